"""What the C library keeps, seen from the page faults of a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes
import resource
import torch
from rlhf.models.heap import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is a single fault

def cycle():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(4 * 2**20) for _ in range(3)]  # 16 MiB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    keep_freed_memory()
cycle()
print(cycle())
"""
PAGES = 10 * 3 * 16 * 2**20 // 4096


def faults(*, keep: bool, **settings: str) -> int:
    env = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | settings
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    assert faults(keep=False, MALLOC_MMAP_THRESHOLD_="1048576") > PAGES / 2
    assert faults(keep=True) < PAGES / 100
    # What the user says of the C library's memory holds.
    assert faults(keep=True, MALLOC_MMAP_THRESHOLD_="1048576") > PAGES / 2
