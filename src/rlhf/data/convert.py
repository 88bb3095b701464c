"""Conversion of files in any layout that the stages read to the library's rows.

The stages read those layouts themselves (`rlhf.data.layouts`), so this is for looking at what they
read, and for other programs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.data.layouts.parts import Row, has
from rlhf.data.layouts.reader import Found, LayoutReader, layout_words
from rlhf.data.layouts.table import BY_NAME, ROWS, has_prompt, near_miss
from rlhf.data.row_checker import RowChecker, add_names, in_words, named
from rlhf.data.sources.reading import find_sources, read_records
from rlhf.data.sources.record import MAX_PROBLEMS
from rlhf.data.sources.source import Source, place
from rlhf.errors import InputError
from rlhf.files.text import whole_file

LAYOUT_NAMES = ("auto", *BY_NAME)


@dataclass
class ConvertReport:
    """Summary of a conversion.

    Attributes:
        output: The file that was written.
        layouts: Rows written, by layout.
        rows: Rows written.
        left_out: Rows that are not two answers to the same prompt.
        repeating: Written rows whose answers all begin with the whole prompt.
        unused: Names of the first few non-empty fields that were not used.
    """

    output: str
    layouts: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0
    left_out: int = 0
    repeating: int = 0
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report for people, one fact per line."""
        said = [f"{self.output}: {self.rows} rows from {layout_words(self.layouts)}"]
        if self.left_out:
            said.append(f"left out, not two answers to the same prompt: {self.left_out}")
        if self.repeating:
            said.append(
                f"all answers begin with the whole prompt: {self.repeating} (kept as they are; "
                "remove it if it is not part of the answer)"
            )
        if self.unused:
            said.append(f"fields not used: {named(self.unused)}")
        return said


def convert(
    source_path: str | Sequence[str],
    output_path: str,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> ConvertReport:
    """Convert files in other layouts to the library's rows, all of them or nothing.

    Args:
        source_path: A path, glob, folder, fsspec address, or a list of these.
        output_path: Local path or fsspec address of the file to write; replaced if it exists.
        layout: The layout of all rows, by its name in `rlhf.data.layouts.table`; "auto" recognizes
            it row by row.
        columns: Columns of the files by our names for them.

    Raises:
        InputError: If the layout is unknown, files are missing or rows do not match the layout.
    """
    if layout not in LAYOUT_NAMES:
        raise InputError(f"layout: is {layout!r}, expected one of {', '.join(LAYOUT_NAMES)}")
    sources = find_sources(source_path, "source_path")
    layouts = LayoutReader(columns, None if layout == "auto" else layout)
    report = ConvertReport(output_path, layouts.counts)
    problems: list[str] = []
    count = 0
    with whole_file(output_path, "output_path") as output:
        for found in _found(sources, layouts):
            if problem := found.problem or _problem(found):
                count += 1
                if len(problems) < MAX_PROBLEMS:
                    problems.append(f"{place(sources, found.lines[0])}: {problem}")
            elif found.row is None:
                report.left_out += 1
            else:
                output.write(json.dumps(found.row, ensure_ascii=False).encode() + b"\n")
                report.rows += 1
                report.repeating += _repeats_prompt(found.row)
                if found.layout is ROWS:
                    add_names(report.unused, RowChecker(found.row).unused())
        add_names(report.unused, (*layouts.columns.replaced, *layouts.unused))
        if count > len(problems):
            problems.append(f"… and {count - len(problems)} more problems")
        if not problems and not report.rows:
            problems = [*report.lines()[1:], "source_path: no row can be converted"]
        if problems:
            raise InputError(problems)
    return report


def _found(sources: Sequence[Source], layouts: LayoutReader) -> Iterator[Found]:
    """Yield what the records of all sources give."""
    for line in read_records(sources):
        problem = line.problem
        if not problem and not isinstance(line.value, dict):
            problem = f"is {in_words(line.value)}, expected a JSON object"
        if problem:
            yield from layouts.finish()
            yield Found((line,), ROWS, problem=problem)
        else:
            yield from layouts.feed(line, layouts.columns.apply(line.value))
    yield from layouts.finish()


def _problem(found: Found) -> str:
    """Say why the stages could not read a row, or ""."""
    if found.row is None:
        return ""
    if found.layout is ROWS and not has_prompt(found.row):
        names = named(list(found.row)[:8]) or "none"
        return near_miss(found.row) or (
            f"has the fields {names}, expected those of one of the layouts {', '.join(BY_NAME)}"
        )
    checker = RowChecker(found.row)
    checker.prompt()
    checker.references()
    if checker.has_candidates():
        checker.candidates()
    return "; ".join(checker.problems)


def _repeats_prompt(row: Row) -> bool:
    """Return whether all answers begin with a prompt that is a text."""
    prompt = row.get("input_text", row.get("prompt"))
    names = (("candidate_0", "candidate_1"), ("chosen", "rejected"))
    answers = next(([row[name] for name in both] for both in names if has(row, *both)), None)
    if answers is None:
        answers = row["candidates"] if isinstance(row.get("candidates"), list) else [None]
    return isinstance(prompt, str) and all(
        isinstance(answer, str) and answer.startswith(prompt) for answer in answers
    )
