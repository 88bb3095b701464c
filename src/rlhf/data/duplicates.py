"""Pairs that a file has more than once, found in eight bytes a row."""

from array import array

import numpy as np


class PairCounter:
    """Counts pairs that repeat or contradict an earlier one; see `counts`."""

    def __init__(self) -> None:
        # A hash of prompt and candidates in either order; its lowest bit tells which one won.
        self._pairs = array("Q")

    def add(self, prompt: str, candidate_0: str, candidate_1: str, choice: int) -> None:
        """Notes one pair of different candidates."""
        swapped = candidate_0 > candidate_1
        candidates = (candidate_1, candidate_0) if swapped else (candidate_0, candidate_1)
        key = hash((prompt, *candidates)) & 0xFFFFFFFFFFFFFFFE
        self._pairs.append(key | (bool(choice) ^ swapped))

    def counts(self) -> tuple[int, int]:
        """Returns (rows that say what an earlier row says, pairs with either choice)."""
        different = np.unique(np.frombuffer(self._pairs, dtype=np.uint64))
        pairs = np.unique(different >> np.uint64(1))
        return len(self._pairs) - len(different), len(different) - len(pairs)
