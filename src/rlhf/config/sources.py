"""The type of all fields that name data sets: paths, rows given from Python, mixtures of these."""

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationError,
)

from rlhf.config.common import LARGEST_WEIGHT, MOST_STEPS, Schema, option
from rlhf.config.describe import TypeWords
from rlhf.config.loading import InnerFieldsError, validation_problems
from rlhf.errors import InputError

_EXPECTED = (
    "a path, address or Hub id, {path, weight, limit}, or a list of these (or, from Python, "
    "a datasets.Dataset or a list of dicts)"
)


class GivenRows:
    """Rows that a Python program gives instead of a path.

    In files they appear as a remark; what they hold is part of a run's identity all the same, as
    a hash of the rows.

    Args:
        rows: A list of dicts, a `datasets.Dataset` or a `datasets.IterableDataset`.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __str__(self) -> str:
        return f"({type(self.rows).__name__} given from Python)"


def _path(value: Any) -> str | GivenRows:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, GivenRows) or (isinstance(value, str) and value):
        return value
    if _is_rows(value):
        return GivenRows(value)
    raise ValueError(f"expected a path, address or Hub id, got {_shown(value)}")


def _plain(value: Any, info: SerializationInfo) -> Any:
    """Return plain data for a field's value; in files, a remark instead of given rows."""
    if isinstance(value, list):
        return [_plain(one, info) for one in value]
    if isinstance(value, SourceEntry):
        return {
            name: _plain(one, info) for name in SourceEntry.model_fields
            if (one := getattr(value, name)) is not None
        }  # fmt: skip
    return str(value) if isinstance(value, GivenRows) and info.mode == "json" else value


class SourceEntry(Schema):
    """One data set of several, with its share of the training rows."""

    path: Annotated[
        str | GivenRows, PlainValidator(_path), PlainSerializer(_plain), TypeWords("text")
    ] = option(..., "Path, address or Hub id.")
    weight: float | None = option(
        None,
        "Its share of the rows of a training epoch, relative to the other weights. As soon as one "
        "data set has a weight, those without have weight 1. Default: each row once an epoch.",
        gt=0,
        le=LARGEST_WEIGHT,
    )
    limit: int | None = option(
        None, "Use only its first rows, at most so many. Default: all.", ge=1, le=MOST_STEPS
    )


def _parse(value: Any) -> Any:
    """Return text, `GivenRows`, or a list of texts, `GivenRows` and `SourceEntry` objects."""
    value = _from_json(value)
    if _is_splits(value):
        raise ValueError(
            f"holds the splits {', '.join(map(str, value))}; give one of them, such as "
            f"data[{next(iter(value), 'train')!r}]"
        )
    if isinstance(value, Mapping | SourceEntry):
        return [_entry(value, 0)]
    if _is_rows(value) or isinstance(value, GivenRows | str | os.PathLike):
        return _path(value)
    if not isinstance(value, list | tuple) or not value:
        hint = "; a table: datasets.Dataset.from_pandas(table)" if _is_table(value) else ""
        raise ValueError(f"expected {_EXPECTED}, got {_shown(value)}{hint}")
    return [_item(item, number) for number, item in enumerate(value)]


def _from_json(value: Any) -> Any:
    """Return what a text of JSON holds, as flags and the parameters of Vertex have it."""
    if not isinstance(value, str) or not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(
            'expected a path, or JSON such as {"path": "rows.jsonl", "weight": 2} or a list of '
            f"these, got {value!r:.200}"
        ) from None


def _item(value: Any, number: int) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        value = _from_json(value)
    if isinstance(value, Mapping | SourceEntry) and not _is_splits(value):
        return _entry(value, number)
    try:
        return _path(value)
    except ValueError as error:
        raise InnerFieldsError(f"{number}: {error}") from None


def _entry(value: Any, number: int) -> SourceEntry:
    if isinstance(value, SourceEntry):
        return value
    try:
        return SourceEntry.model_validate(dict(value))
    except ValidationError as error:
        problems = validation_problems(SourceEntry, error, f"{number}.")
        raise InnerFieldsError("\n".join(problems)) from None


def _is_rows(value: Any) -> bool:
    """Return whether a value is rows rather than names of files."""
    if isinstance(value, list):
        entry = SourceEntry.model_fields.keys()
        return bool(value) and all(
            isinstance(row, Mapping) and "path" not in row and not row.keys() <= entry
            for row in value
        )
    return type(value).__module__.split(".")[0] == "datasets" and not isinstance(value, Mapping)


def _is_splits(value: Any) -> bool:
    return isinstance(value, Mapping) and type(value).__module__.split(".")[0] == "datasets"


def _is_table(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "pandas"


def _shown(value: Any) -> str:
    plain = isinstance(value, str | int | float | list | dict) or value is None
    return f"{value!r:.200}" if plain else f"an object of {type(value).__name__}"


def _refuse_weights(value: Any) -> Any:
    if any(one.weight is not None for one in entries(value)):
        raise ValueError(
            "a weight is for rows to train on, and here every row is read once; leave it out"
        )
    return value


# A data set or several: what every field `dataset` and `*_dataset` is.
Sources = Annotated[
    str | GivenRows | list[str | GivenRows | SourceEntry],
    PlainValidator(_parse),
    PlainSerializer(_plain),
    TypeWords("text or list of text"),
]
# The same where every row is read once, so that weights mean nothing.
UnweightedSources = Annotated[Sources, AfterValidator(_refuse_weights)]


def parse_sources(value: Any, name: str) -> Any:
    """Return what a field of type `Sources` makes of a value.

    Args:
        value: What a user gives.
        name: The field, for messages.

    Raises:
        InputError: It names no data set.
    """
    try:
        return _parse(value)
    except InnerFieldsError as error:
        raise InputError([f"{name}.{line}" for line in str(error).splitlines()]) from None
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def entries(sources: Any) -> list[SourceEntry]:
    """Return each data set that a field names as an entry, plain ones without weight and limit."""
    listed = sources if isinstance(sources, list) else [sources]
    return [
        one if isinstance(one, SourceEntry) else SourceEntry.model_construct(
            path=one, weight=None, limit=None
        )
        for one in listed
    ]  # fmt: skip


def weightless(sources: Any) -> Any:
    """Return what a field names without the weights: where every row is read once."""
    if not isinstance(sources, list):
        return sources
    return [
        one.model_copy(update={"weight": None}) if isinstance(one, SourceEntry) else one
        for one in sources
    ]
