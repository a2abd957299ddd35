"""Squared ReLU: max(x, 0)**2, slope 2 max(x, 0). So et al., "Primer", 2021.

The tensor is one long row. Bytes moved for an element of s bytes: forward 2 s, backward 3 s. The backward that also
recomputes the forward's result moves 4 s; two kernels would move 5 s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch


@triton.jit
def _positive(x):
    """max(x, 0); a NaN stays one."""
    return tl.where(x < 0.0, 0.0, x)


@kernel
def _forward_kernel(
    x,  # (n,), contiguous
    y,  # (n,), contiguous, written
    n, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. Grid: (cdiv(n, BLOCK),)."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = _positive(tl.load(x + here, mask=here < n, other=0.0).to(tl.float32))
    tl.store(y + here, (a * a).to(y.dtype.element_ty), mask=here < n)


@kernel
def _backward_kernel(
    dy,  # (n,), contiguous
    x,  # (n,), contiguous
    dx,  # (n,), contiguous, written; dy itself with AGAIN
    y,  # (n,), contiguous, the squared ReLU of x, written with AGAIN
    n, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. Grid: (cdiv(n, BLOCK),)."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = _positive(tl.load(x + here, mask=here < n, other=0.0).to(tl.float32))
    grad = tl.load(dy + here, mask=here < n, other=0.0).to(tl.float32)
    tl.store(dx + here, (grad * (2.0 * a)).to(dx.dtype.element_ty), mask=here < n)
    if AGAIN:
        tl.store(y + here, (a * a).to(y.dtype.element_ty), mask=here < n)


def relu2(x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    config, n = configuration(device_of(x), "relu2", "any"), x.numel()
    launch(_forward_kernel, (cdiv(n, config["BLOCK"]),), x.contiguous(), y, n, **config)
    return y


def relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backward(dy, x, dx, None)
    return dx


def relu2_backward_recompute_(dy: Tensor, x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backward(dy, x, dy, y)
    return y


def _backward(dy: Tensor, x: Tensor, dx: Tensor, y: Tensor | None) -> None:
    """Write ``dx``, contiguous. If there is a ``y``, the squared ReLU is written there, and ``dx`` is ``dy``."""
    if x.numel() == 0:
        return
    config, n = configuration(device_of(x), "relu2", "any"), x.numel()
    launch(
        _backward_kernel, (cdiv(n, config["BLOCK"]),),
        dy.contiguous(), x.contiguous(), dx, dx if y is None else y, n, AGAIN=y is not None, **config,
    )  # fmt: skip
