"""Matrix products into memory that is there already. Internal: PyTorch's are what others should call."""

from collections.abc import Sequence

from torch import Tensor

from fastgpt.kernels import dispatch, torch_matmul
from fastgpt.kernels.dry_run import on_gpu

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
        row_sums: ``(M,)``, dtype of ``a`` or fp32: ``a.sum(1)``, added where the product is.
    """
    packable = min(out.shape) >= SMALLEST_PACKED and (a.dtype, out.dtype) in dispatch.EXTENSION.products
    multiply = dispatch.resolve("matmul_", a) if packable else torch_matmul.matmul_
    multiply(out, a, b, bias, accumulate, row_sums)
    return out


def weight_and_bias_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, main_grads: Sequence[Tensor | None], needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of ``y = x @ weight.T + bias``, as far as they do not go into a ``main_grad``.

    Args:
        dy: ``(N, C_out)``, any strides.
        x: ``(N, C_in)``, any strides.
        weight: ``(C_out, C_in)``; its gradient is laid out in memory as it is, since autograd would copy it to be.
        main_grads: fp32, of the shapes of ``weight`` and the bias, or ``None``.
        needs_dweight: whether anybody asks for the gradient of ``weight``.
        needs_dbias: whether anybody asks for that of the bias.
    """
    weight_main_grad, bias_main_grad = main_grads
    accumulate = weight_main_grad is not None
    transposed = not accumulate and weight.T.is_contiguous() and not weight.is_contiguous()
    # A CPU's product sums the rows of dy.T on the way, and adds the sums if it adds its result.
    on_the_way = needs_dweight and not on_gpu(dy) and not transposed and (accumulate or bias_main_grad is None)
    dbias = row_sums = None
    if needs_dbias and not on_the_way:
        dbias = bias_gradient(dy, bias_main_grad)
    elif needs_dbias and bias_main_grad is not None:
        row_sums = bias_main_grad
    elif needs_dbias:
        row_sums = dbias = (dy.new_zeros if accumulate else dy.new_empty)(dy.shape[1])
    if not needs_dweight:
        return None, dbias
    if transposed:
        return matmul_into(weight.new_empty(weight.T.shape), x.T, dy).T, dbias
    if weight_main_grad is None:
        return matmul_into(weight.new_empty(weight.shape), dy.T, x, row_sums=row_sums), dbias
    matmul_into(weight_main_grad, dy.T, x, accumulate=True, row_sums=row_sums)
    return None, dbias


def bias_gradient(dy: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """The sum of ``dy`` ``(N, C)`` over its rows; or ``None``, and the sum added to ``main_grad``, ``(C,)`` fp32."""
    if main_grad is None:
        return dy.sum(0)
    dispatch.resolve("add_column_sums_", dy)(main_grad, dy)
    return None
