"""The training loop shared by SFT, reward model and PPO: read `Trainer.train` from top to bottom.

Resuming needs no random state: rows, rollouts and dropout depend only on (seed, step), so a run
that stopped after any step resumes exactly. Nor does stopping have to wait for the end of a step:
what the step has changed is undone, and the step is repeated on resuming.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch

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
from rlhf.training.optimizer import ParameterGroup, StepStart, learning_rate_factor
from rlhf.training.tracking import (
    PhaseTimer,
    ProgressLine,
    RunLog,
    Trackers,
    check_trackers,
    peak_memory_mb,
)
from rlhf.training.updates import Updates

__all__ = ["Callback", "ParameterGroup", "Trainer", "TrainingDiverged"]

# Called after every step with the trainer, the step (from 1), its metrics and its samples.
Callback = Callable[["Trainer", int, Mapping[str, float], Sequence[Mapping[str, Any]]], None]


class Trainer(Updates):
    """A training run in a folder.

    A subclass sets up its models, calls `super().__init__` and implements the abstract methods.
    `train` runs everything; `step` runs a single step, for callers that write their own loop.

    Args:
        config: The stage's configuration.
        num_rows: Training rows (or pairs, or prompts), to count epochs.
        run: What `prepare_output` found; None calls it, without data fingerprints.
        callbacks: Called after every step; see `Callback`.

    Attributes:
        total_steps: Training steps of the run.
        final_metrics: Set for `export`: metrics of the last step and of the exported weights.
    """

    rows_name: ClassVar[str] = "rows"
    shown_metrics: ClassVar[tuple[str, ...]] = ()
    # Metric of `evaluate` that selects the best weights, and its direction.
    best_metric: ClassVar[tuple[str, Literal["max", "min"]] | None] = None
    # Whether `export` gets the best weights rather than the last ones.
    export_best: ClassVar[bool] = True

    def __init__(
        self,
        config: TrainingConfig,
        *,
        num_rows: int,
        run: Run | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_trackers(config.log_with)
        super().__init__(config, run or prepare_output(config, {}, stage=self.stage))
        self.num_rows = num_rows
        self.output_path = self.run.output.path
        if config.tensorboard_dir is not None:
            self.run.output.also_publish("tensorboard", config.tensorboard_dir)
        self.callbacks = callbacks
        self.total_steps = config.total_steps(num_rows)
        self.final_metrics: dict[str, Any] = {}
        self._seconds = 0.0
        self._tokens = 0
        self._timer = PhaseTimer()
        self._samples: list[dict[str, Any]] = []
        self._last: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
        # A completed step that has yet to be evaluated: its metrics and samples.
        self._unevaluated: tuple[dict[str, float], list[dict[str, Any]]] | None = None
        self._saved_step = 0

    @abstractmethod
    def make_step(self) -> dict[str, float]:
        """Run training step `step_index`, using `apply_gradients`; return its metrics."""

    @abstractmethod
    def export(self) -> dict[str, float]:
        """Write the final artifacts to `output_path`; return additional final metrics."""

    def evaluate(self) -> dict[str, float]:
        """Return metrics on held-out data; {} if there are none."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Return JSON-serializable state beyond weights and optimizer."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `extra_state` returned."""

    def describe(self) -> list[str]:
        """Return lines printed at the start that say what the run will do."""
        size, visited = self.config.batch_size, self.config.rows_per_step
        epochs = self.total_steps * visited / self.num_rows
        rows, shared = self.rows_name, ""
        if visited != size:
            rows, shared = "prompts", f" ({visited} prompts, {size // visited} responses each)"
        return [
            f"{self.stage}: {self.total_steps} steps of {size} {self.rows_name}{shared}"
            f" = {epochs:.3g} epochs of {self.num_rows} {rows};"
            f" output in {self.run.output.folder}"
        ]

    def train(self) -> dict[str, Any]:
        """Run the stage: resume, train, evaluate, save checkpoints, export.

        Returns:
            The final metrics, as written to metrics.json.

        Raises:
            StoppedBySignal: After saving, when SIGTERM or SIGINT came.
            TrainingDiverged: If updates failed several times in a row.
        """
        if self.run.status is Status.FINISHED:
            say(f"{self.stage}: already finished in {self.run.output.folder}")
            return self.run.conclude()
        if not self.is_main:  # the main process holds the folder for all of them
            return self._train()
        with self.run.held():
            return self._train()

    def _train(self) -> dict[str, Any]:
        if self.run.status is Status.FINISHED:  # another process has just finished it
            return self.run.conclude()
        if self.is_main:
            self.run.start()
        self._restore()
        with self._session() as (signals, log):
            try:
                self._make_steps(signals, log)
            except StopRequested:
                self._save_unfinished()
                raise StoppedBySignal(self._saved_step) from None
            except TrainingDiverged:
                if self.is_main:
                    self.run.output.publish()  # the log that the message refers to
                raise
            signals.all_saved(self.step_index)
            return self._finish()

    def _make_steps(self, signals: SignalGuard, log: RunLog | None) -> None:
        """Run the remaining steps, with evaluations, logging and checkpoints."""
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
            self._log_step(log, metrics)
            stop = bool(self.reduce(torch.tensor(signals.requested), "max"))
            if stop or self._due(self.config.save_interval(self.total_steps)):
                self.save()
            if stop and self.step_index < self.total_steps:
                raise StoppedBySignal(self.step_index)

    def _remembered_step(self) -> dict[str, float]:
        """Run a step that a signal may interrupt anywhere."""
        self._before_step = StepStart(self.skipped_updates, self._skipped_in_row)
        metrics = self.step()
        self._before_step = None
        return metrics

    def _save_unfinished(self) -> None:
        """Undo what an unfinished step has changed and save the last completed one.

        If the weights have already changed and were too large to copy, the run resumes from the
        newest checkpoint.
        """
        memory, self._before_step = self._before_step, None
        if memory is None:  # stopped during an evaluation, which is repeated
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
        """Run one training step and count it.

        Returns:
            The step's metrics, with learning rate, seconds per phase and memory.
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
        metrics = self.mean_metrics(self.make_step())
        self.step_index += 1
        seconds = time.perf_counter() - start
        self._seconds += seconds
        metrics |= {"train/lr": self.optimizer.groups[0].learning_rate * factor}
        metrics |= {"train/skipped_updates": float(self.skipped_updates)}
        metrics |= self._timer.take() | {"time/step": seconds}
        metrics |= {"perf/peak_memory_mb": peak_memory_mb()}
        if tokens := int(self.reduce(torch.tensor(self._tokens))):
            metrics |= {"perf/tokens_per_second": tokens / seconds}
        return metrics

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as `time/<name>`."""
        return self._timer.phase(name)

    def count_tokens(self, count: int) -> None:
        """Count tokens of this step for `perf/tokens_per_second`."""
        self._tokens += count

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows of this step to samples.jsonl and to what callbacks receive."""
        self._samples.extend(dict(row) for row in rows)

    def save(self) -> None:
        """Write and publish a checkpoint of the completed steps."""
        if self.is_main:
            self._write_checkpoint()
        self._saved_step = self.step_index

    def _write_checkpoint(self) -> None:
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
            "run": self.run.identity,  # says whose checkpoint this is if run.json gets damaged
        }
        moments = self.optimizer.state_tensors()
        checkpoint = Checkpoint(self.step_index, self.parameters, moments, state)
        with self.run.held(look=False):  # for callers that run the steps themselves
            save_checkpoint(self.output_path, checkpoint, keep=self.config.save_total_limit)
            self.run.output.publish()

    def _due(self, every: int) -> bool:
        return self.step_index % every == 0 or self.step_index == self.total_steps

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, and save the weights if they are the best so far."""
        with self.phase("evaluate"):
            self._evaluation = self.mean_metrics(self.evaluate())
        if self.best_metric is not None and self.best_metric[0] in self._evaluation:
            name, direction = self.best_metric
            value = self._evaluation[name]
            best = read_best(self.output_path)
            sign = 1 if direction == "max" else -1
            if math.isfinite(value) and (best is None or sign * value > sign * best.value):
                best = Best(self.step_index, name, value, self._evaluation)
                if self.is_main:
                    save_best(self.output_path, self.parameters, best)
        return self._evaluation | self._timer.take()

    @contextmanager
    def _session(self) -> Iterator[tuple[SignalGuard, RunLog | None]]:
        """Handle signals and open the main process's log; close both whatever happens."""
        log = self._open_log() if self.is_main else None
        try:
            with SignalGuard() as signals:
                yield signals, log
        finally:
            if log is not None:
                log.close()

    def _open_log(self) -> RunLog:
        """Say what the run will do, and open the log where an earlier attempt left off."""
        for line in self.describe():
            say(line)
        if self.step_index:
            say(f"{self.stage}: continues after step {self.step_index}")
        # A step that is not evaluated yet is logged after its evaluation.
        logged = self.step_index - (self._unevaluated is not None)
        cpu = next(iter(self.parameters.values())).device.type == "cpu"
        facts = self.run.identity["fields"]
        return RunLog(
            self.output_path,
            logged,
            Trackers(self.config.log_with, self.output_path, logged, cpu, facts),
            ProgressLine(self.stage, self.total_steps, self.step_index, self.shown_metrics),
        )

    def _log_step(self, log: RunLog | None, metrics: dict[str, float]) -> None:
        """Log a step and call the callbacks, in the main process only."""
        step, self._last = self.step_index, metrics
        if log is None:
            return
        due = self._due(self.config.log_every) or bool(self._evaluation.keys() & metrics.keys())
        log.write(step, metrics, self._samples, due=due)
        for callback in self.callbacks:
            callback(self, step, metrics, self._samples)

    def _restore(self) -> None:
        """Restore the newest intact checkpoint; start from scratch if there is none."""
        checkpoint = None
        if self.run.status is Status.CONTINUE:
            self.run.output.fetch("checkpoints/*", "best/*", "metrics.jsonl", "samples.jsonl")
            checkpoint = load_checkpoint(self.output_path)
        if checkpoint is None or not restore_best(self.output_path, checkpoint):
            if self.is_main:
                remove_checkpoints(self.output_path)
                remove_best(self.output_path)  # from an attempt that failed before saving
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
            # JSON has no NaN: such metrics were written as null.
            numbers = {name: math.nan if m is None else m for name, m in metrics.items()}
            self._unevaluated = (numbers, samples)
        self.load_extra_state(state["extra"])

    def _finish(self) -> dict[str, Any]:
        """Export, write the final metrics, and remove what only resuming needed."""
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
        if not self.is_main:
            return metrics
        metrics |= self.export() | {"seconds": self._seconds}
        return self.run.finish(metrics)
