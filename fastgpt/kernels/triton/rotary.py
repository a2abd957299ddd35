"""Rotary position embeddings, alone or after an RMS norm of each head, and the gradients of both.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

A program takes a tile of POSITIONS by HEADS heads. It holds both elements of each pair in registers, so a head is read
once and written once, also in place. The tables' rows of a position are read for each of its heads, from L1. All
tensors are addressed by their strides, so heads are turned where they lie in packed q, k and v; heads of v are copied
by the same kernel if the result is a new tensor.

The gradient of the norm, with R for the rotation, xhat = x * rstd, and h = R' dy * weight:

    dx = rstd * (h - xhat * mean(h * xhat)),   dweight = sum(R' dy * xhat)

Without a weight it can be computed from the result y = R xhat: mean(h * xhat) is mean(dy * y), and xhat is R' y /
(cos**2 + sin**2).

Bytes moved for an element of s bytes: forward 2 s, backward 3 s, and 2 s without a norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.columns import sum_of_shares
from fastgpt.kernels.triton.launch import Device, cdiv, configuration, device_of, kernel, launch, next_power_of_2


@triton.jit
def _tile(tile, n_positions, n_heads, POSITIONS: tl.constexpr, HEADS: tl.constexpr):
    """Sequence, positions, heads, and which of them exist, of the POSITIONS * HEADS rows of a tile."""
    across = tl.cdiv(n_heads, HEADS)
    of_sequence = tl.cdiv(n_positions, POSITIONS) * across
    b, within = tile // of_sequence, tile % of_sequence
    row = tl.arange(0, POSITIONS * HEADS)
    t = within // across * POSITIONS + row // HEADS
    h = within % across * HEADS + row % HEADS
    return b, t, h, (t < n_positions) & (h < n_heads)


@triton.jit
def _rows(pointer, b, t, h, stride_b, stride_t, stride_h):
    """The first elements of the tile's heads."""
    return pointer + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h


