"""From JSON Lines to checked, rendered rows that live in an Arrow file on disk.

Nothing here needs a model. However long the input, memory stays bounded: rows go one by one into a
temporary Arrow file, which `datasets` maps back; it is removed with the last object that uses it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

from rlhf.data.batching import permutation
from rlhf.data.files import JsonLine, expand_paths, read_json_lines
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PreferenceRow, PromptRow, PromptText, RowChecker
from rlhf.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

RowT = TypeVar("RowT", PromptRow, PreferenceRow)
Paths = str | Sequence[str]
OnBadRows = Literal["error", "skip"]
# Turns a checked row into Arrow columns, or None to leave it out; counts what it sees.
Normaliser = Callable[[RowChecker, "ReadReport"], dict[str, Any] | None]

MAX_PROBLEMS = 20
_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 8 * 2**20


@dataclass
class ReadReport:
    """What reading a data set came upon.

    Attributes:
        name: Name of the configuration field.
        files: Number of files.
        rows: Rows that are kept.
        skipped: Bad rows that were left out (`on_bad_rows: skip`).
        identical: Pairs left out because both candidates are the same text.
        blank_candidates: Candidates without text; they are kept.
        blank_references: Texts of `output_text` without text; they are kept.
        without_candidates: Rows passed over because they are not preferences.
        mended: Rows with half characters, which were replaced.
        conversations: Kept rows that have `messages`.
        problems: The first problems of skipped rows.
    """

    name: str
    files: int = 0
    rows: int = 0
    skipped: int = 0
    identical: int = 0
    blank_candidates: int = 0
    blank_references: int = 0
    without_candidates: int = 0
    mended: int = 0
    conversations: int = 0
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        facts = (
            (self.conversations, "of them conversations"),
            (self.skipped, "bad rows left out"),
            (self.identical, "pairs with identical candidates left out (they carry no signal)"),
            (self.blank_candidates, "blank candidates kept"),
            (self.blank_references, "blank output_text kept"),
            (self.without_candidates, "rows without candidates passed over"),
            (self.mended, "rows with half characters (lone surrogates) mended"),
        )
        said = [f"{self.name}: {self.rows} rows from {self.files} file{_s(self.files)}"]
        said += [f"{self.name}: {what}: {count}" for count, what in facts if count]
        return said + [f"  left out: {problem}" for problem in self.problems]


class _Store:
    """A finished Arrow file and the means to remove it."""

    def __init__(self, folder: str, files: Sequence[str]) -> None:
        from datasets import Dataset

        self.files = list(files)
        self.dataset: Dataset = Dataset.from_file(str(Path(folder) / "rows.arrow"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


class RowData(Sequence[RowT], Generic[RowT]):
    """Rows on disk, read when asked for.

    Attributes:
        report: What reading came upon.
        fingerprint: Hash of the rows' contents and order.
    """

    def __init__(
        self,
        store: _Store,
        report: ReadReport,
        fingerprint: str,
        index: Sequence[int] | None = None,
    ) -> None:
        self.report = report
        self.fingerprint = fingerprint
        self._store = store
        self._index = index

    def __len__(self) -> int:
        return self._store.dataset.num_rows if self._index is None else len(self._index)

    @overload
    def __getitem__(self, place: int) -> RowT: ...
    @overload
    def __getitem__(self, place: slice) -> list[RowT]: ...
    def __getitem__(self, place: int | slice) -> RowT | list[RowT]:
        """One row, or a list of rows for a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        stored = number if self._index is None else self._index[number]
        return self._row(self._store.dataset[stored], number)

    def __iter__(self) -> Iterator[RowT]:
        if self._index is not None:
            yield from (self[number] for number in range(len(self)))
            return
        number = 0
        for batch in self._store.dataset.iter(batch_size=256):
            for values in zip(*batch.values(), strict=True):
                yield self._row(dict(zip(batch, values, strict=True)), number)
                number += 1

    def select(self, rows: Sequence[int]) -> Self:
        """The given rows in the given order, on the same file."""
        index = list(rows) if self._index is None else [self._index[row] for row in rows]
        digest = hashlib.sha256(f"{self.fingerprint} {list(rows)}".encode()).hexdigest()
        return type(self)(self._store, self.report, digest, index)

    def _source(self, columns: dict[str, Any]) -> str:
        return f"{self._store.files[columns['file']]}:{columns['line']}"

    def _row(self, columns: dict[str, Any], number: int) -> RowT:
        raise NotImplementedError


class PromptData(RowData[PromptRow]):
    """Prompts, with references where the rows have them."""

    def _row(self, columns: dict[str, Any], number: int) -> PromptRow:
        return PromptRow(
            prompt=_prompt(columns),
            input_text=columns["input_text"],
            references=list(columns["references"]),
            source=self._source(columns),
            row=number,
        )


