"""What ``torch.autocast`` means for fastgpt's functions, as PyTorch has it for its own on a GPU.

Products (attention, linear, linear + cross-entropy) take their inputs in autocast's dtype, norms take them in fp32,
GELU and cross-entropy take them as they come. Outside of autocast nothing is ever cast: dtypes that differ are a
``TypeError``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def enabled(device_type: str) -> bool:
    """Whether autocast is on for such devices."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # some, as meta, know none
        return False


def in_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors as a matrix product takes them: under autocast in its dtype."""
    if not isinstance(first, Tensor) or not enabled(first.device.type):
        return first, *others
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(_cast(t, dtype) for t in (first, *others))


def in_float32(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors as a norm takes them: under autocast in fp32."""
    if not isinstance(first, Tensor) or not enabled(first.device.type):
        return first, *others
    return tuple(_cast(t, torch.float32) for t in (first, *others))


def outside(device_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, inside of which autocast is off: an operator computes in the dtypes that it was given."""

    def run(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return run


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor
