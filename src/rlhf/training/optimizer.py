"""The optimizer of a run: named groups of weights, each with its own rate and clip norm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.errors import InputError

ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
# Weights and moments up to this size are copied before a step that makes several updates.
LARGEST_COPY = 1 << 30  # bytes of ordinary memory


@dataclass(frozen=True)
class ParameterGroup:
    """Weights with their own learning rate and clip norm.

    Attributes:
        name: Used in metrics: `train/grad_norm_<name>`.
        named_params: Names (unique over all groups, used in checkpoints) and fp32 tensors.
        learning_rate: Peak learning rate.
        max_grad_norm: The group's gradient is clipped to this norm.
    """

    name: str
    named_params: Sequence[tuple[str, nn.Parameter]]
    learning_rate: float
    max_grad_norm: float


def learning_rate_factor(
    step: int, total: int, warmup: int, schedule: Literal["linear", "cosine", "constant"]
) -> float:
    """Return the factor on the peak learning rate.

    Args:
        step: Training step, from 0.
        total: Training steps of the run, at which linear and cosine decay would reach 0 (no step
            trains at 0).
        warmup: Steps of the linear warm-up; step `warmup - 1` is the first at the peak.
        schedule: What happens after the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class GroupedAdamW:
    """AdamW over groups that are clipped separately; its state is saved by tensor name.

    Args:
        groups: What is trained.
        betas: Adam's decay rates for the moments.
        eps: Adam's epsilon.
        weight_decay: Decoupled decay of tensors with two or more dimensions; norms and biases
            do not decay.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.groups = list(groups)
        named = [item for group in groups for item in group.named_params]
        self.parameters: dict[str, nn.Parameter] = dict(named)
        if len(self.parameters) < len(named) or len({p for _, p in named}) < len(named):
            raise ValueError("parameter groups share names or tensors")
        if not named or any(p.dtype != torch.float32 for _, p in named):
            raise ValueError("what is trained must exist, in float32")
        options: list[dict[str, Any]] = []
        for group in groups:
            for decays in (True, False):
                tensors = [p for _, p in group.named_params if (p.ndim >= 2) == decays]
                if tensors:
                    rate = group.learning_rate
                    decay = weight_decay if decays else 0.0
                    options.append(
                        {"params": tensors, "lr": rate, "peak": rate, "weight_decay": decay}
                    )
        self._adam = torch.optim.AdamW(options, betas=betas, eps=eps)

    def set_rates(self, factor: float) -> None:
        """Multiply every group's peak learning rate by `factor`."""
        for options in self._adam.param_groups:
            options["lr"] = options["peak"] * factor

    def grad_norms(self) -> dict[str, Tensor]:
        """Return the 2-norm of each group's gradient, by group name."""
        return {
            group.name: torch.nn.utils.get_total_norm(
                [p.grad for _, p in group.named_params if p.grad is not None]
            )
            for group in self.groups
        }

    def update(self, norms: Mapping[str, Tensor]) -> None:
        """Clip each group by its norm, step, and clear the gradients."""
        for group in self.groups:
            torch.nn.utils.clip_grads_with_norm_(
                [p for _, p in group.named_params], group.max_grad_norm, norms[group.name]
            )
        self._adam.step()
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self._adam.zero_grad(set_to_none=set_to_none)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return Adam's state as `<name>.<key>`; tensors that were never updated have none."""
        return {
            f"{name}.{key}": self._adam.state[parameter][key]
            for name, parameter in self.parameters.items()
            if parameter in self._adam.state
            for key in ADAM_STATE
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        self._adam.state.clear()
        for name, parameter in self.parameters.items():
            if f"{name}.step" in tensors:
                self._adam.state[parameter] = {
                    # torch keeps the counter on the CPU unless told otherwise.
                    key: tensors[f"{name}.{key}"].to("cpu" if key == "step" else parameter.device)
                    for key in ADAM_STATE
                }

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into the parameters with the same names.

        Raises:
            InputError: If names or shapes differ.
        """
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            names = sorted({name for name, _ in set(expected.items()) ^ set(found.items())})
            raise InputError(
                f"output_dir: its checkpoint does not fit this model ({names[0]}, …); choose "
                "another output_dir"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


class StepStart:
    """The state at the start of a step, so that the step can be undone.

    Args:
        skipped_updates: Updates skipped so far.
        skipped_in_row: How many of the latest updates were skipped in a row.

    Attributes:
        updated: Whether the step has changed weights.
        parameters: Trained weights before the step's first update; None if no copy is kept.
        moments: Adam's state at that point.
    """

    def __init__(self, skipped_updates: int, skipped_in_row: int) -> None:
        self.skipped_updates = skipped_updates
        self.skipped_in_row = skipped_in_row
        self.updated = False
        self.parameters: dict[str, Tensor] | None = None
        self.moments: dict[str, Tensor] | None = None

    def keep(self, optimizer: GroupedAdamW, *, copy: bool) -> None:
        """Copy weights and moments before the first update, if asked to and if they are small."""
        first, self.updated = not self.updated, True
        numbers = sum(p.numel() for p in optimizer.parameters.values())
        if first and copy and 3 * 4 * numbers <= LARGEST_COPY:  # fp32, with two moments
            self.parameters = _copied(optimizer.parameters)
            self.moments = _copied(optimizer.state_tensors())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
