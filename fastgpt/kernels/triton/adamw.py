"""AdamW over a list of tensors, and the norm of their gradients, each in one pass and one launch.

A list is cut into chunks of equal size; tables on the device say which chunk belongs to which tensor and where
the tensors lie, so a model of two flat buffers and one of two hundred parameters cost one launch alike. The
tables are kept, and made anew only when a tensor has moved.

Bytes moved a parameter, with fp32 parameters, gradients and moments: norm 4; update 16 read and 12 written, 2
more with a bf16 copy and 4 more where the gradient is zeroed.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.launch import configuration, device_of, launch

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _start(pointers, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor, from the table."""
    pointer = tl.load(pointers + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:  # to 16 bytes, which lets loads be four words wide
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares_kernel(
    pointers, sizes, tensors, offsets, sums, dtype: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    begin = tl.multiple_of(tl.load(offsets + chunk), CHUNK)
    grad = _start(pointers, tensor, dtype, ALIGNED)
    n = tl.load(sizes + tensor)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(0, CHUNK, BLOCK):
        here = begin + block + tl.arange(0, BLOCK)
        g = tl.load(grad + here, mask=here < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums + chunk, tl.sum(total, axis=0))


@triton.jit
def _root_kernel(sums, norm, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, n, BLOCK):
        here = start + tl.arange(0, BLOCK)
        total += tl.load(sums + here, mask=here < n, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt_rn(tl.sum(total, axis=0).to(tl.float32)))


@triton.jit
def _adamw_kernel(
    pointers, sizes, tensors, offsets, coefficients, grad_scale, n_tensors,
    beta2, one_minus_beta1, one_minus_beta2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    ZERO_GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    here = tl.multiple_of(tl.load(offsets + chunk), CHUNK) + tl.arange(0, CHUNK)
    inside = here < tl.load(sizes + tensor)
    param = _start(pointers, tensor, P, ALIGNED)
    grad = _start(pointers + n_tensors, tensor, G, ALIGNED)
    exp_avg = _start(pointers + 2 * n_tensors, tensor, M, ALIGNED)
    exp_avg_sq = _start(pointers + 3 * n_tensors, tensor, M, ALIGNED)
    step_size, correction2, decay = (tl.load(coefficients + i) for i in tl.static_range(3))

    g = tl.load(grad + here, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(grad_scale)
    m = tl.load(exp_avg + here, mask=inside, other=0.0).to(tl.float32)
    m += (g - m) * one_minus_beta1
    v = tl.load(exp_avg_sq + here, mask=inside, other=0.0).to(tl.float32)
    v = v * beta2 + one_minus_beta2 * g * g
    p = tl.load(param + here, mask=inside, other=0.0).to(tl.float32) * decay
    p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
    tl.store(exp_avg + here, m.to(M), mask=inside)
    tl.store(exp_avg_sq + here, v.to(M), mask=inside)
    tl.store(param + here, p.to(P), mask=inside)
    if HAS_COPY:
        tl.store(_start(pointers + 4 * n_tensors, tensor, tl.bfloat16, ALIGNED) + here, p.to(tl.bfloat16), mask=inside)
    if ZERO_GRAD:
        tl.store(grad + here, tl.zeros((CHUNK,), dtype=G), mask=inside)


@lru_cache(maxsize=64)
def _chunk_tables(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes of the tensors; for each chunk the tensor it belongs to and its first element there."""
    numel = torch.tensor(sizes)
    n_chunks = (numel + chunk - 1) // chunk
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), n_chunks)
    first = n_chunks.cumsum(0) - n_chunks
    offsets = (torch.arange(len(tensors)) - first[tensors]) * chunk
    return numel.to(device), tensors.to(device, torch.int32), offsets.to(device)


@lru_cache(maxsize=256)
def _pointer_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64).to(device)


def _tables(lists: list[list[Tensor]], chunk: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], bool]:
    """Pointers, sizes, tensors and offsets on the device; whether all tensors start on 16 bytes."""
    first = lists[0]
    pointers = tuple(t.data_ptr() for tensors in lists for t in tensors)
    device = first[0].device
    tables = (_pointer_table(pointers, device), *_chunk_tables(tuple(t.numel() for t in first), chunk, device))
    return tables, all(pointer % 16 == 0 for pointer in pointers)


def _by_dtypes(*lists: list[Tensor]) -> list[list[list[Tensor]]]:
    """The lists split so that within each part a list has one dtype; empty tensors are left out."""
    parts: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel():
            parts.setdefault(tuple(t.dtype for t in tensors), []).append(tensors)
    return [[list(column) for column in zip(*part, strict=True)] for part in parts.values()]


def grad_norm(grads: list[Tensor]) -> Tensor:
    config = configuration(device_of(grads[0]), "grad_norm", "any")
    chunk = config["CHUNK"]
    sums = []
    for (part,) in _by_dtypes([g.contiguous() for g in grads]):
        tables, aligned = _tables([part], chunk)
        n_chunks = tables[2].numel()
        sums.append(part[0].new_empty(n_chunks, dtype=torch.float32))
        launch(
            _squares_kernel, (n_chunks,), *tables, sums[-1],
            dtype=_DTYPES[part[0].dtype], ALIGNED=aligned, **config,
        )  # fmt: skip
    norm = grads[0].new_zeros((), dtype=torch.float32)
    if sums:
        together = sums[0] if len(sums) == 1 else torch.cat(sums)
        launch(_root_kernel, (1,), together, norm, together.numel(), BLOCK=1024, num_warps=8)
    return norm


def _coefficients(step: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float) -> Tensor:
    """Step size, square root of the second bias correction, decay factor: in fp64, rounded once."""
    t = step.double()
    step_size = lr / (1.0 - beta1**t)
    return torch.stack((step_size, (1.0 - beta2**t).sqrt(), 1.0 - lr * weight_decay)).float()


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], step: Tensor, lr: Tensor, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: float, zero_grad: bool,
) -> None:  # fmt: skip
    config = configuration(device_of(params[0]), "adamw", "any")
    coefficients = _coefficients(step, lr, beta1, beta2, weight_decay)
    for lists in _by_dtypes(params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])):
        tables, aligned = _tables(lists, config["CHUNK"])
        launch(
            _adamw_kernel, (tables[2].numel(),), *tables, coefficients,
            coefficients if grad_scale is None else grad_scale, len(lists[0]),
            beta2, 1.0 - beta1, 1.0 - beta2, eps,
            P=_DTYPES[lists[0][0].dtype], G=_DTYPES[lists[1][0].dtype], M=_DTYPES[lists[2][0].dtype],
            HAS_COPY=bool(copies), HAS_SCALE=grad_scale is not None, ZERO_GRAD=zero_grad, ALIGNED=aligned, **config,
        )  # fmt: skip
