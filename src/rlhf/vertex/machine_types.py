"""Vertex AI's machines for custom jobs, their accelerators, and which ones a stage can use.

From Google's list "Configure compute resources for serverless training". Availability by region
changes and is not checked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rlhf.config import VertexConfig
from rlhf.config.describe import nearest
from rlhf.vertex.image import cuda_of

PERSISTENT = frozenset({"pd-ssd", "pd-standard"})
HYPERDISK = frozenset({"hyperdisk-balanced"})


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU.

    Attributes:
        memory: GiB per GPU.
        bfloat16: Whether it supports bfloat16 natively.
        oldest_cuda: Oldest CUDA build of torch with code for it, 128 for 12.8; 0 for all of ours.
        newest_cuda: Newest such build.
        flexible: Whether FLEX_START offers it.
        refused: Why no stage can run on it, or "".
    """

    memory: int
    bfloat16: bool = True
    oldest_cuda: int = 0
    newest_cuda: int = 999
    flexible: bool = True
    refused: str = ""


_TOO_OLD = "torch's builds in the image have code for Volta and newer GPUs only"
ACCELERATORS: dict[str, Accelerator] = {
    "NVIDIA_L4": Accelerator(24),
    "NVIDIA_TESLA_A100": Accelerator(40),
    "NVIDIA_A100_80GB": Accelerator(80),
    "NVIDIA_H100_80GB": Accelerator(80),
    "NVIDIA_H100_MEGA_80GB": Accelerator(80),
    "NVIDIA_H200_141GB": Accelerator(141),
    "NVIDIA_B200": Accelerator(180, oldest_cuda=128),
    "NVIDIA_GB200": Accelerator(
        186,
        oldest_cuda=128,
        flexible=False,
        refused="its machines need a reservation and an image for ARM",
    ),
    "NVIDIA_RTX_PRO_6000": Accelerator(96, oldest_cuda=128, flexible=False),
    "NVIDIA_TESLA_T4": Accelerator(16, bfloat16=False, flexible=False),
    "NVIDIA_TESLA_V100": Accelerator(16, bfloat16=False, newest_cuda=126, flexible=False),
    "NVIDIA_TESLA_P100": Accelerator(16, bfloat16=False, flexible=False, refused=_TOO_OLD),
    "NVIDIA_TESLA_P4": Accelerator(8, bfloat16=False, flexible=False, refused=_TOO_OLD),
    "NVIDIA_TESLA_K80": Accelerator(12, bfloat16=False, flexible=False, refused=_TOO_OLD),
}


@dataclass(frozen=True)
class MachineType:
    """A machine type.

    Attributes:
        name: Vertex's name for it.
        memory: GB of main memory; 0 where it is never needed.
        accelerators: Accelerators that it supports, and the possible counts of each.
        built_in: Whether the accelerators are part of the machine.
        disks: Kinds of boot disk that it supports.
    """

    name: str
    memory: float = 0
    accelerators: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    built_in: bool = False
    disks: frozenset[str] = PERSISTENT


# CPU machines: family, GB of memory per CPU, CPU counts.
_CPU_FAMILIES: tuple[tuple[str, float, tuple[int, ...]], ...] = (
    ("e2-standard", 4, (4, 8, 16, 32)),
    ("e2-highmem", 8, (2, 4, 8, 16)),
    ("e2-highcpu", 1, (16, 32)),
    ("n1-standard", 3.75, (4, 8, 16, 32, 64, 96)),
    ("n1-highmem", 6.5, (2, 4, 8, 16, 32, 64, 96)),
    ("n1-highcpu", 0.9, (16, 32, 64, 96)),
    ("n2-standard", 4, (4, 8, 16, 32, 48, 64, 80)),
    ("n2-highmem", 8, (2, 4, 8, 16, 32, 48, 64, 80)),
    ("n2-highcpu", 1, (16, 32, 48, 64, 80)),
    ("n4-standard", 4, (2, 4, 8, 16, 32, 48, 64, 80)),
    ("n4-highmem", 8, (2, 4, 8, 16, 32, 48, 64, 80)),
    ("n4-highcpu", 2, (2, 4, 8, 16, 32, 48, 64, 80)),
    ("c2-standard", 4, (4, 8, 16, 30, 60)),
    ("m1-ultramem", 24, (40, 80, 160)),
    ("m1-megamem", 14.9, (96,)),
)
# GPU machines: accelerator, boot disks, machine name to number of accelerators.
_GPU_MACHINES: tuple[tuple[str, frozenset[str], dict[str, int]], ...] = (
    (
        "NVIDIA_L4",
        PERSISTENT,
        {
            f"g2-standard-{cpus}": count
            for cpus, count in (
                (4, 1),
                (8, 1),
                (12, 1),
                (16, 1),
                (24, 2),
                (32, 1),
                (48, 4),
                (96, 8),
            )
        },
    ),
    (
        "NVIDIA_TESLA_A100",
        PERSISTENT,
        {f"a2-highgpu-{count}g": count for count in (1, 2, 4, 8)} | {"a2-megagpu-16g": 16},
    ),
    ("NVIDIA_A100_80GB", PERSISTENT, {f"a2-ultragpu-{count}g": count for count in (1, 2, 4, 8)}),
    (
        "NVIDIA_H100_80GB",
        PERSISTENT | HYPERDISK,
        {f"a3-highgpu-{count}g": count for count in (1, 2, 4, 8)},
    ),
    ("NVIDIA_H100_MEGA_80GB", PERSISTENT | HYPERDISK, {"a3-megagpu-8g": 8}),
    ("NVIDIA_H200_141GB", HYPERDISK, {"a3-ultragpu-8g": 8}),
    ("NVIDIA_B200", HYPERDISK, {"a4-highgpu-8g": 8}),
    ("NVIDIA_GB200", HYPERDISK, {"a4x-highgpu-4g": 4}),
    (
        "NVIDIA_RTX_PRO_6000",
        HYPERDISK,
        {f"g4-standard-{48 * count}": count for count in (1, 2, 4, 8)},
    ),
)


