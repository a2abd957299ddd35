"""The matrix product by PyTorch (cuBLAS, oneDNN, MKL), with what it needs to be safe and to add in fp32.

Production code multiplies here wherever no kernel of ours is faster: on every GPU and on most CPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels.dry_run import on_gpu, stands_for

# On AMX, oneDNN's products of bf16 read past the end of a row of the left operand, up to the end of a tile of 32
# elements, and multiply what they find there by zero: a NaN or an infinity there makes the result NaN. fp16 did not
# show this on a CPU without AMX-FP16. It is treated alike as a precaution.
TILE_DEPTH = 32


def reads_past_rows(x: Tensor) -> bool:
    """Whether PyTorch's product with ``x`` as the left operand may depend on the memory behind the rows of ``x``."""
    on_cpu = stands_for(x.device.type) == "cpu"
    return x.dtype in (torch.bfloat16, torch.float16) and on_cpu and x.shape[-1] % TILE_DEPTH != 0


def with_zeros_behind(a: Tensor) -> Tensor:
    """Return ``a`` (M, K), copied in front of zeros if PyTorch's product would read past its rows."""
    K = a.shape[1]
    return F.pad(a, (0, -K % TILE_DEPTH))[:, :K] if reads_past_rows(a) else a


def _sums_in_fp32(a: Tensor) -> bool:
    """Whether cuBLAS sums products of ``a`` in fp32; set to sum fp16 in fp16, it cannot add them to an fp32 result."""
    return a.dtype != torch.float16 or not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def matmul_(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool, row_sums: Tensor | None) -> None:
    """The operator ``matmul_`` (ops.py): ``out = a @ b + bias`` or ``out += a @ b``, and the row sums of ``a``."""
    if row_sums is not None and accumulate:
        row_sums.add_(a.sum(1, dtype=row_sums.dtype))
    elif row_sums is not None:
        torch.sum(a, 1, dtype=row_sums.dtype, out=row_sums)
    a = with_zeros_behind(a)
    if accumulate and a.dtype == out.dtype:
        out.addmm_(a, b)
    elif accumulate and on_gpu(out) and _sums_in_fp32(a):  # half-precision operands, added to fp32 inside the product
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(a @ b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
