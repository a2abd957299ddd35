"""GELU of x, or of x + bias, exact (erf) and its tanh approximation.

    exact:  x Phi(x) = x (1 + erf(x / sqrt(2))) / 2,               slope Phi(x) + x phi(x)
    tanh:   x (1 + tanh(u)) / 2,  u = sqrt(2 / pi) (x + 0.044715 x**3)

Phi is the standard normal distribution function, phi its density (see activations.py). Hendrycks and Gimpel, "Gaussian
Error Linear Units", 2016.

Without a bias the tensor is one long row. With a bias, a program of the backward owns a block of columns and walks down
the rows, so that it sums the bias's gradient in registers while it writes the input's.

Bytes moved for an element of s bytes: forward 2 s, backward 3 s. The backward that also recomputes the forward's result
moves 4 s; two kernels would move 5 s. The bias's gradient needs no pass of its own.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.activations import gelu_and_derivative
from fastgpt.kernels.triton.columns import sum_of_shares
from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch, rows_of


@kernel
def _forward_kernel(
    x,  # (n,), contiguous
    y,  # (n,), contiguous, written
    n, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. Grid: (cdiv(n, BLOCK),)."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + here, mask=here < n, other=0.0).to(tl.float32)
    value, _ = gelu_and_derivative(a, TANH)
    tl.store(y + here, value.to(y.dtype.element_ty), mask=here < n)


@kernel
def _backward_kernel(
    dy,  # (n,), contiguous
    x,  # (n,), contiguous
    dx,  # (n,), contiguous, written; dy itself with AGAIN
    y,  # (n,), contiguous, GELU of x, written with AGAIN
    n, TANH: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. Grid: (cdiv(n, BLOCK),)."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + here, mask=here < n, other=0.0).to(tl.float32)
    grad = tl.load(dy + here, mask=here < n, other=0.0).to(tl.float32)
    value, derivative = gelu_and_derivative(a, TANH)
    tl.store(dx + here, (grad * derivative).to(dx.dtype.element_ty), mask=here < n)
    if AGAIN:
        tl.store(y + here, value.to(y.dtype.element_ty), mask=here < n)


@kernel
def _bias_forward_kernel(
    x,  # (N, C), rows contiguous, x_stride elements apart
    bias,  # (C,)
    y,  # (N, C), contiguous, written
    x_stride, n_rows, n_columns, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS by COLUMNS. Grid: (cdiv(N, ROWS) * cdiv(C, COLUMNS),)."""
    n_blocks = tl.cdiv(n_columns, COLUMNS)  # all on the grid's first axis: the others end at 65535
    columns = tl.program_id(0) % n_blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    a = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    a += tl.load(bias + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
    value, _ = gelu_and_derivative(a, TANH)
    tl.store(y + rows[:, None] * n_columns + columns[None, :], value.to(y.dtype.element_ty), mask=inside)


@kernel
def _bias_backward_kernel(
    dy,  # (N, C), rows contiguous, dy_stride elements apart
    x,  # (N, C), rows contiguous, x_stride elements apart
    bias,  # (C,)
    dx,  # (N, C), contiguous, written; dy itself with AGAIN
    y,  # (N, C), contiguous, GELU of x + bias, written with AGAIN
    shares,  # (n_shares, C) fp32, written: shares of the bias's gradient
    dy_stride, x_stride, n_rows, n_columns,
    TANH: tl.constexpr, AGAIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of every n_shares-th group of ROWS rows. Grid: (cdiv(C, COLUMNS), n_shares)."""
    if AGAIN:
        dy_stride = n_columns  # dy is dx; with equal strides the compiler keeps one address less in registers
    share, n_shares = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    b = tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(share * ROWS, n_rows, n_shares * ROWS):
        rows = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & in_columns[None, :]
        a = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(a + b[None, :], TANH)
        result = grad * derivative
        dbias += result
        here = rows[:, None] * n_columns + columns[None, :]
        tl.store(dx + here, result.to(dx.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(y + here, value.to(y.dtype.element_ty), mask=inside)
    tl.store(shares + share * n_columns + columns, tl.sum(dbias, axis=0), mask=in_columns)


def gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    if bias is None:
        config = configuration(device_of(x), "gelu", "any")
        n = x.numel()
        launch(_forward_kernel, (cdiv(n, config["BLOCK"]),), x.contiguous(), y, n, TANH=tanh, **config)
        return y
    rows = rows_of(x)
    n_rows, n_columns = rows.shape
    config = configuration(device_of(x), "bias_gelu", "any")
    config.pop("programs_per_sm")
    grid = (cdiv(n_rows, config["ROWS"]) * cdiv(n_columns, config["COLUMNS"]),)
    launch(
        _bias_forward_kernel, grid,
        rows, bias.contiguous(), y, rows.stride(0), n_rows, n_columns, TANH=tanh, **config,
    )  # fmt: skip
    return y


def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, _backward(dy, x, bias, tanh, bias_main_grad, dx, None)


def gelu_backward_recompute_(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, _backward(dy, x, bias, tanh, bias_main_grad, dy, y)


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, main_grad: Tensor | None, dx: Tensor, y: Tensor | None
) -> Tensor:
    """Write ``dx``, contiguous. Return the bias's gradient, empty if it is added to ``main_grad``.

    If there is a ``y``, GELU is written there, and ``dx`` is ``dy``.
    """
    if x.numel() == 0:
        return x.new_zeros(0 if bias is None or main_grad is not None else bias.shape)
    if bias is None:
        config = configuration(device_of(x), "gelu", "any")
        n = x.numel()
        grid = (cdiv(n, config["BLOCK"]),)
        launch(
            _backward_kernel, grid,
            dy.contiguous(), x.contiguous(), dx, dx if y is None else y, n, TANH=tanh, AGAIN=y is not None, **config,
        )  # fmt: skip
        return x.new_empty(0)
    dy_rows, x_rows = rows_of(dy), rows_of(x)
    n_rows, n_columns = x_rows.shape
    device = device_of(x)
    config = configuration(device, "bias_gelu", "any")
    n_blocks = cdiv(n_columns, config["COLUMNS"])
    wanted = cdiv(device.n_sm * config.pop("programs_per_sm"), n_blocks)  # fill every multiprocessor
    n_shares = min(cdiv(n_rows, config["ROWS"]), wanted)
    shares = x.new_empty((1, n_shares, n_columns), dtype=torch.float32)
    launch(
        _bias_backward_kernel, (n_blocks, n_shares),
        dy_rows, x_rows, bias.contiguous(), dx, dx if y is None else y, shares,
        dy_rows.stride(0), x_rows.stride(0), n_rows, n_columns, TANH=tanh, AGAIN=y is not None, **config,
    )  # fmt: skip
    return sum_of_shares(shares, bias.dtype, [main_grad])[0]
