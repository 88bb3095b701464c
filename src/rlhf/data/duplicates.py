"""Texts and pairs that occur more than once in a file, found by 64-bit hashes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf.data.schema import ranked_pairs

_ALL_BUT_LAST_BIT = 0xFFFFFFFFFFFFFFFE


def text_hash(text: str) -> int:
    """Return a 64-bit hash of a text; it differs between processes."""
    return hash(text) & 0xFFFFFFFFFFFFFFFF


def pair_hash(prompt: str, candidate_0: str, candidate_1: str, choice: int) -> int:
    """Return a 64-bit hash of a prompt and two candidates in either order.

    The last bit says which candidate won.
    """
    swapped = candidate_0 > candidate_1
    candidates = (candidate_1, candidate_0) if swapped else (candidate_0, candidate_1)
    return hash((prompt, *candidates)) & _ALL_BUT_LAST_BIT | (bool(choice) ^ swapped)


def pair_hashes(
    prompt: str, texts: Sequence[str], ranking: Sequence[int], levels: Sequence[int] = ()
) -> list[int]:
    """Return the different `pair_hash`es of the pairs that a ranking of texts makes, ties apart."""
    if len(texts) == 2 and not levels:  # nearly all rows, by the million
        first, second = texts
        return [] if first == second else [pair_hash(prompt, first, second, ranking[0])]
    pairs = ranked_pairs(texts, ranking, levels)
    return list({pair_hash(prompt, texts[a], texts[b], 0): None for a, b in pairs})


def count_pairs(hashes: Sequence[NDArray[np.uint64]]) -> tuple[int, int]:
    """Return (rows that repeat an earlier row, pairs that occur with either choice).

    Args:
        hashes: Values of `pair_hash`, in any number of pieces.
    """
    pairs = np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
    again = pairs[1:] == pairs[:-1]
    # Once sorted, the two choices of a pair are neighbors.
    either = (pairs[1:] ^ pairs[:-1]) == 1
    return int(again.sum()), int(either.sum())
