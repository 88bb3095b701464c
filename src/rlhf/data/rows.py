"""Rows in an Arrow file on disk, written one by one and read on demand.

A `RowTable` has a row for each line of the input files, good or bad; a `RowData` holds those that a
stage wants.

The file is temporary: it disappears with the last object that uses it, or with the process.
"""

import hashlib
import mmap
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rlhf.data.duplicates import pair_hash, text_hash
from rlhf.data.schema import Candidates, PreferenceRow, PromptRow, PromptText, named
from rlhf.files.owners import temporary_folder

RowT = TypeVar("RowT", PromptRow, PreferenceRow)

_FILE = "rows.arrow"
_BATCH_ROWS = 4000
_BATCH_CHARACTERS = 8 * 2**20
_PROMPT = PromptText("", ())
_NO_CANDIDATES = (None, None, 0, None, 0, 0)


class Flag:
    """Properties of a table row, as bits."""

    OBJECT = 1  # is a JSON object
    HAS_PAIR = 2  # has candidate fields
    IDENTICAL = 4  # both candidates are the same text
    CONVERSATION = 8
    MENDED = 16
    NO_OUTPUT = 32
    BAD_LINE = 64
    REPEATS = 4096  # both candidates begin with the whole input
    WHOLE_FILE = 128  # not a line, but a file that cannot be read
    BAD_PAIR = 256
    BAD_PROMPT = 512
    BAD_RENDER = 1024
    BAD_OUTPUT = 2048


