"""What public functions check of their arguments; each failure is one line that names the argument."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# torch.compile's symbols stand for numbers while it traces.
INTEGERS: Any = (Integral, torch.SymInt)
NUMBERS: Any = (Real, torch.SymInt, torch.SymFloat)


def floating(**tensors: Tensor) -> None:
    """Each is a dense floating-point tensor of a dtype that fastgpt knows."""
    for name, tensor in tensors.items():
        _dense(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def same(first: str, **tensors: Tensor | None) -> None:
    """Every tensor given has the dtype and device of the one named ``first``."""
    model = tensors[first]
    assert model is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != model.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from {first}'s {model.dtype}")
        if tensor.device != model.device:
            raise ValueError(f"{name}: device {tensor.device} differs from {first}'s {model.device}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """``tensor`` has exactly the shape ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")


def targets(tensor: Tensor, n_rows: int, device: torch.device, ignore_index: int) -> None:
    """``tensor`` is an int64 vector of ``n_rows`` class indices on ``device``."""
    indices("targets", tensor, device)
    shape("targets", tensor, (n_rows,))
    integer("ignore_index", ignore_index)


def indices(name: str, tensor: Tensor, device: torch.device) -> None:
    """``tensor`` holds int64 on ``device``."""
    _dense(name, tensor)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device} differs from {device}, that of the other tensors")


def integer(name: str, value: Any) -> None:
    """``value`` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def number(name: str, value: Any) -> None:
    """``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def epsilon(value: Any) -> None:
    """``value`` may be added to a variance."""
    number("eps", value)
    if value < 0.0:
        raise ValueError(f"eps: expected at least 0, got {value}")


def probability(name: str, value: Any) -> None:
    """``value`` lies in [0, 1)."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def _dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")
