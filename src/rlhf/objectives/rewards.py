"""From scores to the rewards of tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.config import PPOConfig


def shaped_scores(scores: Tensor, lengths: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """Clip scores, charge for length, and apply the rules of a missing EOS, in this order.

    A `missing_eos_score` is final: it replaces the score with all that was done to it.

    Args:
        scores: (B,) from the scorer.
        lengths: (B,) response lengths, EOS included.
        finished: (B,) bool, whether the response ended with EOS.
        config: The fields `reward_clip`, `length_penalty` (with its start), `missing_eos_penalty`
            and `missing_eos_score`.

    Returns:
        (B,) scores.
    """
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.length_penalty:
        beyond = (lengths - config.length_penalty_start).clamp(min=0)
        scores = scores - config.length_penalty * beyond
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * ~finished
    if config.missing_eos_score is not None:
        scores = torch.where(finished, scores, config.missing_eos_score)
    return scores


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coeff: float) -> Tensor:
    """Return the reward of each token: −kl_coeff·KL everywhere, plus the score on the last token.

    Ziegler et al. 2019, eq. 2, spread over tokens.

    Args:
        scores: (B,) score of each response.
        kl: (B, R) per-token KL estimate, 0 past the end.
        lengths: (B,) response lengths, each at least 1.
        kl_coeff: Weight of the KL penalty, in score units per nat.

    Returns:
        (B, R), 0 past the end.
    """
    rewards = -kl_coeff * kl
    return rewards.scatter_add(1, lengths[:, None] - 1, scores[:, None].to(rewards.dtype))


def whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda local: local,
) -> Tensor:
    """Scale masked values to variance 1 and, if asked, shift them to mean 0.

    Advantages are shifted; rewards are only scaled, because their mean is what is to be learned.
    The variance is the unbiased one; with fewer than two values there is only the shift.

    Args:
        values: (B, R).
        mask: (B, R) bool.
        shift_mean: Whether the result has mean 0 (else it keeps its mean, scaled).
        reduce: Sums a number over all processes; by default there is only one.

    Returns:
        (B, R), 0 where masked.
    """
    count = reduce(mask.sum())
    mean = reduce((values * mask).sum()) / count.clamp(min=1)
    variance = reduce(((values - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    scale = torch.where(count > 1, torch.rsqrt(variance + 1e-8), 1.0)
    return (values - mean if shift_mean else values) * scale * mask