@dataclass
class ReadReport:
    """Summary of reading a data set.

    Attributes:
        name: Name of the configuration field.
        files: Number of files.
        rows: Rows that were kept.
        skipped: Bad rows that were skipped (`on_bad_rows: skip`).
        identical: Pairs left out because both candidates are the same text.
        blank_candidates: Candidates that are blank; they are kept.
        blank_references: Texts of `output_text` that are blank; they are kept.
        without_candidates: Rows passed over because they are not preferences.
        mended: Rows with half characters, which were replaced.
        conversations: Kept rows that have `messages`.
        repeated: Kept pairs that repeat an earlier one.
        contradictions: Kept pairs of a prompt and two candidates that occur with either choice.
        unused: Names of the first few non-empty fields that no stage reads.
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
        """Return the report for people, one fact per line."""
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


class RowTable:
    """Rows of a finished Arrow file, memory-mapped; the file itself has already been unlinked.

    Attributes:
        batches: Arrow record batches.
        starts: Index of the first row of each batch, followed by the total number of rows.
    """

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pa.ipc.open_stream(pa.py_buffer(self._map)) as reader:
            self.batches = list(reader)
        self.starts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Yield every batch with the index of its first row; release memory after reading."""
        for number, batch in enumerate(self.batches):
            yield int(self.starts[number]), batch
            if number % 8 == 7 and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return some columns of one row."""
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        place = number - int(self.starts[batch])
        return {name: self.batches[batch].column(name)[place].as_py() for name in columns}


class RowData(Sequence[RowT], Generic[RowT]):
    """Rows on disk, read on demand.

    Args:
        table: All rows of the files.
        files: The files, for `FILE:LINE`.
        report: Summary of reading.
        fingerprint: Hash of the rows' contents and order.
        stored: Indices of these rows in the table.

    Attributes:
        report: Summary of reading.
        fingerprint: Hash of the rows' contents and order.
        stored: Indices of these rows in the table.
        table: All rows of the files.
    """

    columns: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        table: RowTable,
        files: Sequence[str],
        report: ReadReport,
        fingerprint: str,
        stored: NDArray[np.int64],
        token_counts: dict[str, Any] | None = None,
    ) -> None:
        self.report = report
        self.fingerprint = fingerprint
        self.stored = stored
        self.table = table
        self.token_counts = {} if token_counts is None else token_counts
        self._files = files

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, place: int) -> RowT: ...
    @overload
    def __getitem__(self, place: slice) -> list[RowT]: ...
    def __getitem__(self, place: int | slice) -> RowT | list[RowT]:
        """Return one row, or a list of rows for a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        columns = self.table.row(int(self.stored[number]), (*_BASE_COLUMNS, *self.columns))
        return self._row(columns, number)

    def __iter__(self) -> Iterator[RowT]:
        number = 0
        for batch in self.batches((*_BASE_COLUMNS, *self.columns)):
            for start in range(0, batch.num_rows, 256):
                part = batch.slice(start, 256).to_pydict()
                for values in zip(*part.values(), strict=True):
                    yield self._row(dict(zip(part, values, strict=True)), number)
                    number += 1

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield columns of the rows as Arrow record batches, in row order."""
        if len(self.stored) and np.any(np.diff(self.stored) < 0):  # chosen in another order
            for number in self.stored:
                batch = int(np.searchsorted(self.table.starts, number, side="right")) - 1
                place = int(number - self.table.starts[batch])
                yield self.table.batches[batch].select(list(columns)).slice(place, 1)
            return
        for start, batch in self.table.scan():
            ends = np.searchsorted(self.stored, [start, start + batch.num_rows])
            rows = self.stored[ends[0] : ends[1]] - start
            if len(rows):
                yield take(batch.select(list(columns)), rows)

    def raw_lines(self) -> Iterator[bytes]:
        """Yield the original lines of the rows, if kept (`rlhf.data.reading.read_once`)."""
        for batch in self.batches(("raw",)):
            yield from batch.column("raw").to_pylist()

    def select_rows(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """Return the given rows in the given order, backed by the same file."""
        chosen = np.asarray(rows, dtype=np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()
        return type(self)(
            self.table, self._files, self.report, digest, self.stored[chosen], self.token_counts
        )

    def _source(self, columns: dict[str, Any]) -> str:
        return f"{self._files[columns['file']]}:{columns['line']}"

    @abstractmethod
    def _row(self, columns: dict[str, Any], number: int) -> RowT:
        """Return row `number`, given its columns of the table."""


class PromptData(RowData[PromptRow]):
    """Prompts, with references for rows that have them."""

    columns: ClassVar[tuple[str, ...]] = ("references",)

    def _row(self, columns: dict[str, Any], number: int) -> PromptRow:
        return PromptRow(
            prompt=prompt_of(columns),
            input_text=_input_text(columns),
            references=list(columns["references"]),
            source=self._source(columns),
            row=number,
        )


class PreferenceData(RowData[PreferenceRow]):
    """Preference pairs."""

    columns: ClassVar[tuple[str, ...]] = ("candidate_0", "candidate_1", "choice", "margin")

    def _row(self, columns: dict[str, Any], number: int) -> PreferenceRow:
        return PreferenceRow(
            prompt=prompt_of(columns),
            candidate_0=columns["candidate_0"],
            candidate_1=columns["candidate_1"],
            choice=columns["choice"],
            margin=columns["margin"],
            source=self._source(columns),
            row=number,
        )


class TableWriter:
    """Writer of a table, batch by batch, to a temporary file.

    Attributes:
        rows: Rows added so far.
    """

    def __init__(self) -> None:
        import pyarrow as pa

        self.rows = 0
        self._schema = _schema()
        self._folder = str(temporary_folder("data"))
        self._path = os.path.join(self._folder, _FILE)
        self._writer = pa.ipc.new_stream(self._path, self._schema)
        self._pending: list[tuple[Any, ...]] = []
        self._characters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self,
        prompt: PromptText | None,
        input_text: str,
        pair: Candidates | None,
        references: list[str] | None,
        raw: bytes | None,
        place: tuple[int, int],
        flags: int,
        counts: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Append one row.

        Args:
            prompt: The rendered prompt, if valid.
            input_text: The row's own input.
            pair: Its two answers, if valid.
            references: Texts of `output_text`.
            raw: The original line, if lines are kept.
            place: File index and line number.
            flags: Bits of `Flag`.
            counts: Numbers of problems with the pair, the prompt and `output_text`.
        """
        self.rows += 1
        prompt = prompt or _PROMPT
        text, spans, reserve = prompt.text, prompt.spans, prompt.reserve
        candidates: tuple[Any, ...] = _NO_CANDIDATES
        size = len(text) + len(raw or b"") + sum(map(len, references or ()))
        if pair is not None:
            first, second = pair.candidate_0, pair.candidate_1
            blank = is_blank(first) + is_blank(second)
            size += len(first) + len(second)
            pair_key = pair_hash(text, first, second, pair.choice)
            candidates = (first, second, pair.choice, pair.margin, blank, pair_key)
        self._pending.append(
            (
                text,
                prompt.template_bos,
                None if input_text == text else input_text,
                spans[0] if len(spans) == 1 else tuple(chain.from_iterable(spans)),
                tuple(chain.from_iterable(reserve)) if reserve else (),
                text_hash(text),
                *candidates,
                references or (),
                sum(map(is_blank, references)) if references else 0,
                raw,
                *place,
                flags,
                *counts,
            )
        )
        self._characters += size
        if len(self._pending) >= _BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> RowTable:
        """Return the table, once all rows are added."""
        self._flush()
        self._writer.close()
        return RowTable(self._path)

    def _flush(self) -> None:
        import pyarrow as pa

        columns = list(zip(*self._pending, strict=True)) or [()] * len(self._schema)
        arrays = [
            _lists(column, kind) if pa.types.is_list(kind) else pa.array(column, type=kind)
            for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._pending, self._characters = [], 0


def _lists(column: Sequence[Sequence[Any]], kind: Any) -> Any:
    """Return an Arrow column of lists, much faster than Arrow's own conversion."""
    import pyarrow as pa

    offsets = np.zeros(len(column) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, column), np.int32, len(column)), out=offsets[1:])
    values = pa.array(list(chain.from_iterable(column)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def take(batch: Any, rows: NDArray[np.int64]) -> Any:
    """Return some rows of a record batch; the batch itself if all rows are wanted."""
    import pyarrow as pa

    return batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))


