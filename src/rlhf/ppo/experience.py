"""What a PPO step passes from one phase to the next.

Shape letters: B responses, P prompt tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch, micro_batches
from rlhf.data.schema import PromptText
from rlhf.ppo.roles import Critic, Role
from rlhf.signals import stop_point


@dataclass(frozen=True)
class Rollout:
    """Responses of the policy to a batch of prompts.

    Attributes:
        prompt_texts: B prompts as text, which is what scorers read.
        prompts: (B, P) tokens.
        responses: (B, R) tokens as sampled, EOS included.
        finished: (B,) bool, true where EOS was sampled before the limit.
        texts: B responses as text.
        logprobs: (B, R) that decoding gave the sampled tokens, 0 past the end; None where the
            responses were not sampled here.
    """

    prompt_texts: Sequence[PromptText]
    prompts: TokenBatch
    responses: TokenBatch
    finished: Tensor
    texts: Sequence[str]
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class Experience:
    """All that the update needs; everything is 0 past a response's end.

    Attributes:
        prompts: (B, P) tokens.
        responses: (B, R) tokens.
        logprobs: (B, R) log-probabilities under the policy that sampled.
        values: (B, R) of the critic at that time.
        advantages: (B, R) whitened over the whole batch.
        returns: (B, R) targets of the values.
    """

    prompts: TokenBatch
    responses: TokenBatch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def select_rows(self, rows: Sequence[int]) -> "Experience":
        """The given rows, trimmed to the longest response among them."""
        index = torch.tensor(rows, device=self.logprobs.device)
        responses = self.responses.select_rows(index)
        width = responses.ids.shape[1]
        logprobs, values, advantages, returns = (
            tensor[index, :width]
            for tensor in (self.logprobs, self.values, self.advantages, self.returns)
        )
        return Experience(
            self.prompts.select_rows(index), responses, logprobs, values, advantages, returns
        )

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens that a model reads for each row."""
        return self.prompts.lengths + self.responses.lengths


@dataclass(frozen=True)
class RolloutStats:
    """What is known of a rollout beyond the experience, for rewards and for the log.

    Attributes:
        scores: (B,) of the scorer, end-of-sequence rules applied.
        kl: (B, R) k1 estimate of the KL to the reference, 0 past the end (or without reference).
        kl_k3: (B, R) k3 estimate.
        entropy: (B, R) of the policy, nats.
    """

    scores: Tensor
    kl: Tensor
    kl_k3: Tensor
    entropy: Tensor


