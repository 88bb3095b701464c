"""Selection: which rows of a scan a stage takes, which are bad, and what is reported."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf.data.duplicates import count_pairs
from rlhf.data.row_table import Flag, take
from rlhf.data.rows import ReadReport
from rlhf.data.scanning import Scan
from rlhf.data.sources.record import MAX_PROBLEMS
from rlhf.errors import InputError

OnBadRows = Literal["error", "skip"]
Ties = Literal["drop", "keep"]

_PROMPT_COLUMNS = ("text", "template_bos", "input_text", "spans", "reserve")
_PAIR_COLUMNS = ("candidates", "ranking", "margin")


@dataclass(frozen=True)
class Wants:
    """What a stage requires of a row.

    Attributes:
        pair: Whether candidates are required, must be valid if present, or do not matter. Unless
            they do not matter, rows are left out whose candidates are all the same text.
        pass_over: Whether to pass over rows without candidate fields.
        output: Whether `output_text` is required, must be valid if present, or does not matter.
        lines: Whether the row's other fields matter, so that its line is part of the fingerprint.
        ties: Whether pairs of tied answers are kept, as half a choice either way, or left out.
    """

    pair: Literal["required", "if present", "ignored"] = "ignored"
    pass_over: bool = False
    output: Literal["required", "if present", "ignored"] = "if present"
    lines: bool = False
    ties: Ties = "drop"

    def parts(self, flags: int) -> tuple[str, ...]:
        """Return the parts whose problems to report for a bad row with these flags, in order."""
        if not flags & Flag.OBJECT:
            return ("line",)
        has_pair = bool(flags & Flag.HAS_PAIR)
        parts: tuple[str, ...] = ("prompt",)
        if self.pair == "required" or (self.pair == "if present" and has_pair):
            parts = ("pair", "prompt")
            if flags & Flag.BAD_PAIR or not has_pair:
                return parts + self._output_parts(flags)  # rendering was not attempted
        return (*parts, "render", *self._output_parts(flags))

    def _output_parts(self, flags: int) -> tuple[str, ...]:
        if self.output == "ignored":
            return ()
        missing = self.output == "required" and not flags & Flag.BAD_OUTPUT
        return ("no output",) if missing else ("output",)


@dataclass
class Selection:
    """The rows of a scan that a stage takes.

    Attributes:
        index: Their indices in the scan's table.
        report: Summary of reading.
        fingerprint: Hash of their contents and order.
    """

    index: NDArray[np.int64]
    report: ReadReport
    fingerprint: str


@dataclass
class _Sums:
    """Totals over the batches of a scan."""

    problems: int = 0
    first: list[str] = field(default_factory=list)
    index: list[NDArray[np.int64]] = field(default_factory=list)
    pairs: list[NDArray[np.uint64]] = field(default_factory=list)


def rows_wanted(
    scanned: Scan, wants: Wants, name: str, on_bad_rows: OnBadRows, fingerprint: bool = True
) -> Selection:
    """Select the rows that a stage wants.

    Args:
        scanned: All rows.
        wants: What makes a row good.
        name: Configuration field to name in messages.
        on_bad_rows: Whether bad rows are an error, or are skipped and counted.
        fingerprint: Whether to hash the rows.

    Raises:
        InputError: If rows are bad (lists them all), or no row is left.
    """
    key = (wants, name, on_bad_rows, fingerprint)
    if key not in scanned.selections:
        scanned.selections[key] = _select(scanned, wants, name, on_bad_rows, fingerprint)
    taken: Selection = scanned.selections[key]
    return taken


def _select(
    scanned: Scan, wants: Wants, name: str, on_bad_rows: OnBadRows, fingerprint: bool
) -> Selection:
    report = ReadReport(
        name,
        len(scanned.files),
        unused=scanned.unused,
        fields=scanned.fields,
        layouts=scanned.layouts,
        missing_columns=scanned.missing_columns,
        keep_ties=wants.ties == "keep",
    )
    sums = _Sums(first=list(scanned.faults.whole_files[:MAX_PROBLEMS]))
    sums.problems = len(scanned.faults.whole_files)
    digest = _Digest()
    columns = (*_PROMPT_COLUMNS, *(_PAIR_COLUMNS if wants.pair == "required" else ("references",)))
    columns += ("raw",) if wants.lines else ()
    if scanned.has_ties and wants.pair == "required":
        columns += ("levels",)
    for start, batch in scanned.table.scan():
        kept = _decide(batch, start, wants, scanned, report, sums)
        if fingerprint and len(kept):
            digest.add(take(batch.select(columns), kept))
    report.rows = sum(map(len, sums.index))
    report.repeated, report.contradictions = count_pairs(sums.pairs)
    _raise_if_bad(scanned, sums, on_bad_rows, report, wants.pass_over)
    if on_bad_rows == "skip":
        report.problems = sums.first
    index = np.concatenate([*sums.index, np.zeros(0, np.int64)])
    return Selection(index, report, digest.hexdigest())


def _decide(
    batch: Any, start: int, wants: Wants, scanned: Scan, report: ReadReport, sums: _Sums
) -> NDArray[np.int64]:
    """Count what is in a batch; return the places of the rows to keep."""
    flags = column_values(batch, "flags")

    def have(bits: int) -> NDArray[np.bool_]:
        return flags & bits != 0

    has_pair, bad = have(Flag.HAS_PAIR), have(Flag.BAD_LINE | Flag.BAD_PROMPT | Flag.BAD_RENDER)
    passed = have(Flag.OBJECT) & ~has_pair & ~have(Flag.LEFT_OUT) & wants.pass_over
    if wants.pair != "ignored":
        bad |= has_pair & have(Flag.BAD_PAIR)
    if wants.pair == "required":
        bad |= ~has_pair
    if wants.output != "ignored":
        bad |= have(Flag.BAD_OUTPUT)
    if wants.output == "required":
        bad |= have(Flag.NO_OUTPUT)
    bad &= ~passed & ~have(Flag.WHOLE_FILE | Flag.LEFT_OUT)
    good = ~bad & ~passed & ~have(Flag.WHOLE_FILE)
    left_out = good & have(Flag.LEFT_OUT)
    good &= ~left_out
    silent = Flag.IDENTICAL if wants.ties == "keep" else Flag.IDENTICAL | Flag.TIED
    kept = good & ~(have(silent) & (wants.pair != "ignored"))
    report.left_out += int(left_out.sum())
    report.skipped += int(bad.sum())
    report.without_candidates += int(passed.sum())
    report.mended += int((good & have(Flag.MENDED)).sum())
    report.conversations += int((kept & have(Flag.CONVERSATION)).sum())
    if wants.pair != "ignored":
        report.blank_candidates += int(column_values(batch, "blank_candidates")[kept].sum())
        report.identical += int(column_values(batch, "identical_pairs")[good].sum())
        report.ties += int(column_values(batch, "tied_pairs")[good].sum())
        _count_candidates(take(batch, np.flatnonzero(kept & has_pair)), report, sums)
    if wants.output != "ignored":
        report.blank_references += int(column_values(batch, "blank_references")[kept].sum())
    if bad.any():
        _note_problems(batch, start, np.flatnonzero(bad), wants, scanned, sums)
    places = np.flatnonzero(kept)
    sums.index.append(places + start)
    return places


def _count_candidates(batch: Any, report: ReadReport, sums: _Sums) -> None:
    """Count rankings and note the pairs of rows with candidates that are kept."""
    import pyarrow.compute as pc

    sizes = pc.list_value_length(batch.column("ranking")).to_numpy(zero_copy_only=False)
    report.rankings += int((sizes > 2).sum())
    report.pairs += int((sizes * (sizes - 1) // 2).sum())
    report.pairs -= int(column_values(batch, "identical_pairs").sum())
    if not report.keep_ties:
        report.pairs -= int(column_values(batch, "tied_pairs").sum())
    hashes = batch.column("pair_hashes").flatten()
    sums.pairs.append(hashes.to_numpy(zero_copy_only=False))


def _note_problems(
    batch: Any,
    start: int,
    places: NDArray[np.int64],
    wants: Wants,
    scanned: Scan,
    sums: _Sums,
) -> None:
    """Count the problems of bad rows, and keep the first few."""
    flags = column_values(batch, "flags")
    counts = {
        part: column_values(batch, f"{part}_problems") for part in ("pair", "prompt", "output")
    }
    for place in places.tolist():
        row = int(flags[place])
        parts = wants.parts(row)
        count = 0
        for part in parts:
            if part in counts:
                count += int(counts[part][place])
            elif part == "render":
                count += bool(row & Flag.BAD_RENDER)
            elif part == "no output":
                count += bool(row & Flag.NO_OUTPUT)
            else:
                count += 1
        sums.problems += count
        if len(sums.first) < MAX_PROBLEMS:
            where = f"{scanned.files[batch.column('file')[place].as_py()]}:"
            where += f"{batch.column('line')[place].as_py()}: "
            texts = scanned.faults.of(start + place, parts)
            sums.first += [where + text for text in texts][: MAX_PROBLEMS - len(sums.first)]


def _raise_if_bad(
    scanned: Scan, sums: _Sums, on_bad_rows: OnBadRows, report: ReadReport, may_be_empty: bool
) -> None:
    """Raise InputError if there are bad rows that may not be skipped, or no row is left."""
    if sums.problems and on_bad_rows == "error":
        rest = sums.problems - len(sums.first)
        raise InputError([*sums.first, *([f"… and {rest} more problems"] if rest else [])])
    if scanned.faults.whole_files:
        raise InputError(scanned.faults.whole_files)
    if not report.rows and not (may_be_empty and report.without_candidates):
        counts = report.lines()[1:]
        raise InputError([*sums.first, *counts, f"{report.name}: no valid row is left"])


def column_values(batch: Any, column: str) -> NDArray[Any]:
    """Return a column of numbers without nulls."""
    values: NDArray[Any] = batch.column(column).to_numpy(zero_copy_only=False)
    return values


class _Digest:
    """A hash of columns, independent of how they are split into batches."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[Any, Any]] = {}

    def add(self, batch: Any) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self._add(name, column)

    def _add(self, name: str, column: Any) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        lengths, content = self._columns.setdefault(name, (hashlib.sha256(), hashlib.sha256()))
        if pa.types.is_list(column.type):
            lengths.update(_bytes(pc.list_value_length(column)))
            self._add(f"{name}[]", column.flatten())
        elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            lengths.update(_bytes(pc.fill_null(pc.binary_length(column), -1)))
            offsets, data = column.buffers()[1:]
            ends = np.frombuffer(offsets, np.int32)[[column.offset, column.offset + len(column)]]
            content.update(memoryview(data)[ends[0] : ends[1]] if data is not None else b"")
        else:
            content.update(_bytes(column))

    def hexdigest(self) -> str:
        both = (f"{name} {a.hexdigest()} {b.hexdigest()}" for name, (a, b) in self._columns.items())
        return hashlib.sha256("\n".join(sorted(both)).encode()).hexdigest()


def _bytes(column: Any) -> NDArray[Any]:
    values = column.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


def group_rows(hashes: Sequence[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Return the group of each value, numbered 0, 1, 2 and so on by first appearance."""
    values = np.concatenate([*hashes, np.zeros(0, np.uint64)])
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    groups: NDArray[np.int64] = order[inverse]
    return groups
