"""Supervised fine-tuning on demonstrations: the base of all later stages, if there are any."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import SFTConfig
from rlhf.data.batching import TokenBatch, chunks, micro_batches, rows_for_step
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.reading import PromptData
from rlhf.data.schema import PromptRow
from rlhf.files.run_folder import Run
from rlhf.models.generation import Generator, generate
from rlhf.models.loading import load_language_model
from rlhf.models.saving import save_policy
from rlhf.reports.dry_run import dry_run_report
from rlhf.reports.model_card import write_card
from rlhf.signals import stop_point
from rlhf.stages import RunResult
from rlhf.training.inputs import StageInputs
from rlhf.training.running import run_training
from rlhf.training.trainer import Callback, ParameterGroup, Trainer

ADAPTER = "sft"
# With ten evaluations per run, more rows would cost more than training on a small data set.
EVALUATION_ROWS = 256
SAMPLES_PER_EVALUATION = 4
CARD_METRICS = ("steps", "sft/loss", "eval/loss", "eval/perplexity")


@dataclass(frozen=True)
class SFTInputs:
    """Validated data of a run, read before any weights are loaded.

    Attributes:
        tokenizer: Of the base.
        train: Demonstrations to learn from.
        held_out: Demonstrations to evaluate on, if given.
        lines: What to report about the data that was read.
        run: The output folder.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PromptData
    held_out: PromptData | None
    lines: Sequence[str]
    run: Run


