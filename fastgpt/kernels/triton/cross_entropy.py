"""Cross-entropy: forward, backward, and both in one kernel that overwrites the logits by their gradient.

A program takes one row of logits. Each lane keeps a running maximum and the sum of exponentials relative to it (the
online softmax), and the lanes are joined once at the end, so the inner loop has no reduction. The kernel that works in
place reads a row twice. The second time it is in the L2 cache, so memory is read once and written once: 2 V s bytes for
a row of V logits of s bytes.

    loss = log(sum(exp(x))) - x[target],   gradient = softmax(x) - onehot(target)

The options (capped logits, z-loss, smoothed labels, class weights; the formula is in ops.py) are arguments that are
None where they are not used, so that a kernel without them has no code for them.

A target outside [0, V) that is not ``ignore_index`` makes its row's loss and gradient NaN: a kernel cannot raise.
"""

from ctypes import c_float
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import configuration, device_of, kernel, launch, next_power_of_2, rows_of

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e))
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) ln(2)


@triton.jit
def _capped_and_slope(x, cap, slope, slope_error):
    """The capped logits cap tanh(u), u = x / cap, and 1 - tanh(u)**2. 1 / cap is given as the sum of two floats.

    The result must have the same bits wherever it is computed, because differences of equal numbers are taken. So there
    is no sum of products but one with an explicit FMA: the compiler would choose which to fuse.
    """
    magnitude = tl.abs(x)
    magnitude = tl.where(magnitude > 64.0 * cap, 64.0 * cap, magnitude)  # tanh(64) is 1; a NaN stays
    # the rounding error of a single float would be the same for all logits and would not average out
    u = tl.fma(magnitude, slope, magnitude * slope_error)
    # With e = exp(-2 u): (1 - e) / (1 + e) and 4 e / (1 + e)**2. The first cancels for small u.
    e = tl.exp2(u * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + e)
    # There tanh(u) = u + u**3 P(u**2); P is the polynomial of least relative error for u < 0.6, 3e-9.
    square = u * u
    p = square * -5.8951581e-3 + 2.0795972e-2
    p = square * p - 5.3783830e-2
    p = square * p + 1.3331924e-1
    p = square * p - 3.3333298e-1
    capped = tl.where(u < 0.6, u * square * p + u, (1.0 - e) * inverse) * cap
    return tl.where(x < 0.0, -capped, capped), 4.0 * e * inverse * inverse


@triton.jit
def _capped(x, cap, slope, slope_error):
    """The capped logits, cap tanh(x / cap); x itself if there is no cap."""
    if cap is not None:
        x, _ = _capped_and_slope(x, cap, slope, slope_error)
    return x


