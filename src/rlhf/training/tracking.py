"""What a run records as it goes: metrics.jsonl, samples.jsonl, trackers, progress."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf.console import SteadyStream, say
from rlhf.errors import InputError
from rlhf.files.text import json_safe, write_text

SECONDS_BETWEEN_LINES = 5.0


class JsonLog:
    """A JSON Lines file in which every row carries its step.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def truncate(self, step: int) -> None:
        """Drop rows after `step` and incomplete ones: a resumed run writes them again."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue
        write_text(self.path, "".join(kept))

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; numbers that JSON cannot represent (NaN, infinity) become null."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(json_safe({"step": step, **row}), ensure_ascii=False) + "\n")


class Trackers:
    """TensorBoard and the other trackers that accelerate supports.

    Args:
        names: Trackers, by accelerate's names.
        folder: The stage's folder; TensorBoard writes to its `tensorboard/`.
        done: Completed steps; TensorBoard hides what an earlier attempt logged after them.
        cpu: Whether the run uses the CPU only.
        facts: The configuration, flat, for trackers that show it.

    Raises:
        InputError: If a tracker's package is not installed.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, done: int, cpu: bool, facts: Mapping[str, Any]
    ) -> None:
        check_trackers(names)
        self._accelerator = Accelerator(
            # The models choose device and precision, and accelerate's state is one per process:
            # what a caller or an earlier stage has set up is kept.
            cpu=cpu and not is_initialized(),
            log_with=list(names) or None,
            project_config=ProjectConfiguration(logging_dir=str(folder / "tensorboard")),
        )
        self._accelerator.init_trackers(
            "rlhf", init_kwargs={"tensorboard": {"purge_step": done + 1}}
        )
        flat = {name: _plain(value) for name, value in facts.items()}
        for tracker in self._accelerator.trackers:
            # TensorBoard would show the hyperparameters as a separate run at every start.
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(flat)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the finite metrics."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._accelerator.log(finite, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._accelerator.end_training()


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for trackers whose package is not installed."""
    available = {tracker.value for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        raise InputError(
            f"log_with: {', '.join(missing)} cannot be used here; install the package, or choose "
            f"from {', '.join(sorted(available)) or 'none'}"
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value, default=str)


class ProgressLine:
    """A progress bar in a terminal, otherwise an occasional line; on stderr.

    Args:
        name: The stage.
        total: Training steps.
        done: Steps already completed.
        shown: Names of the metrics to show.
    """

    def __init__(self, name: str, total: int, done: int, shown: Sequence[str]) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._started, self._printed, self._done_at_start = time.monotonic(), 0.0, done
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if SteadyStream(sys.stderr).isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=Console(file=cast(TextIO, SteadyStream(sys.stderr))),
            )
            self._task = self._bar.add_task(name, total=total, completed=done, metrics="")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float], log: bool) -> None:
        """Show a step; without a terminal only steps with `log`, and not too often."""
        text = "  ".join(
            f"{name.removeprefix(f'{self._name}/')} {metrics[name]:.4g}"
            for name in self._shown
            if name in metrics
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text)
            return
        now = time.monotonic()
        if step < self._total and (not log or now - self._printed < SECONDS_BETWEEN_LINES):
            return
        self._printed = now
        per_step = (now - self._started) / max(1, step - self._done_at_start)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self._total - step)))
        say(f"{self._name} {step}/{self._total}  {text}  eta {left}")

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()


class RunLog:
    """Everything a run writes step by step: metrics.jsonl, samples.jsonl, trackers, progress.

    Args:
        folder: The stage's folder.
        done: Steps already logged; what an earlier attempt wrote about later steps is dropped.
        trackers: Also receive the metrics; closed by `close`.
        progress: Shows the progress; closed by `close`.
    """

    def __init__(self, folder: Path, done: int, trackers: Trackers, progress: ProgressLine) -> None:
        self._metrics = JsonLog(folder / "metrics.jsonl")
        self._samples = JsonLog(folder / "samples.jsonl")
        self._metrics.truncate(done)
        self._samples.truncate(done)
        self._trackers = trackers
        self._progress = progress

    def write(
        self,
        step: int,
        metrics: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
        *,
        due: bool,
    ) -> None:
        """Write a step: always its samples and progress, its metrics only when they are due."""
        if due:
            self._metrics.write(step, [metrics])
            self._trackers.log(step, metrics)
        self._samples.write(step, samples)
        self._progress.update(step, metrics, due)

    def close(self) -> None:
        """Restore the terminal; flush and close the trackers."""
        self._progress.close()
        self._trackers.close()


class PhaseTimer:
    """Seconds spent in each named phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # kernels run asynchronously
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `time/<phase>` metrics and reset the timer."""
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return metrics


def peak_memory_mb() -> float:
    """Return the peak memory so far, MiB: allocated on the GPU, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # type: ignore[import-untyped]

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
