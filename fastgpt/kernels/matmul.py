"""Matrix products into memory that is there already. Internal: PyTorch's are what others should call."""

import torch
from torch import Tensor

from fastgpt.kernels import ops, reference

# Below so many rows or columns a product is bound by reading the other operand, and packing it does not pay.
SMALLEST_PACKED = 16


def matmul_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
    """``out = a @ b + bias``, or ``out += a @ b``; returns ``out``.

    Args:
        out: ``(M, N)``, rows contiguous; when accumulating it may be wider (fp32) than the operands.
        a: ``(M, K)``, any strides.
        b: ``(K, N)``, any strides, dtype of ``a``.
        bias: ``(N,)`` or ``None``.
        accumulate: add to what ``out`` holds; excludes ``bias``.
    """
    # with a result of bf16 PyTorch's has nothing to lose
    packable = min(out.shape) >= SMALLEST_PACKED and out.dtype == torch.float32 and a.dtype != torch.float16
    multiply = ops.resolve("matmul_", a) if packable else reference.matmul_
    multiply(out, a, b, bias, accumulate)
    return out
