"""``torch.autocast`` for fastgpt's functions, with the rules that PyTorch has for its own functions on a GPU.

Products (attention, linear, linear + cross-entropy) cast their inputs to autocast's dtype and norms cast them to fp32.
Activations and cross-entropy cast nothing. Outside autocast nothing is ever cast: different dtypes are a ``TypeError``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def enabled(device_type: str) -> bool:
    """Whether autocast is on for this type of device."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device without autocast, such as meta
        return False


def in_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return checked tensors as a matrix product takes them: under autocast, in autocast's dtype."""
    if not enabled(first.device.type):
        return first, *others
    return _cast(torch.get_autocast_dtype(first.device.type), first, *others)


def in_float32(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return checked tensors as a norm takes them: under autocast, in fp32."""
    return _cast(torch.float32, first, *others) if enabled(first.device.type) else (first, *others)


def outside(device_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with autocast off inside: an operator computes in the dtypes of its arguments."""

    def run(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return run


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast all but float64, as PyTorch's autocast does."""
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
