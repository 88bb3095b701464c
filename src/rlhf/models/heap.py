"""What becomes of the memory that tensors give back on a CPU."""

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes: blocks of less come from its heap.
_LARGEST_BLOCK = 32 * 2**20
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed, for the tensors to come.

    Each layer frees and asks for the same tens of megabytes again. By default glibc hands them back
    to the kernel, which must map and zero every page anew: a tenth to a fifth of a step. The
    process then keeps its peak until it ends, which it reaches at every step anyway. Does nothing
    where the C library is another one, or where the user has set its variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _NEVER)
