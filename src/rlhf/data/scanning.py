"""One pass over data sources, from which every stage takes the rows it needs.

Each record becomes a row of a `RowTable`, together with the problems of its parts: whether it is a
good row depends on what a stage wants (`rlhf.data.selection`). Rows in other layouts become the
library's on the way.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from rlhf.data.faults import Faults
from rlhf.data.layouts.reader import Found, LayoutReader
from rlhf.data.layouts.table import ROWS, has_prompt, near_miss
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_checker import RowChecker, add_names, in_words
from rlhf.data.row_reader import FieldNames, Parts, RowReader
from rlhf.data.row_table import Flag, RowTable, TableWriter
from rlhf.data.schema import ranked_pairs
from rlhf.data.sources.reading import read_records
from rlhf.data.sources.record import Record
from rlhf.data.sources.source import Source, place


class Scan:
    """Result of one pass over data sources.

    Attributes:
        files: Their names.
        entries: The data set that each belongs to.
        table: A row for each record.
        faults: Problems of the bad rows.
        unused: Names of fields that no stage reads.
        fields: Names of all fields; None if there are more than `MOST_FIELDS`.
        layouts: Rows by layout, the most frequent first.
        missing_columns: Columns of the mapping that no row has.
        has_ties: Whether any two candidates of a row are tied.
        token_counts: Token counts of the prompts by tokenizer, cached for the next stage.
        selections: What stages selected, likewise.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        table: RowTable,
        faults: Faults,
        unused: list[str],
        fields: Sequence[str] | None = (),
        layouts: Mapping[str, int] | None = None,
        missing_columns: Sequence[str] = (),
        has_ties: bool = False,
    ) -> None:
        self.files = [source.name for source in sources]
        self.entries = [source.entry for source in sources]
        self.table = table
        self.faults = faults
        self.unused = unused
        self.fields = fields
        self.layouts = dict(layouts or {})
        self.missing_columns = list(missing_columns)
        self.has_ties = has_ties
        self.token_counts: dict[str, Any] = {}
        self.selections: dict[Any, Any] = {}


