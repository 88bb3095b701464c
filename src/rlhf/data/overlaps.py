"""Prompts that two data sets have in common, found by 64-bit hashes of the rendered texts.

Two prompts are the same if their texts are, however their words are spaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.duplicates import text_hash
from rlhf.data.rows import RowData

MOST_EXAMPLES = 3


@dataclass(frozen=True)
class Overlap:
    """The rows of one data set whose prompt is in another one.

    Attributes:
        name: The data set.
        other: The other one.
        count: Number of such rows.
        rows: Number of all rows.
        examples: Sources of the first few, each with that of the first row of the same prompt.
    """

    name: str
    other: str
    count: int
    rows: int
    examples: Sequence[tuple[str, str]]

    def line(self) -> str:
        """Return the same as a warning about an evaluation."""
        return (
            f"{self.name}: {self.count} of {self.rows} rows have a prompt that {self.other} has, "
            f"too, such as {self.example(0)}; results on them show memory"
        )

    def example(self, number: int) -> str:
        """Return one of the examples, in words."""
        source, first = self.examples[number]
        return f"{source} (as {first})"


def prompt_hashes(data: RowData[Any]) -> NDArray[np.uint64]:
    """Return (N,) hashes of the rows' prompts, equal if only white space differs."""
    pieces = [np.zeros(0, np.uint64)]
    for batch in data.batches(("text",)):
        texts = batch.column("text").to_pylist()
        hashes = (text_hash(" ".join(text.split())) for text in texts)
        pieces.append(np.fromiter(hashes, np.uint64, len(texts)))
    return np.concatenate(pieces)


def find_overlap(
    data: RowData[Any],
    other: RowData[Any],
    hashes: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None,
) -> Overlap:
    """Find the rows of one data set whose prompt is in another one.

    Args:
        data: The data set, such as one for evaluation.
        other: The other one, such as one for training.
        hashes: Their `prompt_hashes`, if known.
    """
    ours, theirs = hashes or (prompt_hashes(data), prompt_hashes(other))
    places = np.flatnonzero(np.isin(ours, theirs))
    examples = [
        (data[place].source, other[int(np.argmax(theirs == ours[place]))].source)
        for place in places[:MOST_EXAMPLES].tolist()
    ]
    return Overlap(data.report.name, other.report.name, len(places), len(ours), examples)