def _beside_n1(cpus: int) -> dict[str, tuple[int, ...]]:
    """Return the accelerators, and counts, that an n1 machine with this many CPUs supports."""
    small = (1, 2, 4) if cpus <= 16 else (2, 4) if cpus == 32 else (4,)
    volta = {8: (1, 2, 4, 8), 16: (2, 4, 8), 32: (4, 8)}.get(max(cpus, 8), (8,))
    kinds = ("NVIDIA_TESLA_T4", "NVIDIA_TESLA_P4", "NVIDIA_TESLA_P100")
    return {**dict.fromkeys(kinds, small), "NVIDIA_TESLA_V100": volta}


def _all() -> Iterator[MachineType]:
    for family, memory, sizes in _CPU_FAMILIES:
        kind = family.split("-")[0]
        disks = {"n4": HYPERDISK, "m1": PERSISTENT | HYPERDISK}.get(kind, PERSISTENT)
        for cpus in sizes:
            yield MachineType(
                f"{family}-{cpus}",
                memory * cpus,
                _beside_n1(cpus) if kind == "n1" else {},
                disks=disks,
            )
    for accelerator, disks, machines in _GPU_MACHINES:
        for name, count in machines.items():
            yield MachineType(name, 0, {accelerator: (count,)}, built_in=True, disks=disks)


MACHINE_TYPES: dict[str, MachineType] = {machine.name: machine for machine in _all()}
DEFAULT_CPU, DEFAULT_GPU = "n1-highmem-8", "g2-standard-12"
# The machine used when only an accelerator is named.
_USUAL = {"NVIDIA_L4": DEFAULT_GPU, "NVIDIA_TESLA_T4": "n1-standard-8"}


def machine_with_one(accelerator: str) -> str:
    """Return a machine with exactly one accelerator of a kind, or ""."""
    takes_one = (
        name
        for name, machine in MACHINE_TYPES.items()
        if 1 in machine.accelerators.get(accelerator, ()) and machine.name[:2] != "n1"
    )
    beside = "n1-standard-8" if accelerator in MACHINE_TYPES["n1-standard-8"].accelerators else ""
    return _USUAL.get(accelerator) or next(takes_one, beside)


def accelerator_of(wanted: VertexConfig) -> str:
    """Return the accelerator that the fields name, directly or by the machine, or "".

    Only valid if `problems_of_machine` finds nothing.
    """
    if wanted.accelerator_type == "CPU":
        return ""
    if wanted.accelerator_type != "GPU":
        return wanted.accelerator_type
    machine = MACHINE_TYPES.get(wanted.machine_type)
    return next(iter(machine.accelerators)) if machine and machine.built_in else ""


def problems_of_machine(wanted: VertexConfig, cuda: int | None = None) -> list[str]:
    """List what is wrong with machine, accelerator, disk and image, separately and combined.

    Args:
        wanted: The `vertex` fields.
        cuda: torch's CUDA build in the image, 126 for 12.6, 0 for none; None: derive it from the
            image's tag.
    """
    kind, count, name = wanted.accelerator_type, wanted.accelerator_count, wanted.machine_type
    machine = MACHINE_TYPES.get(name)
    if name and machine is None:
        return [
            f"machine_type: {name!r} is none that custom jobs take{nearest(name, MACHINE_TYPES)}"
        ]
    if machine is not None and (wrong := _contradiction(machine, kind, count)):
        return wrong
    problems = []
    accelerator = accelerator_of(wanted)
    if accelerator and (refused := ACCELERATORS[accelerator].refused):
        return [f"accelerator_type: {accelerator} cannot be used: {refused}; {_others()}"]
    if accelerator and machine is None and not machine_with_one(accelerator):
        problems.append(
            f"accelerator_type: there is no machine with one {accelerator}, and a stage uses one; "
            f"{_others()}"
        )
    elif machine is not None and accelerator:
        problems += _more_than_one(machine, accelerator, count)
    elif count > 1:
        problems.append(_one_only(count))
    usual = DEFAULT_CPU if kind == "CPU" else machine_with_one(accelerator) or DEFAULT_GPU
    disks = (machine or MACHINE_TYPES[usual]).disks
    if wanted.boot_disk_type not in disks:
        problems.append(
            f"boot_disk_type: {name or usual} does not take {wanted.boot_disk_type}; expected "
            f"{' or '.join(sorted(disks))}"
        )
    if wanted.strategy == "FLEX_START":
        problems += _not_flexible(wanted, accelerator)
    return problems + _wrong_cuda(wanted, accelerator, cuda_of(wanted.image, cuda))


