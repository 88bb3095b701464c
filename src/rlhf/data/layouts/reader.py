"""From lines of files in any layout to library rows, one after the other."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rlhf.data.layouts.columns import Columns
from rlhf.data.layouts.parts import Row, unused_paths
from rlhf.data.layouts.scores import of_attributes, same_prompt
from rlhf.data.layouts.table import BY_NAME, ROWS, Layout, layout_of, possible
from rlhf.data.layouts.turns import NoPreferenceError, RowError
from rlhf.data.row_checker import MOST_KEYS, add_names
from rlhf.data.sources.record import Record

_MOST_SHAPES = 1000


class Found(NamedTuple):
    """What one line, or two that belong together, give.

    Attributes:
        lines: The lines.
        layout: Their layout.
        row: A row of the library; None if it states no preference, or there is a problem.
        problem: What is wrong, or "".
    """

    lines: tuple[Record, ...]
    layout: Layout
    row: Row | None = None
    problem: str = ""


class LayoutReader:
    """Reader of rows in any mixture of layouts.

    Args:
        columns: Names of our fields, each with the column to read it from.
        only: Name of the layout of all rows; None to recognize it row by row.

    Attributes:
        columns: The mapping of columns.
        counts: Rows by the name of their layout.
        unused: Names of values that no conversion used.
        first: The record that waits for the next one, with which it makes a row; None if none does.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, only: str | None = None) -> None:
        self.columns = Columns(columns or {})
        self.counts: Counter[str] = Counter()
        self.unused: list[str] = []
        self._only = None if only is None else BY_NAME[only]
        self._possible: dict[tuple[str, ...], tuple[Layout, ...]] = {}
        self.first: Record | None = None
        self._first_row: Row = {}

    def layout_of(self, row: Row) -> Layout:
        """Return the layout of a row."""
        if self._only is not None:
            return next((one for one in self._only if one.matches(row)), self._only[-1])
        keys = tuple(row)
        among = self._possible.get(keys)
        if among is None:
            among = possible(keys)
            if len(keys) <= MOST_KEYS and sum(map(len, keys)) <= MOST_KEYS * 64:
                if len(self._possible) >= _MOST_SHAPES:
                    self._possible.clear()
                self._possible[keys] = among
        return layout_of(row, among)

    def feed(self, line: Record, row: Row) -> Iterator[Found]:
        """Yield what a line gives, after what waited for it.

        Args:
            line: A line with a JSON object.
            row: The object, with its columns mapped.
        """
        layout = self.layout_of(row)
        problem = ""
        if layout.joins:
            try:
                of_attributes(row)
            except RowError as error:
                problem = str(error)
        first = self.first
        if first and layout.joins and not problem and self._belongs(line, row):
            self.first = None
            yield self._convert((first, line), layout, (self._first_row, row))
            return
        yield from self.finish()
        if problem:
            yield Found((line,), layout, problem=problem)
        elif layout.joins:
            self.first, self._first_row = line, row
        else:
            yield self._convert((line,), layout, (row,))

    def finish(self) -> Iterator[Found]:
        """Yield the row that waits, if there is one: it states no preference alone."""
        if self.first is not None:
            line, self.first = self.first, None
            yield Found((line,), self.layout_of(self._first_row))

    def single(self, row: Row) -> Row:
        """Return the library's row of a row alone.

        A row that only makes a pair with another one stays as it is.

        Raises:
            RowError: The row does not match its layout, or states no preference.
        """
        layout = self.layout_of(row)
        if layout.joins or layout is ROWS:
            return row
        found = self._convert((), layout, (row,))
        if found.row is None:
            raise RowError(found.problem or "is not two answers to the same prompt")
        return found.row

    def _belongs(self, line: Record, row: Row) -> bool:
        """Return whether a row makes a pair with the one that waits."""
        assert self.first is not None
        return line.file == self.first.file and same_prompt(self._first_row, row)

    def _convert(self, lines: tuple[Record, ...], layout: Layout, rows: Sequence[Row]) -> Found:
        try:
            written, used = layout.convert(*rows)
        except NoPreferenceError:
            return Found(lines, layout)
        except RowError as error:
            return Found(lines, layout, problem=str(error))
        self.counts[layout.name] += 1
        if layout is not ROWS:  # whose reader knows what it uses
            for row in rows:
                add_names(self.unused, unused_paths(row, used))
        return Found(lines, layout, written)


def plain_keys(keys: Iterable[str]) -> bool:
    """Return whether rows with these keys need no conversion if all their fields are texts."""
    known = frozenset(keys)
    return all(layout.plain(known) for layout in possible(known))


def layout_words(counts: Mapping[str, int]) -> str:
    """Say how many rows are of which layout; one layout is described."""
    if len(counts) == 1:
        (name,) = counts
        return BY_NAME[name][0].described
    shown = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"layouts {shown}"
