"""Direct preference optimization: a policy from preference pairs, without a reward model.

Rafailov et al. 2023 (arXiv 2305.18290). The policy's own log-ratios are the rewards: at the optimum
β·log π(y|x)/π_ref(y|x) is the reward of a response, up to a constant for each prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import DPOConfig
from rlhf.data.batching import chunks, micro_batches, rows_for_step
from rlhf.data.pairs import Pairs
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.reading import PreferenceData
from rlhf.data.schema import PreferenceRow
from rlhf.evaluation import evaluate_preferences
from rlhf.files.run_folder import Run
from rlhf.models.generation import Generator, generate
from rlhf.models.language_model import LanguageModel
from rlhf.models.saving import save_policy
from rlhf.objectives import dpo_loss, ipo_loss
from rlhf.ppo.roles import Role, load_bases, make_policy
from rlhf.reports.dry_run import dry_run_report
from rlhf.reports.model_card import write_card
from rlhf.signals import stop_point
from rlhf.stages import RunResult
from rlhf.training.inputs import StageInputs
from rlhf.training.optimizer import ParameterGroup
from rlhf.training.running import run_training
from rlhf.training.trainer import Callback, Trainer

EVALUATION_BLOCK = 512
SAMPLES_PER_EVALUATION = 4
CARD_METRICS = ("steps", "dpo/", "eval/")


@dataclass(frozen=True)
class DPOInputs:
    """Validated data of a run, read before any weights are loaded.

    Attributes:
        tokenizer: Of the base.
        train: Rows to learn from.
        held_out: Rows to evaluate on; may be empty if there is a single prompt.
        lines: What to report about the data that was read.
        run: The output folder.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PreferenceData
    held_out: PreferenceData
    lines: list[str]
    run: Run


