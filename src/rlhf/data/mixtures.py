"""Data sets mixed by weight: how often each is drawn from, and which rows in which epoch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf.data.sources.source import Entry
from rlhf.errors import InputError

if TYPE_CHECKING:  # checks of data do without torch
    from torch import Tensor


def draws_of_epoch(total: int, weights: Sequence[float]) -> list[int]:
    """Share out the rows of an epoch by weight, by largest remainders (Hamilton's method).

    Args:
        total: Rows of an epoch.
        weights: Positive weights.

    Returns:
        For each weight the whole number below or above `total * weight / sum(weights)`, so that
        they add up to `total`. Of equal remainders the first ones are rounded up.
    """
    exact = total * np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
    draws = np.floor(exact).astype(np.int64)
    most = np.argsort(draws - exact, kind="stable")  # the largest remainder first
    draws[most[: total - int(draws.sum())]] += 1
    return [int(count) for count in draws]


class Mixture:
    """The order in which rows of weighted data sets are visited.

    An epoch has as many rows as the data sets together. Data set k gets `draws_of_epoch` of them.
    Its rows are drawn from an endless stream, one permutation of all of them after another, which
    continues from epoch to epoch: no row is drawn a second time before all others of its data set
    were drawn once, however small or large its share. Then the rows of an epoch are shuffled. All
    this depends on the seed and the epoch's number alone, so it needs no state.

    Args:
        groups: (N,) index of the data set that each row is of.
        weights: Weight of each data set by its index. Those without a row get no share.

    Attributes:
        rows: The rows of each data set, by its index.
        draws: How many rows of an epoch are drawn from each.
    """

    def __init__(self, groups: NDArray[np.int64], weights: Mapping[int, float]) -> None:
        rows = {index: np.flatnonzero(groups == index) for index in weights}
        self.rows = {index: found for index, found in rows.items() if len(found)}
        draws = draws_of_epoch(len(groups), [weights[index] for index in self.rows])
        self.draws = dict(zip(self.rows, draws, strict=True))
        self._size = len(groups)

    def __len__(self) -> int:
        return self._size

    def order_of_epoch(self, seed: int, epoch: int) -> "Tensor":
        """Return (N,) rows in the order in which an epoch (from 0) visits them."""
        import torch

        from rlhf.data.batching import seeded_generator

        drawn = [
            self._stream(group, epoch * count, (epoch + 1) * count, seed)
            for group, count in self.draws.items()
        ]
        generator = seeded_generator("data order", seed, epoch)
        return torch.cat(drawn)[torch.randperm(self._size, generator=generator)]

    def _stream(self, group: int, start: int, end: int, seed: int) -> "Tensor":
        """Return the draws from `start` to `end` of a data set's endless stream."""
        import torch

        from rlhf.data.batching import seeded_generator

        rows = torch.from_numpy(self.rows[group])
        pieces = [rows[:0]]
        while start < end:
            number, offset = divmod(start, len(rows))
            generator = seeded_generator("mixture", seed, group, number)
            order = torch.randperm(len(rows), generator=generator)
            pieces.append(rows[order[offset : offset + end - start]])
            start += len(pieces[-1])
        return torch.cat(pieces)


def weights_of(entries: Sequence[Entry]) -> dict[int, Entry]:
    """Return the data sets of some sources by their index, if they have weights; else {}."""
    return {entry.index: entry for entry in entries if entry.weight is not None}


def shares_in_words(groups: NDArray[np.int64], weighted: dict[int, Entry]) -> str:
    """Say how many rows of an epoch come from each data set.

    Args:
        groups: (N,) data set of each row.
        weighted: What `weights_of` returned, not empty.

    Raises:
        InputError: A data set has no row, or so little weight that none of its rows is drawn.
    """
    sizes = {index: int((groups == index).sum()) for index in weighted}
    draws = draws_of_epoch(len(groups), [entry.weight or 0.0 for entry in weighted.values()])
    problems, parts = [], []
    for (index, entry), count in zip(weighted.items(), draws, strict=True):
        if not sizes[index]:
            problems.append(f"{entry.name} has a weight but no valid row; leave it out")
        elif not count:
            problems.append(
                f"{entry.name}: weight {entry.weight:g} is less than a row of the {len(groups)} of "
                "an epoch; give it more, or leave it out"
            )
        else:
            passes = f"{count / sizes[index]:.3g} passes over {sizes[index]} rows"
            parts.append(f"{count} of {entry.name} ({passes})")
    if problems:
        raise InputError(problems)
    return f"rows of an epoch: {', '.join(parts)}"
