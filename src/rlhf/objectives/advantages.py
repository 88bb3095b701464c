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


# The estimators that `PPOConfig.advantage` may name.
ADVANTAGES: dict[str, Estimator] = {
    "gae": Estimator(_gae_of_config, needs_critic=True, whitened=True),
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
