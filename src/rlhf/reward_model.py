"""A reward model from rankings of two or more answers.

Stiennon et al. 2020; Ouyang et al. 2022, section 3.5: all pairs of a prompt are in one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import RewardModelConfig
from rlhf.data.batching import chunks, micro_batches, permutation, rows_for_step
from rlhf.data.pairs import Pairs
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import (
    PreferenceData,
    PromptData,
)
from rlhf.data.schema import PreferenceRow
from rlhf.data.turn_ends import turn_end_text
from rlhf.evaluation import evaluate_preferences
from rlhf.files.run_folder import Run
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.loading import load_language_model
from rlhf.models.reward_model import RewardModel
from rlhf.models.reward_record import RewardRecord
from rlhf.models.sequence_classifier import save_sequence_classifier
from rlhf.objectives import pairwise_loss
from rlhf.reports.dry_run import dry_run_report
from rlhf.reports.model_card import write_card
from rlhf.signals import stop_point
from rlhf.stages import RunResult
from rlhf.training.inputs import StageInputs
from rlhf.training.optimizer import ParameterGroup
from rlhf.training.running import run_training
from rlhf.training.trainer import Callback, Trainer
from rlhf.untrusted import without_secrets

ADAPTER = "reward"
# Rows whose responses' mean score becomes 0: its standard error is std/√512 or less.
NORMALIZATION_ROWS = 512
EVALUATION_BLOCK = 512
SAMPLES_PER_EVALUATION = 4


@dataclass(frozen=True)
class RewardModelInputs:
    """Validated data of a run, read before any weights are loaded.

    Attributes:
        tokenizer: Of the base.
        renderer: Renders the prompts.
        train: Rows to learn from.
        held_out: Rows to evaluate on; may be empty if there is a single prompt.
        demonstrations: Reference responses for the normalization, if given.
        lines: What to report about the data that was read.
        run: The output folder.
    """

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    train: PreferenceData
    held_out: PreferenceData
    demonstrations: PromptData | None
    lines: list[str]
    run: Run


def train_reward_model(
    config: RewardModelConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train a reward model and write it to `config.output_dir`.

    The folder gets adapter/ (merged/ where all weights are trained), head.safetensors, tokenizer
    and reward_model.json; LLaMA also sequence_classifier/ for plain transformers, raw scores.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`; it is changed in place.
        tokenizer: Its tokenizer.
        callbacks: Called after every step with trainer, step, metrics and samples.

    Raises:
        InputError: Bad data, configuration or checkpoint.
        StoppedBySignal: After saving, when SIGTERM or SIGINT came.
    """
    inputs = read_reward_model_inputs(config, model=model, tokenizer=tokenizer)
    return run_training(
        inputs.run,
        lambda: RewardModelTrainer(config, model=model, inputs=inputs, callbacks=callbacks),
        report=lambda: dry_run_report("reward_model", config, len(inputs.train), inputs.lines),
    )


def read_reward_model_inputs(
    config: RewardModelConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trainer: "type[RewardModelTrainer] | None" = None,
) -> RewardModelInputs:
    """Read and check everything that can be checked without weights.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        trainer: What will train; `RewardModelTrainer` unless it is a subclass.

    Raises:
        InputError: Everything that is wrong, rows first, then limits.
    """
    inputs = StageInputs(config, model, tokenizer)
    rows = inputs.read("preference_dataset")
    held_out = inputs.read("eval_dataset")
    demonstrations = inputs.read("normalization_dataset")
    run = inputs.finish(optimizer=(trainer or RewardModelTrainer).optimizer_settings())
    assert rows is not None
    train, held_out = inputs.hold_out(rows, held_out)
    return RewardModelInputs(
        inputs.tokenizer, inputs.renderer, train, held_out, demonstrations, inputs.lines, run
    )


