"""Scalar heads: what turns a hidden state into a reward or a value."""

import math

import torch
from torch import Tensor, nn

from rlhf.data.batching import seeded_generator


class ScalarHead(nn.Module):
    """One number per hidden state: weight · state + offset, in fp32 whatever the base's dtype.

    Lives outside peft, so switching adapters can neither freeze nor duplicate it. It has no
    trained bias, because pairwise preferences cannot determine one. `offset` is a constant that
    carries a reward model's normalization into a critic.

    Args:
        hidden_size: D.
        init_std: Standard deviation of the initial weights; None for 1/√(D + 1) (Stiennon et al.
            2020), 0 for a head that initially returns 0 everywhere.
        seed: Seed of the initial weights.
    """

    offset: Tensor

    def __init__(self, hidden_size: int, init_std: float | None = None, seed: int = 0) -> None:
        super().__init__()
        std = 1 / math.sqrt(hidden_size + 1) if init_std is None else init_std
        weight = torch.randn(1, hidden_size, generator=seeded_generator("head", seed)) * std
        self.weight = nn.Parameter(weight)
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., D) post-norm unscaled states of any dtype to (...) fp32."""
        return nn.functional.linear(states.float(), self.weight)[..., 0] + self.offset
