"""The choice of the backend that runs an operator: by device and dtype, by ``FASTGPT_BACKEND``, by ``use_backend``.

The dispatcher of PyTorch routes a call of ``torch.ops.fastgpt.*`` by device; :func:`resolve` is what the public
functions call, and also honours the user's choice. Triton is imported when an operator first runs on a GPU.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import autocast, cpp, reference, slow_path
from fastgpt.kernels.dry_run import stands_for
from fastgpt.kernels.ops import OPERATORS, library

BACKENDS = ("auto", "triton", "cpp", "reference")

# What the compiled backends take; other dtypes (float64, and float16 on the CPU) run on the reference.
COMPILED_DTYPES = {
    "cpp": frozenset({torch.float32, torch.bfloat16}),
    "triton": frozenset({torch.float32, torch.bfloat16, torch.float16}),
}


def _backend_from_environment() -> str:
    name = os.environ.get("FASTGPT_BACKEND", "auto")
    if name in BACKENDS:
        return name
    warnings.warn(f"FASTGPT_BACKEND: expected one of {', '.join(BACKENDS)}, got '{name}'; using auto", stacklevel=2)
    return "auto"


_choice = _backend_from_environment()
EXTENSION = cpp.load() if _choice in ("auto", "cpp") else cpp.Extension(None, f"FASTGPT_BACKEND={_choice}")

# What a compiled backend leaves to plain PyTorch, and why.
LEFT_TO_TORCH: dict[str, dict[str, str]] = {
    "triton": {"matmul_": "cuBLAS"},
    "cpp": {"add_column_sums_": "products sum rows on the way"}
    | ({} if EXTENSION.products else {"matmul_": "PyTorch's is faster on this CPU"}),
    "reference": {},
}

# Made of other operators on every device: linear_cross_entropy.py registers them.
_COMPOSITE = ("linear_cross_entropy", "linear_cross_entropy_backward")


# ---- registration ----


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register ``function`` as operator ``name`` on one kind of device (``"CPU"``, ``"CUDA"``)."""
    library.impl(name, function, dispatch_key)


def _on_triton(name: str) -> Callable[..., Any]:
    """Operator ``name`` of fastgpt/kernels/triton/, imported at the first call."""

    def run(*args: Any) -> Any:
        return importlib.import_module("fastgpt.kernels.triton").IMPLEMENTATIONS[name](*args)

    return run


_references: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in OPERATORS}
_triton: dict[str, Callable[..., Any]] = {
    name: _on_triton(name) for name in OPERATORS if name not in LEFT_TO_TORCH["triton"] and name not in _COMPOSITE
}
_overloads: dict[str, Any] = {name: getattr(torch.ops.fastgpt, name).default for name in OPERATORS}
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# The C++ kernels register themselves under "CPU" when cpp.load() loads them.
for _name, _function in _references.items():
    implement(_name, "CompositeExplicitAutograd", _function)
if _TRITON_INSTALLED:
    for _name, _function in _triton.items():
        implement(_name, "CUDA", _function)


# ---- the choice ----


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on ``name``: ``auto``, ``triton``, ``cpp`` or ``reference``.

    The choice holds for the whole process, not for one thread, because autograd runs backward passes on threads of its
    own. If the backend cannot take a tensor (its device or dtype), the call raises ``RuntimeError``.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got '{name}'")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def _natural_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The best backend for such tensors, and the reason in a few words."""
    device_type = stands_for(device.type)
    if device_type == "cpu":
        if EXTENSION.library is None:
            return "reference", EXTENSION.reason
        if dtype not in COMPILED_DTYPES["cpp"]:
            return "reference", f"the C++ kernels take float32 and bfloat16, not {dtype}"
        return "cpp", EXTENSION.reason
    if device_type != "cuda":
        return "reference", f"no compiled kernels for {device_type}"
    if device.type == "meta":
        return "triton", "as on an NVIDIA GPU"
    if not _TRITON_INSTALLED:
        return "reference", "Triton is not installed"
    if dtype not in COMPILED_DTYPES["triton"]:
        return "reference", f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if torch.version.hip is not None:
        return "reference", "no compiled kernels for AMD's GPUs"
    # Dynamo cannot trace this query. While it compiles, the GPU is assumed to be new enough; launch.py raises if not.
    if not torch.compiler.is_compiling() and _too_old(device):
        return "reference", "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return "triton", "NVIDIA GPU"


@cache
def _too_old(device: torch.device) -> bool:
    """Whether this GPU does not run the kernels. To ask it at every call would take as long as a launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


def backend_of(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend that an operator on such tensors runs on, and the reason in a few words.

    Raises:
        RuntimeError: the chosen backend cannot take such tensors.
    """
    device = torch.device(device)
    device_type = stands_for(device.type)
    natural, reason = _natural_backend(device, dtype)
    if _choice in ("auto", natural):
        return natural, reason
    if _choice == "reference":
        return "reference", "chosen"
    if _choice == "triton" and device_type == "cpu" and dtype in COMPILED_DTYPES["triton"] and _interpreted():
        return "triton", "Triton's interpreter"
    if _choice == "triton" and device_type != "cuda":
        reason = "it needs an NVIDIA GPU"
    raise RuntimeError(f"backend '{_choice}' cannot run {dtype} on {device_type}: {reason}")


def _interpreted() -> bool:
    """Whether Triton kernels run on the CPU, one program after the other: very slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(name: str, tensor: Tensor) -> Callable[..., Any]:
    """Return the implementation of operator ``name`` for tensors such as ``tensor``."""
    device_type = tensor.device.type
    backend, reason = backend_of(tensor.device, tensor.dtype)
    if backend == "reference" and _choice == "auto" and device_type != "meta":
        slow_path.warn(reason)
    if name in _COMPOSITE and device_type == "cuda":
        function = _overloads[name]  # in chunks on any backend: the reference's logits of all rows may not fit a GPU
    elif backend == "reference" or name in LEFT_TO_TORCH[backend]:
        function = _references[name]
    elif backend == "triton" and device_type == "cpu":  # interpreted: the dispatcher would take the C++ kernel
        function = _triton.get(name, _overloads[name])
    else:
        function = _overloads[name]
    return autocast.outside(device_type, function) if autocast.enabled(device_type) else function


def backends() -> dict[str, dict[str, str]]:
    """Return what each operator runs on: ``{device: {operator: "backend (why)"}}`` for float32 tensors."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table = {}
    for device in devices:
        try:
            backend, reason = backend_of(device, torch.float32)
        except RuntimeError as error:  # the chosen backend is for another device
            table[device] = dict.fromkeys(OPERATORS, f"none ({error})")
            continue
        table[device] = dict.fromkeys(OPERATORS, f"{backend} ({reason})")
        table[device] |= {name: f"reference ({why})" for name, why in LEFT_TO_TORCH[backend].items()}
    return table
