"""Rows in an Arrow file on disk, written one by one and read when asked for.

The file is temporary: it goes with the last object that uses it, or with the process.
"""

import hashlib
import os
import shutil
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

from rlhf.data.schema import PreferenceRow, PromptRow, PromptText, named

RowT = TypeVar("RowT", PromptRow, PreferenceRow)

_FILE = "rows.arrow"
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
        repeated: Kept pairs that say what an earlier one says.
        contradictions: Pairs of a prompt and two candidates that are kept with either choice.
        unused: Names of fields that hold something and that no stage reads; the first ones.
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
    repeated: int = 0
    contradictions: int = 0
    unused: list[str] = field(default_factory=list)
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
            (self.repeated, "pairs that an earlier row has too, with the same choice"),
            (self.contradictions, "contradicting pairs (same candidates, either choice)"),
        )
        said = [f"{self.name}: {self.rows} rows from {self.files} file{_s(self.files)}"]
        said += [f"{self.name}: {what}: {count}" for count, what in facts if count]
        if self.unused:
            said.append(f"{self.name}: fields not used: {named(self.unused)}")
        return said + [f"  left out: {problem}" for problem in self.problems]


class RowFile:
    """A finished row file; removes its folder when nobody uses it any more.

    Attributes:
        files: The files that were read, for `FILE:LINE`.
        dataset: The rows as `datasets` maps them.
    """

    def __init__(self, folder: str, files: Sequence[str]) -> None:
        from datasets import Dataset

        self.files = list(files)
        self.dataset = Dataset.from_file(str(Path(folder) / _FILE))
        # A mapped file needs no name, and without one a killed process leaves nothing behind. Where
        # open files cannot be removed (Windows), the second attempt succeeds.
        shutil.rmtree(folder, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


class RowData(Sequence[RowT], Generic[RowT]):
    """Rows on disk, read when asked for.

    Attributes:
        report: What reading came upon.
        fingerprint: Hash of the rows' contents and order.
    """

    def __init__(
        self,
        store: RowFile,
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

    @abstractmethod
    def _row(self, columns: dict[str, Any], number: int) -> RowT:
        """Row `number` from its columns in the store."""


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


class RowWriter:
    """Writes a row file into a folder, batch by batch.

    Attributes:
        rows: Rows added so far.
    """

    def __init__(self, folder: str, schema: Any) -> None:
        import pyarrow as pa

        self.rows = 0
        self._schema = schema
        self._pending: list[dict[str, Any]] = []
        self._characters = 0
        self._writer = pa.ipc.new_stream(os.path.join(folder, _FILE), schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and (self._pending or not self.rows):
            self._flush()
        self._writer.close()

    def add(self, columns: dict[str, Any]) -> None:
        """Appends one row."""
        self.rows += 1
        self._pending.append(columns)
        self._characters += sum(len(v) for v in columns.values() if isinstance(v, str))
        if len(self._pending) >= _BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, self._schema))
        self._pending, self._characters = [], 0


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


def prompt_schema() -> Any:
    """Arrow schema of prompt rows."""
    import pyarrow as pa

    return _base_schema().append(pa.field("references", pa.list_(pa.string())))


def preference_schema() -> Any:
    """Arrow schema of preference rows."""
    import pyarrow as pa

    types = {
        "candidate_0": pa.string(),
        "candidate_1": pa.string(),
        "choice": pa.int8(),
        "margin": pa.float64(),
    }
    schema = _base_schema()
    for column, kind in types.items():
        schema = schema.append(pa.field(column, kind))
    return schema


def _s(count: int) -> str:
    return "" if count == 1 else "s"
