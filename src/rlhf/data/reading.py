"""From JSON Lines to checked and rendered rows on disk.

Nothing here needs a model. However long the input, memory stays bounded: rows go one by one into a
temporary Arrow file, which `datasets` maps back.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rlhf.data.batching import permutation
from rlhf.data.duplicates import PairCounter
from rlhf.data.files import JsonLine, expand_paths, read_json_lines
from rlhf.data.prompts import PromptRenderer
from rlhf.data.rows import (
    PreferenceData,
    PromptData,
    ReadReport,
    RowFile,
    RowWriter,
    preference_schema,
    prompt_schema,
)
from rlhf.data.schema import RowChecker, add_names, describe
from rlhf.errors import InputError

__all__ = [
    "PreferenceData",
    "PromptData",
    "ReadReport",
    "load_preferences",
    "load_prompts",
    "split_holdout",
]

Paths = str | Sequence[str]
OnBadRows = Literal["error", "skip"]
# Turns a checked row into Arrow columns, or None to leave it out; counts what it sees.
Normaliser = Callable[[RowChecker, "ReadReport"], dict[str, Any] | None]

MAX_PROBLEMS = 20


def load_prompts(
    paths: Paths,
    *,
    renderer: PromptRenderer,
    on_bad_rows: OnBadRows = "error",
    require_output: bool = False,
    name: str = "prompt_dataset",
) -> PromptData:
    """Reads prompt rows; preference rows are prompt rows too.

    Args:
        paths: Path, glob, fsspec address, or a list of these.
        renderer: Makes the prompt's text.
        on_bad_rows: Whether a bad row is an error or is left out and counted.
        require_output: Whether each row must have `output_text` (demonstrations).
        name: Name of the configuration field, for messages.

    Raises:
        InputError: For missing files, bad rows (all of them at once), or if no row is left.
    """

    def normalise(checker: RowChecker, report: ReadReport) -> dict[str, Any]:
        columns = prompt_columns(checker, renderer, report)
        columns["references"] = checker.references(require_output)
        report.blank_references += sum(not text.strip() for text in columns["references"])
        return columns

    return PromptData(*read_rows(paths, name, on_bad_rows, normalise, prompt_schema()))


def load_preferences(
    paths: Paths,
    *,
    renderer: PromptRenderer,
    on_bad_rows: OnBadRows = "error",
    candidates_optional: bool = False,
    name: str = "preference_dataset",
) -> PreferenceData:
    """Reads preference rows; pairs of identical candidates are left out and counted.

    Args:
        paths: Path, glob, fsspec address, or a list of these.
        renderer: Makes the prompt's text.
        on_bad_rows: Whether a bad row is an error or is left out and counted.
        candidates_optional: Pass over rows without any candidate field, as an `eval_dataset` may
            have them; the result may then be empty.
        name: Name of the configuration field, for messages.

    Raises:
        InputError: For missing files, bad rows (all of them at once), or if no row is left.
    """
    pairs = PairCounter()

    def normalise(checker: RowChecker, report: ReadReport) -> dict[str, Any] | None:
        if candidates_optional and not checker.has_candidates():
            report.without_candidates += 1
            return None
        pair = checker.candidates()
        columns = prompt_columns(checker, renderer, report)
        if not checker.problems and pair.candidate_0 == pair.candidate_1:
            report.identical += 1
            return None
        report.blank_candidates += (not pair.candidate_0.strip()) + (not pair.candidate_1.strip())
        if not checker.problems:
            pairs.add(columns["text"], pair.candidate_0, pair.candidate_1, pair.choice)
        return columns | {
            "candidate_0": pair.candidate_0,
            "candidate_1": pair.candidate_1,
            "choice": pair.choice,
            "margin": pair.margin,
        }

    schema = preference_schema()
    store, report, fingerprint = read_rows(
        paths, name, on_bad_rows, normalise, schema, may_be_empty=candidates_optional
    )
    report.repeated, report.contradictions = pairs.counts()
    return PreferenceData(store, report, fingerprint)


def split_holdout(
    preferences: PreferenceData, fraction: float = 0.05, limit: int = 1000, *, seed: int = 0
) -> tuple[PreferenceData, PreferenceData]:
    """Holds out pairs for evaluation; all pairs of one prompt stay on the same side.

    Args:
        preferences: All pairs.
        fraction: Share of the pairs to hold out.
        limit: At most so many pairs.
        seed: Chooses the prompts.

    Returns:
        (training pairs, held-out pairs), both in their original order. With a single prompt
        nothing can be held out; otherwise at least one prompt is.
    """
    rows_of: dict[bytes, list[int]] = {}
    for number, row in enumerate(preferences):
        digest = hashlib.sha256(row.prompt.text.encode()).digest()[:16]
        rows_of.setdefault(digest, []).append(number)
    groups = list(rows_of.values())
    wanted = min(limit, max(1, round(fraction * len(preferences))))
    held: set[int] = set()
    for number in permutation(len(groups), seed)[: len(groups) - 1]:
        # A prompt with very many pairs may not fit; it is only taken if nothing else is there.
        if len(held) + len(groups[number]) <= wanted:
            held.update(groups[number])
    if not held and len(groups) > 1 and limit > 0:
        smallest = min(groups, key=len)
        held.update(smallest)
    train = [number for number in range(len(preferences)) if number not in held]
    return preferences.select(train), preferences.select(sorted(held))


def read_rows(
    paths: Paths,
    name: str,
    on_bad_rows: OnBadRows,
    normalise: Normaliser,
    schema: Any,
    may_be_empty: bool = False,
) -> tuple[RowFile, ReadReport, str]:
    """Reads, checks and stores rows; what the `load_` functions have in common.

    Args:
        paths: Path, glob, fsspec address, or a list of these.
        name: Name of the configuration field, for messages.
        on_bad_rows: Whether a bad row is an error or is left out and counted.
        normalise: Makes a row's columns.
        schema: Arrow schema of the columns.
        may_be_empty: Whether passing over all rows is no error.

    Returns:
        What a `RowData` is made of.

    Raises:
        InputError: For missing files, bad rows (all of them at once), or if no row is left.
    """
    files = expand_paths(paths, name)
    report = ReadReport(name, len(files))
    problems = _Problems(files)
    digest = hashlib.sha256()
    folder = tempfile.mkdtemp(prefix="rlhf-data-")
    try:
        with RowWriter(folder, schema) as writer:
            for line in read_json_lines(files):
                columns = _check_line(line, normalise, report, problems)
                if columns is not None:
                    digest.update(json.dumps(columns, sort_keys=True).encode())
                    writer.add(columns | {"file": line.file, "line": line.line})
        report.rows, report.skipped = writer.rows, problems.bad_rows
        problems.raise_if(on_bad_rows, name, report, may_be_empty)
        if on_bad_rows == "skip":
            report.problems = problems.first
        return RowFile(folder, files), report, digest.hexdigest()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_line(
    line: JsonLine,
    normalise: Normaliser,
    report: ReadReport,
    problems: "_Problems",
) -> dict[str, Any] | None:
    """The columns of one line; None for a bad row or one that is left out."""
    if line.problem or not isinstance(line.value, dict):
        problems.add(line, [line.problem or f"is {describe(line.value)}, expected a JSON object"])
        return None
    before = vars(report).copy()
    checker = RowChecker(line.value)
    columns = normalise(checker, report)
    if checker.problems:
        problems.add(line, checker.problems)
        vars(report).update(before)  # a bad row counts as nothing else
        return None
    report.mended += line.mended
    add_names(report.unused, checker.unused())
    return columns


class _Problems:
    """Remembers the first problems and counts the others."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.first: list[str] = []
        self.count = self.bad_rows = 0
        self.fatal: list[str] = []

    def add(self, line: JsonLine, found: Sequence[str]) -> None:
        path = self.files[line.file]
        texts = [
            f"{path}: {one}" if line.whole_file else f"{path}:{line.line}: {one}" for one in found
        ]
        self.bad_rows += not line.whole_file
        self.count += len(texts)
        self.first += texts[: MAX_PROBLEMS - len(self.first)]
        if line.whole_file:
            self.fatal += texts

    def raise_if(
        self, on_bad_rows: OnBadRows, name: str, report: ReadReport, may_be_empty: bool
    ) -> None:
        """Raises InputError for what cannot be let pass."""
        if self.count and on_bad_rows == "error":
            rest = self.count - len(self.first)
            raise InputError([*self.first, *([f"… and {rest} more problems"] if rest else [])])
        if self.fatal:
            raise InputError(self.fatal)
        if not report.rows and not (may_be_empty and report.without_candidates):
            counts = report.lines()[1:]
            raise InputError([*self.first, *counts, f"{name}: no valid row is left"])


def prompt_columns(
    checker: RowChecker, renderer: PromptRenderer, report: ReadReport
) -> dict[str, Any]:
    """The columns of a row's prompt; none of them if it has problems."""
    fields = checker.prompt()
    if checker.problems:
        return {}
    try:
        prompt = renderer.render(fields)
    except ValueError as error:
        checker.problems.append(f"messages: {error}, expected a conversation that it renders")
        return {}
    report.conversations += bool(fields.messages)
    return {
        "text": prompt.text,
        "spans": [end for span in prompt.spans for end in span],
        "reserve": [end for span in prompt.reserve for end in span],
        "input_text": renderer.raw_input(fields),
    }
