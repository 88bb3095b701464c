"""Rows that a Python program gives: a list of dicts, or an object of `datasets`."""

from collections.abc import Iterator
from typing import Any

from rlhf.data.sources.record import BrokenSourceError, Record, mend
from rlhf.data.sources.source import Source
from rlhf.data.sources.tables import json_value, read_batches

_ROWS = 64


class GivenSource(Source):
    """Rows from memory, or from wherever an object of `datasets` takes them.

    Args:
        rows: A list of dicts, a `datasets.Dataset` or a `datasets.IterableDataset`.
        name: What messages call it.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.name = name
        self._rows = rows

    def records(self, number: int) -> Iterator[Record]:
        """Yield every row; see `Source`."""
        if isinstance(self._rows, list):
            yield from self._of_list(number)
        elif hasattr(self._rows, "cache_files"):  # a Dataset: columns in Arrow
            tables = self._rows.with_format("arrow").iter(batch_size=_ROWS)
            yield from read_batches((b for table in tables for b in table.to_batches()), number)
        else:
            yield from self._of_stream(number)

    def stamp(self) -> tuple[object, ...]:
        """Return a value that is the same for the same object alone."""
        return (_Same(self._rows),)

    def _of_list(self, number: int) -> Iterator[Record]:
        for row, given in enumerate(self._rows, start=1):
            try:
                value = json_value(given)
            except RecursionError:
                problem = "is nested too deeply, expected a flat object"
                yield Record(number, row, problem=problem)
                continue
            mended = mend(value)
            yield Record(number, row, mended, mended=mended != value)

    def _of_stream(self, number: int) -> Iterator[Record]:
        row = 0
        try:
            for row, given in enumerate(self._rows, start=1):
                value = {name: item for name, item in given.items() if item is not None}
                yield Record(number, row, json_value(value))
        except Exception as error:  # whatever the user's code, or the Hub, raises
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BrokenSourceError(f"raised {what:.300}", row + 1) from error


class _Same:
    """Equal only to itself made of the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
