"""Preference pairs as ids."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.data.schema import PreferenceRow
from rlhf.data.tokenising import Tokeniser


@dataclass(frozen=True)
class Pairs:
    """B preference pairs.

    Attributes:
        prompts: (B, P).
        chosen: (B, R) preferred responses.
        rejected: (B, R) the others.
        margin: (B,) by how much the chosen one should win, 0 where the row says nothing.
    """

    prompts: TokenBatch
    chosen: TokenBatch
    rejected: TokenBatch
    margin: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[PreferenceRow], tokeniser: Tokeniser) -> "Pairs":
        """Tokenises rows, on the CPU."""
        return cls(
            tokeniser.prompts([row.prompt for row in rows]),
            tokeniser.responses([row.chosen for row in rows]),
            tokeniser.responses([row.rejected for row in rows]),
            torch.tensor([row.margin or 0.0 for row in rows], dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens that a model reads for each pair, its prompt once."""
        return self.prompts.lengths + self.chosen.lengths + self.rejected.lengths

    def select(self, rows: Sequence[int]) -> "Pairs":
        """The given pairs in the given order, trimmed to the longest of them."""
        return Pairs(
            self.prompts.select(rows),
            self.chosen.select(rows),
            self.rejected.select(rows),
            self.margin[list(rows)],
        )

    def to(self, device: torch.device | str) -> "Pairs":
        """The same pairs on another device."""
        return Pairs(
            self.prompts.to(device),
            self.chosen.to(device),
            self.rejected.to(device),
            self.margin.to(device),
        )
