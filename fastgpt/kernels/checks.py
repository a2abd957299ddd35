"""What public functions check of their arguments; each failure names the argument."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(**tensors: Tensor) -> None:
    """Each is a floating-point tensor of a dtype that fastgpt knows."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
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


def targets(tensor: Tensor, n_rows: int, device: torch.device) -> None:
    """``tensor`` is an int64 vector of ``n_rows`` class indices on ``device``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"targets: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"targets: device {tensor.device} differs from the logits' {device}")
    shape("targets", tensor, (n_rows,))


def probability(name: str, value: float) -> None:
    """``value`` lies in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
