"""RMS norm and residual add + RMS norm.

Forward: a program holds whole rows in registers, so each is read once and written once.

Backward, with xhat = x * rstd and g = dy * weight:

    dx = rstd * (g - xhat * mean(g * xhat)) + dsum,   dweight = sum(dy * xhat)

A fixed number of programs walk over the rows. Each sums its share of dweight in registers. One small kernel
(columns.py) then adds the shares, always in the same order.

Bytes moved for a row of C elements of s bytes: forward 2 C s, with the residual add 4 C s; backward 3 C s, with the
gradient of the sum 4 C s.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import reference, slow_path
from fastgpt.kernels.triton.columns import sum_of_shares
from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch, next_power_of_2, rows_of

# The most columns that a shipped configuration takes, because a program holds whole rows in registers. Wider rows run
# on plain PyTorch.
WIDEST = 8192


@kernel
def _forward_kernel(
    x,  # (N, C), rows contiguous, x_stride elements apart
    residual,  # (N, C), rows contiguous, residual_stride elements apart; not read without HAS_RESIDUAL
    weight,  # (C,); not read without HAS_WEIGHT
    y,  # (N, C), contiguous, written
    total,  # (N, C), contiguous, x + residual, written with HAS_RESIDUAL
    rstd,  # (N,) fp32, written
    x_stride, residual_stride, n_rows, eps,
    C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows, each padded to BLOCK_C columns. Grid: (cdiv(N, ROWS),)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: N * C can exceed 2**31
    columns = tl.arange(0, BLOCK_C)
    in_rows, in_columns = rows < n_rows, columns < C
    inside = in_rows[:, None] & in_columns[None, :]
    here = rows[:, None] * C + columns[None, :]

    a = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0)
        # rounded before it is normalised, because the next layer reads the rounded sum
        rounded = (a + b.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask=inside)
        a = rounded.to(tl.float32)

    scale = 1.0 / tl.sqrt_rn(tl.sum(a * a, axis=1) / C + eps)
    tl.store(rstd + rows, scale, mask=in_rows)
    result = a * scale[:, None]
    if HAS_WEIGHT:
        result *= tl.load(weight + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + here, result.to(y.dtype.element_ty), mask=inside)


@kernel
def _backward_kernel(
    dy,  # (N, C), rows contiguous, dy_stride elements apart
    dsum,  # (N, C), rows contiguous, dsum_stride elements apart; not read without HAS_DSUM
    x,  # (N, C), rows contiguous, x_stride elements apart
    weight,  # (C,); not read without HAS_WEIGHT
    rstd,  # (N,) fp32
    dx,  # (N, C), contiguous, written
    shares,  # (1, n_programs, C) fp32, written with HAS_WEIGHT: shares of dweight
    dy_stride, dsum_stride, x_stride, n_rows,
    C: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: every n_programs-th group of ROWS rows, and one share of dweight. Grid: (n_programs,)."""
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    in_columns = columns < C
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=in_columns, other=0.0).to(tl.float32)
        dweight = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)

    for start in range(program * ROWS, n_rows, n_programs * ROWS):
        rows = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        in_rows = rows < n_rows
        inside = in_rows[:, None] & in_columns[None, :]
        scale = tl.load(rstd + rows, mask=in_rows, other=0.0)
        a = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + rows[:, None] * dy_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)

        normal = a * scale[:, None]  # xhat
        if HAS_WEIGHT:
            dweight += g * normal
            g *= w[None, :]
        projection = tl.sum(g * normal, axis=1) / C
        result = scale[:, None] * (g - normal * projection[:, None])
        if HAS_DSUM:
            more = tl.load(dsum + rows[:, None] * dsum_stride + columns[None, :], mask=inside, other=0.0)
            result += more.to(tl.float32)
        tl.store(dx + rows[:, None] * C + columns[None, :], result.to(dx.dtype.element_ty), mask=inside)

    if HAS_WEIGHT:
        share = shares + program * C + columns  # int32 is enough: at most 4 * n_sm * 8192 elements
        tl.store(share, tl.sum(dweight, axis=0), mask=in_columns)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum (y itself without a residual) and rstd."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = y if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return y, total, rstd
    rows = rows_of(x)
    added = rows if residual is None else rows_of(residual)
    n_rows, C = rows.shape
    block = next_power_of_2(C)
    config = configuration(device_of(x), "rms_norm_forward", str(max(block, 64)))
    launch(
        _forward_kernel, (cdiv(n_rows, config["ROWS"]),),
        rows, added, rows if weight is None else weight.contiguous(), y, total, rstd,
        rows.stride(0), added.stride(0), n_rows, eps,
        C=C, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, BLOCK_C=block, **config,
    )  # fmt: skip
    return y, total, rstd


def _too_wide(x: Tensor) -> bool:
    """Whether to run on plain PyTorch, with a warning."""
    if x.shape[-1] <= WIDEST:
        return False
    slow_path.warn(f"on a GPU, RMS norm takes rows of at most {WIDEST}")
    return True


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if _too_wide(x):
        return reference.rms_norm(x, weight, eps)
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if _too_wide(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _forward(x, residual, weight, eps)


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor,
    weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _too_wide(x) or x.numel() == 0:
        return reference.rms_norm_backward(dy, dsum, x, weight, rstd, weight_main_grad)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dy_rows, x_rows = rows_of(dy), rows_of(x)
    dsum_rows = dy_rows if dsum is None else rows_of(dsum)
    n_rows, C = x_rows.shape
    block = next_power_of_2(C)
    device = device_of(x)
    config = configuration(device, "rms_norm_backward", str(max(block, 64)))
    n_programs = min(cdiv(n_rows, config["ROWS"]), device.n_sm * config.pop("programs_per_sm"))
    shares = dx if weight is None else x.new_empty((1, n_programs, C), dtype=torch.float32)
    launch(
        _backward_kernel, (n_programs,),
        dy_rows, dsum_rows, x_rows, x_rows if weight is None else weight.contiguous(), rstd, dx, shares,
        dy_rows.stride(0), dsum_rows.stride(0), x_rows.stride(0), n_rows,
        C=C, HAS_DSUM=dsum is not None, HAS_WEIGHT=weight is not None, BLOCK_C=block, **config,
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0)
    return dx, sum_of_shares(shares, weight.dtype, [weight_main_grad])[0]
