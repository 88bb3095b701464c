"""Reading and writing configurations: YAML, dotted overrides, errors that name the nearest field.

Generic over pydantic models; the schema itself is in `common.py` and `stages.py`.
"""

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhf.config.describe import leaf_fields, model_inside, nearest, type_name
from rlhf.errors import InputError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class InnerFieldsError(ValueError):
    """Several problems inside one field's value, each line beginning with a name inside it."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: A local file; an empty file is an empty mapping.

    Raises:
        InputError: The file cannot be read, is not YAML, or is not a mapping of names to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text: {error.reason}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(_yaml_problem(path, error)) from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply to be a configuration") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(
            f"{path}: expected a mapping of field names to values, such as `batch_size: 64`"
        )
    return data


def _yaml_problem(path: str, error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark is not None else path
    return f"{where}: is not valid YAML: {problem}"


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
        field = model.model_fields.get(str(part))
        model = model_inside(field.annotation) if field is not None else None
    return ".".join(parts)


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
        return str(detail["ctx"]["error"])
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
        if field is not None and (inner := model_inside(field.annotation)) is not None:
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
        required: Fields that may be left out in Python but not here.

    Raises:
        InputError: All problems of the file and the overrides at once.
    """
    data = merged(read_yaml(path) if path is not None else {}, nested(overrides))
    problems = [
        f"{name}: is required, but not given" for name in required if data.get(name) is None
    ]
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
