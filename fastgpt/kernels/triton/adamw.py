"""AdamW over a list of tensors, and the norm of their gradients, each in one pass and one launch.

A list is cut into chunks of CHUNK elements, one program each. Tables on the device say which tensor a chunk belongs to
and where the tensors lie. So one launch serves two flat buffers or two hundred parameters alike. The tables are kept,
and rebuilt only when a tensor has moved. Nothing is copied from the host.

The tables, for L lists (params, grads, ...) of n_tensors tensors each:

    pointers  (L * n_tensors,) int64, addresses, list after list
    sizes     (n_tensors,) int64, elements of each tensor
    tensors   (n_chunks,) int32, the number of the tensor that a chunk belongs to
    offsets   (n_chunks,) int64, the chunk's first element in it, a multiple of CHUNK

Bytes moved for each parameter, with fp32 parameters, gradients and moments: the norm reads 4. The update reads 16 and
writes 12, 2 more with a bf16 copy and 4 more if it zeroes the gradient. With moments of 8 bits it reads 10 and writes
6; with bf16 parameters and gradients as well, 6 and 4.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import moments_8bit
from fastgpt.kernels.triton.launch import configuration, device_of, kernel, launch

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
_MOMENT_BLOCK = tl.constexpr(moments_8bit.MOMENT_BLOCK)
_SHIFT = tl.constexpr(moments_8bit.MOMENT_SHIFT)
_LEAST_SCALE = tl.constexpr(moments_8bit.LEAST_MOMENT_SCALE)


@triton.jit
def _start(pointers, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of tensor number ``tensor`` of a list; ``pointers`` is the list's part of the table."""
    pointer = tl.load(pointers + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:  # to 16 bytes, so that the compiler may load four words at a time
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(sizes, tensor, ALIGNED: tl.constexpr):
    """The number of elements of tensor number ``tensor``, from the table."""
    n = tl.load(sizes + tensor)
    if ALIGNED:  # elements that are loaded together are then all inside or all outside
        n = tl.multiple_of(n, 16)
    return n


@kernel
def _squares_kernel(
    pointers, sizes, tensors, offsets,  # the tables, of one list
    sums,  # (n_chunks,) fp32, written
    dtype: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the sum of squares of one chunk, BLOCK elements at a time. Grid: (n_chunks,)."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    begin = tl.multiple_of(tl.load(offsets + chunk), CHUNK)
    grad = _start(pointers, tensor, dtype, ALIGNED)
    n = _size(sizes, tensor, ALIGNED)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(0, CHUNK, BLOCK):
        here = begin + block + tl.arange(0, BLOCK)
        g = tl.load(grad + here, mask=here < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums + chunk, tl.sum(total, axis=0))


@kernel
def _root_kernel(
    sums,  # (n,) fp32, sums of squares
    norm,  # () fp32, written: the square root of their sum
    n, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program, so that the order of summation is fixed; in fp64, since thousands of sums are added. Grid: (1,)."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n, BLOCK):
        here = start + tl.arange(0, BLOCK)
        total += tl.load(sums + here, mask=here < n, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt_rn(tl.sum(total, axis=0).to(tl.float32)))


@triton.jit
def _updated(p, g, m, v, coefficients, beta2, one_minus_beta1, one_minus_beta2, eps):
    """The new parameter and moments, fp32, of tiles in fp32; ``coefficients`` is (3,) fp32, see _coefficients.

        m = m + (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g**2
        p = decay p - step_size m / (sqrt(v) / correction2 + eps)

    The host computes 1 - beta1 and 1 - beta2 in fp64: 1 - 0.999 in fp32 would be off by 1e-4 of itself. Divisions and
    roots are correctly rounded, as PyTorch's are.
    """
    step_size, correction2, decay = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
    m += (g - m) * one_minus_beta1
    v = v * beta2 + one_minus_beta2 * g * g
    p = p * decay - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
    return p, m, v


@triton.jit
def _n_written(n, found_inf, MAY_SKIP: tl.constexpr, ALIGNED: tl.constexpr):
    """How many of a tensor's n elements are updated: all, or none if this step is skipped."""
    if MAY_SKIP:
        n = tl.where(tl.load(found_inf) == 0.0, n, 0)
        if ALIGNED:
            n = tl.multiple_of(n, 16)
    return n


@kernel
def _adamw_kernel(
    pointers, sizes, tensors, offsets,  # the tables, of params, grads, exp_avgs, exp_avg_sqs and perhaps copies
    coefficients,  # (3,) fp32
    grad_scale,  # () fp32; not read without HAS_SCALE
    found_inf,  # () fp32; not read without MAY_SKIP
    n_tensors,
    beta2, one_minus_beta1, one_minus_beta2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    MAY_SKIP: tl.constexpr, ZERO_GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one tensor. P, G, M: dtypes of params, grads and moments. Grid: (n_chunks,)."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    here = tl.multiple_of(tl.load(offsets + chunk), CHUNK) + tl.arange(0, CHUNK)
    n = _size(sizes, tensor, ALIGNED)
    inside, written = here < n, here < _n_written(n, found_inf, MAY_SKIP, ALIGNED)
    param = _start(pointers, tensor, P, ALIGNED)
    grad = _start(pointers + n_tensors, tensor, G, ALIGNED)
    exp_avg = _start(pointers + 2 * n_tensors, tensor, M, ALIGNED)
    exp_avg_sq = _start(pointers + 3 * n_tensors, tensor, M, ALIGNED)

    g = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(grad_scale)
    m = tl.load(exp_avg + here, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + here, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param + here, mask=inside, other=0.0).to(tl.float32)
    p, m, v = _updated(p, g, m, v, coefficients, beta2, one_minus_beta1, one_minus_beta2, eps)
    tl.store(exp_avg + here, m.to(M), mask=written)
    tl.store(exp_avg_sq + here, v.to(M), mask=written)
    tl.store(param + here, p.to(P), mask=written)
    if HAS_COPY:
        copy = _start(pointers + 4 * n_tensors, tensor, tl.bfloat16, ALIGNED)
        tl.store(copy + here, p.to(tl.bfloat16), mask=written)
    if ZERO_GRAD:
        tl.debug_barrier()  # the zeros may be stored by other threads than loaded these gradients: wait for all
        tl.store(grad + here, tl.zeros((CHUNK,), dtype=G), mask=inside)


# ---- moments of 8 bits, bf16 rounded stochastically: moments_8bit.py and philox.py explain them ----


@triton.jit
def _decoded(codes, scale, LARGEST: tl.constexpr):
    """The moment, (ROWS, 256) fp32, that uint8 codes (ROWS, 256) and scales (ROWS,) fp32 stand for.

    LARGEST, the largest code without a sign, is 127 for exp_avg and 255 for exp_avg_sq. See moments_8bit.decode_moment.
    """
    codes = codes.to(tl.int32)
    magnitude = codes & LARGEST
    zero = (scale.to(tl.int32, bitcast=True) >> _SHIFT) - LARGEST
    values = ((zero[:, None] + magnitude) << _SHIFT).to(tl.float32, bitcast=True)
    values = tl.where(magnitude > 0, values, 0.0)
    return tl.where(codes > LARGEST, -values, values)


@triton.jit
def _encoded(x, random, LARGEST: tl.constexpr):
    """Codes (ROWS, 256) uint8 and scales (ROWS,) fp32 of a moment x, (ROWS, 256) fp32; see moments_8bit.encode_moment.

    random: (ROWS, 256) int32 in [0, 2**16), which decide between rounding up and down.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = (tl.max(bits, axis=1) >> 23) + 1
    scale = tl.minimum(tl.maximum(exponent, _LEAST_SCALE), 254) << 23
    bits = tl.minimum(bits, scale[:, None])
    zero = (scale >> _SHIFT) - LARGEST
    codes = ((bits + (random << 4)) >> _SHIFT) - zero[:, None]
    if LARGEST == 127:
        smallest = (zero + 1) << _SHIFT
        unit = smallest.to(tl.float32, bitcast=True) * 0.0000152587890625  # 2**-16
        up = random.to(tl.float32) * unit[:, None] < tl.abs(x)
        codes = tl.where(bits < smallest[:, None], up.to(tl.int32), codes)
        codes = tl.where((codes > 0) & (x < 0.0), codes + 128, codes)
    else:
        codes = tl.where(bits > 0, tl.maximum(codes, 1), 0)
    return codes.to(tl.uint8), scale.to(tl.float32, bitcast=True)


@triton.jit
def _stochastic(x, random):
    """Round ``x`` to an fp32 that bf16 can hold, up or down by ``random`` in [0, 2**16).

    A NaN is kept, because the carry could run through all its bits.
    """
    bits = (x.to(tl.int32, bitcast=True) + random) & -65536  # the carry out of the lower half rounds up
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _random_halves(key, tensor, purpose, begin, ROWS: tl.constexpr):
    """Two (ROWS, 256) int32 of numbers in [0, 2**16), for the elements of a tensor from ``begin`` on; see philox.py."""
    QUARTER: tl.constexpr = _MOMENT_BLOCK // 4
    zeros = tl.zeros((ROWS, QUARTER), dtype=tl.int32)
    place = (begin // 4).to(tl.int32) + QUARTER * tl.arange(0, ROWS)[:, None] + tl.arange(0, QUARTER)[None, :]
    w0, w1, w2, w3 = tl.philox(key, place, zeros + tensor, zeros + purpose, zeros)
    # the four words of a counter side by side: element 4 i + j gets word j
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, _MOMENT_BLOCK)).to(tl.int32, bitcast=True)
    return (words >> 16) & 0xFFFF, words & 0xFFFF


@kernel
def _adamw_8bit_kernel(
    pointers, sizes, tensors, offsets,  # the tables; with CODED the two lists of scales come before the copies
    coefficients,  # (3,) fp32
    grad_scale,  # () fp32; not read without HAS_SCALE
    found_inf,  # () fp32; not read without MAY_SKIP
    key,  # () int64, seed + step
    numbers,  # (n_tensors,) int64, each tensor's number in the caller's list, which the random numbers depend on
    n_tensors,
    beta2, one_minus_beta1, one_minus_beta2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, CODED: tl.constexpr,
    STOCHASTIC_P: tl.constexpr, STOCHASTIC_M: tl.constexpr, HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    MAY_SKIP: tl.constexpr, ZERO_GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one tensor, as (ROWS, 256): a row has one scale. Grid: (n_chunks,).

    P, G, M: dtypes of params, grads and moments (uint8 with CODED). STOCHASTIC_P, STOCHASTIC_M: whether bf16 params and
    bf16 moments are rounded stochastically.
    """
    ROWS: tl.constexpr = CHUNK // _MOMENT_BLOCK
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    number = tl.load(numbers + tensor).to(tl.int32)
    n = _size(sizes, tensor, ALIGNED)
    begin = tl.multiple_of(tl.load(offsets + chunk), CHUNK)
    starts = begin + tl.arange(0, ROWS) * _MOMENT_BLOCK
    here = starts[:, None] + tl.arange(0, _MOMENT_BLOCK)[None, :]
    inside = here < n
    param = _start(pointers, tensor, P, ALIGNED)
    grad = _start(pointers + n_tensors, tensor, G, ALIGNED)
    exp_avg = _start(pointers + 2 * n_tensors, tensor, M, ALIGNED)
    exp_avg_sq = _start(pointers + 3 * n_tensors, tensor, M, ALIGNED)

    p = tl.load(param + here, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(grad_scale)
    m = tl.load(exp_avg + here, mask=inside, other=0)
    v = tl.load(exp_avg_sq + here, mask=inside, other=0)
    if CODED:
        blocks = begin // _MOMENT_BLOCK + tl.arange(0, ROWS)
        exp_avg_scale = _start(pointers + 4 * n_tensors, tensor, tl.float32, ALIGNED) + blocks
        exp_avg_sq_scale = _start(pointers + 5 * n_tensors, tensor, tl.float32, ALIGNED) + blocks
        m = _decoded(m, tl.load(exp_avg_scale, mask=starts < n, other=0.0), 127)
        v = _decoded(v, tl.load(exp_avg_sq_scale, mask=starts < n, other=0.0), 255)
    p, m, v = _updated(
        p, g, m.to(tl.float32), v.to(tl.float32), coefficients, beta2, one_minus_beta1, one_minus_beta2, eps
    )

    seed = tl.load(key)
    n_written = _n_written(n, found_inf, MAY_SKIP, ALIGNED)
    written, rows_written = here < n_written, starts < n_written
    if CODED:
        for_m, for_v = _random_halves(seed, number, 0, begin, ROWS)
        m, scale = _encoded(m, for_m, 127)
        tl.store(exp_avg_scale, scale, mask=rows_written)
        v, scale = _encoded(v, for_v, 255)
        tl.store(exp_avg_sq_scale, scale, mask=rows_written)
    elif STOCHASTIC_M:
        for_m, for_v = _random_halves(seed, number, 0, begin, ROWS)
        m, v = _stochastic(m, for_m), _stochastic(v, for_v)
    if STOCHASTIC_P:
        _, for_p = _random_halves(seed, number, 1, begin, ROWS)
        p = _stochastic(p, for_p)
    tl.store(exp_avg + here, m.to(M), mask=written)
    tl.store(exp_avg_sq + here, v.to(M), mask=written)
    tl.store(param + here, p.to(P), mask=written)
    if HAS_COPY:
        COPY: tl.constexpr = 6 if CODED else 4  # the number of the list of copies
        copy = _start(pointers + COPY * n_tensors, tensor, tl.bfloat16, ALIGNED)
        tl.store(copy + here, p.to(tl.bfloat16), mask=written)
    if ZERO_GRAD:
        tl.debug_barrier()  # as above
        tl.store(grad + here, tl.zeros((ROWS, _MOMENT_BLOCK), dtype=G), mask=inside)


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    """``numbers`` as int64 on the device. Kernels that take them as arguments write them, so a CUDA graph can too."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(numbers))
    return table


# The stream is part of the caches' keys: another stream might read a table before it is filled.


@lru_cache(maxsize=256)
def number_table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The numbers as int64 on the device: addresses, or anything else that a kernel looks up by a tensor's number."""
    return _numbers(numbers, device)


@lru_cache(maxsize=64)
def chunk_tables(
    sizes: tuple[int, ...], chunk: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tables ``sizes``, ``tensors`` and ``offsets`` of tensors with so many elements, in chunks of ``chunk``."""
    counts = [-(-size // chunk) for size in sizes]
    n_chunks = _numbers(counts, device)
    tensors = torch.repeat_interleave(n_chunks, output_size=sum(counts))
    first = n_chunks.cumsum(0) - n_chunks
    offsets = (torch.arange(sum(counts), device=device) - first[tensors]) * chunk
    return _numbers(sizes, device), tensors.int(), offsets


def cached(make: Any, *args: Any) -> Any:
    """Return ``make(*args, stream)`` for the current stream, from its cache if possible.

    A CUDA graph gets tables of its own, filled at every replay. A cached table could be dropped from the cache while
    the graph still reads it, and one filled during a capture holds nothing until the graph is replayed.

    Args:
        make: an ``lru_cache`` that makes tables.
        args: what it makes them of; the last one is the device.
    """
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(args[-1]).cuda_stream if args[-1].type == "cuda" else 0
    return make.__wrapped__(*args, stream) if capturing else make(*args, stream)


def _tables(
    lists: list[list[Tensor]], chunk: int, unaligned_chunk: int | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """The four tables, and the constants ALIGNED and CHUNK that go with them.

    ALIGNED: every tensor starts on 16 bytes and has a multiple of 16 elements. ``unaligned_chunk`` is CHUNK otherwise.
    """
    sizes = tuple(t.numel() for t in lists[0])
    pointers = tuple(t.data_ptr() for tensors in lists for t in tensors)
    device = lists[0][0].device
    aligned = all(number % 16 == 0 for number in pointers + sizes)
    if not aligned and unaligned_chunk is not None:
        chunk = unaligned_chunk
    tables = (cached(number_table, pointers, device), *cached(chunk_tables, sizes, chunk, device))
    return tables, {"ALIGNED": aligned, "CHUNK": chunk}


def _by_dtypes(*lists: list[Tensor]) -> list[list[list[Tensor]]]:
    """Split the lists into parts in which each list has one dtype, as a kernel needs; leave out empty tensors."""
    parts: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel():
            parts.setdefault(tuple(t.dtype for t in tensors), []).append(tensors)
    return [[list(column) for column in zip(*part, strict=True)] for part in parts.values()]


def grad_norm(grads: list[Tensor]) -> Tensor:
    config = configuration(device_of(grads[0]), "grad_norm", "any")
    sums = []
    for (part,) in _by_dtypes([g.contiguous() for g in grads]):
        tables, constants = _tables([part], config["CHUNK"])
        n_chunks = tables[2].numel()
        sums.append(part[0].new_empty(n_chunks, dtype=torch.float32))
        launch(
            _squares_kernel, (n_chunks,), *tables, sums[-1],
            dtype=_DTYPES[part[0].dtype], **config | constants,
        )  # fmt: skip
    norm = grads[0].new_zeros((), dtype=torch.float32)
    if sums:
        together = sums[0] if len(sums) == 1 else torch.cat(sums)
        launch(_root_kernel, (1,), together, norm, together.numel(), BLOCK=1024, num_warps=8)
    return norm


def _coefficients(step: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float) -> Tensor:
    """(3,) fp32: step size, square root of the second bias correction, decay factor; computed in fp64, rounded once."""
    t, rate = step.double(), lr.double()
    step_size, correction2 = rate / (1.0 - beta1**t), (1.0 - beta2**t).sqrt()
    return torch.stack((step_size, correction2, 1.0 - rate * weight_decay)).float()


def _or_any(placeholder: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, with ``placeholder`` in the place of each ``None``, which no kernel's pointer can be."""
    return [placeholder if t is None else t for t in tensors]


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], step: Tensor, lr: Tensor, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: float, zero_grad: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    config = configuration(device_of(params[0]), "adamw", "any")
    coefficients = _coefficients(step, lr, beta1, beta2, weight_decay)
    for lists in _by_dtypes(params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])):
        # loaded one element at a time, a whole chunk's addresses and values do not fit the registers
        tables, constants = _tables(lists, config["CHUNK"], config["CHUNK"] // 2)
        launch(
            _adamw_kernel, (tables[2].numel(),), *tables, coefficients,
            *_or_any(coefficients, grad_scale, found_inf), len(lists[0]),
            beta2, 1.0 - beta1, 1.0 - beta2, eps,
            P=_DTYPES[lists[0][0].dtype], G=_DTYPES[lists[1][0].dtype], M=_DTYPES[lists[2][0].dtype],
            HAS_COPY=bool(copies), HAS_SCALE=grad_scale is not None, MAY_SKIP=found_inf is not None,
            ZERO_GRAD=zero_grad, **config | constants,
        )  # fmt: skip


def adamw_8bit_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], copies: list[Tensor], step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, seed: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    zero_grad: bool, stochastic_rounding: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    config = configuration(device_of(params[0]), "adamw_8bit", "any")
    coefficients = _coefficients(step, lr, beta1, beta2, weight_decay)
    key = seed + step.long()
    number = {id(param): i for i, param in enumerate(params)}
    optional = (tensors for tensors in (exp_avg_scales, exp_avg_sq_scales, copies) if tensors)
    for lists in _by_dtypes(params, grads, exp_avgs, exp_avg_sqs, *optional):
        tables, constants = _tables(lists, config["CHUNK"])
        launch(
            _adamw_8bit_kernel, (tables[2].numel(),), *tables, coefficients,
            *_or_any(coefficients, grad_scale, found_inf), key,
            cached(number_table, tuple(number[id(param)] for param in lists[0]), key.device), len(lists[0]),
            beta2, 1.0 - beta1, 1.0 - beta2, eps,
            P=_DTYPES[lists[0][0].dtype], G=_DTYPES[lists[1][0].dtype], M=_DTYPES[lists[2][0].dtype],
            CODED=bool(exp_avg_scales), STOCHASTIC_P=stochastic_rounding and lists[0][0].dtype == torch.bfloat16,
            STOCHASTIC_M=stochastic_rounding and lists[2][0].dtype == torch.bfloat16, HAS_COPY=bool(copies),
            HAS_SCALE=grad_scale is not None, MAY_SKIP=found_inf is not None, ZERO_GRAD=zero_grad,
            **config | constants,
        )  # fmt: skip
