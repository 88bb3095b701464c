"""What happens on a CPU to the memory that tensors free."""

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest value that glibc accepts: smaller blocks come from its heap.
_LARGEST_BLOCK = 32 * 2**20
_NEVER = 2**31 - 1
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for later tensors.

    Each layer frees and requests the same tens of megabytes again. By default glibc returns them to
    the kernel, which must map and zero every page anew: a tenth to a fifth of a step's time. With
    this setting the process holds its peak memory until it ends, but it reaches that peak in every
    step anyway. Does nothing with another C library or if the user has set glibc's variables.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_TRIM_THRESHOLD, _NEVER)
