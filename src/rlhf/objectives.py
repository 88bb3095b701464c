"""The formulas of RLHF as pure tensor functions; nothing here knows about models.

Shape letters: B batch, R response tokens. A mask is (B, R) bool, true on the response tokens that
count. Losses are *sums*: the caller divides by the count of the whole minibatch, so that neither
micro-batching, padding nor the number of processes changes a result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.config.describe import nearest
from rlhf.errors import InputError


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Bradley–Terry loss of each pair, −log σ(r_c − r_r − margin) + c·(r_c + r_r)².

    Ouyang et al. 2022, eq. 1; margin after Touvron et al. 2023, eq. 2; centering term after
    Eisenstein et al. 2023, because the first term does not determine the overall level of scores.

    Args:
        chosen: (B,) scores of the preferred responses.
        rejected: (B,) scores of the others.
        margin: (B,) minimum by which the chosen response should win.
        centering: Weight c of the centering term.

    Returns:
        (B,) losses.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + centering * (chosen + rejected) ** 2


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
