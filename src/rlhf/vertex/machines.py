"""Choice of a run's machine: the table of the docs, the choice by memory, and the user's own."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from rlhf.config import PipelineConfig, StageConfig
from rlhf.errors import InputError
from rlhf.models.loading import read_model_config
from rlhf.models.memory import count_parameters, memory_per_role, total_memory
from rlhf.pipeline import on_the_given_base
from rlhf.vertex.machine_types import (
    ACCELERATORS,
    DEFAULT_CPU,
    MACHINE_TYPES,
    accelerator_of,
    machine_with_one,
    problems_of_machine,
)

GIB = 2**30
# The estimate is within a factor of two at worst; this covers the usual error.
HEADROOM = 1.3


@dataclass(frozen=True)
class Machine:
    """A Vertex AI machine, as a job requests it.

    Attributes:
        machine_type: Vertex's name for it.
        accelerator_type: Vertex's name for its accelerators, or "".
        accelerator_count: Number of accelerators.
        memory: GiB per accelerator or, without one, of the machine.
    """

    machine_type: str
    accelerator_type: str = ""
    accelerator_count: int = 0
    memory: int = 0

    @property
    def has(self) -> str:
        """The device that the memory belongs to, in words."""
        return self.accelerator_type or self.machine_type


def _with_one(name: str) -> Machine:
    accelerator = next(iter(MACHINE_TYPES[name].accelerators))
    return Machine(name, accelerator, 1, ACCELERATORS[accelerator].memory)


# Ordered by price; a run gets the first that it fits on. A stage uses one accelerator.
TABLE = tuple(map(_with_one, ("g2-standard-12", "a2-highgpu-1g", "a2-ultragpu-1g")))


class TooLarge(InputError):  # noqa: N818 (says what is the matter)
    """A run needs more memory than any machine in the table has."""


def fit(config: PipelineConfig) -> tuple[PipelineConfig, Machine, str]:
    """Pick the machine; turn on gradient checkpointing if the run only fits with it.

    Recomputing activations changes no result and costs at most a seventh of the time
    (docs/performance.md), which is better than refusing the run.

    Args:
        config: The run.

    Returns:
        The run as it will be executed, the machine, and a sentence on why.

    Raises:
        InputError: As `choose_machine`.
    """
    try:
        return config, *choose_machine(config)
    except TooLarge:
        data = config.model_dump(exclude_unset=True)
        if "gradient_checkpointing" in data:
            raise
        thrifty = PipelineConfig.model_validate(data | {"gradient_checkpointing": True})
        machine, why = choose_machine(thrifty)
        return thrifty, machine, f"{why}, with gradient_checkpointing, which is turned on"


def choose_machine(config: PipelineConfig) -> tuple[Machine, str]:
    """Pick the machine for a run's GPU jobs, or check the one that was named.

    Args:
        config: The run; `config.json` of its bases is read.

    Returns:
        The machine, and a sentence on why.

    Raises:
        InputError: If the fields name no valid machine, or the run needs more memory than it has.
    """
    if problems := problems_of_run(config):
        raise InputError(problems)
    told = named_machine(config)
    if told is None:
        need = _need(config, bfloat16=True)
        if (machine := _first_that_fits(need.bytes)) is not None:
            return machine, f"{machine.machine_type}: {need}, {machine.has} has {machine.memory}"
        raise TooLarge(
            f"machine_type: {need}, and {HEADROOM - 1:.0%} to spare because that is an estimate; "
            f"{TABLE[-1].has} has {TABLE[-1].memory}; {_LOWER}, or name another accelerator_type"
        )
    kind = ACCELERATORS.get(told.accelerator_type)
    need = _need(config, bfloat16=kind is not None and kind.bfloat16)
    if need.bytes > told.memory * GIB:
        raise TooLarge(
            f"machine_type: {need}; {told.has} has {told.memory}; {_instead(config, told)}{_LOWER}"
        )
    near = need.bytes * HEADROOM > told.memory * GIB
    why = f"{told.machine_type}: as told; {need}, {told.has} has {told.memory}"
    return told, f"{why}, which is close" if near else why


def problems_of_run(config: PipelineConfig, cuda: int | None = None) -> list[str]:
    """List what is wrong with the named machine, before any base model is read.

    Args:
        config: The run.
        cuda: torch's CUDA build in the image; None: derive it from the image's tag.
    """
    wanted = config.vertex
    problems = problems_of_machine(wanted, cuda)
    accelerator = "" if problems else accelerator_of(wanted)
    if accelerator and not ACCELERATORS[accelerator].bfloat16:
        for stage in _stages(config):
            if config.stage_config(stage).dtype == "bfloat16":
                own = getattr(config, stage)
                problems.append(
                    f"{f'{stage}.' if 'dtype' in own else ''}dtype: {accelerator} has no bfloat16; "
                    "give float32 or auto, or an accelerator_type such as NVIDIA_L4"
                )
    return list(dict.fromkeys(problems))


def named_machine(config: PipelineConfig) -> Machine | None:
    """Return the machine that the fields name; None if memory is to decide."""
    wanted = config.vertex
    if wanted.accelerator_type == "CPU":
        name = wanted.machine_type or DEFAULT_CPU
        return Machine(name, memory=int(MACHINE_TYPES[name].memory * 10**9 / GIB))
    accelerator = accelerator_of(wanted)
    if not accelerator:
        return None
    name = wanted.machine_type or machine_with_one(accelerator)
    return Machine(name, accelerator, 1, ACCELERATORS[accelerator].memory)


_LOWER = (
    "lower micro_batch_size, max_tokens_per_micro_batch or rollout_batch_size, set "
    "gradient_checkpointing or use LoRA"
)


@dataclass(frozen=True)
class _Need:
    """Memory needed by the most demanding stage, and what it consists of."""

    bytes: int
    stage: str
    base: str
    parameters: int

    def __str__(self) -> str:
        billions = self.parameters / 1e9
        return (
            f"{self.base} has {billions:.2f} B parameters, {self.stage} needs about "
            f"{self.bytes / GIB:.0f} GiB"
        )


def _stages(config: PipelineConfig) -> tuple[str, ...]:
    return ("reward_model", "ppo", *(("inference",) if config.eval_dataset else ()))


def _need(config: PipelineConfig, *, bfloat16: bool) -> _Need:
    """Estimate the memory of a run; `bfloat16` says whether the hardware has that type."""
    needed, stage = max(
        (total_memory(memory_per_role(*_on_a_device(config, name, bfloat16))), name)
        for name in _stages(config)
    )
    stage_config = on_the_given_base(config, stage)
    base = stage_config.base_model or ""
    size = count_parameters(read_model_config(base, stage_config.revision)).base
    return _Need(needed, stage, base, size)


def _first_that_fits(needed: int) -> Machine | None:
    return next((machine for machine in TABLE if needed * HEADROOM <= machine.memory * GIB), None)


def _instead(config: PipelineConfig, told: Machine) -> str:
    """Suggest a machine that would be large enough."""
    if told.accelerator_type:
        fitting = _first_that_fits(_need(config, bfloat16=True).bytes)
        return f"give machine_type {fitting.machine_type}, or " if fitting else ""
    needed = _need(config, bfloat16=False).bytes / 10**9
    roomy = sorted((m.memory, name) for name, m in MACHINE_TYPES.items() if "n1-highmem" in name)
    fitting_names = [name for memory, name in roomy if memory >= needed]
    return f"give machine_type {fitting_names[0]}, or " if fitting_names else ""


def _on_a_device(
    config: PipelineConfig, stage: str, bfloat16: bool
) -> tuple[PretrainedConfig, StageConfig, list[PretrainedConfig]]:
    """Return what determines a stage's memory, with the types that a device would use."""
    stage_config: StageConfig = on_the_given_base(config, stage)
    stage_config = stage_config.model_copy(update={"device": "cpu"})
    if stage_config.dtype == "auto":
        dtype = "bfloat16" if bfloat16 else "float32"
        stage_config = stage_config.model_copy(update={"dtype": dtype})
    scorers = []
    if stage == "ppo":
        reward = on_the_given_base(config, "reward_model")
        if (reward.base_model, reward.revision) != (stage_config.base_model, stage_config.revision):
            scorers.append(read_model_config(reward.base_model, reward.revision))
    model = read_model_config(stage_config.base_model or "", stage_config.revision)
    return model, stage_config, scorers
