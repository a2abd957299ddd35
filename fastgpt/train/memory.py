"""What a process does with memory it has freed, and how it learns that there is no more."""

import ctypes
import sys

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next step instead of returning it to the kernel.

    A training step frees and allocates the same gigabytes over and over; fresh pages must be faulted in and
    zeroed, which on a CPU costs as much as the arithmetic. Returns whether the C library took the request.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left; PyTorch has a class for that, but not always raises it.

    Not its own are what C++ and PyTorch say on a CPU, and on a GPU what CUDA says where it loads a kernel or
    instantiates a graph, Triton where it loads one, and cuBLAS where it makes its workspace.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error)
        for words in ("can't allocate memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
