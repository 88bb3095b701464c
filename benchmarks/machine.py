"""This machine's rates, to which the figures are compared.

`machine.py DEVICE THREADS` prints them as JSON.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPEATS = 7


def median_seconds(work: Callable[[], Any]) -> float:
    """Return the median time of several runs, after one warm-up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square product."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b)


def copy_rate(device: str) -> float:
    """Return the bytes/s of copying more than caches hold; each byte is read and written once."""
    count = 2**30 if device == "cuda" else 2**28
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * count / median_seconds(lambda: target.copy_(source))


def processor() -> str:
    """Return the CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def instructions() -> str:
    """Return what determines a CPU's speed: its widest instructions, and limits that are set."""
    has = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "sve", "bf16")
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    found = [name for name in names if has.get(name, False)]
    return " ".join(
        [*found, *(f"{name}={os.environ[name]}" for name in limits if name in os.environ)]
    )


def measure(device: str, threads: int) -> dict[str, Any]:
    """Return rates, names and versions."""
    torch.set_num_threads(threads)
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "instructions": "" if device == "cuda" else instructions(),
        "threads": threads,
        "flops": {
            "float32": matmul_rate(device, torch.float32),
            "bfloat16": matmul_rate(device, torch.bfloat16),
        },
        "bytes": copy_rate(device),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
