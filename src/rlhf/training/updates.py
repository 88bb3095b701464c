"""How a trainer changes weights: what is trained, clipped updates, and skipped ones."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from rlhf.config import TrainingConfig
from rlhf.errors import TrainingDiverged
from rlhf.files.run_folder import Run
from rlhf.training.optimizer import GroupedAdamW, ParameterGroup, StepStart
from rlhf.training.processes import Processes

SKIPS_BEFORE_GIVING_UP = 5


class Updates(Processes, ABC):
    """The trained weights of a run and the updates to them.

    Args:
        config: The stage's configuration.
        run: The run's folder and identity.

    Attributes:
        config: The stage's configuration.
        run: The run's folder and identity.
        step_index: Completed steps, which is also the index of the next step.
        skipped_updates: Optimizer updates skipped so far.
    """

    stage: ClassVar[str]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 1e-8

    def __init__(self, config: TrainingConfig, run: Run) -> None:
        self.config = config
        self.run = run
        self.step_index = 0
        self.skipped_updates = 0
        self._skipped_in_row = 0
        self._before_step: StepStart | None = None

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what is trained; called once."""

    @cached_property
    def optimizer(self) -> GroupedAdamW:
        """AdamW over the groups from `parameter_groups`, built on first use."""
        return GroupedAdamW(
            self.parameter_groups(),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.config.weight_decay,
        )

    @classmethod
    def optimizer_settings(cls) -> str:
        """Return the optimizer settings that no configuration field covers."""
        return f"Adam, betas {cls.betas}, eps {cls.eps}"

    @property
    def updates_per_step(self) -> int:
        """The most optimizer updates in a step; after the last one the step is not interrupted."""
        return 1

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name."""
        return self.optimizer.parameters

    def apply_gradients(self) -> dict[str, float]:
        """Clip each group's gradients to its own norm, update the weights, clear the gradients.

        Gradients are those of the loss itself: sums that the caller has divided by global counts.

        Returns:
            `train/grad_norm_<group>` before clipping; {} if the update was skipped because a
            gradient was not finite.

        Raises:
            TrainingDiverged: If that happened several times in a row.
        """
        norms = self.optimizer.grad_norms()
        finite = torch.tensor([bool(torch.isfinite(norm)) for norm in norms.values()])
        somewhere = self.reduce(~finite, "max").tolist()
        broken = [name for name, flag in zip(norms, somewhere, strict=True) if flag]
        if broken:
            self.skip_update(f"the gradient of {' and '.join(broken)} was not finite")
            return {}
        if self._before_step is not None:
            self._before_step.keep(self.optimizer, copy=self.updates_per_step > 1)
        self.optimizer.update(norms)
        self._skipped_in_row = 0
        return {f"train/grad_norm_{name}": float(norm) for name, norm in norms.items()}

    def skip_update(self, reason: str) -> None:
        """Skip an update: clear the gradients and count it.

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
