"""The Newton-Schulz iteration, which makes a matrix nearly orthogonal by products alone. Internal.

A quintic odd polynomial p(x) = a x + b x**3 + c x**5 is applied to the singular values of a matrix, whose singular
vectors stay. With Muon's coefficients five steps bring every singular value between about 0.002 and 1 to between about
0.7 and 1.2. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

import torch
from torch import Tensor

from fastgpt.kernels.dry_run import on_gpu
from fastgpt.kernels.matmul import matmul_into

# Muon's: the slope at 0 is as steep as it can be while large singular values stay near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: bf16 where the device multiplies it faster, as Muon does, otherwise that of ``x``."""
    if x.dtype == torch.float64:
        return x.dtype
    fast = on_gpu(x) or (x.device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def orthogonalised(
    x: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """Return matrices with the singular vectors of ``x``, and singular values near 1.

    Args:
        x: ``(K, M, N)``, K matrices; overwritten.
        coefficients: a, b and c of the polynomial.
        steps: how often it is applied.
        eps: the least norm that a matrix is divided by, so that a matrix of zeros stays one.

    Returns:
        ``(K, M, N)`` in the dtype of the products, bf16, fp32 or fp64.
    """
    a, b, c = coefficients
    x = x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=eps)).to(product_dtype(x))
    K, M, N = x.shape
    wide = M <= N  # the smaller of x x^T and x^T x is taken
    gram, polynomial = (x.new_empty((K, min(M, N), min(M, N))) for _ in range(2))
    for _ in range(steps):
        _product(gram, x, x.mT) if wide else _product(gram, x.mT, x)
        # x' = a x + (b G + c G G) x, or with the factors on the other side of a tall x
        _add_product(polynomial, gram, b, gram, gram, c)
        x = _with_product(x, a, polynomial) if wide else _with_product(x, a, polynomial, left=False)
    return x


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, each (K, …)."""
    if on_gpu(out):
        torch.bmm(a, b, out=out)
        return
    for k in range(len(out)):
        matmul_into(out[k], a[k], b[k])


def _add_product(out: Tensor, x: Tensor, beta: float, a: Tensor, b: Tensor, alpha: float) -> None:
    """``out = beta x + alpha a @ b``, each (K, …)."""
    if on_gpu(out):
        torch.baddbmm(x, a, b, beta=beta, alpha=alpha, out=out)
        return
    _product(out, a, b)
    out.mul_(alpha).add_(x, alpha=beta)


def _with_product(x: Tensor, a: float, factor: Tensor, left: bool = True) -> Tensor:
    """``a x + factor @ x``, or ``a x + x @ factor``."""
    out = torch.empty_like(x)
    _add_product(out, x, a, *((factor, x) if left else (x, factor)), 1.0)
    return out
