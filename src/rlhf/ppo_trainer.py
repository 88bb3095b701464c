"""KL-penalized proximal policy optimization (Schulman et al. 2017; Ziegler et al. 2019)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import objectives
from rlhf.config import PPOConfig
from rlhf.console import say, show
from rlhf.data.batching import chunks, permutation, rows_for_step
from rlhf.data.groups import group_batches, members
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.schema import PromptRow
from rlhf.models.generation import Generator, generate_in_chunks, rollout_uniforms
from rlhf.models.saving import save_policy
from rlhf.ppo.deviations import deviation_warnings
from rlhf.ppo.experience import (
    Experience,
    Rollout,
    RolloutStats,
    evaluate_rollout,
    evaluation_metrics,
    rollout_metrics,
    rollout_samples,
)
from rlhf.ppo.inputs import PPOInputs, made_later, other_bases, read_ppo_inputs
from rlhf.ppo.reward_parts import RewardFunctions
from rlhf.ppo.rewards import load_rewards
from rlhf.ppo.roles import load_bases, make_critic, make_policy, make_reference
from rlhf.ppo.update import Minibatch, UpdateLog, add_gradients, count_divisors
from rlhf.reports.dry_run import dry_run_report
from rlhf.reports.model_card import write_card
from rlhf.signals import stop_point
from rlhf.stages import RunResult
from rlhf.training.running import run_training
from rlhf.training.trainer import Callback, ParameterGroup, Trainer

# A minibatch whose mean probability ratio exceeds this has left the trust region of PPO.
RATIO_LIMIT = 10.0
EVALUATION_ROWS = 256
SAMPLES_PER_STEP = 4
CARD_METRICS = ("ppo/score", "ppo/kl", "ppo/response_length", "eval/")


def train_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunctions | None = None,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Tune a policy against reward models, classifiers and functions of texts.

    Args:
        config: The stage's configuration.
        reward_fn: A function, or several (as `Reward` with weight and name). Called with prompts
            and responses (texts) and the columns that it names, returns one number each; see
            docs/rewards.md. Adds to the rewards of the configuration.
        model: A transformers model instead of `config.base_model`; it is changed in place.
        tokenizer: Its tokenizer.
        callbacks: Called after every step with trainer, step, metrics and samples.

    Raises:
        InputError: Bad data, configuration or checkpoints.
        StoppedBySignal: After saving, when SIGTERM or SIGINT came.
    """
    inputs = read_ppo_inputs(
        config, PPOTrainer, reward_fn=reward_fn, model=model, tokenizer=tokenizer
    )
    return run_training(
        inputs.run,
        lambda: PPOTrainer(
            config, reward_fn=reward_fn, model=model, inputs=inputs, callbacks=callbacks
        ),
        report=lambda: dry_run_report(
            "ppo", config, len(inputs.prompts), inputs.lines, reward_bases=other_bases(config)
        ),
    )


def dry_run_in_pipeline(
    config: PPOConfig, *, reward_fn: RewardFunctions | None = None
) -> RunResult:
    """Report what `train_ppo` would do, even if the reward model is not trained yet.

    Raises:
        InputError: Bad data, configuration or checkpoints.
    """
    folder = made_later(config)
    if folder is None:
        return train_ppo(config, reward_fn=reward_fn)
    inputs = read_ppo_inputs(config, PPOTrainer, reward_fn=reward_fn, to_be_written=folder)
    lines, bases = inputs.lines, other_bases(config)
    show(dry_run_report("ppo", config, len(inputs.prompts), lines, reward_bases=bases))
    return RunResult(config.output_dir, {})


