"""Reading and writing configurations: YAML, dotted overrides, errors that name the nearest field.

Generic over pydantic models; the schema itself is in `common.py` and `stages.py`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhf.config.describe import item_model, leaf_fields, model_inside, nearest, type_name
from rlhf.errors import InputError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class InnerFieldsError(ValueError):
    """Several problems inside one field's value, each line beginning with a name inside it."""


# More than any configuration needs, and read in a second.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS, _MOST_DIGITS = 2**18, 10_000, 20, 400
_TAG = "tag:yaml.org,2002:"


class _PlainLoader(yaml.SafeLoader):
    """Finds the nodes of a document and refuses what only makes sense to other programs: tags."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.levels += 1
        if self.levels > _MOST_LEVELS:
            raise _problem_at(event, f"it is nested more than {_MOST_LEVELS} levels deep")
        if getattr(event, "tag", None) is not None:
            raise _problem_at(event, f"the tag {event.tag!r} is not read; give a plain value")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


class _Builder:
    """Makes plain values of nodes; what aliases repeat counts as often as it is repeated."""

    def __init__(self) -> None:
        self.values = 0

    def value(self, node: yaml.Node, levels: int = 0) -> Any:
        """Return text, number, true or false, None, list or dict."""
        self.values += 1
        if self.values > _MOST_VALUES:
            raise _problem_at(node, f"it has more than {_MOST_VALUES} values, aliases repeated")
        if levels > _MOST_LEVELS:
            raise _problem_at(node, "an alias stands inside what it repeats")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, levels + 1) for item in node.value]
        return self._mapping(cast(yaml.MappingNode, node), levels + 1)

    def _mapping(self, node: yaml.MappingNode, levels: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged_in: dict[str, Any] = {}
        for key, item in node.value:
            value = self.value(item, levels)
            if getattr(key, "tag", None) == f"{_TAG}merge":
                parts = value if isinstance(value, list) else [value]
                if merged_in or not all(isinstance(part, dict) for part in parts):
                    raise _problem_at(key, "expected one `<<`, with a mapping or a list of them")
                for part in reversed(parts):
                    merged_in |= part
                continue
            name = _scalar(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str) or not name:
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise _problem_at(
                    key, f"expected a mapping of names to values, got the key {shown!r:.100}"
                )
            if name in own:
                raise _problem_at(key, f"the key {name!r:.100} is given twice")
            own[name] = value
        return merged_in | own


def _scalar(node: yaml.ScalarNode) -> Any:
    """Return a number only for what everybody reads as one: `on`, 010, 1:30, 2024-01-01 are text.

    The schema turns text into what a field needs, as it does with flags.
    """
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if node.style is None:
        if kind == "null":
            return None
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text):
            if len(text) > _MOST_DIGITS:
                raise _problem_at(node, f"a number of {len(text)} digits; expected a smaller one")
            return int(text)
        if kind == "float" and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", text.lower()):
            return float(text)
        if kind == "float" and text.lower().endswith((".inf", ".nan")):
            return float(text.replace(".", ""))
    if (bad := unreadable_character(text)) is not None:
        raise _problem_at(node, f"a text holds {bad}")
    return text


def _problem_at(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: A local file; an empty file is an empty mapping.

    Raises:
        InputError: The file cannot be read, is not plain YAML, or is not a mapping of names to
            values.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}") from None
    return parse_yaml(content, path)


def parse_yaml(content: bytes, where: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds, hence also a JSON text.

    A plain subset: no tags, no dates, no binary data, numbers in decimal, and what is more than a
    configuration can need (size, depth, what aliases unfold to) is refused.

    Args:
        content: The text, UTF-8.
        where: File or address, for messages.

    Raises:
        InputError: It is something else; `WHERE:LINE: …`.
    """
    if len(content) > _MOST_BYTES:
        raise InputError(f"{where}: is larger than {_MOST_BYTES // 1024} KiB; no configuration is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{where}:{line}: is not UTF-8 text: {error.reason}") from None
    loader = None
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        data = None if node is None else _Builder().value(node)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise InputError(
            f"{where}:{line}: is not valid YAML: the character U+{error.character:04X} is not "
            "allowed"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of escapes and directives too
        line = loader.line if loader is not None else 0
        raise InputError(_yaml_problem(where, error, line)) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"{where}:1: expected a mapping of field names to values, such as `batch_size: 64`"
        )
    return data


def _yaml_problem(where: str, error: Exception, line: int) -> str:
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    line = mark.line if mark is not None else line
    return f"{where}:{line + 1}: is not valid YAML: {problem:.300}"


def unreadable_character(text: str) -> str | None:
    """Name a character that no file name, file or terminal can take, if the text has one."""
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "half a character (a lone surrogate), or a byte that is not UTF-8"
    return None


# Fields of which a configuration may hold one: what is laid over replaces the other below.
_INSTEAD_OF = {
    "train_steps": "num_epochs",
    "num_epochs": "train_steps",
    "learning_rate": "learning_rate_multiplier",
    "learning_rate_multiplier": "learning_rate",
    "missing_eos_penalty": "missing_eos_score",
    "missing_eos_score": "missing_eos_penalty",
}