def train_dpo(
    config: DPOConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Tune a policy on preference pairs and write it to `config.output_dir`.

    The folder gets merged/, the whole model for plain transformers, and with LoRA adapter/.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`; it is changed in place.
        tokenizer: Its tokenizer.
        callbacks: Called after every step with trainer, step, metrics and samples.

    Raises:
        InputError: Bad data, configuration or checkpoint.
        StoppedBySignal: After saving, when SIGTERM or SIGINT came.
    """
    inputs = read_dpo_inputs(config, model=model, tokenizer=tokenizer)
    return run_training(
        inputs.run,
        lambda: DPOTrainer(config, model=model, inputs=inputs, callbacks=callbacks),
        report=lambda: dry_run_report("dpo", config, len(inputs.train), inputs.lines),
    )


def read_dpo_inputs(
    config: DPOConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trainer: "type[DPOTrainer] | None" = None,
) -> DPOInputs:
    """Read and check everything that can be checked without weights.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        trainer: What will train; `DPOTrainer` unless it is a subclass.

    Raises:
        InputError: Everything that is wrong, rows first, then limits.
    """
    inputs = StageInputs(config, model, tokenizer)
    train = inputs.read("preference_dataset")
    held_out = inputs.read("eval_dataset")
    run = inputs.finish(optimizer=(trainer or DPOTrainer).optimizer_settings())
    assert train is not None
    train, held_out = inputs.hold_out(train, held_out)
    return DPOInputs(inputs.tokenizer, train, held_out, inputs.lines, run)


class DPOTrainer(Trainer):
    """Trainer that makes the preferred response of a pair likelier, compared with the reference.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        inputs: What `read_dpo_inputs` returned; read here if not given.
        callbacks: Called after every step.
        generator: What decodes the samples; our own engine by default.

    Attributes:
        policy: The model that is trained.
        reference: The untuned policy: the base without the adapter, or a second model.
        codec: Text to ids and back.
    """

    stage: ClassVar[str] = "dpo"
    shown_metrics: ClassVar[tuple[str, ...]] = ("dpo/loss", "dpo/margin", "eval/accuracy")
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = ("eval/loss", "min")

    config: DPOConfig

    def __init__(
        self,
        config: DPOConfig,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: DPOInputs | None = None,
        callbacks: Sequence[Callback] = (),
        generator: Generator | None = None,
    ) -> None:
        self.generator = generator or generate
        self.inputs = inputs or read_dpo_inputs(
            config, model=model, tokenizer=tokenizer, trainer=type(self)
        )
        super().__init__(
            config, num_rows=len(self.inputs.train), run=self.inputs.run, callbacks=callbacks
        )
        bases = load_bases(config, model, self.inputs.tokenizer)
        assert bases.frozen is not None
        self.policy = make_policy(config, bases)
        self.reference = Role(bases.frozen, None)
        self.device = self.policy.lm.device
        self.codec = PromptCodec(
            self.inputs.tokenizer,
            self.policy.lm.layout,
            config.prompt_sequence_length,
            config.target_sequence_length,
            config.truncation_side,
        )

    def describe(self) -> list[str]:
        """Return lines about the steps and the data."""
        return [*super().describe(), *self.inputs.lines]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the adapter, or all weights."""
        named = self.policy.named_trainable("policy")
        rate, norm = self.config.effective_learning_rate, self.config.max_grad_norm
        return [ParameterGroup("policy", named, rate, norm)]

    def make_step(self) -> dict[str, float]:
        """Make one optimizer step on `batch_size` rows, each with all its pairs."""
        size, seed = self.config.batch_size, self.config.seed
        rows = rows_for_step(self.inputs.train.visits, size, self.step_index, seed)
        pairs = Pairs.from_rows([self.inputs.train[row] for row in rows], self.codec)
        with self.phase("update"):
            metrics = self.accumulate_gradients(pairs)
            metrics |= self.apply_gradients()
        self.count_tokens(int(pairs.tokens.sum()))
        return metrics

    def accumulate_gradients(self, pairs: Pairs) -> dict[str, float]:
        """Add gradients of the mean loss over the rows, by micro-batches that keep rows whole.

        A row's loss is the mean over its pairs, whose candidates are each read once.

        Returns:
            Mean loss, accuracy, margin and implicit rewards, rows weighing the same.
        """
        count = int(self.reduce(torch.tensor(len(pairs))))
        totals = torch.zeros(5, device=self.device)
        for rows in micro_batches(pairs.tokens, *self.config.micro_batch_limits):
            stop_point()
            totals += self._backward(pairs.select_rows(rows), count)
        names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
        means = (self.reduce(totals) / count).tolist()
        return {f"dpo/{name}": mean for name, mean in zip(names, means, strict=True)}

    def _backward(self, micro: Pairs, count: int) -> Tensor:
        """Add a micro-batch's part of the gradients; `count` is the rows of the whole batch."""
        micro = micro.to(self.device)
        with self.policy.active():
            ratios = self.log_ratios(micro)
            losses = self.losses(ratios[micro.winners] - ratios[micro.losers])
            ((losses * micro.weight).sum() / count).backward()
        rewards = self.config.beta * ratios.detach()
        chosen, rejected = rewards[micro.winners], rewards[micro.losers]
        correct = (1 + (chosen - rejected).sign()) / 2
        parts = [losses.detach(), correct, chosen - rejected, chosen, rejected]
        return (torch.stack(parts) * micro.weight).sum(1)

    def log_ratios(self, pairs: Pairs) -> Tensor:
        """Return (B,) log π(y|x)/π_ref(y|x) of the candidates, in nats.

        Call it, and the backward pass, with the policy active.
        """
        pairs = pairs.to(self.device)
        with self.policy.active() as lm:
            prompts = lm.with_states(pairs.prompts, len(pairs))
            pairs = replace(pairs, prompts=prompts)
        with torch.no_grad(), self.reference.active() as lm:
            reference = response_logprobs(lm, pairs)
        with self.policy.active() as lm:
            policy = response_logprobs(lm, pairs)
        return policy - reference

    def losses(self, log_ratios: Tensor) -> Tensor:
        """Return (N,) losses of the differences (N,) between the log-ratios of pairs."""
        config = self.config
        if config.loss == "ipo":
            return ipo_loss(log_ratios, config.beta)
        return dpo_loss(log_ratios, config.beta, config.label_smoothing)

    def evaluate(self) -> dict[str, float]:
        """Return loss, accuracy and implicit rewards on held-out pairs; log a few samples."""
        held_out = self.inputs.held_out
        if not held_out:
            return {}
        parts = []
        with self.policy.lm.inference():
            for block in chunks(range(len(held_out)), EVALUATION_BLOCK):
                rows = [held_out[row] for row in block]
                pairs = Pairs.from_rows(rows, self.codec)
                log_ratios = self._evaluated(pairs)
                if block[0] == 0:
                    self._sample(rows[:SAMPLES_PER_EVALUATION], self.config.beta * log_ratios)
                columns = [
                    values[side]
                    for values in (log_ratios, pairs.responses.lengths)
                    for side in (pairs.winners, pairs.losers)
                ]
                parts.append([*columns, block[0] + pairs.rows, pairs.weight])
        better, worse, *lengths, numbers, weight = map(torch.cat, zip(*parts, strict=True))
        chosen, rejected = self.config.beta * better, self.config.beta * worse
        found = evaluate_preferences(
            chosen.numpy(), rejected.numpy(), *(column.numpy() for column in lengths),
            rows=numbers.numpy(), seed=self.config.seed,
        )  # fmt: skip
        figures = {
            "loss": self.losses(better - worse),
            "margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        return {
            f"eval/{name}": float((values * weight).sum()) / len(held_out)
            for name, values in figures.items()
        } | found.metrics("eval/")

    def _evaluated(self, pairs: Pairs) -> Tensor:
        """Return the candidates' log-ratios, (B,) on the CPU."""
        found = torch.zeros(len(pairs.responses))
        for rows in micro_batches(pairs.tokens, *self.config.micro_batch_limits):
            stop_point()
            found[pairs.responses_of(rows)] = self.log_ratios(pairs.select_rows(rows)).cpu()
        return found

    def _sample(self, rows: Sequence[PreferenceRow], rewards: Tensor) -> None:
        """Log what the policy says, greedily, beside the best and the worst candidate.

        Args:
            rows: A few rows.
            rewards: Implicit rewards of their candidates, row after row.
        """
        prompts = self.codec.prompts([row.prompt for row in rows]).to(self.device)
        limit = self.config.target_sequence_length
        with self.policy.active() as lm:
            generation = self.generator(lm, prompts, max_new_tokens=limit, temperature=0.0)
        answers = generation.responses.tolists()
        samples, start = [], 0
        for i, row in enumerate(rows):
            sample = {
                "prompt": row.prompt.text,
                "response": self.codec.decode(answers[i]),
                "chosen": row.chosen,
                "rejected": row.rejected,
                "chosen_reward": float(rewards[start + row.ranking[0]]),
                "rejected_reward": float(rewards[start + row.ranking[-1]]),
                "prompt_tokens": int(prompts.lengths[i]),
                "response_tokens": len(answers[i]),
            }
            samples.append(sample)
            start += len(row.candidates)
        self.log_samples(samples)

    def export(self) -> dict[str, float]:
        """Write adapter/ and merged/, and return what merging cost."""
        policy, folder = self.policy, self.output_path
        rows = self.inputs.train[: self.config.effective_micro_batch_size]
        prompts = [row.prompt for row in rows]
        chosen = self.codec.responses([row.chosen for row in rows], prompts=prompts)
        probe = self.codec.prompts(prompts).to(self.device), chosen.to(self.device)
        with policy.lm.inference():
            kl = save_policy(policy.lm, policy.adapter, folder, probe)
        metrics = {} if kl is None else {"dpo/kl_merged_adapter": kl}
        shown = {name: m for name, m in self.final_metrics.items() if name.startswith(CARD_METRICS)}
        write_card(folder, self.stage, self.config, shown | metrics, self.inputs.lines)
        return metrics


def response_logprobs(lm: LanguageModel, pairs: Pairs) -> Tensor:
    """Return (B,) log-probabilities of whole candidates, in nats."""
    states = lm.response_states(pairs.prompts, pairs.responses, pairs.groups)
    return lm.token_logprobs(states, pairs.responses).logprobs.sum(1)
