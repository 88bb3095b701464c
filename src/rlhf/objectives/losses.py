"""The losses of policy and critic, and how well the critic predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClippedLoss:
    """A clipped loss over a micro-batch.

    Attributes:
        total: Scalar, summed over tokens.
        clipped: Scalar, number of tokens where the clip removed the gradient.
    """

    total: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> ClippedLoss:
    """Return PPO's clipped surrogate, negated: −min(ρA, clip(ρ, 1−ε, 1+ε)A).

    Schulman et al. 2017, eq. 7, with ρ = π/π_old.

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) of the policy that sampled.
        advantages: (B, R).
        mask: (B, R) bool.
        clip_range: ε.
    """
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return ClippedLoss(
        total=(torch.maximum(plain, clipped) * mask).sum(),
        clipped=((clipped > plain) & mask).sum(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> ClippedLoss:
    """Return the clipped squared error, ½·max((V−R)², (clip(V, V_old−ε, V_old+ε)−R)²).

    As in Ziegler et al. 2019 and Stiennon et al. 2020.

    Args:
        values: (B, R) of the critic being trained.
        old_values: (B, R) at rollout time.
        returns: (B, R) targets.
        mask: (B, R) bool.
        clip_range: ε, in score units.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ClippedLoss(
        total=0.5 * (torch.maximum(plain, clipped) * mask).sum(),
        clipped=((clipped > plain) & mask).sum(),
    )


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> float:
    """Return 1 − Var(target − prediction)/Var(target) over masked tokens; 0 if targets agree."""
    targets, errors = targets[mask], (targets - predictions)[mask]
    if len(targets) < 2 or targets.var() == 0:
        return 0.0
    return float(1 - errors.var() / targets.var())