@triton.jit
def _load_pairs(rows, stride, inside, D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of the pairs of each row, two tiles (rows, BLOCK) in the tensor's dtype; 0 beyond D."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (columns < D)[None, :]
        both = tl.load(rows[:, None] + columns[None, :].to(tl.int64) * stride, mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK, 2)))
    else:
        pairs = tl.arange(0, BLOCK)
        mask = inside[:, None] & (pairs < D // 2)[None, :]
        here = rows[:, None] + pairs[None, :].to(tl.int64) * stride
        first = tl.load(here, mask=mask, other=0.0)
        second = tl.load(here + tl.cast(stride, tl.int64) * (D // 2), mask=mask, other=0.0)
    return first, second


@triton.jit
def _store_pairs(rows, stride, first, second, inside, D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (columns < D)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK))
        tl.store(rows[:, None] + columns[None, :].to(tl.int64) * stride, both, mask=mask)
    else:
        pairs = tl.arange(0, BLOCK)
        mask = inside[:, None] & (pairs < D // 2)[None, :]
        here = rows[:, None] + pairs[None, :].to(tl.int64) * stride
        tl.store(here, first, mask=mask)
        tl.store(here + tl.cast(stride, tl.int64) * (D // 2), second, mask=mask)


@triton.jit
def _load_angles(cos, sin, b, t, of_batch, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """The cosines and sines of the tile's positions, (rows, BLOCK)."""
    pairs = tl.arange(0, BLOCK)
    mask = inside[:, None] & (pairs < D // 2)[None, :]
    here = b.to(tl.int64) * of_batch + t.to(tl.int64)[:, None] * (D // 2) + pairs[None, :]
    return tl.load(cos + here, mask=mask, other=1.0), tl.load(sin + here, mask=mask, other=0.0)


@triton.jit
def _turn(first, second, c, s):
    """Pairs turned by an angle. The FMAs are explicit, so that no kernel rounds otherwise than another."""
    return tl.fma(first, c, -(second * s)), tl.fma(second, c, first * s)


@triton.jit
def _load_weight(weight, D: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The weights of both elements of the pairs, (BLOCK,) each, and where they lie."""
    pairs = tl.arange(0, BLOCK)
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + D // 2
    mask = pairs < D // 2
    a = tl.load(weight + first, mask=mask, other=0.0).to(tl.float32)
    return a, tl.load(weight + second, mask=mask, other=0.0).to(tl.float32), first, second


@kernel
def _forward_kernel(
    x,  # (B, T, H, D)
    cos,  # (T, D/2) or (B, T, D/2) fp32, contiguous; not read without TURN
    sin,  # likewise
    weight,  # (D,); not read without HAS_WEIGHT
    y,  # (B, T, H, D), written; may be x
    rstd,  # (B, T, n_turned) fp32, written with NORM
    x_b, x_t, x_h, x_d, y_b, y_t, y_h, y_d,  # strides
    table_b,  # elements between the tables' rows of two sequences
    n_positions, n_heads,
    n_turned,  # heads from here on are copied, with COPY
    eps, D: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: a tile. Grid: (B * cdiv(T, POSITIONS) * cdiv(H, HEADS),)."""
    b, t, h, inside = _tile(tl.program_id(0), n_positions, n_heads, POSITIONS, HEADS)
    first, second = _load_pairs(_rows(x, b, t, h, x_b, x_t, x_h), x_d, inside, D, BLOCK, INTERLEAVED)
    a, d = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt_rn(tl.sum(a * a + d * d, axis=1) / D + eps)
        place = (b.to(tl.int64) * n_positions + t) * n_turned + h
        tl.store(rstd + place, scale, mask=inside & (h < n_turned))
        a, d = a * scale[:, None], d * scale[:, None]
    if HAS_WEIGHT:
        w_first, w_second, _, _ = _load_weight(weight, D, BLOCK, INTERLEAVED)
        a, d = a * w_first[None, :], d * w_second[None, :]
    if TURN:
        c, s = _load_angles(cos, sin, b, t, table_b, inside & (h < n_turned), D, BLOCK)
        if INVERSE:
            s = -s
        a, d = _turn(a, d, c, s)
    a, d = a.to(y.dtype.element_ty), d.to(y.dtype.element_ty)
    if COPY:
        turned = (h < n_turned)[:, None]
        a, d = tl.where(turned, a, first), tl.where(turned, d, second)
    _store_pairs(_rows(y, b, t, h, y_b, y_t, y_h), y_d, a, d, inside, D, BLOCK, INTERLEAVED)


@kernel
def _backward_from_result_kernel(
    dy,  # (B, T, H, D)
    y,  # (B, T, H, D), the forward's result
    cos,  # (T, D/2) or (B, T, D/2) fp32, contiguous; not read without TURN
    sin,  # likewise
    rstd,  # (B, T, n_turned) fp32
    dx,  # (B, T, H, D), written; may be dy
    dy_b, dy_t, dy_h, dy_d, y_b, y_t, y_h, y_d, dx_b, dx_t, dx_h, dx_d,  # strides
    table_b,  # elements between the tables' rows of two sequences
    n_positions, n_heads,
    n_turned,  # heads from here on are copied, with COPY
    D: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: a tile. Grid: (B * cdiv(T, POSITIONS) * cdiv(H, HEADS),)."""
    b, t, h, inside = _tile(tl.program_id(0), n_positions, n_heads, POSITIONS, HEADS)
    normed = inside & (h < n_turned)
    first, second = _load_pairs(_rows(dy, b, t, h, dy_b, dy_t, dy_h), dy_d, inside, D, BLOCK, INTERLEAVED)
    y_first, y_second = _load_pairs(_rows(y, b, t, h, y_b, y_t, y_h), y_d, normed, D, BLOCK, INTERLEAVED)
    a, d = first.to(tl.float32), second.to(tl.float32)
    p, q = y_first.to(tl.float32), y_second.to(tl.float32)
    mean = (tl.sum(a * p + d * q, axis=1) / D)[:, None]
    scale = tl.load(rstd + (b.to(tl.int64) * n_positions + t) * n_turned + h, mask=normed, other=0.0)[:, None]
    if TURN:
        c, s = _load_angles(cos, sin, b, t, table_b, normed, D, BLOCK)
        mean = mean / (c * c + s * s)
        a, d = _turn(a - p * mean, d - q * mean, c, -s)
    else:
        a, d = a - p * mean, d - q * mean
    a, d = (a * scale).to(dx.dtype.element_ty), (d * scale).to(dx.dtype.element_ty)
    if COPY:
        turned = (h < n_turned)[:, None]
        a, d = tl.where(turned, a, first), tl.where(turned, d, second)
    _store_pairs(_rows(dx, b, t, h, dx_b, dx_t, dx_h), dx_d, a, d, inside, D, BLOCK, INTERLEAVED)


@kernel
def _backward_kernel(
    dy,  # (B, T, H, D)
    x,  # (B, T, H, D)
    weight,  # (D,); not read without HAS_WEIGHT
    cos,  # (T, D/2) or (B, T, D/2) fp32, contiguous; not read without TURN
    sin,  # likewise
    rstd,  # (B, T, H) fp32
    dx,  # (B, T, H, D), contiguous, written
    shares,  # (n_programs, D) fp32, written with HAS_WEIGHT: shares of dweight
    dy_b, dy_t, dy_h, dy_d, x_b, x_t, x_h, x_d,  # strides
    table_b,  # elements between the tables' rows of two sequences
    n_positions, n_heads, n_tiles,
    D: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: every n_programs-th tile, and one share of dweight. Grid: (n_programs,)."""
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    w_first, w_second, at_first, at_second = _load_weight(weight, D, BLOCK, INTERLEAVED)
    dw_first = tl.zeros((POSITIONS * HEADS, BLOCK), dtype=tl.float32)
    dw_second = tl.zeros((POSITIONS * HEADS, BLOCK), dtype=tl.float32)
    for tile in range(program, n_tiles, n_programs):
        b, t, h, inside = _tile(tile, n_positions, n_heads, POSITIONS, HEADS)
        first, second = _load_pairs(_rows(dy, b, t, h, dy_b, dy_t, dy_h), dy_d, inside, D, BLOCK, INTERLEAVED)
        x_first, x_second = _load_pairs(_rows(x, b, t, h, x_b, x_t, x_h), x_d, inside, D, BLOCK, INTERLEAVED)
        row = (b.to(tl.int64) * n_positions + t) * n_heads + h
        scale = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        a, d = first.to(tl.float32), second.to(tl.float32)
        p, q = x_first.to(tl.float32) * scale, x_second.to(tl.float32) * scale  # xhat
        if TURN:
            c, s = _load_angles(cos, sin, b, t, table_b, inside, D, BLOCK)
            a, d = _turn(a, d, c, -s)
        if HAS_WEIGHT:
            dw_first += a * p
            dw_second += d * q
            a, d = a * w_first[None, :], d * w_second[None, :]
        mean = (tl.sum(a * p + d * q, axis=1) / D)[:, None]
        a, d = (a - p * mean) * scale, (d - q * mean) * scale
        a, d = a.to(dx.dtype.element_ty), d.to(dx.dtype.element_ty)
        _store_pairs(dx + row * D, 1, a, d, inside, D, BLOCK, INTERLEAVED)
    if HAS_WEIGHT:
        mask = tl.arange(0, BLOCK) < D // 2
        tl.store(shares + program * D + at_first, tl.sum(dw_first, axis=0), mask=mask)
        tl.store(shares + program * D + at_second, tl.sum(dw_second, axis=0), mask=mask)


def _heads_of(packed: Tensor, n: int) -> Tensor:
    """A view (B, T, n, D) of packed heads (B, T, n D), whatever the strides."""
    return packed.unflatten(2, (n, packed.shape[2] // n))


def _tables(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The tables for the kernels, and the elements between the rows of two sequences; ``x`` stands for absent ones."""
    if cos is None or sin is None:
        return x, x, 0
    return cos.contiguous(), sin.contiguous(), cos[0].numel() if cos.dim() == 3 else 0


def _launched(x: Tensor, name: str) -> tuple[Device, dict[str, int], int, int]:
    """Device, configuration, number of pairs rounded up to a power of 2, and number of tiles."""
    B, T, H, D = x.shape
    block = next_power_of_2(D // 2)
    device = device_of(x)
    config = configuration(device, name, str(max(block, 16)))
    return device, config, block, B * cdiv(T, config["POSITIONS"]) * cdiv(H, config["HEADS"])


def _forward(
    x: Tensor, y: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, rstd: Tensor | None,
    eps: float, interleaved: bool, inverse: bool, n_turned: int,
) -> None:  # fmt: skip
    """Write ``y``, which may be ``x``; its heads from ``n_turned`` on are copied. Norm, if there is an ``rstd``."""
    if x.numel() == 0:
        return
    _, config, block, n_tiles = _launched(x, "rotary_forward")
    c, s, of_batch = _tables(x, cos, sin)
    launch(
        _forward_kernel, (n_tiles,),
        x, c, s, x if weight is None else weight.contiguous(), y, x if rstd is None else rstd, *x.stride(), *y.stride(),
        of_batch, x.shape[1], x.shape[2], n_turned, eps, D=x.shape[3], TURN=cos is not None, INTERLEAVED=interleaved,
        INVERSE=inverse, NORM=rstd is not None, HAS_WEIGHT=weight is not None, COPY=n_turned < x.shape[2], BLOCK=block,
        **config,
    )  # fmt: skip


def _statistics(x: Tensor, n_head: int) -> Tensor:
    return x.new_empty((*x.shape[:2], n_head), dtype=torch.float32)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x, y, cos, sin, None, None, 0.0, interleaved, inverse, x.shape[2])
    return y


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    _forward(x, x, cos, sin, None, None, 0.0, interleaved, inverse, x.shape[2])


def rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    y, rstd = torch.empty_like(x, memory_format=torch.contiguous_format), _statistics(x, x.shape[2])
    _forward(x, y, cos, sin, weight, rstd, eps, interleaved, False, x.shape[2])
    return y, rstd


def rms_norm_rotary_(x: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    rstd = _statistics(x, x.shape[2])
    _forward(x, x, cos, sin, None, rstd, eps, interleaved, False, x.shape[2])
    return rstd


def rotary_qkv(
    qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor | None, sin: Tensor | None, qk_norm: bool, eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    n, n_turned = n_head + 2 * n_kv_head, n_head + n_kv_head
    rstd = _statistics(qkv, n_turned) if qk_norm else None
    _forward(_heads_of(qkv, n), _heads_of(out, n), cos, sin, None, rstd, eps, interleaved, False, n_turned)
    return out, qkv.new_empty(0, dtype=torch.float32) if rstd is None else rstd


def _backward_from_result(
    dy: Tensor, y: Tensor, dx: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, interleaved: bool,
    n_turned: int,
) -> None:  # fmt: skip
    """Write ``dx``, which may be ``dy``; its heads from ``n_turned`` on are copied."""
    if dy.numel() == 0:
        return
    _, config, block, n_tiles = _launched(dy, "rotary_backward_from_result")
    c, s, of_batch = _tables(dy, cos, sin)
    launch(
        _backward_from_result_kernel, (n_tiles,),
        dy, y, c, s, rstd.contiguous(), dx, *dy.stride(), *y.stride(), *dx.stride(), of_batch, dy.shape[1], dy.shape[2],
        n_turned, D=dy.shape[3], TURN=cos is not None, INTERLEAVED=interleaved, COPY=n_turned < dy.shape[2],
        BLOCK=block, **config,
    )  # fmt: skip


def rms_norm_rotary_backward_(
    dy: Tensor, y: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, interleaved: bool
) -> None:
    _backward_from_result(dy, y, dy, cos, sin, rstd, interleaved, dy.shape[2])


def rotary_qkv_backward(
    dout: Tensor, out: Tensor | None, rstd: Tensor | None, n_head: int, n_kv_head: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    dqkv = torch.empty_like(dout, memory_format=torch.contiguous_format)
    n, n_turned = n_head + 2 * n_kv_head, n_head + n_kv_head
    dy, dx = _heads_of(dout, n), _heads_of(dqkv, n)
    if out is None or rstd is None:
        _forward(dy, dx, cos, sin, None, None, 0.0, interleaved, True, n_turned)
    else:
        _backward_from_result(dy, _heads_of(out, n), dx, cos, sin, rstd, interleaved, n_turned)
    return dqkv


def rms_norm_rotary_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, rstd: Tensor,
    interleaved: bool, weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        empty = weight is None or weight_main_grad is not None
        return dx, x.new_zeros(0 if empty else weight.shape)  # type: ignore[union-attr]
    device, config, block, n_tiles = _launched(x, "rotary_backward")
    n_programs = min(n_tiles, device.n_sm * config.pop("programs_per_sm"))
    c, s, of_batch = _tables(x, cos, sin)
    D = x.shape[3]
    shares = x.new_empty((1, n_programs, D) if weight is not None else 0, dtype=torch.float32)
    launch(
        _backward_kernel, (n_programs,),
        dy, x, x if weight is None else weight.contiguous(), c, s, rstd.contiguous(), dx, shares, *dy.stride(),
        *x.stride(), of_batch, x.shape[1], x.shape[2], n_tiles, D=D, TURN=cos is not None, INTERLEAVED=interleaved,
        HAS_WEIGHT=weight is not None, BLOCK=block, **config,
    )  # fmt: skip
    if weight is None:
        return dx, x.new_empty(0)
    return dx, sum_of_shares(shares, weight.dtype, [weight_main_grad])[0]
