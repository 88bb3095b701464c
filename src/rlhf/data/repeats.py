"""Where rows repeat or contradict earlier ones: counts, and the first few as row numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.rows import RowData

MOST_EXAMPLES = 3


@dataclass
class Repeats:
    """Rows that are like an earlier one.

    Attributes:
        count: Their number.
        first: The first few, each with the first row that it is like: places in the data set.
    """

    count: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)


def repeated_pairs(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> tuple[Repeats, Repeats]:
    """Return the pairs that repeat an earlier one, and those that occur with either choice.

    Args:
        hashes: (N,) values of `pair_hash`.
        rows: (N,) rows that they are from, ascending.
    """
    order = np.argsort(hashes, kind="stable")
    sorted_, owners = hashes[order], rows[order]
    again = np.flatnonzero(sorted_[1:] == sorted_[:-1]) + 1
    # The place at which the run of equal hashes begins that a place is in.
    places = np.arange(len(sorted_))
    places[again] = 0
    start = np.maximum.accumulate(places)
    either = np.flatnonzero((sorted_[1:] ^ sorted_[:-1]) == 1) + 1
    first, second = owners[start[either - 1]], owners[either]
    both = np.stack([np.maximum(first, second), np.minimum(first, second)], axis=1)
    return (
        _first(len(again), np.stack([owners[again], owners[start[again]]], axis=1)),
        _first(len(either), both),
    )


def repeated_rows(data: RowData[Any], hashes: NDArray[np.uint64]) -> Repeats:
    """Return the rows without candidates whose prompt and `output_text` an earlier one has.

    Args:
        data: The rows.
        hashes: Their `prompt_hashes`.
    """
    keys: list[NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    rows: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for start, batch in _batches(data, ("candidates", "references")):
        alone = np.flatnonzero(batch.column("candidates").value_lengths().to_numpy() == 0)
        references = batch.column("references").to_pylist()
        values = ((int(hashes[start + i]), *references[i]) for i in alone.tolist())
        keys.append(np.fromiter((_key(value) for value in values), np.uint64, len(alone)))
        rows.append(alone + start)
    return repeated_pairs(np.concatenate(keys), np.concatenate(rows))[0]


def _key(value: tuple[Any, ...]) -> int:
    return hash(value) & 0xFFFFFFFFFFFFFFFE  # no two keys that look like a pair's two choices


def _batches(data: RowData[Any], columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    start = 0
    for batch in data.batches(columns):
        yield start, batch
        start += batch.num_rows


def _first(count: int, pairs: NDArray[np.int64]) -> Repeats:
    """Return the first few pairs by row, the later one first; pairs inside a row are no example."""
    apart = pairs[pairs[:, 0] != pairs[:, 1]]
    order = np.lexsort((apart[:, 1], apart[:, 0]))[:MOST_EXAMPLES]
    return Repeats(count, [(int(later), int(earlier)) for later, earlier in apart[order]])
