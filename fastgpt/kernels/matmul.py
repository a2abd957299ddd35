"""Matrix products into memory that is there already. Internal: PyTorch's are what others should call."""

from torch import Tensor

from fastgpt.kernels import ops, reference

# Below so many rows or columns a product is bound by reading the other operand, and packing it does not pay.
SMALLEST_PACKED = 16


def matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    row_sums: Tensor | None = None,
) -> Tensor:
    """``out = a @ b + bias``, or ``out += a @ b``; returns ``out``.

    Args:
        out: ``(M, N)``, rows contiguous; when accumulating it may be wider (fp32) than the operands.
        a: ``(M, K)``, any strides.
        b: ``(K, N)``, any strides, dtype of ``a``.
        bias: ``(N,)`` or ``None``.
        accumulate: add to what ``out`` holds; excludes ``bias``.
        row_sums: ``(M,)``, dtype of ``a``, becomes ``a.sum(1)``.
    """
    packable = min(out.shape) >= SMALLEST_PACKED and (a.dtype, out.dtype) in ops.EXTENSION.products
    multiply = ops.resolve("matmul_", a) if packable else reference.matmul_
    multiply(out, a, b, bias, accumulate, row_sums)
    return out


def weight_and_bias_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, main_grad: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of ``y = x @ weight.T + bias``; that of ``weight`` goes into ``main_grad`` if there is one.

    Args:
        dy: ``(N, C_out)``, any strides.
        x: ``(N, C_in)``, any strides.
        weight: ``(C_out, C_in)``; its gradient is laid out in memory as it is, since autograd would copy it to be.
        main_grad: fp32, shape of ``weight``, or ``None``.
        needs_dweight: whether anybody asks for the gradient of ``weight``.
        needs_dbias: whether anybody asks for that of the bias.
    """
    if not needs_dweight:
        return None, dy.sum(0) if needs_dbias else None
    dbias = dy.new_empty(dy.shape[1]) if needs_dbias else None
    if main_grad is not None:
        matmul_into(main_grad, dy.T, x, accumulate=True, row_sums=dbias)
        return None, dbias
    if weight.T.is_contiguous() and not weight.is_contiguous():
        return matmul_into(weight.new_empty(weight.T.shape), x.T, dy).T, dy.sum(0) if needs_dbias else None
    return matmul_into(weight.new_empty(weight.shape), dy.T, x, row_sums=dbias), dbias