def scan(
    sources: Sequence[Source],
    renderer: PromptRenderer,
    keep_lines: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Scan:
    """Read data sources once, in bounded memory.

    Args:
        sources: Files and the like.
        renderer: Renders the prompts.
        keep_lines: Whether to keep every row as a line of JSON, too: its own, if it has one.
        columns: Columns of the data by our names for them.
    """
    with TableWriter() as writer:
        scanner = _Scanner(sources, renderer, keep_lines, columns, writer)
        for line in read_records(sources):
            scanner.add(line)
        return scanner.finish()


class _Scanner:
    """What becomes of the records of some sources, one after the other."""

    def __init__(
        self,
        sources: Sequence[Source],
        renderer: PromptRenderer,
        keep_lines: bool,
        columns: Mapping[str, str] | None,
        writer: TableWriter,
    ) -> None:
        self.sources, self.keep_lines, self.writer = sources, keep_lines, writer
        self.faults, self.layouts, self.names = Faults(), LayoutReader(columns), FieldNames()
        # The names of converted rows are not those of the files.
        self.own = RowReader(renderer, None if columns else self.names)
        self.converted = RowReader(renderer)
        self.maps = bool(columns)
        self.slow_rows = 0  # those of the library's layout that took the short way are the others

    def add(self, line: Record) -> None:
        """Add what a record gives."""
        value, layouts = line.value, self.layouts
        if line.problem or not isinstance(value, dict):
            self._add_found(layouts.finish())
            problem = line.problem or f"is {in_words(value)}, expected a JSON object"
            self._add_problem(line, problem, line.whole_file)
            return
        if layouts.first is None and not self.maps:
            parts = self.own.read_plain(value)
            if parts is not None:
                self._add_row(parts, line)
                return
        self.names.note(value)
        self._add_found(layouts.feed(line, layouts.columns.apply(value)))

    def finish(self) -> Scan:
        """Return everything, once all lines are added."""
        self._add_found(self.layouts.finish())
        layouts, unused = self.layouts, self.own.unused
        counts = layouts.counts + Counter({ROWS.name: self.writer.rows - self.slow_rows})
        add_names(unused, (*layouts.columns.replaced, *layouts.unused))
        return Scan(
            self.sources,
            self.writer.finish(),
            self.faults,
            unused,
            self.names.listed(),
            layouts=dict(counts.most_common()),
            missing_columns=layouts.columns.missing(),
            has_ties=self.writer.ties > 0,
        )

    def _add_found(self, several: Iterable[Found]) -> None:
        for found in several:
            line, row = found.lines[0], found.row
            if found.problem:
                self._add_problem(line, found.problem)
                continue
            self.slow_rows += 1
            if row is None:
                flags = Flag.OBJECT | Flag.LEFT_OUT
                self.writer.add(None, "", None, None, None, (line.file, line.line), flags)
            elif found.layout is not ROWS:
                parts = self.converted.read_plain(row) or self.converted.read(row)
                self._add_row(parts, line, found)
            elif not has_prompt(row) and (near := near_miss(row)):
                self.slow_rows -= 1
                self._add_problem(line, near)
            else:
                parts = self.own.read_plain(row) or self.own.read(row)
                self._add_row(parts, line, found)

    def _add_problem(self, line: Record, problem: str, whole_file: bool = False) -> None:
        """Add a line that is no row at all."""
        self.slow_rows += 1
        flags = Flag.BAD_LINE
        if whole_file:
            flags |= Flag.WHOLE_FILE
            self.faults.whole_files.append(f"{place(self.sources, line)}: {problem}")
        elif self.faults.wanted("line", False, False):
            self.faults.add(self.writer.rows, "line", [problem])
        self.writer.add(None, "", None, None, None, (line.file, line.line), flags)

    def _add_row(self, parts: Parts, line: Record, found: Found | None = None) -> None:
        """Add a row of the library.

        Args:
            parts: Its parts.
            line: Its line.
            found: What it was converted from; None for a row as in the file.
        """
        prompt, input_text, pair, references, conversation, has_pair, problems, near = parts
        faults = self.faults
        flags = Flag.OBJECT
        counts = (0, 0, 0)
        if conversation:
            flags |= Flag.CONVERSATION
        if line.mended or (found and found.lines[-1].mended):
            flags |= Flag.MENDED
        if not references:
            flags |= Flag.NO_OUTPUT
            bad_output = problems and "output" in problems
            if not bad_output and faults.wanted("no output", has_pair, False):
                faults.add(self.writer.rows, "no output", _problems_of_no_output(line, found))
        if problems:
            bad_pair = "pair" in problems
            for part, wrong in problems.items():
                flags |= _FLAG_OF_PART[part]
                if faults.wanted(part, has_pair, bad_pair):
                    faults.add(self.writer.rows, part, wrong)
            counts = tuple(  # type: ignore[assignment]
                len(problems.get(part, ())) for part in ("pair", "prompt", "output")
            )
        if has_pair:
            flags |= Flag.HAS_PAIR
        elif not flags & Flag.BAD_PAIR:
            counts = (1 if near or _is_converted(found) else _NO_PAIR_PROBLEMS, *counts[1:])
            if faults.wanted("pair", False, False):
                faults.add(self.writer.rows, "pair", _problems_of_no_pair(line, near, found))
        if pair is not None:
            texts, first = pair.texts, pair.texts[0]
            if texts.count(first) == len(texts):
                flags |= Flag.IDENTICAL
            elif pair.levels and not ranked_pairs(texts, pair.ranking, pair.levels):
                flags |= Flag.TIED
            if input_text and first.startswith(input_text):
                same = all(candidate.startswith(input_text) for candidate in texts)
                flags |= Flag.REPEATS if same else 0
        raw = None
        if self.keep_lines:
            raw = b"\n".join(map(_raw, found.lines)) if found else _raw(line)
        where = (line.file, line.line)
        self.writer.add(prompt, input_text, pair, references, raw, where, flags, counts)


_FLAG_OF_PART = {
    "pair": Flag.BAD_PAIR,
    "prompt": Flag.BAD_PROMPT,
    "render": Flag.BAD_RENDER,
    "output": Flag.BAD_OUTPUT,
}


# `candidate_0`, `candidate_1` and `choice` are missing.
_NO_PAIR_PROBLEMS = 3


def _is_converted(found: Found | None) -> TypeGuard[Found]:
    return found is not None and found.layout is not ROWS


def _raw(line: Record) -> bytes:
    raw = b"" if line.mended else line.raw
    return raw or json.dumps(line.value).encode()


def _problems_of_no_pair(line: Record, near: str, found: Found | None) -> list[str]:
    """Say what a row lacks that has no candidate fields."""
    if _is_converted(found):
        return [f"is of {found.layout.described}, expected two answers to a prompt"]
    if near:
        return [near]
    checker = _checker(line, found)
    checker.candidates()
    return checker.problems


def _problems_of_no_output(line: Record, found: Found | None) -> list[str]:
    if _is_converted(found):
        return [f"is of {found.layout.described}, expected an answer to learn"]
    checker = _checker(line, found)
    checker.references(required=True)
    return checker.problems


def _checker(line: Record, found: Found | None) -> RowChecker:
    """Return the checker of a row as in the file, with its columns mapped."""
    return RowChecker(found.row if found and found.row else line.value)