@dataclass(frozen=True)
class Demonstrations:
    """B demonstrations as ids.

    Attributes:
        prompts: (B, P).
        responses: (B, R).
    """

    prompts: TokenBatch
    responses: TokenBatch

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens that the model reads for each row."""
        return self.prompts.lengths + self.responses.lengths

    def select_rows(self, rows: Sequence[int]) -> "Demonstrations":
        """Return the given rows, trimmed to the longest of them."""
        return Demonstrations(self.prompts.select_rows(rows), self.responses.select_rows(rows))

    def to(self, device: torch.device | str) -> "Demonstrations":
        """Return the same rows on another device."""
        return Demonstrations(self.prompts.to(device), self.responses.to(device))


def train_sft(
    config: SFTConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Fine-tune a model on demonstrations and write it to `config.output_dir`.

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
    inputs = read_sft_inputs(config, model=model, tokenizer=tokenizer)
    return run_training(
        inputs.run,
        lambda: SFTTrainer(config, model=model, inputs=inputs, callbacks=callbacks),
        report=lambda: dry_run_report("sft", config, len(inputs.train), inputs.lines),
    )


def read_sft_inputs(
    config: SFTConfig,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trainer: "type[SFTTrainer] | None" = None,
) -> SFTInputs:
    """Read and check everything that can be checked without weights.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        trainer: What will train; `SFTTrainer` unless it is a subclass.

    Raises:
        InputError: Everything that is wrong, rows first, then limits.
    """
    inputs = StageInputs(config, model, tokenizer)
    train = inputs.read("dataset")
    held_out = inputs.read("eval_dataset")
    run = inputs.finish(optimizer=(trainer or SFTTrainer).optimizer_settings())
    assert train is not None
    return SFTInputs(inputs.tokenizer, train, held_out, inputs.lines, run)


class SFTTrainer(Trainer):
    """Trainer that learns to give the demonstrated responses.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.
        inputs: What `read_sft_inputs` returned; read here if not given.
        callbacks: Called after every step.
        generator: What decodes the samples; our own engine by default.

    Attributes:
        lm: The model.
        adapter: Name of the adapter that is trained; None trains all weights.
        codec: Text to ids and back.
    """

    stage: ClassVar[str] = "sft"
    shown_metrics: ClassVar[tuple[str, ...]] = ("sft/loss", "eval/loss")
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = ("eval/loss", "min")

    config: SFTConfig

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        inputs: SFTInputs | None = None,
        callbacks: Sequence[Callback] = (),
        generator: Generator | None = None,
    ) -> None:
        self.generator = generator or generate
        self.inputs = inputs or read_sft_inputs(
            config, model=model, tokenizer=tokenizer, trainer=type(self)
        )
        super().__init__(
            config, num_rows=len(self.inputs.train), run=self.inputs.run, callbacks=callbacks
        )
        self.lm = load_language_model(
            config,
            trainable=config.lora.rank == 0,
            model=model,
            tokenizer=self.inputs.tokenizer,
        )
        self.adapter = None
        if config.lora.rank > 0:
            self.adapter = ADAPTER
            self.lm.add_adapter(ADAPTER, config.lora, seed=config.seed)
        self.codec = PromptCodec(
            self.inputs.tokenizer,
            self.lm.layout,
            config.prompt_sequence_length,
            config.target_sequence_length,
            config.truncation_side,
        )

    def describe(self) -> list[str]:
        """Return lines about the steps and the data."""
        return [*super().describe(), *self.inputs.lines]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the adapter, or all weights."""
        named = self.lm.named_trainable(self.adapter)
        rate, norm = self.config.effective_learning_rate, self.config.max_grad_norm
        return [ParameterGroup("policy", named, rate, norm)]

    def make_step(self) -> dict[str, float]:
        """Make one optimizer step on `batch_size` demonstrations."""
        batch = self.next_batch()
        with self.phase("update"):
            loss = self.accumulate_gradients(batch)
            norms = self.apply_gradients()
        self.count_tokens(int(batch.tokens.sum()))
        return {"sft/loss": loss, **norms}

    def next_batch(self) -> Demonstrations:
        """Return the rows of this step; each epoch uses another of several references."""
        size, rows = self.config.batch_size, self.num_rows
        numbers = rows_for_step(self.inputs.train.visits, size, self.step_index, self.config.seed)
        chosen, responses = [], []
        for place, number in enumerate(numbers, start=self.step_index * size):
            row = self.inputs.train[number]
            chosen.append(row)
            responses.append(row.references[(number + place // rows) % len(row.references)])
        return self.tokenize(chosen, responses)

    def tokenize(self, rows: Sequence[PromptRow], responses: Sequence[str]) -> Demonstrations:
        """Convert texts to ids, on the model's device."""
        prompts = [row.prompt for row in rows]
        batch = Demonstrations(
            self.codec.prompts(prompts), self.codec.responses(responses, prompts=prompts)
        )
        return batch.to(self.lm.device)

    def accumulate_gradients(self, batch: Demonstrations) -> float:
        """Add gradients of the mean over the batch's response tokens, by micro-batches.

        Returns:
            Mean negative log-likelihood per response token, nats.
        """
        count = int(self.reduce(batch.responses.lengths.sum()))
        total = torch.zeros((), device=self.lm.device)
        for rows in micro_batches(batch.tokens, *self.config.micro_batch_limits):
            stop_point()
            with self.lm.using(self.adapter):
                nll = self.negative_log_likelihood(batch.select_rows(rows))
                (nll / count).backward()
            total += nll.detach()
        return self.reduce(total).item() / count

    def negative_log_likelihood(self, batch: Demonstrations) -> Tensor:
        """Return the sum over all response tokens, EOS included, in nats."""
        states = self.lm.response_states(batch.prompts, batch.responses)
        return -self.lm.token_logprobs(states, batch.responses).logprobs.sum()

    def evaluate(self) -> dict[str, float]:
        """Return loss and perplexity on the first held-out rows; log a few greedy samples."""
        with self.lm.inference(), self.lm.using(self.adapter):
            held_out = self.inputs.held_out
            rows = held_out if held_out is not None else self.inputs.train
            self._sample(rows[:SAMPLES_PER_EVALUATION])
            if held_out is None:
                return {}
            total, count = 0.0, 0
            size = self.config.effective_micro_batch_size
            for block in chunks(range(min(len(held_out), EVALUATION_ROWS)), size):
                stop_point()
                some = [held_out[number] for number in block]
                batch = self.tokenize(some, [row.references[0] for row in some])
                total += self.negative_log_likelihood(batch).item()
                count += int(batch.responses.lengths.sum())
        total, count = self.reduce(torch.tensor([total, count], dtype=torch.float64)).tolist()
        loss = total / count
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

    def _sample(self, rows: Sequence[PromptRow]) -> None:
        prompts = self.codec.prompts([row.prompt for row in rows]).to(self.lm.device)
        limit = self.config.target_sequence_length
        generation = self.generator(self.lm, prompts, max_new_tokens=limit, temperature=0.0)
        answers = generation.responses.tolists()
        self.log_samples(
            [
                {
                    "prompt": row.prompt.text,
                    "response": self.codec.decode(answer),
                    "reference": row.references[0],
                    "prompt_tokens": prompt_tokens,
                    "response_tokens": len(answer),
                }
                for row, answer, prompt_tokens in zip(
                    rows, answers, prompts.lengths.tolist(), strict=True
                )
            ]
        )

    def export(self) -> dict[str, float]:
        """Write adapter/ and merged/, and return what merging cost."""
        folder, rows = self.output_path, self.inputs.held_out or self.inputs.train
        some = rows[: self.config.effective_micro_batch_size]
        probe = self.tokenize(some, [row.references[0] for row in some])
        with self.lm.inference():
            kl = save_policy(self.lm, self.adapter, folder, (probe.prompts, probe.responses))
        metrics = {} if kl is None else {"sft/kl_merged_adapter": kl}
        shown = {
            name: self.final_metrics[name] for name in CARD_METRICS if name in self.final_metrics
        }
        write_card(folder, self.stage, self.config, shown | metrics, self.inputs.lines)
        return metrics
