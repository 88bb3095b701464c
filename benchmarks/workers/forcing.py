"""Where responses of a peer end, through transformers' own seam for such things."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor


class ForcedLengths(LogitsProcessor):
    """Makes EOS certain at a row's length and impossible before, in place to cost nothing.

    Args:
        lengths: Tokens of each row's response, EOS included; None for no EOS at all.
        start: Tokens that the first call finds: those of a prompt, or T5's decoder start.
        eos: The id that ends a response.
    """

    def __init__(self, lengths: Sequence[int] | None, start: int, eos: int) -> None:
        self._lengths = lengths
        self._start = start
        self._eos = eos

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """Changes and returns (B, V) `scores`."""
        scores[:, self._eos] = -float("inf")
        done = input_ids.shape[1] - self._start
        for row, length in enumerate(self._lengths or ()):
            if done + 1 == length:
                scores[row] = -float("inf")
                scores[row, self._eos] = 0.0
        return scores
