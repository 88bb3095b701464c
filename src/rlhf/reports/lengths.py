"""Lengths of texts in a few numbers and a small histogram."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_BARS = 8  # wanted; widths are round numbers, so there may be a few less
_MOST = 0.95  # share of the texts that the bars of equal width show
_WIDEST = 40  # characters


@dataclass(frozen=True)
class Lengths:
    """Lengths of a set of texts.

    Attributes:
        what: Which texts.
        unit: "tokens" or "characters".
        count: Number of texts.
        quantiles: Shortest, median, 90 %, 99 %, longest.
        bars: First and last length of each bar of the histogram, and the texts in it.
    """

    what: str
    unit: str
    count: int
    quantiles: tuple[int, ...]
    bars: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, what: str, unit: str, lengths: Sequence[int] | NDArray[np.int64]) -> "Lengths":
        """Summarize at least one length."""
        ordered = np.sort(np.asarray(lengths))
        quantiles = tuple(int(ordered[round(q * (len(ordered) - 1))]) for q in _QUANTILES)
        return cls(what, unit, len(ordered), quantiles, _bars(ordered, quantiles))

    def lines(self) -> list[str]:
        """Return the same in words, and as bars."""
        shortest, median, most, nearly_all, longest = self.quantiles
        said = [
            f"{self.what}, {self.unit}: shortest {shortest}, median {median}, 90 % {most}, "
            f"99 % {nearly_all}, longest {longest}"
        ]
        names = [f"{low}-{high}" if high > low else f"{low}" for low, high, _ in self.bars]
        width = max(map(len, names), default=0)
        digits = len(f"{self.count:,}")
        tallest = max((count for *_, count in self.bars), default=0)
        for name, (*_, count) in zip(names, self.bars, strict=True):
            bar = "█" * round(_WIDEST * count / tallest) or ("▏" if count else "")
            said.append(f"  {name:>{width}}  {count:>{digits},}  {bar}".rstrip())
        return said


def _bars(ordered: NDArray[np.int64], quantiles: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return bars of equal, round width; the last one holds what is far longer than most."""
    shortest, longest = quantiles[0], quantiles[-1]
    most = int(ordered[round(_MOST * (len(ordered) - 1))])
    width = _round_number((most - shortest) / _BARS)
    starts = np.arange(shortest // width, most // width + 1) * width
    ends = [*(starts[1:] - 1).tolist(), max(longest, int(starts[-1]) + width - 1)]
    if longest > int(starts[-1]) + width - 1:  # a bar of its own for the longest
        ends[-1] = int(starts[-1]) + width - 1
        starts, ends = np.append(starts, ends[-1] + 1), [*ends, longest]
    places = np.searchsorted(ordered, [*starts, longest + 1])
    return tuple(
        (int(low), int(high), int(count))
        for low, high, count in zip(starts, ends, np.diff(places), strict=True)
    )


def _round_number(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … that is not below a number."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= least:
                return digit * scale
        scale *= 10
