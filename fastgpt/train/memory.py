"""Keeping freed memory for the next step; ``ran_out`` is that of ``fastgpt.limits``."""

import ctypes
import sys

from fastgpt.limits import ran_out

__all__ = ["keep_freed_memory", "ran_out"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory instead of returning it to the kernel.

    A training step frees and allocates the same gigabytes over and over. New pages must be faulted in and zeroed, which
    on a CPU costs as much as the arithmetic. Returns whether the C library accepted the request.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    # no block in a mapping of its own, which free would unmap; the heap's end is given back only beyond 2 GiB
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
