"""The formulas of RLHF as pure tensor functions; nothing here knows about models.

Shape letters: B batch, R response tokens. A mask is (B, R) bool, true on the response tokens that
count. Losses are *sums*: the caller divides by the count of the whole minibatch, so that neither
micro-batching, padding nor the number of processes changes a result.
"""

from rlhf.objectives.advantages import (
    ADVANTAGES,
    Estimator,
    find_estimator,
    gae,
    grpo,
    rewards_to_come,
    rloo,
)
from rlhf.objectives.kl import KL, AdaptiveKL, find_kl, kl_k1, kl_k2, kl_k3, kl_loss
from rlhf.objectives.losses import (
    ClippedLoss,
    explained_variance,
    loss_weights,
    policy_loss,
    value_loss,
)
from rlhf.objectives.preferences import dpo_loss, ipo_loss, pairwise_loss
from rlhf.objectives.rewards import shaped_scores, token_rewards, whiten

__all__ = [
    "ADVANTAGES",
    "KL",
    "AdaptiveKL",
    "ClippedLoss",
    "Estimator",
    "dpo_loss",
    "explained_variance",
    "find_estimator",
    "find_kl",
    "gae",
    "grpo",
    "ipo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_loss",
    "loss_weights",
    "pairwise_loss",
    "policy_loss",
    "rewards_to_come",
    "rloo",
    "shaped_scores",
    "token_rewards",
    "value_loss",
    "whiten",
]
