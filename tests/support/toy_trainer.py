"""A trainer with a handful of numbers, for tests of runs and folders."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from rlhf.config import SFTConfig
from rlhf.data.batching import rows_for_step, seeded_generator
from rlhf.training.optimizer import ParameterGroup
from rlhf.training.trainer import Trainer

ROWS = 24


class ToyTrainer(Trainer):
    """Two linear layers with different clip norms, dropout, and its own state."""

    stage = "toy"
    best_metric = ("eval/loss", "min")
    shown_metrics = ("toy/loss",)

    def __init__(self, config: SFTConfig, **options: Any) -> None:
        super().__init__(config, num_rows=ROWS, **options)
        generator = seeded_generator("test", 7)
        self.inputs = torch.randn(ROWS, 5, generator=generator)
        self.targets = torch.randn(ROWS, 1, generator=generator)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in [*self.first.parameters(), *self.second.parameters()]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.seen = 0
        self.broken_steps: set[int] = set()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("first", list(self.first.named_parameters("first")), 0.05, 1.0),
            ParameterGroup("second", list(self.second.named_parameters("second")), 0.02, 0.1),
        ]

    def loss(self, rows: Sequence[int], dropout: float) -> torch.Tensor:
        hidden = nn.functional.dropout(self.first(self.inputs[rows]).tanh(), dropout)
        return (self.second(hidden) - self.targets[rows]).square().mean()

    def make_step(self) -> dict[str, float]:
        rows = rows_for_step(ROWS, self.config.batch_size, self.step_index, self.config.seed)
        with self.phase("forward"):
            loss = self.loss(rows, 0.3)
        if self.step_index in self.broken_steps:
            loss = loss * float("nan")
        loss.backward()
        self.seen += len(rows)
        self.count_tokens(len(rows))
        self.log_samples([{"row": rows[0]}])
        return {"toy/loss": loss.item(), "toy/seen": float(self.seen), **self.apply_gradients()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {"eval/loss": float(self.loss(range(ROWS), 0.0))}

    def extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]

    def export(self) -> dict[str, float]:
        torch.save({k: v.detach() for k, v in self.parameters.items()}, self.output_path / "w.pt")
        return {"toy/exported": 1.0}


class LastTrainer(ToyTrainer):
    """Exports the last weights rather than the best."""

    export_best: ClassVar[bool] = False


def toy_config(folder: Path | str, **fields: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "dataset": "unused.jsonl",
        "output_dir": str(folder),
        "batch_size": 5,
        "train_steps": 8,
        "eval_every": 3,
        "save_every": 3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "log_with": [],
    }
    return SFTConfig(**{**defaults, **fields})


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_timing(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(("time/", "perf/")) and name != "seconds"
    }


def stop_at(step: int, number: int = signal.SIGTERM) -> Any:
    def callback(_: Trainer, now: int, __: Any, ___: Any) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    return callback
