"""Cross-entropy: forward, backward, and both in one kernel that overwrites the logits by their gradient.

A program takes one row of logits. Each lane keeps a running maximum and the sum of exponentials relative to it (the
online softmax), and the lanes are joined once at the end, so the inner loop has no reduction. The kernel that works in
place reads a row twice. The second time it is in the L2 cache, so memory is read once and written once: 2 V s bytes for
a row of V logits of s bytes.

    loss = log(sum(exp(x))) - x[target],   gradient = softmax(x) - onehot(target)

A target outside [0, V) that is not ``ignore_index`` makes its row's loss and gradient NaN: a kernel cannot raise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import configuration, device_of, kernel, launch, next_power_of_2, rows_of

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e))
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) ln(2)


@triton.jit
def _maximum_and_sum(row, V, BLOCK: tl.constexpr):
    """max(x) and sum(exp(x - max)) of a row of V contiguous logits."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lanes, mask=start + lanes < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        # what was summed relative to the old maximum is scaled to the new one
        total = total * tl.exp2((top - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
        top = new_top
    maximum = tl.max(top, axis=0)
    # this maximum drops a NaN, but total is NaN then, and so is the sum
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    return maximum, tl.sum(total * tl.exp2((top - shift) * LOG2E), axis=0)


@triton.jit
def _loss(row, target, maximum, total, V, ignore_index):
    """The row's loss, 0 if it does not count."""
    counts = target != ignore_index
    valid = (target >= 0) & (target < V)
    at_target = tl.load(row + target, mask=counts & valid, other=float("nan")).to(tl.float32)
    # maximum - at_target first: both are large where the loss is small, and their difference is exact then
    return tl.where(counts, (maximum - at_target) + tl.log2(total) * LN2, 0.0)


@kernel
def _forward_kernel(
    logits,  # (N, V), rows contiguous, row_stride elements apart
    targets,  # (N,) int64, target_stride elements apart
    losses,  # (N,) fp32, written
    lse,  # (N,) fp32, written
    row_stride, target_stride, V, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK logits at a time. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * row_stride
    target = tl.load(targets + i * target_stride)
    maximum, total = _maximum_and_sum(row, V, BLOCK)
    tl.store(losses + i, _loss(row, target, maximum, total, V, ignore_index))
    tl.store(lse + i, maximum + tl.log2(total) * LN2)


@triton.jit
def _write_gradient(row, drow, target, shift, factor, scale, V, ignore_index, BLOCK: tl.constexpr):
    """Write drow = (factor * exp(row - shift) - onehot(target)) * scale; zeros if the row does not count.

    factor * exp(x - shift) is the softmax, either with the maximum and 1 / sum or with the logsumexp and 1.
    """
    counts = target != ignore_index
    valid = (target >= 0) & (target < V)
    scale = tl.where(counts & valid, scale, tl.where(counts, float("nan"), 0.0))
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(row + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        softmax = tl.exp2((x - shift) * LOG2E) * factor
        gradient = tl.where(columns == target, softmax - 1.0, softmax) * scale
        gradient = tl.where(counts, gradient, 0.0)  # 0 * NaN would be NaN
        tl.store(drow + columns, gradient.to(drow.dtype.element_ty), mask=inside)


@kernel
def _backward_kernel(
    dlosses,  # (N,), dlosses_stride elements apart
    logits,  # (N, V), rows contiguous, row_stride elements apart
    targets,  # (N,) int64, target_stride elements apart
    lse,  # (N,) fp32, contiguous
    dlogits,  # (N, V), contiguous, written
    dlosses_stride, row_stride, target_stride, V, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i * target_stride)
    scale = tl.load(dlosses + i * dlosses_stride).to(tl.float32)
    _write_gradient(
        logits + i * row_stride, dlogits + i * V, target, tl.load(lse + i), 1.0, scale, V, ignore_index, BLOCK
    )


@kernel
def _in_place_kernel(
    logits,  # (N, V), contiguous; their gradient afterwards
    targets,  # (N,) int64, target_stride elements apart
    scale,  # () fp32, the gradient of each loss
    losses,  # (N,) fp32, written
    target_stride, V, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, read twice and overwritten. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * V
    target = tl.load(targets + i * target_stride)
    maximum, total = _maximum_and_sum(row, V, BLOCK)
    tl.store(losses + i, _loss(row, target, maximum, total, V, ignore_index))
    tl.debug_barrier()  # every thread has read the row before the first one writes to it
    _write_gradient(row, row, target, maximum, 1.0 / total, tl.load(scale), V, ignore_index, BLOCK)


def _configuration(logits: Tensor) -> dict[str, int]:
    """The shipped configuration; for a vocabulary smaller than its block, one block of the vocabulary's size."""
    width = next_power_of_2(logits.shape[1])
    config = configuration(device_of(logits), "cross_entropy", "any")
    return config if width >= config["BLOCK"] else {"BLOCK": max(width, 128), "num_warps": 4}


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    losses, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    if logits.shape[0]:
        rows = rows_of(logits)
        launch(
            _forward_kernel, (rows.shape[0],),
            rows, targets, losses, lse, rows.stride(0), targets.stride(0), rows.shape[1], ignore_index,
            **_configuration(rows),
        )  # fmt: skip
    return losses, lse


def cross_entropy_backward(dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    if logits.shape[0]:
        rows = rows_of(logits)
        launch(
            _backward_kernel, (rows.shape[0],),
            dlosses, rows, targets, lse, dlogits, dlosses.stride(0), rows.stride(0), targets.stride(0),
            rows.shape[1], ignore_index, **_configuration(rows),
        )  # fmt: skip
    return dlogits


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.shape[0]:
        launch(
            _in_place_kernel, (logits.shape[0],),
            logits, targets, scale, losses, targets.stride(0), logits.shape[1], ignore_index,
            **_configuration(logits),
        )  # fmt: skip
    return losses
