"""The update of a PPO step: losses and gradients of micro-batches, and their statistics."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.roles import Critic, Role

# Means over tokens: the parts from micro-batches and processes are summed.
_SUMS = ("policy_loss", "value_loss", "policy_clipped", "value_clipped", "kl", "ratio")


@dataclass(frozen=True)
class Minibatch:
    """Statistics of one minibatch, as means over its tokens, so that its parts can be summed.

    Attributes:
        tokens: Response tokens of the minibatch.
        policy_loss: Clipped surrogate.
        value_loss: Clipped squared error; 0 without a critic.
        policy_clipped: Share of tokens whose ratio was clipped.
        value_clipped: Share of tokens whose value was clipped; 0 without a critic.
        kl: KL to the policy that sampled, nats per token.
        ratio: Mean probability ratio.
        ratio_deviation: Largest deviation of a ratio from 1.
    """

    tokens: int
    policy_loss: float = 0.0
    value_loss: float = 0.0
    policy_clipped: float = 0.0
    value_clipped: float = 0.0
    kl: float = 0.0
    ratio: float = 0.0
    ratio_deviation: float = 0.0

    def __add__(self, other: "Minibatch") -> "Minibatch":
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        deviation = max(self.ratio_deviation, other.ratio_deviation)
        return Minibatch(tokens=self.tokens, ratio_deviation=deviation, **sums)

    def reduced(self, reduce: Callable[..., Tensor]) -> "Minibatch":
        """Return the statistics over all processes; `reduce` is `Trainer.reduce`.

        `tokens` must already be the count over all processes.
        """
        local = torch.tensor([getattr(self, name) for name in _SUMS], dtype=torch.float64)
        deviation = reduce(torch.tensor(self.ratio_deviation, dtype=torch.float64), "max")
        sums = dict(zip(_SUMS, reduce(local).tolist(), strict=True))
        return Minibatch(tokens=self.tokens, ratio_deviation=float(deviation), **sums)


def add_gradients(
    micro: Experience, count: int, policy: Role, critic: Critic | None, config: PPOConfig
) -> Minibatch:
    """Add a micro-batch's share to the gradients.

    Args:
        micro: Rows of a minibatch.
        count: Response tokens of the whole minibatch, over all processes.
        policy: Role being trained.
        critic: Role that values states; None if the estimator needs none.
        config: Clip ranges, coefficients, temperature and constraint.

    Returns:
        The micro-batch's share of the minibatch's statistics.
    """
    mask, value = micro.responses.mask, None
    with policy.active() as lm:
        states = lm.response_states(micro.prompts, micro.responses)
        new = lm.token_logprobs(
            states,
            micro.responses,
            config.temperature,
            config.min_response_length,
            entropy=config.entropy_coef != 0,
        )
        surrogate = objectives.policy_loss(
            new.logprobs, micro.logprobs, micro.advantages, mask, config.clip_range
        )
        loss = surrogate.total - config.entropy_coef * new.entropy.sum()
        if critic is not None and critic.on_policy_trunk:
            value = _value_loss(critic, states, micro, config)
            loss = loss + config.vf_coef * value.total
        (loss / count).backward()
    if critic is not None and not critic.on_policy_trunk:
        with critic.role.active() as lm:
            states = lm.response_states(micro.prompts, micro.responses)
            value = _value_loss(critic, states, micro, config)
            (config.vf_coef * value.total / count).backward()
    log_ratio = (new.logprobs.detach() - micro.logprobs)[mask]
    return Minibatch(
        tokens=count,
        policy_loss=surrogate.total.item() / count,
        value_loss=0.0 if value is None else value.total.item() / count,
        policy_clipped=float(surrogate.clipped) / count,
        value_clipped=0.0 if value is None else float(value.clipped) / count,
        # KL(old‖new) on samples from old: k3 with the roles swapped.
        kl=float((torch.expm1(log_ratio) - log_ratio).sum()) / count,
        ratio=float(log_ratio.exp().sum()) / count,
        ratio_deviation=float(torch.expm1(log_ratio).abs().max()),
    )


def _value_loss(
    critic: Critic, states: Tensor, micro: Experience, config: PPOConfig
) -> objectives.ClippedLoss:
    assert micro.values is not None
    assert micro.returns is not None
    values, mask = critic.values(states), micro.responses.mask
    return objectives.value_loss(values, micro.values, micro.returns, mask, config.value_clip_range)


class UpdateLog:
    """Collects the minibatches of a step's update.

    Args:
        critic: Whether there is a critic, whose metrics are then reported.

    Attributes:
        norms: Gradient norms of the updates made.
    """

    def __init__(self, *, critic: bool) -> None:
        self._critic = critic
        self._minibatches: list[Minibatch] = []
        self.norms: list[dict[str, float]] = []

    def add(self, minibatch: Minibatch) -> None:
        """Add a minibatch, in the order of the updates."""
        self._minibatches.append(minibatch)

    def metrics(self, *, stopped_early: bool) -> dict[str, float]:
        """Return means over the step, the last KL, and how far the first ratios were from 1."""
        count = len(self._minibatches)
        metrics = {
            f"ppo/{shown}": sum(getattr(m, name) for m in self._minibatches) / count
            for name, shown in {
                "policy_loss": "policy_loss",
                "value_loss": "value_loss",
                "policy_clipped": "policy_clip_fraction",
                "value_clipped": "value_clip_fraction",
            }.items()
            if self._critic or not name.startswith("value")
        }
        metrics |= {
            "ppo/kl_to_rollout": self._minibatches[-1].kl,
            "ppo/ratio_first": self._minibatches[0].ratio_deviation,
            "ppo/stopped_early": float(stopped_early),
        }
        norms = [norm for norm in self.norms if norm]
        for name in norms[0] if norms else ():
            metrics[name] = sum(norm[name] for norm in norms) / len(norms)
        return metrics
