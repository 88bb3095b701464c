"""Which machine a run gets: the table of the docs, and the choice by memory."""

import re
from dataclasses import dataclass

from rlhf.config import PipelineConfig, StageConfig, VertexConfig
from rlhf.errors import InputError
from rlhf.models.loading import read_model_config
from rlhf.models.memory import count_parameters, memory_per_role, total_memory
from rlhf.pipeline import on_the_given_base

GIB = 2**30
# The estimate is good to a factor of two at worst; this leaves room for the usual error.
HEADROOM = 1.3


@dataclass(frozen=True)
class Machine:
    """A machine of Vertex AI.

    Attributes:
        machine_type: Vertex's name of it.
        accelerator_type: Vertex's name of its accelerators; "" for none.
        accelerator_count: How many.
        memory: GiB of one accelerator; 0 without.
    """

    machine_type: str
    accelerator_type: str = ""
    accelerator_count: int = 0
    memory: int = 0


CPU = Machine("n1-highmem-8")
# In order of price; a run gets the first that it fits on. The stages use one accelerator.
TABLE = (
    Machine("g2-standard-12", "NVIDIA_L4", 1, 24),
    Machine("a2-highgpu-1g", "NVIDIA_TESLA_A100", 1, 40),
    Machine("a2-ultragpu-1g", "NVIDIA_A100_80GB", 1, 80),
)
# Not chosen by itself: scarce, or without bfloat16.
_ON_REQUEST = (
    Machine("a3-highgpu-1g", "NVIDIA_H100_80GB", 1, 80),
    Machine("n1-standard-8", "NVIDIA_TESLA_T4", 1, 16),
    Machine("n1-standard-8", "NVIDIA_TESLA_V100", 1, 16),
)
# Machines that come with their accelerators: {family}-…-{count}g, or g2 by size.
_BUILT_IN = {
    "g2-standard": "NVIDIA_L4",
    "a2-highgpu": "NVIDIA_TESLA_A100",
    "a2-megagpu": "NVIDIA_TESLA_A100",
    "a2-ultragpu": "NVIDIA_A100_80GB",
    "a3-highgpu": "NVIDIA_H100_80GB",
    "a3-megagpu": "NVIDIA_H100_MEGA_80GB",
    "a3-ultragpu": "NVIDIA_H200_141GB",
}
_L4_OF_G2 = {"24": 2, "48": 4, "96": 8}


class TooLarge(InputError):  # noqa: N818 (says what is the matter)
    """A run needs more memory than any machine of the table has."""


def fit(config: PipelineConfig) -> tuple[PipelineConfig, Machine, str]:
    """Pick the machine, and turn gradient checkpointing on where a run fits only with it.

    Recomputing activations changes no result and costs a seventh of the time or less
    (docs/performance.md), which is cheaper than to be refused.

    Args:
        config: The run.

    Returns:
        The run as it will be made, the machine, and a sentence on why.

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
    """Pick the machine for the GPU jobs of a run.

    Args:
        config: The run; reads `config.json` of its bases where memory decides.

    Returns:
        The machine, and a sentence on why.

    Raises:
        InputError: The fields do not name a machine, or no machine of the table is large enough.
    """
    wanted = config.vertex
    if wanted.machine_type or wanted.accelerator_type != "GPU":
        machine = _as_told(wanted)
        return machine, f"{machine.machine_type}: as told"
    if wanted.accelerator_count > 1:
        raise InputError(
            "accelerator_count: a stage uses one accelerator, and without a machine_type a machine "
            f"with one is chosen; leave it out, or give the machine with {wanted.accelerator_count}"
        )
    stages = ("reward_model", "ppo", *(("inference",) if config.eval_dataset else ()))
    needed, stage = max(
        (total_memory(memory_per_role(*_on_a_gpu(config, name))), name) for name in stages
    )
    stage_config = on_the_given_base(config, stage)
    base = stage_config.base_model or ""
    size = count_parameters(read_model_config(base, stage_config.revision)).base
    for machine in TABLE:
        if needed * HEADROOM <= machine.memory * GIB:
            return machine, (
                f"{machine.machine_type}: {base} has {size / 1e9:.2f} B parameters, {stage} needs "
                f"about {needed / GIB:.0f} GiB, {machine.accelerator_type} has {machine.memory}"
            )
    raise TooLarge(
        f"machine_type: {stage} of {base} ({size / 1e9:.1f} B parameters) needs about "
        f"{needed / GIB:.0f} GiB, and {HEADROOM - 1:.0%} to spare because that is an estimate; "
        f"{TABLE[-1].accelerator_type} has {TABLE[-1].memory}; lower "
        "micro_batch_size, max_tokens_per_micro_batch or rollout_batch_size, set "
        "gradient_checkpointing, use LoRA, or give a machine_type"
    )


def _on_a_gpu(config: PipelineConfig, stage: str) -> tuple[object, StageConfig, object]:
    """What a stage's memory is reckoned from, with the types that a GPU would use."""
    stage_config: StageConfig = on_the_given_base(config, stage)
    stage_config = stage_config.model_copy(update={"device": "cpu"})
    if stage_config.dtype == "auto":
        stage_config = stage_config.model_copy(update={"dtype": "bfloat16"})
    judge = None
    if stage == "ppo":
        reward = on_the_given_base(config, "reward_model")
        if (reward.base_model, reward.revision) != (stage_config.base_model, stage_config.revision):
            judge = read_model_config(reward.base_model, reward.revision)
    model = read_model_config(stage_config.base_model or "", stage_config.revision)
    return model, stage_config, judge


def _as_told(wanted: VertexConfig) -> Machine:
    kind, count = wanted.accelerator_type, wanted.accelerator_count
    if kind == "CPU":
        if wanted.machine_type and (own := _accelerators_of(wanted.machine_type)):
            raise InputError(
                f"accelerator_type: {wanted.machine_type} comes with {own[0]}, not without "
                f"accelerators; give another machine_type, such as {CPU.machine_type}"
            )
        return Machine(wanted.machine_type or CPU.machine_type)
    if not wanted.machine_type:
        for machine in (*TABLE, *_ON_REQUEST):
            if machine.accelerator_type == kind and count in (0, machine.accelerator_count):
                return machine
        raise InputError(
            f"accelerator_type: there is no usual machine for {count or 1} {kind}; give a "
            "machine_type too"
        )
    built_in = _accelerators_of(wanted.machine_type)
    if built_in is None:
        if kind == "GPU":
            raise InputError(
                f"accelerator_type: {wanted.machine_type} is not known to come with GPUs; give an "
                "accelerator such as NVIDIA_TESLA_T4, or CPU"
            )
        return Machine(wanted.machine_type, kind, count or 1)
    own_kind, own_count = built_in
    # Vertex refuses any other than what such a machine comes with.
    if kind not in ("GPU", own_kind):
        raise InputError(
            f"accelerator_type: {wanted.machine_type} comes with {own_kind}, not with {kind}"
        )
    if count not in (0, own_count):
        raise InputError(
            f"accelerator_count: {wanted.machine_type} comes with {own_count}, not with {count}; "
            "leave it out"
        )
    return Machine(wanted.machine_type, own_kind, own_count)


def _accelerators_of(machine_type: str) -> tuple[str, int] | None:
    """Kind and number of the accelerators that a machine comes with."""
    family, _, size = machine_type.rpartition("-")
    if family not in _BUILT_IN:
        return None
    if family == "g2-standard":
        return _BUILT_IN[family], _L4_OF_G2.get(size, 1)
    digits = re.match(r"\d+", size)
    return _BUILT_IN[family], int(digits.group()) if digits else 1
