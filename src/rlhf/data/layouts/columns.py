"""Columns by other names, given by hand (`columns`): read before layouts are recognized."""

from collections.abc import Mapping
from typing import Any

from rlhf.config.columns import EXAMPLE, column_problems
from rlhf.data.row_checker import add_names, holds_something
from rlhf.errors import InputError

Row = dict[str, Any]


class Columns:
    """A mapping of our fields to the columns that they are read from.

    Args:
        mapping: By field, a column, or a path of keys joined by dots. A column whose name has a
            dot is found by its whole name first.

    Raises:
        InputError: A field is unknown, or what is given is no name of a column.

    Attributes:
        mapping: The same.
        found: The paths that some row has had.
        replaced: Names of fields whose own values had to make way.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        if not isinstance(mapping, Mapping):
            raise InputError(f"columns: expected a mapping such as {EXAMPLE}, got {mapping!r:.200}")
        if problems := column_problems(mapping):
            raise InputError([f"columns.{problem}" for problem in problems])
        self.mapping = dict(mapping)
        self.found: set[str] = set()
        self.replaced: list[str] = []

    def missing(self) -> list[str]:
        """Return the paths that no row has had."""
        return [path for path in self.mapping.values() if path not in self.found]

    def apply(self, row: Row) -> Row:
        """Return a row with the mapped values under our names; the others keep theirs.

        A column that is not there leaves its field as it is.
        """
        values = {}
        rest = row
        for name, path in self.mapping.items():
            keys = [path] if path in row else path.split(".")
            value: Any = row
            for key in keys:
                value = value.get(key, _NOTHING) if isinstance(value, dict) else _NOTHING
            if value is not _NOTHING:
                self.found.add(path)
                values[name] = value
                rest = _without(rest, keys)
        add_names(self.replaced, (name for name in values if holds_something(rest.get(name))))
        return rest | values


_NOTHING = object()


def _without(row: Row, keys: list[str]) -> Row:
    """Return an object without the value at a path, nor the objects that it leaves empty."""
    key, *more = keys
    if key not in row:  # two fields are read from one column
        return row
    rest = {name: value for name, value in row.items() if name != key}
    inner = _without(row[key], more) if more and isinstance(row[key], dict) else {}
    return rest | {key: inner} if inner else rest
