"""The rows of a data set that a stage wants, read from their `RowTable` on demand."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rlhf.data.layouts.reader import layout_words
from rlhf.data.layouts.table import ROWS
from rlhf.data.mixtures import Mixture, shares_in_words, weights_of
from rlhf.data.row_checker import named
from rlhf.data.row_table import RowTable, take
from rlhf.data.schema import PreferenceRow, PromptRow, PromptText
from rlhf.data.sources.source import Entry
from rlhf.errors import InputError

RowT = TypeVar("RowT", PromptRow, PreferenceRow)
_BASE_COLUMNS = ("text", "template_bos", "spans", "reserve", "input_text", "file", "line")


@dataclass
class ReadReport:
    """Summary of reading a data set.

    Attributes:
        name: Name of the configuration field.
        files: Number of files.
        rows: Rows that were kept.
        skipped: Bad rows that were skipped (`on_bad_rows: skip`).
        rankings: Kept rows with more than two candidates.
        pairs: Pairs that the candidates of kept rows make.
        identical: Pairs left out because both candidates are the same text.
        ties: Pairs of tied candidates.
        keep_ties: Whether they are kept, as half a choice either way.
        left_out: Rows of other layouts that are not two answers to the same prompt.
        layouts: Rows of the files by layout, the most frequent first.
        missing_columns: Columns of the configuration that no row has.
        blank_candidates: Candidates that are blank; they are kept.
        blank_references: Texts of `output_text` that are blank; they are kept.
        without_candidates: Rows passed over because they are not preferences.
        mended: Rows with half characters, which were replaced.
        conversations: Kept rows that have `messages`.
        repeated: Kept pairs that repeat an earlier one.
        contradictions: Kept pairs of a prompt and two candidates that occur with either choice.
        unused: Names of the first few non-empty fields that no stage reads.
        fields: Names of the fields of all rows; None if there are too many to list.
        problems: The first problems of skipped rows.
        shares: How many rows of an epoch come from each data set, if they have weights.
    """

    name: str
    files: int = 0
    rows: int = 0
    skipped: int = 0
    rankings: int = 0
    pairs: int = 0
    identical: int = 0
    ties: int = 0
    keep_ties: bool = False
    left_out: int = 0
    layouts: Mapping[str, int] = field(default_factory=dict)
    missing_columns: Sequence[str] = ()
    blank_candidates: int = 0
    blank_references: int = 0
    without_candidates: int = 0
    mended: int = 0
    conversations: int = 0
    repeated: int = 0
    contradictions: int = 0
    unused: list[str] = field(default_factory=list)
    fields: Sequence[str] | None = ()
    problems: list[str] = field(default_factory=list)
    shares: str = ""

    def facts(self) -> list[tuple[str, str, int]]:
        """Return what was counted, as attribute, words and count; zeros are left out."""
        ties = "tied pairs kept, as half a choice either way"
        counted = (
            ("conversations", "of them conversations"),
            ("rankings", "of them with more than two candidates"),
            ("pairs", "pairs that their candidates make"),
            ("skipped", "bad rows left out"),
            ("identical", "pairs with identical candidates left out (they carry no signal)"),
            ("ties", ties if self.keep_ties else "tied pairs left out (ties: keep)"),
            ("left_out", "rows left out, not two answers to the same prompt"),
            ("blank_candidates", "blank candidates kept"),
            ("blank_references", "blank output_text kept"),
            ("without_candidates", "rows without candidates passed over"),
            ("mended", "rows with half characters (lone surrogates) mended"),
            ("repeated", "pairs that an earlier row has too, with the same choice"),
            ("contradictions", "contradicting pairs (same candidates, either choice)"),
        )
        return [
            (name, words, int(getattr(self, name)))
            for name, words in counted
            if getattr(self, name) and (name != "pairs" or self.rankings)
        ]

    def head(self) -> list[str]:
        """Return how many rows there are, and of which layouts."""
        said = [f"{self.name}: {self.rows} rows from {self.files} file{_s(self.files)}"]
        if set(self.layouts) - {ROWS.name}:
            said.append(f"{self.name}: {layout_words(self.layouts)}")
        if self.shares:
            said.append(f"{self.name}: {self.shares}")
        return said

    def tail(self) -> list[str]:
        """Return which fields were not used, and the first bad rows."""
        said = []
        if self.missing_columns:
            said.append(f"{self.name}: no row has the columns: {named(self.missing_columns)}")
        if self.unused:
            said.append(f"{self.name}: fields not used: {named(self.unused)}")
        return said + [f"  left out: {problem}" for problem in self.problems]

    def lines(self) -> list[str]:
        """Return the report for people, one fact per line."""
        facts = [f"{self.name}: {words}: {count}" for _, words, count in self.facts()]
        return [*self.head(), *facts, *self.tail()]


class RowData(Sequence[RowT], Generic[RowT]):
    """Rows on disk, read on demand.

    Args:
        table: All rows of the files.
        files: The files, for `FILE:LINE`.
        report: Summary of reading.
        fingerprint: Hash of the rows' contents and order.
        stored: Indices of these rows in the table.
        token_counts: Token counts by tokenizer, cached.
        entries: The data set of each file, with its weight.

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
        entries: Sequence[Entry] = (),
    ) -> None:
        self.report = report
        self.fingerprint = fingerprint
        self.stored = stored
        self.table = table
        self.token_counts = {} if token_counts is None else token_counts
        self._files = files
        self._entries = entries

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
            self.table,
            self._files,
            self.report,
            digest,
            self.stored[chosen],
            self.token_counts,
            self._entries,
        )

    @property
    def commits(self) -> list[str]:
        """The commits of the Hub that the rows were read from, as USER/SET@COMMIT."""
        return sorted({entry.commit for entry in self._entries if entry.commit})

    @cached_property
    def visits(self) -> int | Mixture:
        """The order in which training visits the rows, for `rlhf.data.batching.rows_for_step`."""
        weighted = weights_of(self._entries)
        if not weighted:
            return len(self)
        return Mixture(self.groups(), {index: e.weight or 0.0 for index, e in weighted.items()})

    def weighted_parts(self) -> list[tuple[Entry, Self]]:
        """Return the rows of each data set that has rows and a weight; [] if none has a weight."""
        groups = self.groups()
        return [
            (entry, self.select_rows(np.flatnonzero(groups == index)))
            for index, entry in weights_of(self._entries).items()
            if np.any(groups == index)
        ]

    def groups(self) -> NDArray[np.int64]:
        """Return (N,) index of the data set, of those that the field names, that a row is of."""
        index = np.array([entry.index for entry in self._entries], np.int64)
        none = np.zeros(0, np.int32)
        files = [none, *(batch.column("file").to_numpy() for batch in self.batches(("file",)))]
        return index[np.concatenate(files)]

    def check_shares(self) -> None:
        """Report the shares of the data sets in an epoch, if they have weights.

        Raises:
            InputError: A data set has no row, or too little weight for one.
        """
        if weighted := weights_of(self._entries):
            try:
                shares = shares_in_words(self.groups(), weighted)
            except InputError as error:
                problems = [f"{self.report.name}: {problem}" for problem in error.problems]
                raise InputError(problems) from None
            self.report = replace(self.report, shares=shares)

    def _source(self, columns: dict[str, Any]) -> str:
        return f"{self._files[columns['file']]}:{columns['line']}"

    @abstractmethod
    def _row(self, columns: dict[str, Any], number: int) -> RowT:
        """Return row `number`, given its columns of the table."""


class PromptData(RowData[PromptRow]):
    """Prompts, with references for rows that have them."""

    columns: ClassVar[tuple[str, ...]] = ("references", "raw")

    def _row(self, columns: dict[str, Any], number: int) -> PromptRow:
        return PromptRow(
            prompt=prompt_of(columns),
            input_text=_input_text(columns),
            references=list(columns["references"]),
            source=self._source(columns),
            row=number,
            line=columns["raw"],
        )


class PreferenceData(RowData[PreferenceRow]):
    """Prompts with ranked candidates."""

    columns: ClassVar[tuple[str, ...]] = ("candidates", "ranking", "margin", "levels")

    def _row(self, columns: dict[str, Any], number: int) -> PreferenceRow:
        return PreferenceRow(
            prompt=prompt_of(columns),
            candidates=tuple(columns["candidates"]),
            ranking=tuple(columns["ranking"]),
            margin=columns["margin"],
            source=self._source(columns),
            row=number,
            levels=tuple(columns["levels"]),
            keep_ties=self.report.keep_ties,
        )


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


def _s(count: int) -> str:
    return "" if count == 1 else "s"
