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
    """Checked tensors as a matrix product takes them: under autocast in its dtype."""
    if not enabled(first.device.type):
        return first, *others
    return _cast(torch.get_autocast_dtype(first.device.type), first, *others)


def in_float32(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Checked tensors as a norm takes them: under autocast in fp32."""
    return _cast(torch.float32, first, *others) if enabled(first.device.type) else (first, *others)


def outside(device_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, inside of which autocast is off: an operator computes in the dtypes that it was given."""

    def run(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return run


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
