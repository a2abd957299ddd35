"""Attention after FlashAttention-2: online softmax, no T x T in memory, a backward of two passes or of one.

A forward program takes BLOCK_M queries and walks over the keys that they see, BLOCK_N at a time. Blocks left of the
diagonal need no mask and run in a loop without one. Only blocks that the diagonal or the end of the sequence crosses
are masked. For 16-bit inputs, scores are multiplied by scale * log2(e), so that a softmax weight is one multiply-add
and one exp2 ("base 2" below). Scores of fp32 inputs stay in base e, because the rounding to base 2 would show in fp32.

The online softmax: with the running maximum m and the running sum l of a row, a new block of scores s gives
m' = max(m, max(s)) and w = exp(s - m'). What was accumulated before is multiplied by exp(m - m'): l = l exp(m - m')
+ sum(w), acc = acc exp(m - m') + w v. At the end out = acc / l and lse = m + log(l).

The backward recomputes the weights, exp(s - lse), in each of two passes. One walks along the keys and writes dq, and
delta, the row sums of dout * out. The other walks along the queries and writes dk and dv. These are 7 products without
atomics: the same inputs give the same bits. With the weights P, the dropout factors Z and dP = Z (dout v^T):

    dv = (P Z)^T dout,   dS = P (dP - delta),   dq = scale dS k,   dk = scale dS^T q

With ``deterministic=False`` the pass along the queries also does the work of the other, 5 products in all. Each block
of keys is a program of its own, so the programs add their shares of dq with atomics, in fp32 and in any order, to a
buffer of sums. One kernel fills the buffer with zeros before, and another rounds it to dq after: 16 bytes of traffic
for each element of q, if L2 holds a head's sums while its blocks are added.

q, k and v, and the gradients, are read and written wherever they lie: a packed (B, T, 3C) tensor needs no split.

Heads of q may share one of k and v (GROUP of them). A program for a block of keys then walks along the queries of each
in turn, all of them masked, and dk and dv are sums over all of them, in fp32.

A window, or documents, hide keys from a query that causality shows it (LOCAL). The blocks that no query of a block sees
are not in its loop, which begins at the first key that its first query sees; in the pass along the queries it ends at
the last query that sees its last key. All blocks of the loop are masked: there are few of them. ``documents`` is
(B, 2, S): the first position of each position's document and the end of it, kept within bounds whatever it says.

A soft cap turns a scaled score s into cap tanh(s / cap) and multiplies dS by 1 - tanh(s / cap)**2.

In the kernels below every (B, H, T, D) tensor has D contiguous and three strides in elements: NAME_batch, NAME_head
and NAME_stride, from one position to the next. ``threshold`` and ``keep`` are dropout's: a weight is kept if its random
word reaches the threshold, and then multiplied by keep = 1 / (1 - p). ``offset`` is S - T, the position of the first
query among the keys under the causal mask; SQUARE says that it is 0. WINDOW and SOFTCAP are 0 for none. BLOCK_D is D
padded to a power of two. The grid has one axis, heads times blocks, with the blocks of one head side by side, so that
they share its keys in L2.

Dao, "FlashAttention-2", 2023.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import reference, slow_path
from fastgpt.kernels.heads import empty_heads, split_heads, split_qkv
from fastgpt.kernels.philox import dropout_threshold
from fastgpt.kernels.triton import autotune
from fastgpt.kernels.triton.launch import (
    cdiv,
    configuration,
    device_of,
    has_configuration,
    kernel,
    launch,
    next_power_of_2,
)

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e))
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) ln(2)


@triton.jit
def _block_and_head(n_rows, n_head, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """What this program works on: its first row, its head among all B * H, its batch entry, its head within the entry.

    The last two are int64, because their products with strides can exceed 2**31 elements.
    """
    n_blocks = tl.cdiv(n_rows, BLOCK)
    block = tl.program_id(0) % n_blocks
    if LAST_FIRST:  # under a causal mask the last queries see most keys; started last, they would run alone at the end
        block = n_blocks - 1 - block
    start = block * BLOCK
    head = tl.program_id(0) // n_blocks
    b, h = (head // n_head).to(tl.int64), (head % n_head).to(tl.int64)
    return start, head, b, h


@triton.jit
def _qkv_of_head(q, k, v, b, h, q_batch, q_head, k_batch, k_head, v_batch, v_head, GROUP: tl.constexpr):
    """Pointers to the first row of one head of q, and of the head of k and v that it reads."""
    q += b * q_batch + h * q_head
    if GROUP > 1:
        h = h // GROUP
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    return q, k, v


@triton.jit
def _tile(
    base, start, stride, n_rows, CHECK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load (BLOCK, BLOCK_D) of the rows from ``start`` on; zeros beyond ``n_rows`` (if CHECK) and beyond D.

    ``base`` is the first of ``n_rows`` rows of D elements, ``stride`` elements apart.
    """
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # only the offset of the first row needs 64 bits: _readable bounds the stride, so offsets within a block fit 32
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK and D < BLOCK_D:  # each mask costs instructions in the inner loop, so only those needed are built
        tile = tl.load(pointers, mask=(start + rows < n_rows)[:, None] & (columns < D)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=(start + rows < n_rows)[:, None], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_tile(base, tile, start, stride, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a (BLOCK, BLOCK_D) tile, rounded to the dtype of ``base``, over the rows from ``start`` on."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < n_rows)[:, None] & (columns < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _add_tile(base, tile, start, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add a (BLOCK, BLOCK_D) tile to rows from ``start`` on of a contiguous (n_rows, D) in fp32, with atomics."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * D + rows[:, None] * D + columns[None, :]
    inside = (start + rows < n_rows)[:, None] & (columns < D)[None, :]
    tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")  # no program reads the sums, so no order is needed


@triton.jit
def _dropout_keeps(seed, threshold, head, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a (BLOCK_M, BLOCK_N) tile dropout keeps, as booleans.

    Philox-4x32-10 with key = seed and counter = (column // 4, row, head, 0); word column % 4 must reach the threshold
    (philox.py). One call gives four words, so a quarter of the columns is drawn and the words are interleaved.
    """
    QUARTER: tl.constexpr = BLOCK_N // 4
    zeros = tl.zeros((BLOCK_M, QUARTER), dtype=tl.int32)
    columns = zeros + (start_n // 4 + tl.arange(0, QUARTER))[None, :]
    rows = zeros + (start_m + tl.arange(0, BLOCK_M))[:, None]
    w0, w1, w2, w3 = tl.philox(seed, columns, rows, zeros + head, zeros)
    # join puts its second operand behind the first along a new last axis, so the words come out as w0, w1, w2, w3
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N))
    return words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32)


@triton.jit
def _first_position(n_query, n_key, SQUARE: tl.constexpr):
    """``offset``. A constant where it is known to be 0, because the register that it takes lowers the occupancy."""
    return 0 if SQUARE else n_key - n_query


@triton.jit
def _visible(start_m, start_n, n_key, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) booleans: whether the query attends to the key."""
    columns = start_n + tl.arange(0, BLOCK_N)
    if CAUSAL:  # the last query is at the last key, so the diagonal ends before the keys do
        visible = (start_m + offset + tl.arange(0, BLOCK_M))[:, None] >= columns[None, :]
    else:
        visible = (columns < n_key)[None, :]
    return visible


@triton.jit
def _key_bounds(start_m, n_key, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Two bounds: keys before the first need no mask, keys between them do, and no query of the block sees the rest."""
    if CAUSAL:  # query start_m sees offset + start_m + 1 keys; every query of the block sees whole blocks of these
        unmasked = (offset + start_m + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(start_m + offset + BLOCK_M, n_key)
    else:
        unmasked = n_key // BLOCK_N * BLOCK_N
        end = n_key
    return unmasked, end


@triton.jit
def _first_key(documents, position, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first key that the queries at these positions see. documents: pointer to a batch entry's."""
    first = position - (WINDOW - 1) if WINDOW > 0 else position * 0
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(documents + position))
    return tl.minimum(tl.maximum(first, 0), position)  # whatever the documents say


@triton.jit
def _first_keys(documents, start, n_key, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first key that each of BLOCK_M queries sees, from position ``start`` on; and the first that any sees."""
    positions = tl.minimum(start + tl.arange(0, BLOCK_M), n_key - 1)  # rows beyond T see what the last one sees
    return _first_key(documents, positions, WINDOW, DOCUMENTS), _first_key(documents, start, WINDOW, DOCUMENTS)


@triton.jit
def _end_position(documents, key, n_key, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The end of the positions whose queries see these keys. documents: pointer to a batch entry's."""
    end = tl.minimum(key + WINDOW, n_key) if WINDOW > 0 else key * 0 + n_key
    if DOCUMENTS:
        end = tl.minimum(end, tl.load(documents + n_key + tl.minimum(key, n_key - 1)))
    return end


@triton.jit
def _capped(products, scale, SOFTCAP: tl.constexpr, FP32: tl.constexpr):
    """tanh(s / SOFTCAP) of the scaled scores s. scale: in the base."""
    x = products * (scale * ((1.0 if FP32 else LN2) / SOFTCAP))
    # two special instructions; exp2 may overflow to infinity, which gives 1
    capped = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if FP32 or SOFTCAP > 1000.0:  # near 0 the subtraction cancels: its rounding, times the cap, would show
        square = x * x
        p = tl.fma(square, -0.0058939453, 0.0207946177)  # fitted by least squares to a relative error of 3e-9
        p = tl.fma(p, square, -0.053783293)
        p = tl.fma(p, square, 0.133319153)
        p = tl.fma(p, square, -0.333332975)
        capped = tl.where(tl.abs(x) < 0.6, tl.fma(x * square, p, x), capped)
    return capped


@triton.jit
def _weights(products, scale, lse, SOFTCAP: tl.constexpr, FP32: tl.constexpr):
    """The weights of a tile from its products and lse, which broadcasts along it; and these times the cap's slope."""
    if SOFTCAP > 0.0:
        capped = _capped(products, scale, SOFTCAP, FP32)
        weights = _exp(tl.fma(capped, _to_base(SOFTCAP, FP32), -lse), FP32)
        sloped = weights * (1.0 - capped * capped)
    else:
        weights = _exp(tl.fma(products, scale, -lse), FP32)
        sloped = weights
    return weights, sloped


@triton.jit
def _to_base(x, FP32: tl.constexpr):
    """Convert a scale or a logsumexp to the base that exponents are kept in: 2 for 16-bit inputs, e for fp32."""
    return x if FP32 else x * LOG2E


@triton.jit
def _exp(x, FP32: tl.constexpr):
    """The exponential in the base of ``_to_base``: one instruction in base 2, two in base e.

    In base e a score is not rounded to base 2 before the maximum is subtracted. fp32 results would show that rounding.
    """
    return tl.exp2(x * LOG2E if FP32 else x)


@triton.jit
def _attend(
    acc, top, total, q, k, v, k_stride, v_stride, begin, end, start_m, n_key, offset, first, head, seed, threshold,
    scale, keep,
    MASKED: tl.constexpr, LOCAL: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, FP32: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the keys from ``begin`` to ``end`` into the online softmax. Return its new state: acc, top and total.

    acc: (BLOCK_M, BLOCK_D) fp32, the weighted sum of values. top, total: (BLOCK_M,) fp32, running maximum and sum.
    q: (BLOCK_M, BLOCK_D), a tile of queries. k, v: pointers to a head's first key and value. scale: in the base.
    first: (BLOCK_M,), the first key that each query sees; not read without LOCAL.
    """
    for start_n in range(begin, end, BLOCK_N):
        keys = _tile(k, start_n, k_stride, n_key, MASKED, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        if SOFTCAP > 0.0:
            scores = _capped(scores, scale, SOFTCAP, FP32) * _to_base(SOFTCAP, FP32)
        if MASKED:
            visible = _visible(start_m, start_n, n_key, offset, CAUSAL, BLOCK_M, BLOCK_N)
            if LOCAL:
                visible &= first[:, None] <= (start_n + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where(visible, scores if SOFTCAP > 0.0 else scores * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
        elif SOFTCAP > 0.0:
            new_top = tl.maximum(top, tl.max(scores, axis=1))
        else:  # scale >= 0 (_forward sees to that), so the scaled maximum is the maximum of the scaled
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        # while all scores of a row are -inf, 0 is subtracted: -inf - -inf would be NaN, and a later key may be finite
        subtracted = tl.where(new_top == float("-inf"), 0.0, new_top)
        if MASKED or SOFTCAP > 0.0:
            weights = _exp(scores - subtracted[:, None], FP32)
        else:  # one FMA scales and subtracts
            weights = _exp(tl.fma(scores, scale, -subtracted[:, None]), FP32)
        correction = _exp(top - subtracted, FP32)  # 0 for the first block, where top is -inf
        total = total * correction + tl.sum(weights, axis=1)  # before dropout, which is applied to normalised weights
        acc = acc * correction[:, None]
        if DROPOUT:
            kept = _dropout_keeps(seed, threshold, head, start_m, start_n, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights * keep, 0.0)
        values = _tile(v, start_n, v_stride, n_key, MASKED, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


# Otherwise Triton would compile a second kernel, for those p whose threshold is a multiple of 16.
@kernel(do_not_specialize=["threshold"])
def _forward_kernel(
    q,  # (B, H, T, D)
    k,  # (B, Hk, S, D)
    v,  # (B, Hk, S, D)
    out,  # (B, H, T, D), written
    lse,  # (B, H, T) fp32, contiguous, written
    seed,  # () int64; not read without DROPOUT
    documents,  # (B, 2, S) int32, contiguous; not read without DOCUMENTS
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, out_batch, out_head, out_stride,
    n_head, n_query, n_key, scale, threshold, keep,  # H, T, S
    CAUSAL: tl.constexpr, SQUARE: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr,
    MASKED_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, their output and logsumexp. Grid: (B * H * cdiv(T, BLOCK_M),)."""
    start_m, head, b, h = _block_and_head(n_query, n_head, True, BLOCK_M)
    q, k, v = _qkv_of_head(q, k, v, b, h, q_batch, q_head, k_batch, k_head, v_batch, v_head, GROUP)
    out += b * out_batch + h * out_head

    seed_value = tl.load(seed) if DROPOUT else 0
    queries = _tile(q, start_m, q_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    scale_in_base = _to_base(scale, FP32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    offset = _first_position(n_query, n_key, SQUARE)
    unmasked, end = _key_bounds(start_m, n_key, offset, CAUSAL, BLOCK_M, BLOCK_N)
    if WINDOW > 0 or DOCUMENTS:
        first, begin = _first_keys(documents + b * 2 * n_key, start_m + offset, n_key, WINDOW, DOCUMENTS, BLOCK_M)
        acc, top, total = _attend(
            acc, top, total, queries, k, v, k_stride, v_stride, begin // BLOCK_N * BLOCK_N, end, start_m, n_key,
            offset, first, head, seed_value, threshold, scale_in_base, keep,
            True, True, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        for i in tl.static_range(2):  # the keys that need no mask and those that do; MASKED_FIRST says in which order
            begin = unmasked if (i == 0) == MASKED_FIRST else 0
            until = end if (i == 0) == MASKED_FIRST else unmasked
            acc, top, total = _attend(
                acc, top, total, queries, k, v, k_stride, v_stride, begin, until, start_m, n_key, offset, 0, head,
                seed_value, threshold, scale_in_base, keep,
                (i == 0) == MASKED_FIRST, False, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
    # rows beyond T have queries of zero, hence scores of zero: no division by 0, and the mask drops their results
    _store_tile(out, acc / total[:, None], start_m, out_stride, n_query, D, BLOCK_M, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    lse_in_e = top + tl.log2(total) * LN2 if FP32 else (top + tl.log2(total)) * LN2
    tl.store(lse + head.to(tl.int64) * n_query + rows, lse_in_e, mask=rows < n_query)


@triton.jit
def _accumulate_dq(
    acc, q, dout, lse, delta, k, v, k_stride, v_stride, begin, end, start_m, n_key, offset, first, head, seed,
    threshold, scale, keep,
    MASKED: tl.constexpr, LOCAL: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, FP32: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add dS k of the keys from ``begin`` to ``end`` to ``acc``, (BLOCK_M, BLOCK_D) fp32, still without the scale.

    q, dout: (BLOCK_M, BLOCK_D), tiles. lse (in the base), delta: (BLOCK_M,) fp32. k, v: pointers to a head's first row.
    first: as in _attend.
    """
    for start_n in range(begin, end, BLOCK_N):
        keys = _tile(k, start_n, k_stride, n_key, MASKED, D, BLOCK_N, BLOCK_D)
        values = _tile(v, start_n, v_stride, n_key, MASKED, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, keys.T, input_precision=PRECISION)
        # normalised: lse holds maximum and sum
        _, weights = _weights(scores, scale, lse[:, None], SOFTCAP, FP32)
        if MASKED:
            visible = _visible(start_m, start_n, n_key, offset, CAUSAL, BLOCK_M, BLOCK_N)
            if LOCAL:
                visible &= first[:, None] <= (start_n + tl.arange(0, BLOCK_N))[None, :]
            weights = tl.where(visible, weights, 0.0)
        dweights = tl.dot(dout, values.T, input_precision=PRECISION)
        if DROPOUT:
            kept = _dropout_keeps(seed, threshold, head, start_m, start_n, BLOCK_M, BLOCK_N)
            dweights = tl.where(kept, dweights * keep, 0.0)
        dscores = weights * (dweights - delta[:, None])
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@kernel(do_not_specialize=["threshold"])
def _dq_kernel(
    q,  # (B, H, T, D)
    k,  # (B, Hk, S, D)
    v,  # (B, Hk, S, D)
    out,  # (B, H, T, D)
    dout,  # (B, H, T, D)
    lse,  # (B, H, T) fp32, contiguous
    dq,  # (B, H, T, D), written
    delta,  # (B, H, T) fp32, contiguous, written for _dk_dv_kernel
    seed,  # () int64; not read without DROPOUT
    documents,  # (B, 2, S) int32, contiguous; not read without DOCUMENTS
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    out_batch, out_head, out_stride, dout_batch, dout_head, dout_stride, dq_batch, dq_head, dq_stride,
    n_head, n_query, n_key, scale, threshold, keep,
    CAUSAL: tl.constexpr, SQUARE: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr,
    MASKED_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta of BLOCK_M queries of one head. Grid: (B * H * cdiv(T, BLOCK_M),)."""
    start_m, head, b, h = _block_and_head(n_query, n_head, True, BLOCK_M)
    q, k, v = _qkv_of_head(q, k, v, b, h, q_batch, q_head, k_batch, k_head, v_batch, v_head, GROUP)
    out += b * out_batch + h * out_head
    dout += b * dout_batch + h * dout_head
    dq += b * dq_batch + h * dq_head
    lse += head.to(tl.int64) * n_query
    delta += head.to(tl.int64) * n_query

    seed_value = tl.load(seed) if DROPOUT else 0
    rows = start_m + tl.arange(0, BLOCK_M)
    grad = _tile(dout, start_m, dout_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    result = _tile(out, start_m, out_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    row_delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + rows, row_delta, mask=rows < n_query)

    queries = _tile(q, start_m, q_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    # an infinite lse makes the weights of queries beyond the end 0
    row_lse = _to_base(tl.load(lse + rows, mask=rows < n_query, other=float("inf")), FP32)
    scale_in_base = _to_base(scale, FP32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    offset = _first_position(n_query, n_key, SQUARE)
    unmasked, end = _key_bounds(start_m, n_key, offset, CAUSAL, BLOCK_M, BLOCK_N)
    if WINDOW > 0 or DOCUMENTS:
        first, begin = _first_keys(documents + b * 2 * n_key, start_m + offset, n_key, WINDOW, DOCUMENTS, BLOCK_M)
        acc = _accumulate_dq(
            acc, queries, grad, row_lse, row_delta, k, v, k_stride, v_stride, begin // BLOCK_N * BLOCK_N, end, start_m,
            n_key, offset, first, head, seed_value, threshold, scale_in_base, keep,
            True, True, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        for i in tl.static_range(2):
            begin = unmasked if (i == 0) == MASKED_FIRST else 0
            until = end if (i == 0) == MASKED_FIRST else unmasked
            acc = _accumulate_dq(
                acc, queries, grad, row_lse, row_delta, k, v, k_stride, v_stride, begin, until, start_m, n_key, offset,
                0, head, seed_value, threshold, scale_in_base, keep,
                (i == 0) == MASKED_FIRST, False, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
    # the scale once here, in base e, rather than for each block of keys
    _store_tile(dq, acc * scale, start_m, dq_stride, n_query, D, BLOCK_M, BLOCK_D)


@triton.jit
def _accumulate_dk_dv(
    dk, dv, dq, k, v, q, dout, lse, delta, q_head, q_stride, dout_head, dout_stride, begin, end, start_n, n_query,
    n_key, offset, until, head, seed, threshold, scale, keep,
    ADD_DQ: tl.constexpr, MASKED: tl.constexpr, GROUP: tl.constexpr, LOCAL: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the shares of the queries from ``begin`` to ``end`` to dk and dv, (BLOCK_N, BLOCK_D) fp32, without the scale.

    Tiles of scores and weights are transposed here, (BLOCK_N, BLOCK_M), because both products need them as the left
    operand. With ADD_DQ the keys' share of dq is added to memory, also without the scale. The queries of a GROUP of
    heads are walked along in one loop, one head behind the other: a loop in a loop would spill registers.

    k, v: (BLOCK_N, BLOCK_D), tiles. q, dout, lse, delta: pointers to the first head's first row. dq: to its sums, or
    None.
    until: (BLOCK_N,), the end of the positions whose queries see each key; not read without LOCAL.
    """
    rows_of_head = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) * BLOCK_M if GROUP > 1 else 0
    for step in range(begin, begin + GROUP * rows_of_head if GROUP > 1 else end, BLOCK_M):
        start_m, this_head = step, head
        if GROUP > 1:
            i = (step - begin) // rows_of_head
            start_m, this_head = step - i * rows_of_head, head + i
            i = tl.cast(i, tl.int64)
            of_head = i * n_query
        else:
            i, of_head = 0, 0
        rows = start_m + tl.arange(0, BLOCK_M)
        queries = _tile(q + i * q_head, start_m, q_stride, n_query, True, D, BLOCK_M, BLOCK_D)
        # infinity makes the weights of queries beyond the end 0
        row_lse = _to_base(tl.load(lse + of_head + rows, mask=rows < n_query, other=float("inf")), FP32)
        scores = tl.dot(k, queries.T, input_precision=PRECISION)
        weights, sloped = _weights(scores, scale, row_lse[None, :], SOFTCAP, FP32)
        if MASKED:
            visible = _visible(start_m, start_n, n_key, offset, CAUSAL, BLOCK_M, BLOCK_N)
            if LOCAL:
                visible &= (offset + rows)[:, None] < until[None, :]
            weights = tl.where(visible.T, weights, 0.0)
            sloped = tl.where(visible.T, sloped, 0.0) if SOFTCAP > 0.0 else weights
        grad = _tile(dout + i * dout_head, start_m, dout_stride, n_query, True, D, BLOCK_M, BLOCK_D)
        dweights = tl.dot(v, grad.T, input_precision=PRECISION)
        used = weights
        if DROPOUT:
            kept = _dropout_keeps(seed, threshold, this_head, start_m, start_n, BLOCK_M, BLOCK_N).T
            used = tl.where(kept, weights * keep, 0.0)
            dweights = tl.where(kept, dweights * keep, 0.0)
        dv = tl.dot(used.to(grad.dtype), grad, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + of_head + rows, mask=rows < n_query, other=0.0)
        dscores = sloped * (dweights - row_delta[None, :])
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision=PRECISION)
        if ADD_DQ:
            share = tl.dot(dscores.to(k.dtype).T, k, input_precision=PRECISION)
            _add_tile(dq + of_head * D, share, start_m, n_query, D, BLOCK_M, BLOCK_D)
    return dk, dv


@triton.jit
def _dk_dv_of_block(
    dq, q, k, v, dout, lse, delta, dk, dv, seed, documents,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    dout_batch, dout_head, dout_stride, dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
    n_head, n_query, n_key, scale, threshold, keep,
    ADD_DQ: tl.constexpr, CAUSAL: tl.constexpr, SQUARE: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    FP32: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The body of both kernels below: one block of keys, its dk and dv, and with ADD_DQ its share of dq.

    dq: contiguous (B, H, T, D) fp32 with ADD_DQ, otherwise None. The other arguments are those of the kernels.
    """
    # in ascending order: the first keys are seen by most queries
    start_n, head, b, h = _block_and_head(n_key, n_head if GROUP == 1 else n_head // GROUP, False, BLOCK_N)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    dk += b * dk_batch + h * dk_head
    dv += b * dv_batch + h * dv_head
    q += b * q_batch + h * GROUP * q_head  # the first of the heads that read these keys
    dout += b * dout_batch + h * GROUP * dout_head
    head = head * GROUP
    lse += head.to(tl.int64) * n_query
    delta += head.to(tl.int64) * n_query
    if ADD_DQ:
        dq += head.to(tl.int64) * n_query * D

    seed_value = tl.load(seed) if DROPOUT else 0
    keys = _tile(k, start_n, k_stride, n_key, True, D, BLOCK_N, BLOCK_D)
    values = _tile(v, start_n, v_stride, n_key, True, D, BLOCK_N, BLOCK_D)
    scale_in_base = _to_base(scale, FP32)
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    begin, unmasked, end = 0, 0, n_query
    until = 0
    offset = _first_position(n_query, n_key, SQUARE)
    if CAUSAL:  # queries before first see none of these keys; from first + BLOCK_N - 1 on they see all
        first = start_n - offset
        begin = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
        unmasked = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M, n_query)
    elif ADD_DQ:  # a key beyond the end is 0, but its weight may be infinite, and 0 * infinity would be added to dq
        unmasked = tl.where(start_n + BLOCK_N > n_key, n_query, 0)
    LOCAL: tl.constexpr = WINDOW > 0 or DOCUMENTS
    if LOCAL:
        documents += b * 2 * n_key
        until = _end_position(documents, start_n + tl.arange(0, BLOCK_N), n_key, WINDOW, DOCUMENTS)
        last = tl.minimum(start_n + BLOCK_N, n_key) - 1
        end = tl.minimum(_end_position(documents, last, n_key, WINDOW, DOCUMENTS) - offset, n_query)
    if LOCAL or GROUP > 1:
        unmasked = end
    if CAUSAL or ADD_DQ or GROUP > 1:
        dkeys, dvalues = _accumulate_dk_dv(
            dkeys, dvalues, dq, keys, values, q, dout, lse, delta, q_head, q_stride, dout_head, dout_stride, begin,
            unmasked, start_n, n_query, n_key, offset, until, head, seed_value, threshold, scale_in_base, keep,
            ADD_DQ, True, GROUP, LOCAL, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    # keys beyond the end need no mask: what they gather is not stored
    if not (LOCAL or GROUP > 1):
        dkeys, dvalues = _accumulate_dk_dv(
            dkeys, dvalues, dq, keys, values, q, dout, lse, delta, q_head, q_stride, dout_head, dout_stride, unmasked,
            n_query, start_n, n_query, n_key, offset, until, head, seed_value, threshold, scale_in_base, keep,
            ADD_DQ, False, GROUP, LOCAL, SOFTCAP, CAUSAL, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    _store_tile(dk, dkeys * scale, start_n, dk_stride, n_key, D, BLOCK_N, BLOCK_D)
    _store_tile(dv, dvalues, start_n, dv_stride, n_key, D, BLOCK_N, BLOCK_D)


@kernel(do_not_specialize=["threshold"])
def _dk_dv_kernel(
    q,  # (B, H, T, D)
    k,  # (B, Hk, S, D)
    v,  # (B, Hk, S, D)
    dout,  # (B, H, T, D)
    lse,  # (B, H, T) fp32, contiguous
    delta,  # (B, H, T) fp32, contiguous, from _dq_kernel
    dk,  # (B, Hk, S, D), written
    dv,  # (B, Hk, S, D), written
    seed,  # () int64; not read without DROPOUT
    documents,  # (B, 2, S) int32, contiguous; not read without DOCUMENTS
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    dout_batch, dout_head, dout_stride, dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
    n_head, n_query, n_key, scale, threshold, keep,
    CAUSAL: tl.constexpr, SQUARE: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head. Grid: (B * Hk * cdiv(S, BLOCK_N),)."""
    _dk_dv_of_block(
        None, q, k, v, dout, lse, delta, dk, dv, seed, documents,
        q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
        dout_batch, dout_head, dout_stride, dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
        n_head, n_query, n_key, scale, threshold, keep,
        False, CAUSAL, SQUARE, GROUP, WINDOW, DOCUMENTS, SOFTCAP, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@kernel(do_not_specialize=["threshold"])
def _single_pass_kernel(
    q,  # (B, H, T, D)
    k,  # (B, Hk, S, D)
    v,  # (B, Hk, S, D)
    dout,  # (B, H, T, D)
    lse,  # (B, H, T) fp32, contiguous
    delta,  # (B, H, T) fp32, contiguous, from _delta_kernel
    dq_sums,  # (B, H, T, D) fp32, contiguous, added to with atomics
    dk,  # (B, Hk, S, D), written
    dv,  # (B, Hk, S, D), written
    seed,  # () int64; not read without DROPOUT
    documents,  # (B, 2, S) int32, contiguous; not read without DOCUMENTS
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    dout_batch, dout_head, dout_stride, dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
    n_head, n_query, n_key, scale, threshold, keep,
    CAUSAL: tl.constexpr, SQUARE: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, FP32: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_dk_dv_kernel, and the keys' share of dq as well. Grid: (B * Hk * cdiv(S, BLOCK_N),)."""
    _dk_dv_of_block(
        dq_sums, q, k, v, dout, lse, delta, dk, dv, seed, documents,
        q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
        dout_batch, dout_head, dout_stride, dk_batch, dk_head, dk_stride, dv_batch, dv_head, dv_stride,
        n_head, n_query, n_key, scale, threshold, keep,
        True, CAUSAL, SQUARE, GROUP, WINDOW, DOCUMENTS, SOFTCAP, DROPOUT, PRECISION, FP32, D, BLOCK_D, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@kernel
def _delta_kernel(
    out,  # (B, H, T, D)
    dout,  # (B, H, T, D)
    delta,  # (B, H, T) fp32, contiguous, written
    dq_sums,  # (B, H, T, D) fp32, contiguous, written
    out_batch, out_head, out_stride, dout_batch, dout_head, dout_stride, n_head, n_query,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Before the single pass: delta, and zeros in dq_sums, of BLOCK_M rows. Grid: (B * H * cdiv(T, BLOCK_M),)."""
    start_m, head, b, h = _block_and_head(n_query, n_head, False, BLOCK_M)
    rows = start_m + tl.arange(0, BLOCK_M)
    grad = _tile(dout + b * dout_batch + h * dout_head, start_m, dout_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    result = _tile(out + b * out_batch + h * out_head, start_m, out_stride, n_query, True, D, BLOCK_M, BLOCK_D)
    row_delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + head.to(tl.int64) * n_query + rows, row_delta, mask=rows < n_query)
    zeros = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    _store_tile(dq_sums + head.to(tl.int64) * n_query * D, zeros, start_m, D, n_query, D, BLOCK_M, BLOCK_D)


@kernel
def _round_dq_kernel(
    dq_sums,  # (B, H, T, D) fp32, contiguous
    dq,  # (B, H, T, D), written
    dq_batch, dq_head, dq_stride, n_head, n_query, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """After the single pass: scale and round the sums of BLOCK_M rows to dq. Grid: (B * H * cdiv(T, BLOCK_M),)."""
    start_m, head, b, h = _block_and_head(n_query, n_head, False, BLOCK_M)
    sums = _tile(dq_sums + head.to(tl.int64) * n_query * D, start_m, D, n_query, True, D, BLOCK_M, BLOCK_D)
    _store_tile(dq + b * dq_batch + h * dq_head, sums * scale, start_m, dq_stride, n_query, D, BLOCK_M, BLOCK_D)


def _strides(*tensors: Tensor) -> list[int]:
    """The batch, head and position strides of each tensor, (B, H, T, D), in elements."""
    return [stride for t in tensors for stride in t.stride()[:3]]


# If strides and addresses are multiples of 16, Triton compiles a kernel that loads 16 bytes at a time. Otherwise each
# element of a tile has an address of its own, in 64 bits. These fill the registers: most configurations spill.
_ALIGNED = 16  # elements


def _width(D: int) -> int:
    """The elements of a row that the kernels work on: D rounded up to a multiple of 16."""
    return -(-D // _ALIGNED) * _ALIGNED


def _readable(x: Tensor) -> Tensor:
    """Return ``x``, (B, H, T, D), as the kernels read it: itself, or a copy whose rows are filled up with zeros.

    It is copied if D or a stride is no multiple of 16, if D is not contiguous, or if offsets in a block exceed 32 bits.
    A block has at most 256 rows, so a position stride below 2**23 keeps its offsets below 2**31.
    """
    *strides, last = x.stride()
    aligned = x.shape[3] % _ALIGNED == 0 and x.data_ptr() % 16 == 0 and not any(s % _ALIGNED for s in strides)
    if aligned and last == 1 and x.stride(2) < 2**23:
        return x
    D = x.shape[3]
    rows = x.new_empty((*x.shape[:3], _width(D)))
    rows[..., :D].copy_(x)
    rows[..., D:].zero_()
    return rows


def _writable(x: Tensor) -> Tensor:
    """``x`` if its D is a multiple of 16. Otherwise a buffer with longer rows; ``_write_back`` copies it to ``x``."""
    D = x.shape[3]
    return x if D % _ALIGNED == 0 else x.new_empty((*x.shape[:3], _width(D)))


def _write_back(buffers: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy what the kernels wrote to tensors that :func:`_writable` has given a buffer."""
    for buffer, x in zip(buffers, tensors, strict=True):
        if buffer is not x:
            x.copy_(buffer[..., : x.shape[3]])


class _Scores(NamedTuple):
    """What becomes of a score: the last arguments of all four operators."""

    window: int = 0
    softcap: float = 0.0
    documents: Tensor | None = None


def _constants(
    q: Tensor, k: Tensor, causal: bool, dropout_p: float, seed: Tensor | None, scores: _Scores
) -> dict[str, Any]:
    """The compile-time arguments of every kernel with products.

    Raises:
        RuntimeError: the kernels would read elsewhere than in the tensors.
    """
    fp32, documents = q.dtype == torch.float32, scores.documents
    if (scores.window > 0 or documents is not None) and (not causal or k.shape[2] < q.shape[2]):
        raise RuntimeError("causal: windows and documents need it, and as many keys as queries")
    if documents is not None and (documents.dtype != torch.int32 or documents.shape != (q.shape[0], 2, k.shape[2])):
        raise RuntimeError(f"documents: expected {(q.shape[0], 2, k.shape[2])} int32")
    return {
        "CAUSAL": causal,
        "SQUARE": not causal or q.shape[2] == k.shape[2],
        "GROUP": q.shape[1] // k.shape[1],
        "WINDOW": min(scores.window, k.shape[2]),
        "DOCUMENTS": documents is not None,
        "SOFTCAP": scores.softcap,
        "DROPOUT": dropout_p > 0.0 and seed is not None,
        # fp32 products run on the tensor cores as three in tf32, which keeps fp32's accuracy
        "PRECISION": "tf32x3" if fp32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32",
        "FP32": fp32,
        "D": q.shape[3],
        # tiles have sides that are powers of two; shipped configurations begin at 32
        "BLOCK_D": max(32, next_power_of_2(q.shape[3])),
    }


def _order(q: Tensor) -> dict[str, bool]:
    """Whether the masked keys come first. Either order is correct: until it sees a key, a query has scores of -inf.

    On Hopper they come first. If a loop may run zero times, ptxas serialises the asynchronous products of the loop
    behind it. With as many keys as queries the masked loop always runs, so it goes first. On other architectures this
    order takes more registers.
    """
    return {"MASKED_FIRST": device_of(q).capability == 90}


def _pointers(lse: Tensor, seed: Tensor | None, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Seed and documents, or in the place of one that is missing any tensor: a kernel's pointer cannot be None."""
    return lse if seed is None else seed, lse if documents is None else documents.contiguous()


def _dropout(dropout_p: float) -> tuple[int, float]:
    """The threshold that a random word must reach, and the factor of kept weights, 1 / (1 - p)."""
    return dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def _launch(
    name: str, kernel: Any, along: tuple[Tensor, str], q: Tensor, *args: Any, constants: dict[str, Any],
    before: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Launch a kernel with one program for each head and block of positions.

    Args:
        name: of the kernel's launch configuration.
        kernel: what is launched.
        along: a tensor, (B, heads, positions, D), and the configuration's entry that is the size of a block of them.
        q: the kernel's first argument, (B, H, T, D).
        args: the kernel's other arguments.
        constants: its compile-time arguments.
        before: called once, after tuning and right before the launch; tuning runs the kernel many times.
    """
    (B, heads, length, _), block = along[0].shape, along[1]

    def run(config: dict[str, int]) -> None:
        launch(kernel, (cdiv(length, config[block]) * B * heads,), q, *args, **constants, **config)

    config = configuration(device_of(q), name, _kind(q, name, constants))
    config = _tuned(q, kernel, (name, length, constants), config, run)
    if before is not None:
        before()
    run(config)


def _kind(q: Tensor, name: str, constants: dict[str, Any]) -> str:
    """The key of a kernel's launch configuration in configs/.

    With a window, documents, shared keys (all blocks are masked then) or a soft cap it ends in "masked" if there is
    such a key: where the other would spill.
    """
    dtype, dropout = ("fp32" if constants["FP32"] else "16-bit"), (" dropout" if constants["DROPOUT"] else "")
    kind = f"{dtype} D{constants['BLOCK_D']}{dropout}"
    extra = constants["WINDOW"] or constants["DOCUMENTS"] or constants["SOFTCAP"] or constants["GROUP"] > 1
    return f"{kind} masked" if extra and has_configuration(device_of(q), name, f"{kind} masked") else kind


def _tuned(
    q: Tensor, kernel: Any, case: tuple[str, int, dict[str, Any]], config: dict[str, int],
    run: Callable[[dict[str, int]], None],
) -> dict[str, int]:  # fmt: skip
    """``config``; or, with FASTGPT_AUTOTUNE, the fastest one that was measured on this device."""
    if not (q.is_cuda and autotune.enabled()):
        return config
    name, length, constants = case
    key = f"{kernel.cache_key[:12]} {name} {q.dtype} {tuple(q.shape)} along {length} {constants}"
    with torch.cuda.device(q.device):
        return autotune.best(device_of(q), key, config, run)


def _launch_on_rows(kernel: Any, like: Tensor, *args: Any, D: int, BLOCK_D: int) -> None:
    """Launch a kernel without products on tensors shaped like ``like``, (B, H, T, D). A program takes BLOCK_M rows."""
    config = configuration(device_of(like), "attention_rows", f"D{BLOCK_D}")
    grid = (cdiv(like.shape[2], config["BLOCK_M"]) * like.shape[0] * like.shape[1],)
    launch(kernel, grid, like, *args, D=D, BLOCK_D=BLOCK_D, **config)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, dropout_p: float,
    seed: Tensor | None, scores: _Scores,
) -> None:  # fmt: skip
    """Write ``out``, (B, H, T, D), and ``lse``, (B, H, T) fp32."""
    if scale < 0.0:  # the kernel scales the maximum of the scores, which needs scale >= 0; a cap is odd
        q, scale = -q, -scale
    q, k, v = _readable(q), _readable(k), _readable(v)
    result = _writable(out)
    H, T = q.shape[1:3]
    constants = _constants(q, k, causal, dropout_p, seed, scores)
    _launch(
        "attention_forward", _forward_kernel, (q, "BLOCK_M"),
        q, k, v, result, lse, *_pointers(lse, seed, scores.documents), *_strides(q, k, v, result), H, T, k.shape[2],
        scale, *_dropout(dropout_p), constants=constants | _order(q),
    )  # fmt: skip
    _write_back([result], [out])


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    causal: bool, scale: float, dropout_p: float, seed: Tensor | None, deterministic: bool, of_scores: _Scores,
) -> None:  # fmt: skip
    """Write ``dq``, ``dk`` and ``dv``, (B, H, T, D) or (B, Hk, S, D)."""
    dout, q, k, v, out = (_readable(t) for t in (dout, q, k, v, out))
    gradients = dq, dk, dv
    dq, dk, dv = (_writable(t) for t in gradients)
    H, T, S = q.shape[1], q.shape[2], k.shape[2]
    delta = torch.empty_like(lse)
    constants = _constants(q, k, causal, dropout_p, seed, of_scores)
    pointers = _pointers(lse, seed, of_scores.documents)
    scalars = (scale, *_dropout(dropout_p))
    single_pass = "attention_single_pass"
    if deterministic or not has_configuration(device_of(q), single_pass, _kind(q, single_pass, constants)):
        _launch(
            "attention_dq", _dq_kernel, (q, "BLOCK_M"),
            q, k, v, out, dout, lse, dq, delta, *pointers, *_strides(q, k, v, out, dout, dq), H, T, S, *scalars,
            constants=constants | _order(q),
        )  # fmt: skip
        _launch(
            "attention_dk_dv", _dk_dv_kernel, (k, "BLOCK_N"),
            q, k, v, dout, lse, delta, dk, dv, *pointers, *_strides(q, k, v, dout, dk, dv), H, T, S, *scalars,
            constants=constants,
        )  # fmt: skip
        _write_back([dq, dk, dv], gradients)
        return
    dq_sums = q.new_empty(q.shape, dtype=torch.float32)
    width = {name: constants[name] for name in ("D", "BLOCK_D")}
    _launch(
        single_pass, _single_pass_kernel, (k, "BLOCK_N"),
        q, k, v, dout, lse, delta, dq_sums, dk, dv, *pointers, *_strides(q, k, v, dout, dk, dv), H, T, S, *scalars,
        constants=constants,
        before=lambda: _launch_on_rows(
            _delta_kernel, out, dout, delta, dq_sums, *_strides(out, dout), H, T, **width
        ),
    )  # fmt: skip
    _launch_on_rows(_round_dq_kernel, dq_sums, dq, *_strides(dq), H, T, scale, **width)
    _write_back([dq, dk, dv], gradients)


def _splittable(packed: Tensor) -> Tensor:
    """Return ``packed``, (B, T, n C), or a copy if its last dimension is not contiguous, so that heads can be views."""
    return packed if packed.stride(2) == 1 else packed.contiguous()


def _left_to_the_reference(q: Tensor, D: int) -> bool:
    """Whether to run on plain PyTorch: heads of more than 128 fp32 elements spill registers in every configuration."""
    if q.dtype != torch.float32 or D <= 128:
        return False
    slow_path.warn("on a GPU, attention in float32 takes heads of at most 128")
    return True


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = _Scores(window, softcap, documents)
    if _left_to_the_reference(q, q.shape[3]):
        return reference.attention(q, k, v, causal, scale, dropout_p, seed, *scores)
    out, lse = empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _forward(q, k, v, out, lse, causal, scale, dropout_p, seed, scores)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, window: int = 0, softcap: float = 0.0,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options, scores = (causal, scale, dropout_p, seed, deterministic), _Scores(window, softcap, documents)
    if _left_to_the_reference(q, q.shape[3]):
        return reference.attention_backward(dout, q, k, v, out, lse, *options, *scores)
    dq, dk, dv = empty_heads(q), empty_heads(k), empty_heads(v)
    _backward(dout, q, k, v, out, lse, dq, dk, dv, *options, scores)
    return dq, dk, dv


def attention_qkv(
    qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None, n_kv_head: int = 0,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, width = qkv.shape
    n_kv_head, scores = n_kv_head or n_head, _Scores(window, softcap, documents)
    D = width // (n_head + 2 * n_kv_head)
    if _left_to_the_reference(qkv, D):
        return reference.attention_qkv(qkv, n_head, causal, scale, dropout_p, seed, n_kv_head, *scores)
    out = qkv.new_empty((B, T, n_head * D))
    lse = qkv.new_empty((B, n_head, T), dtype=torch.float32)
    q, k, v = split_qkv(_splittable(qkv), n_head, n_kv_head)
    (out_heads,) = split_heads(out, n_head, 1)
    _forward(q, k, v, out_heads, lse, causal, scale, dropout_p, seed, scores)
    return out, lse


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, n_kv_head: int = 0, window: int = 0,
    softcap: float = 0.0, documents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options, scores = (causal, scale, dropout_p, seed, deterministic), _Scores(window, softcap, documents)
    n_kv_head = n_kv_head or n_head
    if _left_to_the_reference(qkv, out.shape[2] // n_head):
        return reference.attention_qkv_backward(dout, qkv, out, lse, n_head, *options, n_kv_head, *scores)
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = split_qkv(_splittable(qkv), n_head, n_kv_head)
    dq, dk, dv = split_qkv(dqkv, n_head, n_kv_head)
    (dout_heads,), (out_heads,) = split_heads(_splittable(dout), n_head, 1), split_heads(out, n_head, 1)
    _backward(dout_heads, q, k, v, out_heads, lse, dq, dk, dv, *options, scores)
    return dqkv