class PPOTrainer(Trainer):
    """Trainer of PPO: each step is one rollout of `batch_size` responses with all its epochs.

    Args:
        config: The stage's configuration.
        reward_fn: Functions of texts, besides the rewards of the configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        inputs: What `read_ppo_inputs` returned; read here if not given.
        callbacks: Called after every step.
        generator: What decodes the rollouts; our own engine by default.
    """

    stage: ClassVar[str] = "ppo"
    rows_name: ClassVar[str] = "episodes"
    shown_metrics: ClassVar[tuple[str, ...]] = ("ppo/score", "ppo/kl", "ppo/response_length")
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = ("eval/objective", "max")
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    eps: ClassVar[float] = 1e-5

    config: PPOConfig

    def __init__(
        self,
        config: PPOConfig,
        *,
        reward_fn: RewardFunctions | None = None,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: PPOInputs | None = None,
        callbacks: Sequence[Callback] = (),
        generator: Generator | None = None,
    ) -> None:
        inputs = inputs or read_ppo_inputs(
            config, type(self), reward_fn=reward_fn, model=model, tokenizer=tokenizer
        )
        super().__init__(config, num_rows=len(inputs.prompts), run=inputs.run, callbacks=callbacks)
        self.generator: Generator = generator or partial(
            generate_in_chunks, chunk_size=config.effective_rollout_batch_size
        )
        self.lines = inputs.lines
        self._warned: set[str] = set()
        self.prompts = inputs.prompts
        self.eval_prompts = inputs.eval_prompts
        self.estimator = objectives.find_estimator(config.advantage)
        frozen = config.kl_coeff > 0 or bool(config.reward_models)
        bases = load_bases(config, model, inputs.tokenizer, frozen=frozen)
        data = (inputs.prompts, inputs.eval_prompts)
        self.rewards = load_rewards(inputs.rewards, config, bases.frozen, data)
        self.policy = make_policy(config, bases)
        self.reference = make_reference(config, bases)
        self.critic = None
        if self.estimator.needs_critic:
            weighted = self.rewards.weighted_scorers
            self.critic = make_critic(config, self.policy, weighted, model, inputs.tokenizer)
        lm = self.policy.lm
        if config.compile_decode:
            rows, width = config.effective_rollout_batch_size, config.prompt_sequence_length
            lm.compile_decoding(rows, width)
        self.device = lm.device
        self.codec = PromptCodec(
            inputs.tokenizer,
            lm.layout,
            config.prompt_sequence_length,
            config.target_sequence_length,
            config.truncation_side,
        )
        self.kl_controller = objectives.AdaptiveKL(
            config.kl_coeff, config.kl_target, config.kl_horizon
        )

    def describe(self) -> list[str]:
        """Return lines about the steps and the data."""
        return [*super().describe(), *self.lines]

    def make_step(self) -> dict[str, float]:
        """Make one PPO iteration: rollout, scores, experience, epochs of minibatches."""
        with self.phase("rollout"):
            rollout = self.rollout(self.next_prompts())
        with self.phase("score"):
            parts = self.reward_scores(rollout)
            scores = self.total_score(rollout, parts)
        with self.phase("experience"):
            experience, stats = self.make_experience(rollout, scores)
        with self.phase("update"):
            updates = self.optimize(experience)
        coefficient = None if self.reference is None else self.kl_controller.value
        metrics = rollout_metrics(rollout, experience, stats, coefficient) | updates
        metrics |= self.rewards.metrics(parts, "ppo")
        samples = rollout_samples(rollout, stats, SAMPLES_PER_STEP)
        self.log_samples(self.rewards.add_to_samples(samples, parts))
        self._warn_of_deviations(metrics)
        kl = self.reduce(stats.kl.sum(1).mean(), "mean")
        episodes = self.reduce(torch.tensor(len(experience)))
        self.kl_controller.update(float(kl), int(episodes))
        return metrics

    def next_prompts(self) -> list[PromptRow]:
        """Return the rows of this step, one for each group of responses."""
        size, seed = self.config.rows_per_step, self.config.seed
        rows = rows_for_step(self.prompts.visits, size, self.step_index, seed)
        return [self.prompts[row] for row in rows]

    def rollout(
        self,
        rows: Sequence[PromptRow],
        *,
        responses_per_prompt: int | None = None,
        evaluation: bool = False,
    ) -> Rollout:
        """Sample responses from the policy.

        Args:
            rows: Prompts.
            responses_per_prompt: Responses to each, next to each other. Default: the
                configuration's; in an evaluation 1.
            evaluation: Use the random numbers of evaluations, always the same, not the step's.

        Raises:
            NumericalError: If the policy's logits were NaN or infinite.
        """
        config = self.config
        each = 1 if evaluation else config.effective_responses_per_prompt
        each = responses_per_prompt or each
        prompts = self.codec.prompts([row.prompt for row in rows]).to(self.device)
        groups = torch.arange(len(rows), device=self.device).repeat_interleave(each)
        limit = config.target_sequence_length
        draw = (0, "evaluation") if evaluation else (self.step_index, "rollout")
        with self.policy.active() as lm:
            prompts = lm.with_states(prompts, config.effective_micro_batch_size)
            generation = self.generator(
                lm,
                prompts,
                max_new_tokens=limit,
                temperature=config.temperature,
                uniforms=rollout_uniforms(config.seed, draw[0], range(len(groups)), limit, draw[1]),
                min_response_length=config.min_response_length,
                groups=groups,
            )
        responses = [self.codec.decode(ids) for ids in generation.responses.tolists()]
        return Rollout(
            rows,
            prompts,
            generation.responses,
            generation.finished,
            responses,
            groups,
            generation.logprobs,
        )

    def score(self, rollout: Rollout) -> Tensor:
        """Return (B,) fp32 scores, clipped, with what length and a missing EOS cost."""
        return self.total_score(rollout, self.reward_scores(rollout))

    def reward_scores(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return the scores of each reward: name to (B,) fp32 on the CPU."""
        stop_point()
        return self.rewards.scores(rollout, self.config.effective_micro_batch_size)

    def total_score(self, rollout: Rollout, parts: Mapping[str, Tensor]) -> Tensor:
        """Return (B,) fp32: the weighted sum of the rewards, shaped as `score` says."""
        scores, lengths = self.rewards.total(parts).to(self.device), rollout.responses.lengths
        return objectives.shaped_scores(scores, lengths, rollout.finished, self.config)

    @torch.no_grad()
    def make_experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, RolloutStats]:
        """Compute token rewards, values, advantages and returns of a rollout.

        The old log-probabilities come from the update's own forward path, so that the first
        ratios are 1, and not from decoding.
        """
        config, mask = self.config, rollout.responses.mask
        found = evaluate_rollout(rollout, self.policy, self.reference, self.critic, config)
        charged = found.kl(config.kl_estimator if config.kl_placement == "reward" else None)
        rewards = objectives.token_rewards(
            scores, charged, rollout.responses.lengths, self.kl_controller.value
        )
        if config.whiten_rewards:
            rewards = objectives.whiten(rewards, mask, shift_mean=False, reduce=self.reduce)
        advantages, returns = self.estimator.function(
            rewards, found.values, mask, rollout.groups, config
        )
        if self.estimator.whitened:
            advantages = objectives.whiten(advantages, mask, reduce=self.reduce)
        experience = Experience(
            rollout.prompts,
            rollout.responses,
            rollout.groups,
            found.logprobs,
            found.ref_logprobs,
            found.values,
            advantages,
            returns,
        )
        return experience, found.stats(scores)

    @property
    def updates_per_step(self) -> int:
        """One per minibatch."""
        return self.config.ppo_epochs * self.config.num_minibatches

    def optimize(self, experience: Experience) -> dict[str, float]:
        """Make all epochs over the rollout; end early when the policy has moved too far."""
        config, groups = self.config, members(experience.groups)
        kl_loss = config.kl_placement == "loss" and self.reference is not None
        log = UpdateLog(critic=self.critic is not None, kl_loss=kl_loss)
        size = len(groups) // config.num_minibatches
        for epoch in range(config.ppo_epochs):
            order = permutation(len(groups), "minibatches", config.seed, self.step_index, epoch)
            for some in chunks(order, size):
                rows = [row for group in some for row in groups[group]]
                minibatch = self.accumulate_gradients(experience.select_rows(rows))
                log.add(minibatch)
                if config.target_kl is not None and minibatch.kl > 1.5 * config.target_kl:
                    self.optimizer.zero_grad(set_to_none=True)
                    return log.metrics(stopped_early=True)
                if not minibatch.ratio < RATIO_LIMIT:
                    self.skip_update(f"the mean probability ratio was {minibatch.ratio:.3g}")
                    continue
                log.norms.append(self.apply_gradients())
        return log.metrics(stopped_early=False)

    def accumulate_gradients(self, minibatch: Experience) -> Minibatch:
        """Add the gradients of the minibatch's mean loss (`loss_average`), by micro-batches."""
        config, kl_coeff = self.config, self.kl_controller.value
        divisors = count_divisors(minibatch, config, self.reduce)
        total = Minibatch(tokens=divisors.tokens)
        lengths = (minibatch.prompts.lengths, minibatch.responses.lengths, minibatch.groups)
        for rows in group_batches(*lengths, *config.micro_batch_limits):
            stop_point()
            micro = minibatch.select_rows(rows)
            roles = (self.policy, self.critic)
            total = total + add_gradients(micro, divisors, *roles, config, kl_coeff)
        read = minibatch.responses.lengths.sum() + minibatch.prompts.lengths.sum()
        self.count_tokens(int(read))
        return total.reduced(self.reduce)

    def evaluate(self) -> dict[str, float]:
        """Return score and KL on held-out prompts, always sampled with the same draws."""
        if self.eval_prompts is None:
            return {}
        count = min(len(self.eval_prompts), EVALUATION_ROWS)
        rollout = self.rollout([self.eval_prompts[i] for i in range(count)], evaluation=True)
        found = evaluate_rollout(rollout, self.policy, self.reference, None, self.config)
        parts = self.reward_scores(rollout)
        stats = found.stats(self.total_score(rollout, parts))
        metrics = evaluation_metrics(rollout, stats, self.config.kl_coeff)
        return metrics | self.rewards.metrics(parts, "eval")

    def _warn_of_deviations(self, metrics: Mapping[str, float]) -> None:
        """Warn, once each, if the update does not see the policy that sampled."""
        exact = self.policy.lm.dtype == torch.float32
        for name, warning in deviation_warnings(metrics, exact=exact).items():
            if self.is_main and name not in self._warned:
                say(f"ppo: {warning}")
            self._warned.add(name)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return policy and critic (if any), each with its own learning rate and clip norm."""
        config = self.config
        rates = {"policy": config.effective_learning_rate}
        named = {"policy": self.policy.named_trainable("policy")}
        if self.critic is not None:
            rates["critic"] = config.effective_critic_learning_rate
            named["critic"] = self.critic.named_trainable()
        return [
            ParameterGroup(name, named[name], rate, config.max_grad_norm)
            for name, rate in rates.items()
        ]

    def extra_state(self) -> dict[str, Any]:
        """Return the adaptive KL coefficient."""
        return {"kl_coeff": self.kl_controller.value}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the coefficient back."""
        self.kl_controller.value = state["kl_coeff"]

    def export(self) -> dict[str, float]:
        """Write adapter/ and merged/, and return what merging cost."""
        policy, folder = self.policy, self.output_path
        rows = self.next_prompts()[: self.config.effective_micro_batch_size]
        rollout = self.rollout(rows, responses_per_prompt=1)
        probe = (rollout.prompts, rollout.responses)
        kl = save_policy(policy.lm, policy.adapter, folder, probe)
        metrics = {} if kl is None else {"ppo/kl_merged_adapter": kl}
        shown = {name: m for name, m in self.final_metrics.items() if name.startswith(CARD_METRICS)}
        write_card(folder, self.stage, self.config, shown | metrics, self.lines)
        return metrics
