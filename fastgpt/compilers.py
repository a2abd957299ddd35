"""What Triton and torch.compile need on this machine before they can run: compilers, and the headers of Python."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch


def missing_for_triton() -> str | None:
    """What Triton lacks to run a kernel, and how to get it; ``None`` if nothing.

    Triton brings its compiler for the GPU (no CUDA toolkit is needed). But it compiles a small launcher in C for each
    kernel, the first time that it runs.
    """
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"Triton needs a C compiler, and CC={compiler} is not a program: unset CC or correct it"
    if compiler is None and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    return _missing_headers("Triton")


def missing_for_compile(device: torch.device) -> str | None:
    """What ``torch.compile`` lacks on a device, and how to get it; ``None`` if nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU: pip install triton"
        return missing_for_triton()
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # Inductor tries no other name
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        if "CXX" in os.environ:
            return f"torch.compile needs a C++ compiler, and CXX={compiler} is not a program: unset CXX or correct it"
        return f"torch.compile needs a C++ compiler: install {usual}, or set CXX"
    return _missing_headers("torch.compile")


def failure(error: BaseException) -> str | None:
    """What a compiler that is there has failed at, in a line; ``None`` if the exception means something else."""
    if type(error).__name__ not in ("InductorError", "BackendCompilerFailed"):  # torch's, which are imported late
        return None
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"torch.compile failed ({lines[0]}): train without --compile"


def _missing_headers(who: str) -> str | None:
    if sys.platform != "linux":  # only distributions of Linux part them from Python
        return None
    for scheme in (sysconfig.get_default_scheme(), "posix_prefix"):
        if Path(sysconfig.get_path("include", scheme), "Python.h").exists():
            return None
    return f"{who} needs Python.h: install python{sys.version_info.major}.{sys.version_info.minor}-dev"
