"""What peers need to do the same work: fixed response lengths, and prompts answered repeatedly."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor


def repeated(prompts: Sequence[list[int]], times: int) -> list[list[int]]:
    """Repeat each prompt, copies next to each other."""
    return [ids for ids in prompts for _ in range(times)]


class ForcedLengths(LogitsProcessor):
    """Make EOS certain at a row's length and impossible before, in place and at no cost.

    Args:
        lengths: Tokens in each row's response, EOS included; None for no EOS at all.
        start: Tokens present at the first call: those of a prompt, or T5's decoder start.
        eos: The id that ends a response.
    """

    def __init__(self, lengths: Sequence[int] | None, start: int, eos: int) -> None:
        self._lengths = lengths
        self._start = start
        self._eos = eos

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """Modify and return (B, V) `scores`."""
        scores[:, self._eos] = -float("inf")
        done = input_ids.shape[1] - self._start
        for row, length in enumerate(self._lengths or ()):
            if done + 1 == length:
                scores[row] = -float("inf")
                scores[row, self._eos] = 0.0
        return scores
