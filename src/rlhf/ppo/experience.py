"""What a PPO step passes from one phase to the next.

Shape letters: G prompts, B responses, P prompt tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.groups import group_batches, select_group_rows
from rlhf.data.schema import PromptRow, PromptText
from rlhf.ppo.roles import Critic, Role
from rlhf.signals import stop_point


@dataclass(frozen=True)
class Rollout:
    """Responses of the policy to a batch of prompts.

    Attributes:
        rows: G rows of prompts, which the scorers read.
        prompts: (G, P) tokens.
        responses: (B, R) tokens as sampled, EOS included.
        finished: (B,) bool, true where EOS was sampled before the limit.
        texts: B responses as text.
        groups: (B,) index of each response's prompt.
        logprobs: (B, R) log-probabilities of the sampled tokens from decoding, 0 past the end;
            None if the responses were not sampled here.
    """

    rows: Sequence[PromptRow]
    prompts: TokenBatch
    responses: TokenBatch
    finished: Tensor
    texts: Sequence[str]
    groups: Tensor
    logprobs: Tensor | None = None

    @property
    def response_rows(self) -> list[PromptRow]:
        """The row behind each of the B responses."""
        return [self.rows[group] for group in self.groups.tolist()]

    @property
    def prompt_texts(self) -> list[PromptText]:
        """The prompt of each of the B responses, which the scorers read."""
        return [row.prompt for row in self.response_rows]


@dataclass(frozen=True)
class Experience:
    """Everything the update needs, 0 past a response's end.

    Attributes:
        prompts: (G, P) tokens.
        responses: (B, R) tokens.
        groups: (B,) index of each response's prompt.
        logprobs: (B, R) log-probabilities under the policy that sampled.
        ref_logprobs: (B, R) under the reference; None without one.
        values: (B, R) values from the critic at rollout time; None without one.
        advantages: (B, R), whitened over the whole batch if the estimator asks for it.
        returns: (B, R) targets for the values; None without a critic.
    """

    prompts: TokenBatch
    responses: TokenBatch
    groups: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None

    def __len__(self) -> int:
        return len(self.responses)

    def select_rows(self, rows: Sequence[int]) -> "Experience":
        """Return the given responses and their prompts, trimmed to the longest among them."""
        index = torch.tensor(rows, device=self.logprobs.device)
        prompts, groups = select_group_rows(self.prompts, self.groups, rows)
        responses = self.responses.select_rows(index)
        width = responses.ids.shape[1]

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index, :width]

        return Experience(
            prompts,
            responses,
            groups,
            self.logprobs[index, :width],
            some(self.ref_logprobs),
            some(self.values),
            self.advantages[index, :width],
            some(self.returns),
        )


@dataclass(frozen=True)
class RolloutStats:
    """What is known about a rollout beyond the experience, for rewards and for the log.

    Attributes:
        scores: (B,) from the scorer, with the end-of-sequence rules applied.
        kl: (B, R) k1 estimate of the KL to the reference, 0 past the end (or without a reference).
        kl_k3: (B, R) k3 estimate.
        entropy: (B, R) of the policy, nats.
    """

    scores: Tensor
    kl: Tensor
    kl_k3: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What the roles compute for a rollout, each (B, R) fp32 and 0 past the end.

    Attributes:
        logprobs: Log-probabilities under the policy.
        entropy: Entropy of the policy, nats.
        ref_logprobs: Log-probabilities under the reference; None without one.
        values: Values from the critic; None without one.
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None

    def kl(self, estimator: str | None) -> Tensor:
        """Return the per-token KL by an entry of `objectives.KL`; 0 for None or no reference."""
        if self.ref_logprobs is None or estimator is None:
            return torch.zeros_like(self.logprobs)
        return objectives.KL[estimator](self.logprobs, self.ref_logprobs)

    def stats(self, scores: Tensor) -> RolloutStats:
        """Return what is logged, with the (B,) scores: KL by k1 and k3, whichever is charged."""
        return RolloutStats(scores, self.kl("k1"), self.kl("k3"), self.entropy)


@torch.no_grad()
def evaluate_rollout(
    rollout: Rollout,
    policy: Role,
    reference: Role | None,
    critic: Critic | None,
    config: PPOConfig,
) -> Evaluation:
    """Run all roles over a rollout, micro-batch by micro-batch.

    Args:
        rollout: The responses.
        policy: Role that sampled them.
        reference: Role that the KL is measured against; None for no KL.
        critic: Role that values states; None for no values.
        config: Temperature, constraint and micro-batch size.
    """
    responses = rollout.responses

    def blank() -> Tensor:
        return torch.zeros(responses.ids.shape, device=responses.ids.device)

    result = Evaluation(
        logprobs=blank(),
        entropy=blank(),
        ref_logprobs=None if reference is None else blank(),
        values=None if critic is None else blank(),
    )
    constraint = (config.temperature, config.min_response_length)
    lengths = (rollout.prompts.lengths, responses.lengths, rollout.groups)
    for rows in group_batches(*lengths, *config.micro_batch_limits):
        stop_point()
        prompts, groups = select_group_rows(rollout.prompts, rollout.groups, rows)
        answers = responses.select_rows(rows)
        width = answers.ids.shape[1]
        with policy.active() as lm:
            states = lm.response_states(prompts, answers, groups)
            own = lm.token_logprobs(states, answers, *constraint, entropy=True)
        result.logprobs[rows, :width], result.entropy[rows, :width] = own.logprobs, own.entropy
        if reference is not None and result.ref_logprobs is not None:
            with reference.active() as lm:
                ref_states = lm.response_states(prompts, answers, groups)
                ref = lm.token_logprobs(ref_states, answers, *constraint)
            result.ref_logprobs[rows, :width] = ref.logprobs
        if critic is not None and result.values is not None:
            if not critic.on_policy_trunk:
                with critic.role.active() as lm:
                    states = lm.response_states(prompts, answers, groups)
            result.values[rows, :width] = critic.values(states) * answers.mask
    return result


def rollout_metrics(
    rollout: Rollout, experience: Experience, stats: RolloutStats, kl_coeff: float | None
) -> dict[str, float]:
    """Return a rollout's metrics.

    KL metrics are included only if KL is charged (`kl_coeff` is not None), value metrics only with
    a critic.
    """
    mask, lengths = rollout.responses.mask, rollout.responses.lengths
    metrics = {
        "ppo/score": float(stats.scores.mean()),
        "ppo/score_std": float(stats.scores.std(correction=0)),
        "ppo/entropy": float(stats.entropy.sum() / mask.sum()),
        "ppo/response_length": float(lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
    }
    values, returns = experience.values, experience.returns
    if values is not None and returns is not None:
        explained = objectives.explained_variance(values, returns, mask)
        metrics |= {
            "ppo/explained_variance": explained,
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
    """Return rows for samples.jsonl for the first `count` responses; KL in nats."""
    kl, prompts = stats.kl.sum(1), rollout.prompt_texts
    prompt_tokens = rollout.prompts.lengths[rollout.groups]
    return [
        {
            "prompt": prompts[i].text,
            "response": rollout.texts[i],
            "finish_reason": "eos" if rollout.finished[i] else "length",
            "score": float(stats.scores[i]),
            "kl": float(kl[i]),
            "prompt_tokens": int(prompt_tokens[i]),
            "response_tokens": int(rollout.responses.lengths[i]),
        }
        for i in range(min(count, len(kl)))
    ]


def evaluation_metrics(rollout: Rollout, stats: RolloutStats, kl_coeff: float) -> dict[str, float]:
    """Return the metrics of a rollout on held-out prompts; `kl_coeff` is the charge per nat."""
    score, kl = float(stats.scores.mean()), float(stats.kl.sum(1).mean())
    return {
        "eval/score": score,
        "eval/kl": kl,
        "eval/objective": score - kl_coeff * kl,
        "eval/response_length": float(rollout.responses.lengths.float().mean()),
        "eval/eos_rate": float(rollout.finished.float().mean()),
    }