def _others() -> str:
    return "give one such as NVIDIA_L4, NVIDIA_A100_80GB or NVIDIA_H100_80GB"


def _one_only(count: int) -> str:
    return f"accelerator_count: a stage uses one accelerator, got {count}; leave it out"


def _contradiction(machine: MachineType, kind: str, count: int) -> list[str]:
    """List combinations of machine, accelerator and count that Vertex does not offer."""
    if machine.built_in:
        return _against_its_own(machine, kind, count)
    name, takes = machine.name, machine.accelerators
    if kind == "CPU":
        return []
    if kind == "GPU":
        return [
            f"accelerator_type: {name} is not known to come with GPUs; give an accelerator such "
            "as NVIDIA_TESLA_T4 (with n1 machines), CPU, or a machine_type such as g2-standard-12"
        ]
    if kind not in takes:
        fitting = machine_with_one(kind)
        instead = f"give machine_type {fitting}" if fitting else _others()
        problems = [f"machine_type: {name} cannot have {kind}; {instead}"]
        return problems + ([_one_only(count)] if count > 1 else [])
    if count and count not in takes[kind]:
        return [
            f"accelerator_count: {name} takes {_listed(takes[kind])} x {kind}, not {count}; a "
            "stage uses one"
        ]
    return []


def _against_its_own(machine: MachineType, kind: str, count: int) -> list[str]:
    """List what contradicts a machine's built-in accelerators."""
    [(own, (own_count,))] = machine.accelerators.items()
    if kind == "CPU":
        return [
            f"accelerator_type: {machine.name} comes with {own}, not without accelerators; give "
            f"another machine_type, such as {DEFAULT_CPU}"
        ]
    if kind not in ("GPU", own):
        return [f"accelerator_type: {machine.name} comes with {own}, not with {kind}"]
    if count not in (0, own_count):
        return [
            f"accelerator_count: {machine.name} comes with {own_count}, not with {count}; leave it "
            "out"
        ]
    return []


def _listed(counts: tuple[int, ...]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, counts[:-1])), str(counts[-1])]))


def _more_than_one(machine: MachineType, accelerator: str, count: int) -> list[str]:
    """List what has several accelerators where a stage uses only one."""
    counts = machine.accelerators[accelerator]
    if 1 in counts:
        return [_one_only(count)] if count > 1 else []
    fitting = machine_with_one(accelerator)
    instead = f"give machine_type {fitting}" if fitting else f"none has one; {_others()}"
    return [
        f"machine_type: {machine.name} has {_listed(counts)} x {accelerator}, of which a stage "
        f"uses one and all are paid; {instead}"
    ]


def _not_flexible(wanted: VertexConfig, accelerator: str) -> list[str]:
    if wanted.accelerator_type == "CPU":
        return ["strategy: FLEX_START is for GPUs; give STANDARD"]
    if accelerator and not ACCELERATORS[accelerator].flexible:
        names = [name for name, kind in ACCELERATORS.items() if kind.flexible]
        return [
            f"strategy: FLEX_START does not give {accelerator}, but {', '.join(names)}; give "
            "STANDARD or SPOT, or another accelerator_type"
        ]
    return []


def _wrong_cuda(wanted: VertexConfig, accelerator: str, cuda: int | None) -> list[str]:
    """Check that the image's torch has code for the accelerator, if its build is known."""
    if cuda is None or wanted.accelerator_type == "CPU":
        return []
    if cuda == 0:
        return ["image: has torch's CPU build, and the jobs are to run on a GPU; give another tag"]
    if not accelerator:
        return []
    kind = ACCELERATORS[accelerator]
    if cuda < kind.oldest_cuda:
        return [
            f"image: torch for CUDA {_version(cuda)} has no code for {accelerator}, which needs "
            f"{_version(kind.oldest_cuda)} or newer; build it with _VARIANT=cu130 under a tag that "
            "ends in -cu130, and give that"
        ]
    if cuda > kind.newest_cuda:
        return [
            f"image: torch for CUDA {_version(cuda)} has no code for {accelerator} any more, "
            f"{_version(kind.newest_cuda)} has; build it with _VARIANT=cu126, and give that"
        ]
    return []


def _version(cuda: int) -> str:
    return f"{cuda // 10}.{cuda % 10}"
