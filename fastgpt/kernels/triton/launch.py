"""What the host side of every Triton kernel needs: the device, its launch configuration, the launch itself.

A launch configuration (block sizes, warps, pipeline stages) comes from ``configs/``: ``sm_XX.json`` for kernels with
matrix products, which depend on an architecture's registers and shared memory, ``any.json`` for kernels bound by
memory. :mod:`fastgpt.kernels.triton.autotune` can replace the former by one measured on this device.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Device:
    """What a launch depends on.

    Attributes:
        name: as the vendor writes it.
        capability: compute capability times ten; 89 is Ada.
        n_sm: number of streaming multiprocessors.
        shared_memory: bytes of shared memory that one block may use.
    """

    name: str
    capability: int
    n_sm: int
    shared_memory: int


# Ada's limits, so that the interpreter takes the configurations of an RTX 4070. It runs programs one after the other,
# so there are few multiprocessors, and therefore few programs.
INTERPRETER = Device("Triton's interpreter", 89, 4, 99 << 10)

_ahead_of_time: tuple[Device, Callable[..., None]] | None = None


def name_of(function: Any) -> str:
    """A kernel's name in a profile: ``attention_dq`` for ``_dq_kernel`` of attention.py."""
    return f"{function.__module__.rpartition('.')[2]}_{function.__name__.strip('_').removesuffix('_kernel')}"


def kernel(function: Any = None, **options: Any) -> Any:
    """``triton.jit`` for a kernel that is launched; profiles show it under :func:`name_of`."""
    if function is None:
        return functools.partial(kernel, **options)
    return triton.jit(function, repr=lambda _: name_of(function), **options)


@contextmanager
def ahead_of_time(device: Device, compile: Callable[..., None]) -> Iterator[None]:
    """Inside the block nothing is launched: a launch for ``device`` becomes ``compile(kernel, grid, args, options)``.

    Call operators on ``meta`` tensors to compile exactly the kernels that the same calls would run.
    """
    global _ahead_of_time
    _ahead_of_time = device, compile
    try:
        yield
    finally:
        _ahead_of_time = None


@cache
def _properties(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    shared_memory = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    capability = properties.major * 10 + properties.minor
    return Device(properties.name, capability, properties.multi_processor_count, shared_memory)


def device_of(tensor: Tensor) -> Device:
    """The device that a kernel on ``tensor`` runs on."""
    if _ahead_of_time is not None:
        return _ahead_of_time[0]
    return _properties(tensor.device.index) if tensor.is_cuda else INTERPRETER


@cache
def shipped() -> dict[int, dict[str, Any]]:
    """The contents of ``configs/`` by compute capability; 0 stands for any."""
    files = {path.stem: json.loads(path.read_text()) for path in CONFIGS.glob("*.json")}
    return {0 if stem == "any" else int(stem.removeprefix("sm_")): table for stem, table in files.items()}


@cache
def architecture(device: Device) -> int:
    """Return the newest architecture in ``configs/`` that is not newer than ``device`` and needs no more shared memory.

    Raises:
        RuntimeError: there is none, because the device is older than Ampere.
    """
    fitting = [
        capability
        for capability, table in shipped().items()
        if 0 < capability <= device.capability and table["shared_memory"] <= device.shared_memory
    ]
    if not fitting:
        raise RuntimeError(
            f"{device.name} has compute capability {device.capability / 10} and {device.shared_memory} bytes of "
            "shared memory a block; the Triton kernels need 8.0 and 101376 (FASTGPT_BACKEND=reference works)"
        )
    return max(fitting)


def configuration(device: Device, kernel: str, key: str) -> dict[str, int]:
    """Return the shipped configuration of ``kernel`` for inputs of the kind ``key``: block sizes, warps, stages."""
    return dict(_configurations(device, kernel)[key])


def has_configuration(device: Device, kernel: str, key: str) -> bool:
    """Whether a configuration is shipped; there is none if every configuration spills registers."""
    return key in _configurations(device, kernel)


@cache
def _configurations(device: Device, kernel: str) -> dict[str, dict[str, int]]:
    return shipped()[architecture(device)].get(kernel) or shipped()[0][kernel]


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, /, *args: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` on the device of ``tensor``.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes.
        tensor: the first argument; the kernel runs on its device.
        args: the other arguments.
        options: constants and launch options, by name.
    """
    options.setdefault("enable_fp_fusion", True)  # a * b + c as one FMA, whatever Triton's default
    if _ahead_of_time is not None:
        _ahead_of_time[1](kernel, grid, (tensor, *args), options)
    elif tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](tensor, *args, **options)
    else:
        kernel[grid](tensor, *args, **options)


# Plain Python, because Triton's own functions of these names take as long as half a launch.


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not less than n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """Return ``x`` as ``(N, C)`` with contiguous rows: a view where its strides allow one, otherwise a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    return rows if rows.stride(1) == 1 else rows.contiguous()