@torch.no_grad()
def evaluate_rollout(
    rollout: Rollout, policy: Role, reference: Role | None, critic: Critic, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What all roles say of a rollout, micro-batch by micro-batch.

    Args:
        rollout: The responses.
        policy: Role that sampled them.
        reference: Role that KL is charged against; None charges none.
        critic: Role that values states.
        config: Temperature, constraint and micro-batch size.

    Returns:
        Log-probabilities under policy and reference (the policy's own without one), values and
        the policy's entropy, each (B, R) fp32, 0 past the end.
    """
    responses = rollout.responses
    result = torch.zeros(4, *responses.ids.shape, device=responses.ids.device)
    tokens = rollout.prompts.lengths + responses.lengths
    constraint = (config.temperature, config.min_response_length)
    for rows in micro_batches(tokens, *config.micro_batch_limits):
        stop_point()
        prompts, answers = rollout.prompts.select_rows(rows), responses.select_rows(rows)
        with policy.active() as lm:
            states = lm.response_states(prompts, answers)
            own = lm.token_logprobs(states, answers, *constraint, entropy=True)
        ref_logprobs = own.logprobs
        if reference is not None:
            with reference.active() as lm:
                ref_states = lm.response_states(prompts, answers)
                ref_logprobs = lm.token_logprobs(ref_states, answers, *constraint).logprobs
        if not critic.on_policy_trunk:
            with critic.role.active() as lm:
                states = lm.response_states(prompts, answers)
        values = critic.values(states) * answers.mask
        parts = torch.stack([own.logprobs, ref_logprobs, values, own.entropy])
        result[:, rows, : answers.ids.shape[1]] = parts
    return result[0], result[1], result[2], result[3]


def rollout_metrics(
    rollout: Rollout, experience: Experience, stats: RolloutStats, kl_coeff: float | None
) -> dict[str, float]:
    """Metrics of a rollout; those of KL only where it is charged (`kl_coeff` not None)."""
    mask, lengths = rollout.responses.mask, rollout.responses.lengths
    values, returns = experience.values, experience.returns
    metrics = {
        "ppo/score": float(stats.scores.mean()),
        "ppo/score_std": float(stats.scores.std(correction=0)),
        "ppo/entropy": float(stats.entropy.sum() / mask.sum()),
        "ppo/response_length": float(lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
        "ppo/explained_variance": objectives.explained_variance(values, returns, mask),
        "ppo/value": float(values.sum() / mask.sum()),
    }
    if rollout.logprobs is not None:
        deviation = torch.expm1(experience.logprobs - rollout.logprobs)  # 0 past the end
        metrics["ppo/decode_deviation"] = float(deviation.abs().max())
    if kl_coeff is not None:
        kl = stats.kl.sum(1)
        metrics |= {
            "ppo/kl": float(kl.mean()),
            "ppo/kl_k3": float(stats.kl_k3.sum(1).mean()),
            "ppo/kl_coeff": kl_coeff,
            "ppo/score_minus_kl": float((stats.scores - kl_coeff * kl).mean()),
        }
    return metrics


def rollout_samples(rollout: Rollout, stats: RolloutStats, count: int) -> list[dict[str, Any]]:
    """The first `count` responses with score, KL (nats) and token counts, for samples.jsonl."""
    kl = stats.kl.sum(1)
    return [
        {
            "prompt": rollout.prompt_texts[i].text,
            "response": rollout.texts[i],
            "finish_reason": "eos" if rollout.finished[i] else "length",
            "score": float(stats.scores[i]),
            "kl": float(kl[i]),
            "prompt_tokens": int(rollout.prompts.lengths[i]),
            "response_tokens": int(rollout.responses.lengths[i]),
        }
        for i in range(min(count, len(kl)))
    ]


@dataclass(frozen=True)
class Minibatch:
    """Statistics of one minibatch, means over its tokens; parts of it add up.

    Attributes:
        tokens: Response tokens of the minibatch.
        policy_loss: Clipped surrogate.
        value_loss: Clipped squared error.
        policy_clipped: Share of tokens whose ratio was clipped.
        value_clipped: Share of tokens whose value was clipped.
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
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name not in ("tokens", "ratio_deviation")
        }
        deviation = max(self.ratio_deviation, other.ratio_deviation)
        return Minibatch(tokens=self.tokens, ratio_deviation=deviation, **sums)


class UpdateLog:
    """Collects the minibatches of a step's update.

    Attributes:
        norms: Gradient norms of the updates that were made.
    """

    def __init__(self) -> None:
        self._minibatches: list[Minibatch] = []
        self.norms: list[dict[str, float]] = []

    def add(self, minibatch: Minibatch) -> None:
        """Adds a minibatch in the order of the update."""
        self._minibatches.append(minibatch)

    def metrics(self, *, stopped_early: bool) -> dict[str, float]:
        """Means over the step, the last KL, and how far the first ratios were from 1."""
        count = len(self._minibatches)
        metrics = {
            f"ppo/{shown}": sum(getattr(m, name) for m in self._minibatches) / count
            for name, shown in {
                "policy_loss": "policy_loss",
                "value_loss": "value_loss",
                "policy_clipped": "policy_clip_fraction",
                "value_clipped": "value_clip_fraction",
            }.items()
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