def merged(
    base: Mapping[str, Any], update: Mapping[str, Any], *, exclusive: bool = True
) -> dict[str, Any]:
    """Lay `update` over `base`; mappings inside are merged, everything else is replaced.

    Args:
        base: What lies below.
        update: What wins.
        exclusive: Of two fields that exclude each other keep only the one in `update`:
            `--train_steps` over a file with `num_epochs`.
    """
    result = dict(base)
    for name, value in update.items():
        other = _INSTEAD_OF.get(name) if exclusive else None
        if other is not None and value is not None and other not in update:
            result.pop(other, None)
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value, exclusive=exclusive)
        result[name] = value
    return result


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings: `{"lora.rank": 8}` to `{"lora": {"rank": 8}}`."""
    result: dict[str, Any] = {}
    for name, value in overrides.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        result = merged(result, value, exclusive=False)
    return result


def validation_problems(
    cls: type[BaseModel], error: ValidationError, prefix: str = ""
) -> list[str]:
    """Say in plain words what pydantic found, one line a field.

    Args:
        cls: The schema that was validated.
        error: What validation raised.
        prefix: Put before every field name, such as `ppo.`.
    """
    messages: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        name = _dotted(cls, detail["loc"])
        if not name:  # a check over several fields names them itself, one line each
            text = str(detail.get("ctx", {}).get("error", detail["msg"]))
            for line in text.splitlines():
                messages.setdefault(prefix + line, [])
            continue
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InnerFieldsError):
            messages.update({f"{prefix}{name}.{line}": [] for line in str(cause).splitlines()})
            continue
        found = messages.setdefault(prefix + name, [])
        message = _message(cls, detail)
        if message not in found:
            found.append(message)
    return [f"{name}: {' or '.join(found)}" if found else name for name, found in messages.items()]


def _dotted(cls: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Keep the part of pydantic's location that a user wrote: no names of union members."""
    parts: list[str] = []
    model: type[BaseModel] | None = cls
    for part in location:
        if model is None:
            if isinstance(part, int):
                parts.append(str(part))
            continue
        parts.append(str(part))
        if isinstance(part, int):  # an item of a list of models
            continue
        field = model.model_fields.get(str(part))
        model = _model_of(field) if field is not None else None
    return ".".join(parts)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model whose fields a field's value, or each item of it, has."""
    return model_inside(field.annotation) or item_model(field.annotation)


def _message(cls: type[BaseModel], detail: Any) -> str:
    kind, location = detail["type"], detail["loc"]
    model, field = _field_at(cls, location)
    if kind == "extra_forbidden":
        return "unknown field" + nearest(str(location[-1]), _spellings(cls, model, location))
    if kind == "missing":
        return "is required, but not given"
    if kind == "model_type":
        return f"expected a mapping of fields, got {detail['input']!r:.200}"
    if kind == "value_error":
        return f"{detail['ctx']['error']!s:.500}"
    if field is not None and kind.endswith(("_type", "_parsing", "_from_float", "literal_error")):
        return f"expected {type_name(field)}, got {detail['input']!r:.200}"
    number = f"expected {type_name(field)}" if field is not None else "expected a value"
    message = detail["msg"].replace("Input should be", number)
    return f"{message}, got {detail['input']!r:.200}"


def _field_at(
    cls: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None]:
    """Return the innermost model that a location is in, and its field there if there is one."""
    model, field = cls, None
    for part in location:
        field = model.model_fields.get(str(part), field)
        if field is not None and (inner := _model_of(field)) is not None:
            model = inner
    return model, field


def _spellings(
    cls: type[BaseModel], model: type[BaseModel], location: tuple[int | str, ...]
) -> list[str]:
    """List the names that may have been meant: at this level first, dotted ones at the top."""
    if len(location) > 1:
        return list(model.model_fields)
    return [*cls.model_fields, *(name for name, _ in leaf_fields(cls))]


def load(
    cls: type[ConfigT],
    path: str | None,
    overrides: Mapping[str, Any],
    required: Iterable[str] = (),
) -> ConfigT:
    """Read a configuration from a YAML file and lay overrides over it.

    Args:
        cls: The schema.
        path: A YAML file, or None for the overrides alone.
        overrides: Dotted field name to value; text is converted as in YAML.
        required: Fields that may be left out in Python but not here; `a|b` for one of the two.

    Raises:
        InputError: All problems of the file and the overrides at once.
    """
    data = merged(read_yaml(path) if path is not None else {}, nested(overrides))
    problems = []
    for name in required:
        first, *others = name.split("|")
        if all(data.get(part) in (None, []) for part in (first, *others)):
            instead = f" (or {', '.join(others)})" if others else ""
            problems.append(f"{first}: is required, but not given{instead}")
    try:
        config = cls.model_validate(data)
    except ValidationError as error:
        raise InputError(problems + validation_problems(cls, error)) from None
    if problems:
        raise InputError(problems)
    return config


def to_yaml(data: Mapping[str, Any]) -> str:
    """Write plain data as YAML, in the schema's order."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)