class PreferenceData(RowData[PreferenceRow]):
    """Preference pairs."""

    def _row(self, columns: dict[str, Any], number: int) -> PreferenceRow:
        return PreferenceRow(
            prompt=_prompt(columns),
            candidate_0=columns["candidate_0"],
            candidate_1=columns["candidate_1"],
            choice=columns["choice"],
            margin=columns["margin"],
            source=self._source(columns),
            row=number,
        )


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
        columns = _prompt_columns(checker, renderer, report)
        columns["references"] = checker.references(require_output)
        report.blank_references += sum(not text.strip() for text in columns["references"])
        return columns

    return PromptData(*_load(paths, name, on_bad_rows, normalise, _prompt_schema()))


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

    def normalise(checker: RowChecker, report: ReadReport) -> dict[str, Any] | None:
        if candidates_optional and not checker.has_candidates():
            report.without_candidates += 1
            return None
        pair = checker.candidates()
        columns = _prompt_columns(checker, renderer, report)
        if not checker.problems and pair.candidate_0 == pair.candidate_1:
            report.identical += 1
            return None
        report.blank_candidates += (not pair.candidate_0.strip()) + (not pair.candidate_1.strip())
        return columns | {
            "candidate_0": pair.candidate_0,
            "candidate_1": pair.candidate_1,
            "choice": pair.choice,
            "margin": pair.margin,
        }

    schema = _preference_schema()
    return PreferenceData(
        *_load(paths, name, on_bad_rows, normalise, schema, may_be_empty=candidates_optional)
    )


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
        held.update(min(groups, key=len))
    train = [number for number in range(len(preferences)) if number not in held]
    return preferences.select(train), preferences.select(sorted(held))


def _load(
    paths: Paths,
    name: str,
    on_bad_rows: OnBadRows,
    normalise: Normaliser,
    schema: Any,
    may_be_empty: bool = False,
) -> tuple[_Store, ReadReport, str]:
    files = expand_paths(paths, name)
    report = ReadReport(name, len(files))
    problems = _Problems(files)
    digest = hashlib.sha256()
    folder = tempfile.mkdtemp(prefix="rlhf-data-")
    try:
        with _Writer(Path(folder) / "rows.arrow", schema) as writer:
            for line in read_json_lines(files):
                columns = _check_line(line, normalise, report, problems, on_bad_rows)
                if columns is not None:
                    digest.update(json.dumps(columns, sort_keys=True).encode())
                    writer.add(columns | {"file": line.file, "line": line.line})
        report.rows, report.skipped = writer.rows, problems.bad_rows
        problems.raise_if(on_bad_rows, name, report, may_be_empty)
        if on_bad_rows == "skip":
            report.problems = problems.first
        return _Store(folder, files), report, digest.hexdigest()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_line(
    line: JsonLine,
    normalise: Normaliser,
    report: ReadReport,
    problems: "_Problems",
    on_bad_rows: OnBadRows,
) -> dict[str, Any] | None:
    """The columns of one line; None for a bad row or one that is left out."""
    if line.problem or not isinstance(line.value, dict):
        kind = "a list" if isinstance(line.value, list) else "a single value"
        problems.add(line, [line.problem or f"is {kind}, expected a JSON object"])
        return None
    before = vars(report).copy()
    checker = RowChecker(line.value)
    columns = normalise(checker, report)
    if checker.problems:
        problems.add(line, checker.problems)
        vars(report).update(before)  # a bad row counts as nothing else
        return None
    report.mended += line.mended
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
        texts = [f"{path}: {one}" if line.whole_file else f"{path}:{line.line}: {one}"
                 for one in found]
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


class _Writer:
    """Writes rows into an Arrow stream file, batch by batch."""

    def __init__(self, path: Path, schema: Any) -> None:
        import pyarrow as pa

        self.rows = 0
        self._schema = schema
        self._pending: list[dict[str, Any]] = []
        self._characters = 0
        self._writer = pa.ipc.new_stream(os.fspath(path), schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and (self._pending or not self.rows):
            self._flush()
        self._writer.close()

    def add(self, columns: dict[str, Any]) -> None:
        self.rows += 1
        self._pending.append(columns)
        self._characters += sum(len(v) for v in columns.values() if isinstance(v, str))
        if len(self._pending) >= _BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, self._schema))
        self._pending, self._characters = [], 0


def _prompt_columns(
    checker: RowChecker, renderer: PromptRenderer, report: ReadReport
) -> dict[str, Any]:
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


def _prompt(columns: dict[str, Any]) -> PromptText:
    spans, reserve = (
        tuple(zip(ends[::2], ends[1::2], strict=True))
        for ends in (columns["spans"], columns["reserve"])
    )
    return PromptText(columns["text"], spans, reserve)


def _base_schema() -> Any:
    import pyarrow as pa

    fields = {"text": pa.string(), "spans": pa.list_(pa.int64()), "reserve": pa.list_(pa.int64())}
    return pa.schema(fields | {"input_text": pa.string(), "file": pa.int32(), "line": pa.int64()})


def _prompt_schema() -> Any:
    import pyarrow as pa

    return _base_schema().append(pa.field("references", pa.list_(pa.string())))


def _preference_schema() -> Any:
    import pyarrow as pa

    types = {"candidate_0": pa.string(), "candidate_1": pa.string(), "choice": pa.int8(),
             "margin": pa.float64()}
    schema = _base_schema()
    for column, kind in types.items():
        schema = schema.append(pa.field(column, kind))
    return schema


def _s(count: int) -> str:
    return "" if count == 1 else "s"
