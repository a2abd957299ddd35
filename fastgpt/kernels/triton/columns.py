"""The second step of a sum over rows. Many programs have each summed a share of the rows; this kernel adds the shares.

It takes two steps because atomics would add the shares in the order in which programs happen to end.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch


@triton.jit
def _deliver(total, sums, columns, in_columns, ADD: tl.constexpr):
    """Write ``total`` to ``sums``, rounded to its dtype. With ADD, add it instead."""
    if ADD:
        total += tl.load(sums + columns, mask=in_columns, other=0.0)
    tl.store(sums + columns, total.to(sums.dtype.element_ty), mask=in_columns)


@kernel
def _sum_kernel(
    shares,  # (K, n_shares, C) fp32, contiguous
    sums_0,  # (C,), the sum of shares[0]: written, or added to with ADD_0 (then fp32)
    sums_1,  # likewise of shares[1]; not touched if K < 2
    sums_2,  # likewise of shares[2]; not touched if K < 3
    n_shares, n_columns, ADD_0: tl.constexpr, ADD_1: tl.constexpr, ADD_2: tl.constexpr,
    BLOCK_SHARES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_COLUMNS columns of one of the K sums. Grid: (cdiv(C, BLOCK_COLUMNS), K)."""
    k = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < n_columns
    shares += k.to(tl.int64) * n_shares * n_columns
    total = tl.zeros((BLOCK_SHARES, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, n_shares, BLOCK_SHARES):
        rows = start + tl.arange(0, BLOCK_SHARES)
        inside = (rows < n_shares)[:, None] & in_columns[None, :]
        total += tl.load(shares + rows[:, None] * n_columns + columns[None, :], mask=inside, other=0.0)
    result = tl.sum(total, axis=0)
    if k == 0:
        _deliver(result, sums_0, columns, in_columns, ADD_0)
    elif k == 1:
        _deliver(result, sums_1, columns, in_columns, ADD_1)
    else:
        _deliver(result, sums_2, columns, in_columns, ADD_2)


def sum_of_shares(shares: Tensor, dtype: torch.dtype, main_grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Sum ``shares`` over its second dimension, in an order that never changes, in one launch.

    Args:
        shares: (K, n_shares, C) fp32; K is at most 3.
        dtype: of the returned sums.
        main_grads: for each of the K sums, a (C,) fp32 tensor to add it to, or ``None``.

    Returns:
        K tensors: (C,), or empty where there was a ``main_grad``.
    """
    K, n_shares, C = shares.shape
    for main_grad in main_grads:
        check_main_grad(main_grad, C)
    sums = [shares.new_empty(C, dtype=dtype) if m is None else m for m in main_grads]
    adds = [m is not None for m in main_grads]
    config = configuration(device_of(shares), "sum_of_shares", "any")
    # (sums * 3)[:3]: the kernel has three pointers; those beyond K are repeated and not used
    launch(
        _sum_kernel, (cdiv(C, config["BLOCK_COLUMNS"]), K),
        shares, *(sums * 3)[:3], n_shares, C, **{f"ADD_{k}": (adds * 3)[k] for k in range(3)}, **config,
    )  # fmt: skip
    return [shares.new_empty(0, dtype=dtype) if add else total for add, total in zip(adds, sums, strict=True)]


def check_main_grad(main_grad: Tensor | None, n: int) -> None:
    """Raise ``ValueError`` if a kernel cannot add ``n`` elements to ``main_grad``; ``None`` passes."""
    if main_grad is None or (main_grad.dtype == torch.float32 and main_grad.numel() == n and main_grad.is_contiguous()):
        return
    raise ValueError(f"main_grad: expected {n} elements of float32, contiguous, got {tuple(main_grad.shape)}")
