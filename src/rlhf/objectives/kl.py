"""The KL to the reference: its estimates per token, and its coefficient."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.config.describe import nearest
from rlhf.errors import InputError


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the per-token estimate of KL(π‖π_ref) on π's own samples: log π − log π_ref.

    Unbiased; may be negative on a token (Schulman 2020, "Approximating KL divergence", k1).
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the never-negative per-token estimate of KL(π‖π_ref): ½(log π − log π_ref)².

    Biased, but its gradient on π's own samples is the unbiased one of KL(π‖π_ref) (Schulman 2020,
    k2).
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the never-negative per-token estimate of KL(π‖π_ref): π_ref/π − 1 − log(π_ref/π).

    Unbiased, with less variance than k1 (Schulman 2020, k3).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


# (B, R) log-probabilities under policy and reference to (B, R) estimates, nats per token.
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def find_kl(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the entry of `KL` that `PPOConfig.kl_estimator` names.

    Raises:
        InputError: There is none.
    """
    if name not in KL:
        hint = nearest(name, KL)
        known = ", ".join(KL)
        raise InputError(f"kl_estimator: unknown estimator {name!r}{hint}; expected one of {known}")
    return KL[name]


def kl_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor, estimator: str
) -> Tensor:
    """Return Σ w·ρ·k, the KL to the reference as a term of the loss (Shao et al. 2024, eq. 3).

    The gradient is that of k alone: ρ = π/π_old is a constant that corrects for the tokens having
    been sampled by π_old, so that it stays in expectation what it is on π's own samples, also after
    the first update of a rollout. (The paper has no ρ, which is 1 in the first update.) For a given
    prefix it is ∇KL(π‖π_ref) with k2, ∇KL(π_ref‖π) with k3 and 0 with k1 (Tang and Munos 2025,
    arXiv 2506.09477).

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) of the policy that sampled.
        ref_logprobs: (B, R) of the reference.
        weights: (B, R) weight w of each token, 0 past the end; a mask counts as 0 and 1.
        estimator: Entry of `KL`.

    Returns:
        Scalar.
    """
    counts = weights != 0
    ratio = torch.exp((logprobs - old_logprobs) * counts).detach()
    return (weights * ratio * find_kl(estimator)(logprobs * counts, ref_logprobs * counts)).sum()


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
