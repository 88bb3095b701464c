"""What a PPO step passes from one phase to the next.

Shape letters: B responses, P prompt tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf.data.batching import TokenBatch
from rlhf.data.schema import PromptText


@dataclass(frozen=True)
class Rollout:
    """Responses of the policy to a batch of prompts.

    Attributes:
        prompt_texts: B prompts as text, for judges with another tokenizer.
        prompts: (B, P) tokens.
        responses: (B, R) tokens as sampled, EOS included.
        finished: (B,) bool, true where EOS was sampled before the limit.
        texts: B responses as text.
    """

    prompt_texts: Sequence[PromptText]
    prompts: TokenBatch
    responses: TokenBatch
    finished: Tensor
    texts: Sequence[str]


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

    def select(self, rows: Sequence[int]) -> "Experience":
        """The given rows, trimmed to the longest response among them."""
        index = torch.tensor(rows, device=self.logprobs.device)
        responses = self.responses.select(index)
        width = responses.ids.shape[1]
        logprobs, values, advantages, returns = (
            tensor[index, :width]
            for tensor in (self.logprobs, self.values, self.advantages, self.returns)
        )
        return Experience(
            self.prompts.select(index), responses, logprobs, values, advantages, returns
        )

    def by_length(self) -> list[int]:
        """Rows from short to long, so that micro-batches have little padding."""
        lengths = self.prompts.lengths + self.responses.lengths
        return lengths.argsort(stable=True).tolist()


@dataclass(frozen=True)
class RolloutStats:
    """What is known of a rollout beyond the experience, for rewards and for the log.

    Attributes:
        scores: (B,) of the judge, end-of-sequence rules applied.
        kl: (B, R) k1 estimate of the KL to the reference, 0 past the end (or without reference).
        kl_k3: (B, R) k3 estimate.
        entropy: (B, R) of the policy, nats.
    """

    scores: Tensor
    kl: Tensor
    kl_k3: Tensor
    entropy: Tensor


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
