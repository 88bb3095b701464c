"""The loop that SFT, reward model and PPO share, read from top to bottom in `Trainer.train`.

Resuming needs no random state: rows, rollouts and dropout depend on (seed, step) alone, so a run
that stopped after any step goes on as if it had not. Nor does stopping wait for a step's end: what
the step has changed is taken back, and it is made again.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rlhf.config import TrainingConfig
from rlhf.console import say
from rlhf.data.batching import seeded_generator
from rlhf.errors import StoppedBySignal, TrainingDiverged
from rlhf.files.run_folder import Run, Status, prepare_output
from rlhf.signals import SignalGuard, StopRequested
from rlhf.training.checkpoints import (
    Best,
    Checkpoint,
    load_best,
    load_checkpoint,
    read_best,
    remove_best,
    remove_checkpoints,
    restore_best,
    save_best,
    save_checkpoint,
)
from rlhf.training.optimizer import GroupedAdamW, ParameterGroup, StepStart, learning_rate_factor
from rlhf.training.tracking import (
    JsonLog,
    PhaseTimer,
    ProgressLine,
    Trackers,
    check_trackers,
    peak_memory_mb,
)

__all__ = ["Callback", "ParameterGroup", "Trainer", "TrainingDiverged"]

# Called after every step with the trainer, the step (from 1), its metrics and its samples.
Callback = Callable[["Trainer", int, Mapping[str, float], Sequence[Mapping[str, Any]]], None]
SKIPS_BEFORE_GIVING_UP = 5


class Trainer(ABC):
    """A training run in a folder.

    A subclass sets its models up, calls `super().__init__` and supplies the abstract methods.
    `train` runs everything; `step` makes a single step for those who want the loop themselves.

    Args:
        config: The stage's configuration.
        num_rows: Training rows (or pairs, or prompts), for epochs.
        run: What `prepare_output` found; None asks it, without data fingerprints.
        callbacks: Called after every step, see `Callback`.

    Attributes:
        config: The stage's configuration.
        run: The run's folder and identity.
        total_steps: Training steps of the run.
        step_index: Steps that are done, which is the index of the step to make next.
        skipped_updates: Optimizer updates left out so far.
        final_metrics: For `export`: metrics of the last step and of what is exported.
    """

    stage: ClassVar[str]
    rows_name: ClassVar[str] = "rows"
    shown_metrics: ClassVar[tuple[str, ...]] = ()
    # Metric of `evaluate` that decides which weights are the best, and its direction.
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = None
    # Whether `export` gets the best weights rather than the last.
    export_best: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 1e-8

    def __init__(
        self,
        config: TrainingConfig,
        *,
        num_rows: int,
        run: Run | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_trackers(config.log_with)
        self.config = config
        self.num_rows = num_rows
        self.run = run or prepare_output(config, {}, stage=self.stage)
        self.output_path = self.run.output.path
        if config.tensorboard_dir is not None:
            self.run.output.also_publish("tensorboard", config.tensorboard_dir)
        self.callbacks = callbacks
        self.total_steps = config.total_steps(num_rows)
        self.step_index = 0
        self.skipped_updates = 0
        self.final_metrics: dict[str, Any] = {}
        self._skipped_in_row = 0
        self._seconds = 0.0
        self._tokens = 0
        self._timer = PhaseTimer()
        self._samples: list[dict[str, Any]] = []
        self._last: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
        # A step that is done and whose evaluation is not: its metrics and samples.
        self._unevaluated: tuple[dict[str, float], list[dict[str, Any]]] | None = None
        self._saved_step = 0
        self._before_step: StepStart | None = None

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """What is trained; asked once."""

    @abstractmethod
    def make_step(self) -> dict[str, float]:
        """Makes training step `step_index`, using `apply_gradients`; returns its metrics."""

    @abstractmethod
    def export(self) -> dict[str, float]:
        """Writes the final artifacts to `output_path`; returns further final metrics."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out data; {} if there are none."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """JSON-able state beyond weights and optimizer."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (optional)
        """Takes back what `extra_state` gave."""

    def describe(self) -> list[str]:
        """Lines that say at the start what will happen."""
        rows = self.total_steps * self.config.batch_size
        return [
            f"{self.stage}: {self.total_steps} steps of {self.config.batch_size} {self.rows_name}"
            f" = {rows / self.num_rows:.3g} epochs of {self.num_rows} {self.rows_name};"
            f" output in {self.run.output.folder}"
        ]

    def train(self) -> dict[str, Any]:
        """Runs the stage: resume, steps, evaluations, checkpoints, export.

        Returns:
            The final metrics, as written to metrics.json.

        Raises:
            StoppedBySignal: After saving, when SIGTERM or SIGINT came.
            TrainingDiverged: If updates failed several times in a row.
        """
        if self.run.status is Status.FINISHED:
            say(f"{self.stage}: already finished in {self.run.output.folder}")
            return self.run.conclude()
        with self.run.held():
            return self._train()

    def _train(self) -> dict[str, Any]:
        if self.run.status is Status.FINISHED:  # by another process, a moment ago
            return self.run.conclude()
        self.run.start()
        self._restore()
        with self._session() as (signals, log):
            try:
                self._make_steps(signals, log)
            except StopRequested:
                self._save_unfinished()
                raise StoppedBySignal(self._saved_step) from None
            except TrainingDiverged:
                self.run.output.publish()  # the log that the message points at
                raise
            signals.all_saved(self.step_index)
            return self._finish()

    def _make_steps(self, signals: SignalGuard, log: Callable[[dict[str, float]], None]) -> None:
        """Makes what is left of the run, with evaluations, log and checkpoints."""
        while self.step_index < self.total_steps or self._unevaluated is not None:
            if self._unevaluated is None:
                metrics = self._remembered_step()
                if self._due(self.config.eval_interval(self.total_steps)):
                    self._unevaluated = (metrics, list(self._samples))
            if self._unevaluated is not None:
                metrics, samples = self._unevaluated
                self._samples = list(samples)
                metrics = metrics | self._evaluate()
                self._unevaluated = None
            log(metrics)
            if signals.requested or self._due(self.config.save_interval(self.total_steps)):
                self.save()
            if signals.requested and self.step_index < self.total_steps:
                raise StoppedBySignal(self.step_index)

    def _remembered_step(self) -> dict[str, float]:
        """`step`, which a signal may leave anywhere."""
        self._before_step = StepStart(self.skipped_updates, self._skipped_in_row)
        metrics = self.step()
        self._before_step = None
        return metrics

    def _save_unfinished(self) -> None:
        """Takes back what an unfinished step has changed and saves the last finished one.

        Where its weights were too large to be copied and are changed already, the newest
        checkpoint stays what the run continues from.
        """
        memory, self._before_step = self._before_step, None
        if memory is None:  # stopped in an evaluation, which is made again
            self.save()
            return
        self.optimizer.zero_grad()
        self.skipped_updates, self._skipped_in_row = memory.skipped_updates, memory.skipped_in_row
        if memory.parameters is not None and memory.moments is not None:
            self.optimizer.load_parameters(memory.parameters)
            self.optimizer.load_state_tensors(memory.moments)
        elif memory.updated:
            say(
                f"{self.stage}: step {self.step_index + 1} has changed the weights already, and "
                "they are too large to keep a copy of; the run continues from the newest checkpoint"
            )
            return
        if self._saved_step != self.step_index:
            self.save()

    def step(self) -> dict[str, float]:
        """Makes one training step and counts it.

        Returns:
            The step's metrics with learning rate, seconds per phase and memory.
        """
        start = time.perf_counter()
        factor = learning_rate_factor(
            self.step_index,
            self.total_steps,
            self.config.warmup_steps,
            self.config.lr_scheduler,
        )
        self.optimizer.set_rates(factor)
        dropout = seeded_generator("dropout", self.config.seed, self.step_index)
        torch.manual_seed(dropout.initial_seed())
        self._samples, self._tokens = [], 0
        metrics = self.make_step()
        self.step_index += 1
        seconds = time.perf_counter() - start
        self._seconds += seconds
        metrics |= {"train/lr": self.optimizer.groups[0].learning_rate * factor}
        metrics |= {"train/skipped_updates": float(self.skipped_updates)}
        metrics |= self._timer.take() | {"time/step": seconds}
        metrics |= {"perf/peak_memory_mb": peak_memory_mb()}
        if self._tokens:
            metrics |= {"perf/tokens_per_second": self._tokens / seconds}
        return metrics

    @cached_property
    def optimizer(self) -> GroupedAdamW:
        """AdamW over the groups that `parameter_groups` gives, built when first needed."""
        return GroupedAdamW(
            self.parameter_groups(),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.config.weight_decay,
        )

    @classmethod
    def optimizer_settings(cls) -> str:
        """What the optimizer has that no field of the configuration names, for the identity."""
        return f"Adam, betas {cls.betas}, eps {cls.eps}"

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that a step makes at most; after the last one nothing stops it."""
        return 1

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name."""
        return self.optimizer.parameters

    def apply_gradients(self) -> dict[str, float]:
        """Clips each group's gradients to its own norm, updates its weights, clears gradients.

        Gradients are those of the loss itself: sums that the caller has divided by global counts.

        Returns:
            `train/grad_norm_<group>` before clipping; {} if the update was skipped because a
            gradient was not finite.

        Raises:
            TrainingDiverged: If that happened several times in a row.
        """
        norms = self.optimizer.grad_norms()
        broken = [name for name, norm in norms.items() if not torch.isfinite(norm)]
        if broken:
            self.skip_update(f"the gradient of {' and '.join(broken)} was not finite")
            return {}
        if self._before_step is not None:
            self._before_step.keep(self.optimizer, copy=self.updates_per_step > 1)
        self.optimizer.update(norms)
        self._skipped_in_row = 0
        return {f"train/grad_norm_{name}": float(norm) for name, norm in norms.items()}

    def skip_update(self, reason: str) -> None:
        """Leaves an update out: clears gradients and counts.

        Raises:
            TrainingDiverged: If it was the fifth in a row.
        """
        self.optimizer.zero_grad()
        self.skipped_updates += 1
        self._skipped_in_row += 1
        if self._skipped_in_row >= SKIPS_BEFORE_GIVING_UP:
            raise TrainingDiverged(
                f"{self.stage} diverged: {self._skipped_in_row} updates in a row were skipped, the "
                f"last one at step {self.step_index + 1} because {reason}. Lower learning_rate "
                f"(now {self.optimizer.groups[0].learning_rate:g}) or max_grad_norm, use dtype "
                f"float32, and look at {self.run.output.folder}/metrics.jsonl for where it began"
            )

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measures what happens inside as `time/<name>`."""
        return self._timer.phase(name)

    def count_tokens(self, count: int) -> None:
        """Adds tokens of this step, for `perf/tokens_per_second`."""
        self._tokens += count

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows of this step to samples.jsonl and to what callbacks get."""
        self._samples.extend(dict(row) for row in rows)

    def save(self) -> None:
        """Writes a checkpoint of the steps that are done, and publishes it."""
        best = read_best(self.output_path)
        state = {
            "best": None if best is None else asdict(best),
            "seconds": self._seconds,
            "skipped_updates": self.skipped_updates,
            "skipped_in_row": self._skipped_in_row,
            "last": self._last,
            "evaluation": self._evaluation,
            "unevaluated": self._unevaluated,
            "extra": self.extra_state(),
            "run": self.run.identity,  # where run.json gets damaged, this tells whose it is
        }
        moments = self.optimizer.state_tensors()
        checkpoint = Checkpoint(self.step_index, self.parameters, moments, state)
        with self.run.held(look=False):  # for those who make the steps themselves
            save_checkpoint(self.output_path, checkpoint, keep=self.config.save_total_limit)
            self.run.output.publish()
        self._saved_step = self.step_index

    def _due(self, every: int) -> bool:
        return self.step_index % every == 0 or self.step_index == self.total_steps

    def _evaluate(self) -> dict[str, float]:
        """Evaluates, and keeps the weights if they are the best so far."""
        with self.phase("evaluate"):
            self._evaluation = self.evaluate()
        if self.best_metric is not None and self.best_metric[0] in self._evaluation:
            name, direction = self.best_metric
            value = self._evaluation[name]
            best = read_best(self.output_path)
            sign = 1 if direction == "max" else -1
            if math.isfinite(value) and (best is None or sign * value > sign * best.value):
                best = Best(self.step_index, name, value, self._evaluation)
                save_best(self.output_path, self.parameters, best)
        return self._evaluation | self._timer.take()

    @contextmanager
    def _session(self) -> Iterator[tuple[SignalGuard, Callable[[dict[str, float]], None]]]:
        """Signals, logs, trackers and the progress bar, closed again whatever happens."""
        metrics_log = JsonLog(self.output_path / "metrics.jsonl")
        samples_log = JsonLog(self.output_path / "samples.jsonl")
        # A step whose evaluation is still to come is logged after that.
        logged = self.step_index - (self._unevaluated is not None)
        for file in (metrics_log, samples_log):
            file.truncate(logged)
        for line in self.describe():
            say(line)
        if self.step_index:
            say(f"{self.stage}: continues after step {self.step_index}")
        facts = self.run.identity["fields"]
        cpu = next(iter(self.parameters.values())).device.type == "cpu"
        trackers = Trackers(self.config.log_with, self.output_path, logged, cpu, facts)
        progress = ProgressLine(self.stage, self.total_steps, self.step_index, self.shown_metrics)

        def log(metrics: dict[str, float]) -> None:
            step, self._last = self.step_index, metrics
            due = self._due(self.config.log_every) or bool(self._evaluation.keys() & metrics.keys())
            if due:
                metrics_log.write(step, [metrics])
                trackers.log(step, metrics)
            samples_log.write(step, self._samples)
            progress.update(step, metrics, due)
            for callback in self.callbacks:
                callback(self, step, metrics, self._samples)

        try:
            with SignalGuard() as signals:
                yield signals, log
        finally:
            progress.close()
            trackers.close()

    def _restore(self) -> None:
        """Goes back to the newest whole checkpoint, or to nothing if there is none."""
        checkpoint = None
        if self.run.status is Status.CONTINUE:
            self.run.output.fetch("checkpoints/*", "best/*", "metrics.jsonl", "samples.jsonl")
            checkpoint = load_checkpoint(self.output_path)
        if checkpoint is None or not restore_best(self.output_path, checkpoint):
            remove_checkpoints(self.output_path)
            remove_best(self.output_path)  # of an attempt that failed before it saved
            return
        self.optimizer.load_parameters(checkpoint.model)
        self.optimizer.load_state_tensors(checkpoint.optimizer)
        self.step_index = self._saved_step = checkpoint.step
        state = checkpoint.state
        self._seconds = state["seconds"]
        self.skipped_updates = state["skipped_updates"]
        self._skipped_in_row = state["skipped_in_row"]
        self._last, self._evaluation = state["last"], state["evaluation"]
        if state.get("unevaluated") is not None:
            metrics, samples = state["unevaluated"]
            # JSON has no NaN: such a metric was written as null.
            numbers = {name: math.nan if m is None else m for name, m in metrics.items()}
            self._unevaluated = (numbers, samples)
        self.load_extra_state(state["extra"])

    def _finish(self) -> dict[str, Any]:
        """Exports, writes the final metrics, and drops what only resuming needed."""
        best = read_best(self.output_path)
        metrics: dict[str, Any] = {"stage": self.stage, "steps": self.step_index}
        metrics |= {name: value for name, value in self._last.items() if "time/" not in name}
        metrics |= self._evaluation
        if best is not None:
            metrics |= {"best_step": best.step, "best_metric": best.metric, "best": best.value}
            if self.export_best and best.step != self.step_index:
                self.optimizer.load_parameters(load_best(self.output_path))
                metrics |= best.evaluation
        self.final_metrics = metrics
        metrics |= self.export() | {"seconds": self._seconds}
        return self.run.finish(metrics)
