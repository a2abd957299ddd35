"""The gradient of a linear layer's bias: the sum of dy over the rows. The layer's products are in matmul.py.

A program owns a block of columns and walks down a share of the rows, which it sums in registers. One small kernel
(columns.py) then adds the shares, always in the same order. Bytes moved for an element of s bytes: s.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.columns import check_main_grad, sum_of_shares
from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch, rows_of


@kernel
def _column_sums_kernel(
    x,  # (N, C), rows contiguous, x_stride elements apart
    shares,  # (n_shares, C) fp32, written; with ADD the sums themselves, (C,) fp32, added to
    x_stride, n_rows, n_columns, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of every n_shares-th group of ROWS rows. Grid: (cdiv(C, COLUMNS), n_shares)."""
    share, n_shares = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(share * ROWS, n_rows, n_shares * ROWS):
        rows = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & in_columns[None, :]
        total += tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    here = shares + share * n_columns + columns
    result = tl.sum(total, axis=0)
    if ADD:  # there is one share, and it goes to the sums directly
        result += tl.load(here, mask=in_columns, other=0.0)
    tl.store(here, result, mask=in_columns)


def add_column_sums_(sums: Tensor, x: Tensor) -> None:
    check_main_grad(sums, x.shape[-1])
    if x.numel() == 0:
        return
    rows = rows_of(x)
    n_rows, n_columns = rows.shape
    device = device_of(x)
    config = configuration(device, "column_sums", "any")
    n_blocks = cdiv(n_columns, config["COLUMNS"])
    wanted = cdiv(device.n_sm * config.pop("programs_per_sm"), n_blocks)
    n_shares = min(cdiv(n_rows, config["ROWS"]), wanted)
    shares = sums if n_shares == 1 else x.new_empty((1, n_shares, n_columns), dtype=torch.float32)
    launch(
        _column_sums_kernel, (n_blocks, n_shares),
        rows, shares, rows.stride(0), n_rows, n_columns, ADD=n_shares == 1, **config,
    )  # fmt: skip
    if n_shares > 1:
        sum_of_shares(shares, torch.float32, [sums])