@triton.jit
def _row_sums(row, V, cap, slope, slope_error, weight, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of a row of V contiguous logits, capped: max(x), sum(exp(x - max)), and sum(weight * (max - x)) with SMOOTH."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if SMOOTH:
        below = tl.zeros((BLOCK,), dtype=tl.float32)  # sum(weight * (top - x))
        weights = tl.zeros((BLOCK,), dtype=tl.float32)  # sum(weight)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + lanes, mask=start + lanes < V, other=float("-inf")).to(tl.float32)
        if cap is not None:  # which lifts the infinity beyond the row
            x = tl.where(start + lanes < V, _capped(x, cap, slope, slope_error), float("-inf"))
        new_top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        # what was summed relative to the old maximum is scaled to the new one
        total = total * tl.exp2((top - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
        if SMOOTH:
            inside = start + lanes < V
            w = inside.to(tl.float32)
            if weight is not None:
                w = tl.load(weight + start + lanes, mask=inside, other=0.0)
            below += tl.where(top == float("-inf"), 0.0, (shift - top) * weights)
            below += tl.where(inside, (shift - x) * w, 0.0)
            weights += w
        top = new_top
    maximum = tl.max(top, axis=0)
    # this maximum drops a NaN, but total is NaN then, and so is the sum
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    row_total = tl.sum(total * tl.exp2((top - shift) * LOG2E), axis=0)
    row_below = 0.0
    if SMOOTH:
        row_below = tl.sum(below + tl.where(top == float("-inf"), 0.0, (shift - top) * weights), axis=0)
    return maximum, row_total, row_below


@triton.jit
def _loss(
    row, target, maximum, total, below, V, ignore_index, cap, slope, slope_error, weight, weight_sum, z_loss,
    smoothing,
):  # fmt: skip
    """The row's loss, 0 if it does not count."""
    counts = target != ignore_index
    valid = (target >= 0) & (target < V)
    at_target = tl.load(row + target, mask=counts & valid, other=float("nan")).to(tl.float32)
    at_target = _capped(at_target, cap, slope, slope_error)
    # maximum - at_target first: both are large where the loss is small, and their difference is exact then
    loss = (maximum - at_target) + tl.log2(total) * LN2
    if weight is not None:
        loss *= tl.load(weight + target, mask=counts & valid, other=0.0)
    if smoothing is not None:
        spread = smoothing / V
        loss = (1.0 - smoothing) * loss + spread * (below + _sum_of_weights(weight_sum, V) * (tl.log2(total) * LN2))
    if z_loss is not None:
        lse = maximum + tl.log2(total) * LN2
        loss += z_loss * lse * lse
    return tl.where(counts, loss, 0.0)


@triton.jit
def _sum_of_weights(weight_sum, V):
    """The sum of the class weights, all 1 if there are none."""
    if weight_sum is not None:
        return tl.load(weight_sum)
    return V * 1.0


@kernel
def _forward_kernel(
    logits,  # (N, V), rows contiguous, row_stride elements apart
    targets,  # (N,) int64, target_stride elements apart
    losses,  # (N,) fp32, written
    lse,  # (N,) fp32, written
    row_stride, target_stride, V, ignore_index,
    cap, slope, slope_error,  # softcap and its inverse in two parts, or None
    weight,  # (V,) fp32, contiguous, or None
    weight_sum,  # () fp32, the sum of weight, or None
    z_loss, smoothing,  # fp32, or None for 0
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, BLOCK logits at a time. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * row_stride
    target = tl.load(targets + i * target_stride)
    maximum, total, below = _row_sums(row, V, cap, slope, slope_error, weight, smoothing is not None, BLOCK)
    loss = _loss(
        row, target, maximum, total, below, V, ignore_index, cap, slope, slope_error, weight, weight_sum, z_loss,
        smoothing,
    )  # fmt: skip
    tl.store(losses + i, loss)
    tl.store(lse + i, maximum + tl.log2(total) * LN2)


@triton.jit
def _write_gradient(
    row, drow, target, shift, factor, lse, scale, V, ignore_index, cap, slope, slope_error, weight, weight_sum, z_loss,
    smoothing, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write drow = (factor * exp(row - shift) - onehot(target)) * scale; zeros if the row does not count.

    factor * exp(x - shift) is the softmax, either with the maximum and 1 / sum or with the logsumexp and 1. With
    options the softmax is multiplied by what the whole row gets, onehot(target) by what the target gets.
    """
    counts = target != ignore_index
    valid = (target >= 0) & (target < V)
    scale = tl.where(counts & valid, scale, tl.where(counts, float("nan"), 0.0))
    of_target = 1.0
    if weight is not None:
        of_target *= tl.load(weight + target, mask=counts & valid, other=0.0)
    if smoothing is not None:
        of_target *= 1.0 - smoothing
    of_row = of_target
    if smoothing is not None:
        spread = smoothing / V
        of_row += spread * _sum_of_weights(weight_sum, V)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        x = tl.load(row + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if cap is not None:
            x, derivative = _capped_and_slope(x, cap, slope, slope_error)
        softmax = tl.exp2((x - shift) * LOG2E) * factor
        if smoothing is not None:
            label = spread
            if weight is not None:
                label = tl.load(weight + columns, mask=inside, other=0.0) * spread
            gradient = softmax * of_row - tl.where(columns == target, of_target + label, label)
        elif weight is not None:
            gradient = softmax * of_row - tl.where(columns == target, of_target, 0.0)
        else:
            gradient = tl.where(columns == target, softmax - of_target, softmax)
        if z_loss is not None:  # last, because at the target the rest may nearly cancel
            gradient += softmax * (2.0 * z_loss * lse)
        gradient *= scale
        if cap is not None:
            gradient *= derivative
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
    cap, slope, slope_error, weight, weight_sum, z_loss, smoothing,  # as in the forward
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i * target_stride)
    scale = tl.load(dlosses + i * dlosses_stride).to(tl.float32)
    row_lse = tl.load(lse + i)
    _write_gradient(
        logits + i * row_stride, dlogits + i * V, target, row_lse, 1.0, row_lse, scale, V, ignore_index,
        cap, slope, slope_error, weight, weight_sum, z_loss, smoothing, BLOCK,
    )  # fmt: skip


@kernel
def _in_place_kernel(
    logits,  # (N, V), contiguous; their gradient afterwards
    targets,  # (N,) int64, target_stride elements apart
    scale,  # fp32, the gradient of each loss: (), or (N,), scale_stride elements apart
    losses,  # (N,) fp32, written
    target_stride, V, ignore_index, scale_stride,  # None if there is one scale for all
    cap, slope, slope_error, weight, weight_sum, z_loss, smoothing,  # as in the forward
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row, read twice and overwritten. Grid: (N,)."""
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * V
    target = tl.load(targets + i * target_stride)
    maximum, total, below = _row_sums(row, V, cap, slope, slope_error, weight, smoothing is not None, BLOCK)
    loss = _loss(
        row, target, maximum, total, below, V, ignore_index, cap, slope, slope_error, weight, weight_sum, z_loss,
        smoothing,
    )  # fmt: skip
    tl.store(losses + i, loss)
    if scale_stride is not None:
        scale += i * scale_stride
    tl.debug_barrier()  # every thread has read the row before the first one writes to it
    lse = maximum + tl.log2(total) * LN2 if z_loss is not None else None
    _write_gradient(
        row, row, target, maximum, 1.0 / total, lse, tl.load(scale), V, ignore_index, cap, slope, slope_error, weight,
        weight_sum, z_loss, smoothing, BLOCK,
    )  # fmt: skip


def _configuration(logits: Tensor) -> dict[str, int]:
    """The shipped configuration; for a vocabulary smaller than its block, one block of the vocabulary's size."""
    width = next_power_of_2(logits.shape[1])
    config = configuration(device_of(logits), "cross_entropy", "any")
    return config if width >= config["BLOCK"] else {"BLOCK": max(width, 128), "num_warps": 4}


def _options(softcap: float, z_loss: float, label_smoothing: float, class_weight: Tensor | None) -> tuple[Any, ...]:
    """The options as the kernels take them, None for those that are not used."""
    cap: tuple[float | None, ...] = (None, None, None)
    if softcap:
        slope = c_float(1.0 / softcap).value
        cap = softcap, slope, 1.0 / softcap - slope
    weight = None if class_weight is None else class_weight.contiguous()
    weight_sum = None if weight is None or not label_smoothing else weight.sum()
    return *cap, weight, weight_sum, z_loss or None, label_smoothing or None


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    losses, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    if logits.shape[0]:
        rows = rows_of(logits)
        launch(
            _forward_kernel, (rows.shape[0],),
            rows, targets, losses, lse, rows.stride(0), targets.stride(0), rows.shape[1], ignore_index,
            *_options(softcap, z_loss, label_smoothing, class_weight), **_configuration(rows),
        )  # fmt: skip
    return losses, lse


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dlogits = logits.new_empty(logits.shape)
    if logits.shape[0]:
        rows = rows_of(logits)
        launch(
            _backward_kernel, (rows.shape[0],),
            dlosses, rows, targets, lse, dlogits, dlosses.stride(0), rows.stride(0), targets.stride(0),
            rows.shape[1], ignore_index, *_options(softcap, z_loss, label_smoothing, class_weight),
            **_configuration(rows),
        )  # fmt: skip
    return dlogits


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    if logits.shape[0]:
        launch(
            _in_place_kernel, (logits.shape[0],),
            logits, targets, scale, losses, targets.stride(0), logits.shape[1], ignore_index,
            scale.stride(0) if scale.dim() else None, *_options(softcap, z_loss, label_smoothing, class_weight),
            **_configuration(logits),
        )  # fmt: skip
    return losses
