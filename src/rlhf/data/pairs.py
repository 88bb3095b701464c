"""Tokenized preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PreferenceRow


@dataclass(frozen=True)
class Pairs:
    """B preference pairs.

    Attributes:
        prompts: (B, P).
        chosen: (B, R) preferred responses.
        rejected: (B, R) the others.
        margin: (B,) by how much the chosen response should win; 0 where the row has none.
    """

    prompts: TokenBatch
    chosen: TokenBatch
    rejected: TokenBatch
    margin: Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[PreferenceRow], codec: PromptCodec) -> "Pairs":
        """Tokenize rows, on the CPU."""
        return cls(
            codec.prompts([row.prompt for row in rows]),
            codec.responses([row.chosen for row in rows]),
            codec.responses([row.rejected for row in rows]),
            torch.tensor([row.margin or 0.0 for row in rows], dtype=torch.float32),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens that a model reads for each pair, with the prompt counted once."""
        return self.prompts.lengths + self.chosen.lengths + self.rejected.lengths

    def select_rows(self, rows: Sequence[int]) -> "Pairs":
        """Return the given pairs in the given order, trimmed to the longest of them."""
        return Pairs(
            self.prompts.select_rows(rows),
            self.chosen.select_rows(rows),
            self.rejected.select_rows(rows),
            self.margin[list(rows)],
        )

    def to(self, device: torch.device | str) -> "Pairs":
        """Return the pairs on another device."""
        return Pairs(
            self.prompts.to(device),
            self.chosen.to(device),
            self.rejected.to(device),
            self.margin.to(device),
        )
