"""The second step of a sum over rows: many programs have each summed a share, this adds the shares up."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import configuration, device_of, launch


@triton.jit
def _sum_kernel(shares, sums, n_shares, n_columns, BLOCK_SHARES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    shares += tl.program_id(1).to(tl.int64) * n_shares * n_columns
    total = tl.zeros((BLOCK_SHARES, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, n_shares, BLOCK_SHARES):
        rows = start + tl.arange(0, BLOCK_SHARES)
        inside = (rows < n_shares)[:, None] & in_columns[None, :]
        total += tl.load(shares + rows[:, None] * n_columns + columns[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0).to(sums.dtype.element_ty)
    tl.store(sums + tl.program_id(1) * n_columns + columns, result, mask=in_columns)


def sum_of_shares(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, n_shares, C) fp32 summed over its second dimension to (K, C), in an order that never changes."""
    K, n_shares, C = shares.shape
    sums = shares.new_empty((K, C), dtype=dtype)
    config = configuration(device_of(shares), "sum_of_shares", "any")
    launch(_sum_kernel, (triton.cdiv(C, config["BLOCK_COLUMNS"]), K), shares, sums, n_shares, C, **config)
    return sums
