"""The KL to the reference: its estimates per token, and its coefficient."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the per-token estimate of KL(π‖π_ref) on π's own samples: log π − log π_ref.

    Unbiased; may be negative on a token (Schulman 2020, "Approximating KL divergence", k1).
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the never-negative per-token estimate of KL(π‖π_ref): π_ref/π − 1 − log(π_ref/π).

    Unbiased, with less variance than k1 (Schulman 2020, k3).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


# (B, R) log-probabilities under policy and reference to (B, R) estimates, nats per token.
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k3": kl_k3}


class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, §2.2).

    e = clip(KL/target − 1, ±0.2), then β ← β·(1 + e·n/horizon) after n episodes. An error takes
    full effect at most once per rollout: beyond `horizon` episodes n counts as `horizon`, where the
    published formula would turn β negative and reward KL.

    Args:
        value: Initial coefficient β.
        target: Per-sequence KL in nats to hold, or None to keep the coefficient fixed.
        horizon: Episodes over which an error takes full effect.
    """

    def __init__(self, value: float, target: float | None, horizon: int) -> None:
        self.value = value
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after a rollout.

        Args:
            kl: Mean per-sequence KL of the rollout, in nats.
            episodes: Number of responses in it.
        """
        if self._target is not None and math.isfinite(kl):
            error = min(max(kl / self._target - 1, -0.2), 0.2)
            self.value *= 1 + error * min(episodes / self._horizon, 1.0)
