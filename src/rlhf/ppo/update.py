"""The update of a PPO step: losses and gradients of micro-batches, and their statistics."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.roles import Critic, Role

# Means: the parts from micro-batches and processes are summed.
_SUMS = ("policy_loss", "value_loss", "kl_loss", "policy_clipped", "value_clipped", "kl", "ratio")


@dataclass(frozen=True)
class Minibatch:
    """Statistics of one minibatch, as means, so that its parts can be summed.

    Losses are means by `loss_average`, all else means over tokens.

    Attributes:
        tokens: Response tokens of the minibatch.
        policy_loss: Clipped surrogate.
        value_loss: Clipped squared error; 0 without a critic.
        kl_loss: KL to the reference as a loss, without its coefficient; 0 if it is charged in the
            rewards.
        policy_clipped: Share of tokens whose ratio was clipped.
        value_clipped: Share of tokens whose value was clipped; 0 without a critic.
        kl: KL to the policy that sampled, nats per token.
        ratio: Mean probability ratio.
        ratio_deviation: Largest deviation of a ratio from 1.
    """

    tokens: int
    policy_loss: float = 0.0
    value_loss: float = 0.0
    kl_loss: float = 0.0
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


@dataclass(frozen=True)
class Divisors:
    """What a minibatch's sums are divided by, over all processes.

    Attributes:
        tokens: Response tokens, for means over tokens.
        losses: What losses are divided by: tokens or responses, see `objectives.loss_weights`.
    """

    tokens: int
    losses: int


def count_divisors(
    minibatch: Experience, config: PPOConfig, reduce: Callable[..., Tensor]
) -> Divisors:
    """Count a minibatch; `reduce` is `Trainer.reduce`."""
    tokens = minibatch.responses.lengths.sum()
    responses = torch.full_like(tokens, len(minibatch.responses))
    total = reduce(torch.stack([tokens, responses])).tolist()
    return Divisors(tokens=total[0], losses=total[0 if config.loss_average == "token" else 1])


def add_gradients(
    micro: Experience,
    divisors: Divisors,
    policy: Role,
    critic: Critic | None,
    config: PPOConfig,
    kl_coeff: float,
) -> Minibatch:
    """Add a micro-batch's share to the gradients.

    Args:
        micro: Rows of a minibatch.
        divisors: Those of the whole minibatch.
        policy: Role being trained.
        critic: Role that values states; None if the estimator needs none.
        config: Clip ranges, coefficients, temperature and constraint.
        kl_coeff: Weight of the KL to the reference in the loss; not used with `kl_placement` reward
            or without a reference.

    Returns:
        The micro-batch's share of the minibatch's statistics.
    """
    mask, value = micro.responses.mask, None
    weights = objectives.loss_weights(mask, config.loss_average, config.target_sequence_length)
    with policy.active() as lm:
        states = lm.response_states(micro.prompts, micro.responses, micro.groups)
        new = lm.token_logprobs(
            states,
            micro.responses,
            config.temperature,
            config.min_response_length,
            entropy=config.entropy_coef != 0,
        )
        surrogate, kl = _policy_losses(new.logprobs, micro, weights, config)
        loss = surrogate.total - config.entropy_coef * (new.entropy * weights).sum()
        if kl is not None:
            loss = loss + kl_coeff * kl
        if critic is not None and critic.on_policy_trunk:
            value = _value_loss(critic, states, micro, weights, config)
            loss = loss + config.vf_coef * value.total
        (loss / divisors.losses).backward()
    if critic is not None and not critic.on_policy_trunk:
        with critic.role.active() as lm:
            states = lm.response_states(micro.prompts, micro.responses, micro.groups)
            value = _value_loss(critic, states, micro, weights, config)
            (config.vf_coef * value.total / divisors.losses).backward()
    log_ratio = (new.logprobs.detach() - micro.logprobs)[mask]
    return Minibatch(
        tokens=divisors.tokens,
        policy_loss=surrogate.total.item() / divisors.losses,
        value_loss=0.0 if value is None else value.total.item() / divisors.losses,
        kl_loss=0.0 if kl is None else kl.item() / divisors.losses,
        policy_clipped=float(surrogate.clipped) / divisors.tokens,
        value_clipped=0.0 if value is None else float(value.clipped) / divisors.tokens,
        # KL(old‖new) on samples from old: k3 with the roles swapped.
        kl=float((torch.expm1(log_ratio) - log_ratio).sum()) / divisors.tokens,
        ratio=float(log_ratio.exp().sum()) / divisors.tokens,
        ratio_deviation=float(torch.expm1(log_ratio).abs().max()),
    )


def _policy_losses(
    logprobs: Tensor, micro: Experience, weights: Tensor, config: PPOConfig
) -> tuple[objectives.ClippedLoss, Tensor | None]:
    """Return the surrogate, and the KL to the reference if it is charged in the loss."""
    clip = (config.clip_range, config.effective_clip_range_high)
    surrogate = objectives.policy_loss(logprobs, micro.logprobs, micro.advantages, weights, *clip)
    if config.kl_placement == "reward" or micro.ref_logprobs is None:
        return surrogate, None
    ref, estimator = micro.ref_logprobs, config.kl_estimator
    return surrogate, objectives.kl_loss(logprobs, micro.logprobs, ref, weights, estimator)


def _value_loss(
    critic: Critic, states: Tensor, micro: Experience, weights: Tensor, config: PPOConfig
) -> objectives.ClippedLoss:
    assert micro.values is not None
    assert micro.returns is not None
    values, limit = critic.values(states), config.value_clip_range
    return objectives.value_loss(values, micro.values, micro.returns, weights, limit)


class UpdateLog:
    """Collects the minibatches of a step's update.

    Args:
        critic: Whether there is a critic, whose metrics are then reported.
        kl_loss: Whether the KL to the reference is a loss, which is then reported.

    Attributes:
        norms: Gradient norms of the updates made.
    """

    def __init__(self, *, critic: bool, kl_loss: bool) -> None:
        self._left_out = {"value_loss": not critic, "value_clipped": not critic}
        self._left_out["kl_loss"] = not kl_loss
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
                "kl_loss": "kl_loss",
                "policy_clipped": "policy_clip_fraction",
                "value_clipped": "value_clip_fraction",
            }.items()
            if not self._left_out.get(name)
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
