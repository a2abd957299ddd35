"""Checks of the arguments of public functions. Each error is one line that begins with the argument's name."""

import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels.heads import MAX_HEAD_SIZE

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# While torch.compile traces, its symbols stand for numbers.
INTEGERS: Any = (Integral, torch.SymInt)
NUMBERS: Any = (Real, torch.SymInt, torch.SymFloat)


def floating(**tensors: Tensor) -> None:
    """Check that each is a dense tensor of a dtype in ``FLOATING``. Call it before autocast casts."""
    for name, tensor in tensors.items():
        dense(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def floating_if_given(**tensors: Tensor | None) -> None:
    """Check with :func:`floating` those that are not ``None``."""
    floating(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def same(first: str, **tensors: Tensor | None) -> None:
    """Check that every tensor has the dtype and device of the one named ``first``."""
    model = tensors[first]
    assert model is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != model.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype} differs from {first}'s {model.dtype}")
    on_one_device(first, **tensors)


def on_one_device(first: str, **tensors: Tensor | None) -> None:
    """Check that every tensor has the device of the one named ``first``."""
    model = tensors[first]
    assert model is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != model.device:
            raise ValueError(f"{name}: device {tensor.device} differs from {first}'s {model.device}")


def shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Check that ``tensor`` has the shape ``expected``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")


def targets(tensor: Tensor, n_rows: int, device: torch.device, ignore_index: int) -> None:
    """Check that ``tensor`` is an int64 vector of ``n_rows`` class indices on ``device``."""
    indices("targets", tensor, device)
    shape("targets", tensor, (n_rows,))
    integer("ignore_index", ignore_index)


def indices(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that ``tensor`` is int64 and on ``device``."""
    dense(name, tensor)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device} differs from {device}, that of the other tensors")


def scalar(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Check that ``tensor`` is 0-dim, of ``dtype`` and on ``device``."""
    dense(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    shape(name, tensor, ())
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device} differs from {device}, that of the other tensors")


def integer(name: str, value: Any) -> None:
    """Check that ``value`` is an integer of at most 64 bits."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of at most 64 bits")


def size(name: str, value: Any) -> None:
    """Check that ``value`` is an integer of at least 1."""
    integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def number(name: str, value: Any) -> None:
    """Check that ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # an int may exceed it
        got = "an int too large for a float" if isinstance(value, int) else value
        raise ValueError(f"{name}: expected a finite number, got {got}")


def heads(name: str, n_head: Any, width_name: str, width: int) -> None:
    """Check that ``n_head`` divides ``width`` into heads of a size that attention takes."""
    if n_head < 1 or width % n_head or width // n_head > MAX_HEAD_SIZE:
        raise ValueError(
            f"{name}: {n_head} heads do not divide {width_name} = {width} into heads of at most {MAX_HEAD_SIZE}"
        )


def boolean(name: str, value: Any) -> None:
    """Check that ``value`` is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def epsilon(value: Any) -> None:
    """Check that ``value`` can be added to a variance."""
    number("eps", value)
    if value < 0.0:
        raise ValueError(f"eps: expected at least 0, got {value}")


def soft_cap(name: str, value: Any) -> None:
    """Check that ``value`` can bound scores in fp32: it and its inverse are far from the ends of its range."""
    number(name, value)
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name}: expected 1e-30 <= {name} <= 1e30, got {value}")


def probability(name: str, value: Any) -> None:
    """Check that ``value`` is in [0, 1)."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")


def reduction(value: Any) -> None:
    """Check that ``value`` is one of the reductions of a loss."""
    if not isinstance(value, str) or value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {value!r}")


def loss_options(softcap: Any, z_loss: Any, label_smoothing: Any) -> None:
    """Check the numbers that say which cross-entropy is computed."""
    if softcap is not None:
        number("softcap", softcap)
        if softcap <= 0.0:
            raise ValueError(f"softcap: expected more than 0, or None, got {softcap}")
    number("z_loss", z_loss)
    if z_loss < 0.0:
        raise ValueError(f"z_loss: expected at least 0, got {z_loss}")
    number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 <= label_smoothing <= 1, got {label_smoothing}")


def class_weight(name: str, tensor: Tensor, n_classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check that ``tensor`` has a weight for each class, in fp32 or in ``dtype``, that of the logits, on ``device``."""
    dense(name, tensor)
    if tensor.dtype not in (torch.float32, dtype):
        expected = " or ".join(map(str, dict.fromkeys((torch.float32, dtype))))
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    shape(name, tensor, (n_classes,))
    if tensor.device != device:
        raise ValueError(f"{name}: device {tensor.device} differs from {device}, that of the other tensors")


def dense(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is a strided tensor: not sparse, not nested."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")
