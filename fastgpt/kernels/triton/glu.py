"""Gated linear units: activation(gate) * up. Shazeer, "GLU Variants Improve Transformer", 2020.

With a = activation:

    y = a(gate) up,   dgate = dy up a'(gate),   dup = dy a(gate)

The gate and up may be the halves of a packed tensor, whose rows are further apart than their length; dgate and dup
likewise. Tensors whose rows follow one another without gaps count as one long row.

Bytes moved for an element of s bytes: forward 3 s, backward 5 s, 6 s if it recomputes the forward's result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.ops import GELU_TANH, SILU
from fastgpt.kernels.triton.activations import gelu_and_derivative, silu_and_derivative
from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch, rows_of

_SILU, _GELU_TANH = tl.constexpr(SILU), tl.constexpr(GELU_TANH)


@triton.jit
def _value_and_derivative(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative at x, fp32."""
    if ACTIVATION == _SILU:
        value, derivative = silu_and_derivative(x)
    else:
        value, derivative = gelu_and_derivative(x, ACTIVATION == _GELU_TANH)
    return value, derivative


@triton.jit
def _place(n_columns, BLOCK: tl.constexpr):
    """The program's row, its columns, and which of them exist; int64, because a row can be longer than 2**31."""
    n_blocks = tl.cdiv(n_columns, BLOCK)  # all on the grid's first axis: the others end at 65535
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    columns = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < n_columns


@kernel
def _forward_kernel(
    gate,  # (N, H), rows contiguous, gate_stride elements apart
    up,  # (N, H), rows contiguous, up_stride elements apart
    y,  # (N, H), rows contiguous, y_stride elements apart, written
    gate_stride, up_stride, y_stride, n_columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of a row. Grid: (N * cdiv(H, BLOCK),)."""
    row, columns, inside = _place(n_columns, BLOCK)
    a = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_derivative(a, ACTIVATION)
    tl.store(y + row * y_stride + columns, (value * factor).to(y.dtype.element_ty), mask=inside)


@kernel
def _backward_kernel(
    dgate,  # (N, H), rows contiguous, dgate_stride elements apart, written
    dup,  # (N, H), rows contiguous, dup_stride elements apart, written
    dy,  # (N, H), rows contiguous, dy_stride elements apart
    gate,  # (N, H), rows contiguous, gate_stride elements apart
    up,  # (N, H), rows contiguous, up_stride elements apart
    y,  # (N, H), rows contiguous, y_stride elements apart, written with AGAIN
    dgate_stride, dup_stride, dy_stride, gate_stride, up_stride, y_stride, n_columns,
    ACTIVATION: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of a row. Grid: (N * cdiv(H, BLOCK),)."""
    row, columns, inside = _place(n_columns, BLOCK)
    a = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, derivative = _value_and_derivative(a, ACTIVATION)
    result = grad * factor * derivative
    tl.store(dgate + row * dgate_stride + columns, result.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_stride + columns, (grad * value).to(dup.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(y + row * y_stride + columns, (value * factor).to(y.dtype.element_ty), mask=inside)


def _without_gaps(*tensors: Tensor) -> list[Tensor]:
    """Tensors (N, H) with contiguous rows; as (1, N H) if the rows of all follow one another."""
    return [t.view(1, -1) for t in tensors] if all(t.is_contiguous() for t in tensors) else list(tensors)


def _rows(t: Tensor) -> Tensor:
    """``t`` as (N, H) with contiguous rows; a number is a row."""
    return rows_of(t.unsqueeze(0) if t.dim() == 0 else t)


def _rows_to_write(name: str, t: Tensor) -> Tensor:
    """The same, as a view.

    Raises:
        ValueError: its strides do not allow one.
    """
    rows = _rows(t)
    if rows.untyped_storage()._cdata != t.untyped_storage()._cdata:
        raise ValueError(f"{name}: expected rows that are contiguous and evenly spaced, got strides {t.stride()}")
    return rows


def glu(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    rows = _without_gaps(_rows(gate), _rows(up), _rows(y))
    n_rows, n_columns = rows[0].shape
    config = configuration(device_of(y), "glu", "any")
    launch(
        _forward_kernel, (n_rows * cdiv(n_columns, config["BLOCK"]),),
        *rows, *(t.stride(0) for t in rows), n_columns, ACTIVATION=activation, **config,
    )  # fmt: skip
    return y


def glu_backward_(
    dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, activation: int, y: Tensor | None = None
) -> None:
    if gate.numel() == 0:
        return
    to = [_rows_to_write(name, t) for name, t in (("dgate", dgate), ("dup", dup), ("y", dgate if y is None else y))]
    rows = _without_gaps(*to[:2], _rows(dy), _rows(gate), _rows(up), to[2])
    n_rows, n_columns = rows[0].shape
    config = configuration(device_of(gate), "glu", "any")
    launch(
        _backward_kernel, (n_rows * cdiv(n_columns, config["BLOCK"]),),
        *rows, *(t.stride(0) for t in rows), n_columns, ACTIVATION=activation, AGAIN=y is not None, **config,
    )  # fmt: skip
