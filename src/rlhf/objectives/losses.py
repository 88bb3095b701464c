"""The losses of policy and critic, and how well the critic predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClippedLoss:
    """A clipped loss over a micro-batch.

    Attributes:
        total: Scalar, weighted sum over tokens.
        clipped: Scalar, number of tokens where the clip removed the gradient.
    """

    total: Tensor
    clipped: Tensor


def loss_weights(mask: Tensor, average: str, limit: int) -> Tensor:
    """Return each token's weight in the losses, by `PPOConfig.loss_average`; 0 past the end.

    token: 1, to be divided by the tokens of the minibatch. sequence: 1/length, to be divided by its
    responses (Shao et al. 2024, eq. 3). constant: 1/limit, divided by its responses too, so that
    neither a response's length nor the others' changes a token's weight (Liu et al. 2025,
    "Dr. GRPO").

    Args:
        mask: (B, R) bool.
        average: token, sequence or constant.
        limit: Most tokens of a response, `PPOConfig.target_sequence_length`.
    """
    if average == "sequence":
        return mask / mask.sum(1, keepdim=True)
    return mask / limit if average == "constant" else mask.float()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> ClippedLoss:
    """Return PPO's clipped surrogate, negated: −min(ρA, clip(ρ, 1−ε, 1+ε)A), summed with weights.

    Schulman et al. 2017, eq. 7, with ρ = π/π_old. The clip above 1 may differ (Yu et al. 2025,
    arXiv 2503.14476, §3.1, "Clip-Higher").

    Args:
        logprobs: (B, R) of the policy being trained.
        old_logprobs: (B, R) of the policy that sampled.
        advantages: (B, R).
        weights: (B, R) weight of each token, 0 past the end; a mask counts as 0 and 1.
        clip_range: ε.
        clip_range_high: ε above 1; None for the same.
    """
    counts = weights != 0
    ratio = torch.exp((logprobs - old_logprobs) * counts)
    high = clip_range if clip_range_high is None else clip_range_high
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + high) * advantages
    return ClippedLoss(
        total=(torch.maximum(plain, clipped) * weights).sum(),
        clipped=((clipped > plain) & counts).sum(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_range: float
) -> ClippedLoss:
    """Return the clipped squared error, ½·max((V−R)², (clip(V, V_old−ε, V_old+ε)−R)²).

    As in Ziegler et al. 2019 and Stiennon et al. 2020.

    Args:
        values: (B, R) of the critic being trained.
        old_values: (B, R) at rollout time.
        returns: (B, R) targets.
        weights: (B, R) weight of each token, 0 past the end; a mask counts as 0 and 1.
        clip_range: ε, in score units.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ClippedLoss(
        total=0.5 * (torch.maximum(plain, clipped) * weights).sum(),
        clipped=((clipped > plain) & (weights != 0)).sum(),
    )


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> float:
    """Return 1 − Var(target − prediction)/Var(target) over masked tokens; 0 if targets agree."""
    targets, errors = targets[mask], (targets - predictions)[mask]
    if len(targets) < 2 or targets.var() == 0:
        return 0.0
    return float(1 - errors.var() / targets.var())