class RewardModelTrainer(Trainer):
    """Trainer that learns to score the better response of each pair above the other.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        inputs: What `read_reward_model_inputs` returned; read here if not given.
        callbacks: Called after every step.

    Attributes:
        reward: The reward model, whose scores are raw until `export` has normalized them.
    """

    stage: ClassVar[str] = "reward_model"
    shown_metrics: ClassVar[tuple[str, ...]] = (
        "reward_model/loss",
        "reward_model/margin",
        "eval/accuracy",
    )
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = ("eval/log_loss", "min")

    config: RewardModelConfig

    def __init__(
        self,
        config: RewardModelConfig,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: RewardModelInputs | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.inputs = inputs or read_reward_model_inputs(
            config, model=model, tokenizer=tokenizer, trainer=type(self)
        )
        super().__init__(
            config, num_rows=len(self.inputs.train), run=self.inputs.run, callbacks=callbacks
        )
        lm = load_language_model(
            config,
            trainable=config.lora.rank == 0,
            model=model,
            tokenizer=self.inputs.tokenizer,
        )
        adapter = None
        if config.lora.rank > 0:
            adapter = ADAPTER
            lm.add_adapter(adapter, config.lora, seed=config.seed)
        head = ScalarHead(lm.hidden_size, seed=config.seed).to(lm.device)
        record = make_record(config, lm, self.inputs.renderer)
        self.reward = RewardModel(lm, adapter, head, record)

    def describe(self) -> list[str]:
        """Return lines about the steps and the data."""
        return [*super().describe(), *self.inputs.lines]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return adapter (or all weights) and head, clipped together."""
        lm, head = self.reward.lm, self.reward.head
        named = [*lm.named_trainable(self.reward.adapter)]
        named += [(f"head.{name}", parameter) for name, parameter in head.named_parameters()]
        rate, norm = self.config.effective_learning_rate, self.config.max_grad_norm
        return [ParameterGroup("reward_model", named, rate, norm)]

    def make_step(self) -> dict[str, float]:
        """Make one optimizer step on `batch_size` rows, each with all its pairs."""
        size, seed = self.config.batch_size, self.config.seed
        rows = rows_for_step(self.inputs.train.visits, size, self.step_index, seed)
        pairs = Pairs.from_rows([self.inputs.train[row] for row in rows], self.reward.codec)
        with self.phase("update"):
            metrics = self.accumulate_gradients(pairs)
            metrics |= self.apply_gradients()
        self.count_tokens(int(pairs.tokens.sum()))
        return metrics

    def accumulate_gradients(self, pairs: Pairs) -> dict[str, float]:
        """Add gradients of the mean loss over the rows, by micro-batches that keep rows whole.

        A row's loss is the mean over its pairs (Ouyang et al. 2022, eq. 1), whose candidates are
        each read once.

        Returns:
            Mean loss, accuracy, margin and score, rows weighing the same.
        """
        count = int(self.reduce(torch.tensor(len(pairs))))
        totals = torch.zeros(4, device=self.reward.lm.device)
        for rows in micro_batches(pairs.tokens, *self.config.micro_batch_limits):
            stop_point()
            totals += self._backward(pairs.select_rows(rows).to(totals.device), count)
        names = ("loss", "accuracy", "margin", "score")
        means = (self.reduce(totals) / count).tolist()
        return {f"reward_model/{name}": mean for name, mean in zip(names, means, strict=True)}

    def _backward(self, micro: Pairs, count: int) -> Tensor:
        """Add a micro-batch's part of the gradients; `count` is the rows of the whole batch."""
        with self.reward.lm.using(self.reward.adapter):
            scores = self.reward.raw_scores(micro.prompts, micro.responses, micro.groups)
            chosen, rejected = scores[micro.winners], scores[micro.losers]
            losses = pairwise_loss(chosen, rejected, micro.margin, self.config.centering_coeff)
            ((losses * micro.weight).sum() / count).backward()
        difference = (chosen - rejected).detach()
        correct = (1 + difference.sign()) / 2
        level = (chosen + rejected).detach() / 2
        parts = torch.stack([losses.detach(), correct, difference, level])
        return (parts * micro.weight).sum(1)

    def evaluate(self) -> dict[str, float]:
        """Return accuracy, log loss and calibration of the raw scores on held-out pairs."""
        held_out = self.inputs.held_out
        if not held_out:
            return {}
        found = []
        for block in chunks(range(len(held_out)), EVALUATION_BLOCK):
            rows = [held_out[row] for row in block]
            pairs = Pairs.from_rows(rows, self.reward.codec)
            size = 2 * self.config.effective_micro_batch_size
            scores = self.reward.score_tokens(pairs.prompts, pairs.responses, size, pairs.groups)
            if block[0] == 0:
                self._log_rows(rows, pairs, scores)
            lengths, sides = pairs.responses.lengths, (pairs.winners, pairs.losers)
            columns = [values[side] for values in (scores, lengths) for side in sides]
            found.append([*columns, block[0] + pairs.rows])
        *figures, numbers = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        result = evaluate_preferences(*figures, rows=numbers, seed=self.config.seed)
        return result.metrics("eval/")

    def normalize(self) -> None:
        """Make the mean score of reference responses 0 (and the standard deviation 1)."""
        if self.config.normalization == "none":
            return
        self.reward.normalize(0.0, 1.0)  # the constants apply to raw scores, also if called again
        scores = self._reference_scores().double()
        spread = float(scores.std(correction=0))
        scales = self.config.normalization == "mean_std" and spread > 0
        self.reward.normalize(float(scores.mean()), spread if scales else 1.0)

    def export(self) -> dict[str, float]:
        """Normalize and write the reward model."""
        self.normalize()
        reward, folder = self.reward, self.output_path
        reward.save(folder)
        classifier = folder / "sequence_classifier"
        if save_sequence_classifier(reward.lm, reward.adapter, reward.head, classifier):
            # Its scores are raw; the record gives it the reward model's own limits.
            replace(reward.record, shift=0.0, scale=1.0).write(classifier)
        metrics = {
            "reward_model/shift": reward.record.shift,
            "reward_model/scale": reward.record.scale,
        }
        shown = {n: m for n, m in self.final_metrics.items() if n.startswith("eval/")} | metrics
        write_card(folder, self.stage, self.config, shown, [*self.inputs.lines])
        return metrics

    def _reference_scores(self) -> Tensor:
        """Return (N,) raw scores of demonstrations, or of the candidates of training rows."""
        data: Sequence[Any] = self.inputs.demonstrations or self.inputs.train
        chosen = sorted(
            permutation(len(data), "normalization", self.config.seed)[:NORMALIZATION_ROWS]
        )
        rows = [data[row] for row in chosen]
        if self.inputs.demonstrations:
            texts = [(row.prompt, row.references[0]) for row in rows]
        else:
            texts = [(row.prompt, text) for row in rows for text in row.candidates]
        prompts, responses = zip(*texts, strict=True)
        return self.reward.score(prompts, responses, 2 * self.config.effective_micro_batch_size)

    def _log_rows(self, rows: Sequence[PreferenceRow], pairs: Pairs, scores: Tensor) -> None:
        """Log the best and the worst candidate of a few rows, with the scores (B,) of all."""
        samples, start = [], 0
        for number, row in enumerate(rows[:SAMPLES_PER_EVALUATION]):
            sample = {
                "prompt": row.prompt.text,
                "chosen": row.chosen,
                "rejected": row.rejected,
                "prompt_tokens": int(pairs.prompts.lengths[number]),
            }
            for name, index in (("chosen", row.ranking[0]), ("rejected", row.ranking[-1])):
                sample[f"{name}_score"] = float(scores[start + index])
                sample[f"{name}_tokens"] = int(pairs.responses.lengths[start + index])
            samples.append(sample)
            start += len(row.candidates)
        self.log_samples(samples)


def make_record(
    config: RewardModelConfig, lm: LanguageModel, renderer: PromptRenderer
) -> RewardRecord:
    """Return what `reward_model.json` says before the normalization is known."""
    try:
        installed = version("rlhf-ppo")
    except PackageNotFoundError:
        installed = ""
    return RewardRecord(
        base_model=without_secrets(lm.base_name),
        revision=lm.revision,
        fingerprint=lm.fingerprint,
        tokenizer=tokenizer_fingerprint(lm.tokenizer),
        dtype=str(lm.dtype).removeprefix("torch."),
        prompt_sequence_length=config.prompt_sequence_length,
        target_sequence_length=config.target_sequence_length,
        truncation_side=config.truncation_side,
        instruction=config.instruction,
        prompting=renderer.identity,
        chat_template_options=renderer.options,
        turn_end=turn_end_text(lm.layout, lm.tokenizer),
        version=installed,
    )