def text_sizes(texts: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (N,) characters and (N,) bytes of an Arrow column of texts; 0 for null."""
    import pyarrow.compute as pc

    characters, size = (
        pc.fill_null(length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        for length in (pc.utf8_length, pc.binary_length)
    )
    return characters, size


def is_blank(text: str) -> bool:
    """Return whether a text is empty or all white space."""
    return not text or text.isspace()


_BASE_COLUMNS = ("text", "template_bos", "spans", "reserve", "input_text", "file", "line")


def prompt_of(columns: Mapping[str, Any]) -> PromptText:
    """Build the prompt from a row's columns `text`, `template_bos`, `spans` and `reserve`."""
    spans, reserve = (
        tuple(zip(ends[::2], ends[1::2], strict=True))
        for ends in (columns["spans"], columns["reserve"])
    )
    return PromptText(columns["text"], spans, reserve, columns["template_bos"])


def _input_text(columns: dict[str, Any]) -> str:
    text: str | None = columns["input_text"]
    return columns["text"] if text is None else text


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "text": pa.string(),
            "template_bos": pa.string(),
            "input_text": pa.string(),  # null where it equals the prompt's text
            "spans": pa.list_(pa.int64()),
            "reserve": pa.list_(pa.int64()),
            "prompt_hash": pa.uint64(),
            "candidate_0": pa.string(),
            "candidate_1": pa.string(),
            "choice": pa.int8(),
            "margin": pa.float64(),
            "blank_candidates": pa.int8(),
            "pair_hash": pa.uint64(),
            "references": pa.list_(pa.string()),
            "blank_references": pa.int32(),
            "raw": pa.binary(),
            "file": pa.int32(),
            "line": pa.int64(),
            "flags": pa.int32(),
            "pair_problems": pa.int32(),
            "prompt_problems": pa.int32(),
            "output_problems": pa.int32(),
        }
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"
