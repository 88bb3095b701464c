"""What a schema says about itself: its fields, their types in words, the name most like another."""

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.errors import closest

_WORDS = {str: "text", int: "integer", float: "number", bool: "true | false"}


@dataclass(frozen=True)
class TypeWords:
    """What a type is called, as part of its `Annotated`.

    Attributes:
        words: Such as "text or list of text".
    """

    words: str


def model_inside(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model that a field's annotation holds, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (model := model_inside(argument)) is not None:
                return model
    return None


def item_model(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model of which a field's annotation holds a list, if any."""
    if typing.get_origin(annotation) is not list:
        return None
    return model_inside(typing.get_args(annotation)[0])


def leaf_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) for every field of a schema, nested models opened."""
    for name, field in cls.model_fields.items():
        inner = model_inside(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from leaf_fields(inner, f"{prefix}{name}.")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint that names the valid name most like `name`, or an empty string."""
    by_plain = {candidate.replace("-", "_"): candidate for candidate in valid}
    close = closest(name.replace("-", "_"), by_plain, cutoff=0.5)
    return f"; did you mean `{by_plain[close]}`?" if close else ""


def type_name(field: FieldInfo) -> str:
    """Return a field's type in words a user knows, such as `integer` or `auto | float32`."""
    own = next((part for part in field.metadata if isinstance(part, TypeWords)), None)
    return own.words if own is not None else _type_words(field.annotation)


def may_be_none(field: FieldInfo) -> bool:
    """Whether None is a value of the field."""
    return type(None) in typing.get_args(field.annotation)


def takes_list(field: FieldInfo) -> bool:
    """Whether a list is a value of the field."""
    return "list" in type_name(field)


def takes_mapping(field: FieldInfo) -> bool:
    """Whether a mapping of the user's own names is the value of the field."""
    return typing.get_origin(field.annotation) is dict


def _type_words(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    if model_inside(annotation) is annotation:
        return "mapping"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        own = next((part for part in arguments if isinstance(part, TypeWords)), None)
        return own.words if own is not None else _type_words(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin in (typing.Union, types.UnionType):
        members = [_type_words(part) for part in arguments if part is not type(None)]
        return " or ".join(members)
    return str(getattr(annotation, "__name__", annotation))
