"""From rewards of tokens to advantages: the estimators that a configuration may name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.config.describe import nearest
from rlhf.errors import InputError


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE (Schulman et al. 2016, eq. 16); every response is terminal.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, with V = A = 0 past the end.

    Args:
        rewards: (B, R).
        values: (B, R), V_t of the state before token t.
        mask: (B, R) bool; true tokens are a prefix of each row.
        gamma: Discount γ.
        gae_lambda: λ; 0 is one-step, 1 is Monte Carlo.

    Returns:
        Advantages and returns (advantage + value), each (B, R), 0 past the end.
    """
    values, rewards = values * mask, rewards * mask
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * gae_lambda * following_advantage) * mask[:, t]
        advantages[:, t] = following_advantage
        following_value = values[:, t]
    return advantages, advantages + values


AdvantageFunction = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, PPOConfig], tuple[Tensor, Tensor | None]
]


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator: an entry of `ADVANTAGES`.

    Attributes:
        function: Takes the token rewards (B, R), the critic's values (B, R) or None, the mask
            (B, R), the group ids (B,), equal for responses to the same prompt, and the stage's
            configuration. Returns the advantages (B, R) and the targets for the values (B, R), or
            None without a critic; both 0 past the end.
        needs_critic: Whether to train a critic; without one, values cost no weights, memory or
            loss.
        whitened: Whether the advantages are then shifted to mean 0 and scaled to variance 1 over
            the whole batch.
    """

    function: AdvantageFunction
    needs_critic: bool
    whitened: bool


def _gae_of_config(
    rewards: Tensor, values: Tensor | None, mask: Tensor, _groups: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor | None]:
    """Wrap `gae` as an entry of `ADVANTAGES`; it ignores which responses share a prompt."""
    assert values is not None
    return gae(rewards, values, mask, config.gamma, config.gae_lambda)


def _above_group(totals: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ_j (R_i − R_j) over the group of each response i, and the size of its group.

    Differences, unlike a mean that is subtracted, are exactly 0 where all rewards of a group agree.

    Args:
        totals: (B,) rewards R of whole responses.
        groups: (B,) group ids, in any order.
    """
    same = groups[:, None] == groups[None, :]
    return ((totals[:, None] - totals[None, :]) * same).sum(1), same.sum(1)


def rloo(totals: Tensor, groups: Tensor) -> Tensor:
    """Return each reward less the mean of the *others* in its group, R_i − Σ_{j≠i} R_j/(n−1).

    Ahmadian et al. 2024 (arXiv 2402.14740), after Kool et al. 2019. The baseline does not
    depend on response i, so that the gradient is unbiased. Alone in its group, a response is 0.

    Args:
        totals: (B,) rewards R of whole responses.
        groups: (B,) group ids, in any order.
    """
    above, sizes = _above_group(totals, groups)
    return above / (sizes - 1).clamp(min=1)


def grpo(totals: Tensor, groups: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """Return (R_i − mean)/(std + 1e-4) with the moments of the group, response i included.

    Shao et al. 2024 (arXiv 2402.03300), §4.1.2; std is the unbiased one. Without the division,
    Liu et al. 2025 (arXiv 2503.20783, "Dr. GRPO"): dividing weights prompts whose responses are
    scored alike more than others.

    Args:
        totals: (B,) rewards R of whole responses.
        groups: (B,) group ids, in any order.
        divide_by_std: Whether to divide.
    """
    above, sizes = _above_group(totals, groups)
    centered = above / sizes
    if not divide_by_std:
        return centered
    same = (groups[:, None] == groups[None, :]).to(centered.dtype)
    variance = same @ centered**2 / (sizes - 1).clamp(min=1)
    return centered / (variance.sqrt() + 1e-4)


def rewards_to_come(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the (B, R) discounted rewards from each token on, Σ_{k≥t} γ^{k−t} r_k; 0 past the end.

    Args:
        rewards: (B, R).
        mask: (B, R) bool; true tokens are a prefix of each row.
        gamma: Discount γ.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def _rloo_of_config(
    rewards: Tensor, _values: Tensor | None, mask: Tensor, groups: Tensor, _config: PPOConfig
) -> tuple[Tensor, None]:
    """Give all tokens of a response the advantage of the response."""
    return rloo((rewards * mask).sum(1), groups)[:, None] * mask, None


def _grpo_of_config(
    rewards: Tensor, _values: Tensor | None, mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    """Give all tokens of a response the advantage of the response."""
    advantages = grpo((rewards * mask).sum(1), groups, divide_by_std=config.grpo_std)
    return advantages[:, None] * mask, None


def _reinforce_pp_of_config(
    rewards: Tensor, _values: Tensor | None, mask: Tensor, _groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    """Take the rewards to come of each token, with no baseline.

    Hu 2025 (arXiv 2501.03262), REINFORCE++; the whitening follows.
    """
    return rewards_to_come(rewards, mask, config.gamma), None


def _reinforce_pp_baseline_of_config(
    rewards: Tensor, _values: Tensor | None, mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    """Take the rewards to come, after the group's mean is subtracted from the last token's reward.

    Hu 2025 (arXiv 2501.03262), REINFORCE++-baseline; the whitening follows. The mean is that of the
    rewards of whole responses, KL included if it is charged there.
    """
    totals = (rewards * mask).sum(1)
    above, sizes = _above_group(totals, groups)
    mean = totals - above / sizes
    rewards = (rewards * mask).scatter_add(1, mask.sum(1, keepdim=True) - 1, -mean[:, None])
    return rewards_to_come(rewards, mask, config.gamma), None


# The estimators that `PPOConfig.advantage` may name.
ADVANTAGES: dict[str, Estimator] = {
    "gae": Estimator(_gae_of_config, needs_critic=True, whitened=True),
    "rloo": Estimator(_rloo_of_config, needs_critic=False, whitened=False),
    "grpo": Estimator(_grpo_of_config, needs_critic=False, whitened=False),
    "reinforce_pp": Estimator(_reinforce_pp_of_config, needs_critic=False, whitened=True),
    "reinforce_pp_baseline": Estimator(
        _reinforce_pp_baseline_of_config, needs_critic=False, whitened=True
    ),
}


def find_estimator(name: str) -> Estimator:
    """Return the entry of `ADVANTAGES` that `PPOConfig.advantage` names.

    Raises:
        InputError: There is none.
    """
    if name not in ADVANTAGES:
        known = ", ".join(ADVANTAGES)
        hint = nearest(name, ADVANTAGES)
        raise InputError(f"advantage: unknown estimator {name!r}{hint}; expected one of {known}")
    return ADVANTAGES[name]
