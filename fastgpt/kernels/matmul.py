"""Matrix products into existing memory, by the C++ kernels or by PyTorch. Internal."""

from collections.abc import Sequence

from torch import Tensor

from fastgpt.kernels import dispatch, torch_matmul
from fastgpt.kernels.dry_run import on_gpu

# With fewer rows or columns a product is bound by reading the other operand, and packing costs more than it saves.
SMALLEST_PACKED = 16

# Fewer rows than this are multiplied by a transposed weight without packing it, as when a text is generated.
FEW_ROWS = 8


def matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    row_sums: Tensor | None = None,
) -> Tensor:
    """Compute ``out = a @ b + bias`` or ``out += a @ b``, and return ``out``.

    Args:
        out: ``(M, N)``, rows contiguous; dtype of ``a``, or fp32 with ``accumulate``.
        a: ``(M, K)``, any strides.
        b: ``(K, N)``, any strides, dtype of ``a``.
        bias: ``(N,)`` or ``None``.
        accumulate: add to what ``out`` holds; excludes ``bias``.
        row_sums: ``(M,)``, dtype of ``a`` or fp32, or ``None``: receives ``a.sum(1)``, added with ``accumulate``.
    """
    products = dispatch.EXTENSION.products
    packable = min(out.shape) >= SMALLEST_PACKED and (a.dtype, out.dtype) in products
    few_rows = (
        len(out) < FEW_ROWS and a.stride(1) == b.stride(0) == 1 and not accumulate and row_sums is None
        and bool(products) and a.dtype == out.dtype and a.dtype in dispatch.COMPILED_DTYPES["cpp"]
    )  # fmt: skip
    multiply = dispatch.resolve("matmul_", a) if packable or few_rows else torch_matmul.matmul_
    multiply(out, a, b, bias, accumulate, row_sums)
    return out


def weight_and_bias_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, main_grads: Sequence[Tensor | None], needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias of ``y = x @ weight.T + bias``.

    A gradient that was added to a ``main_grad``, or is not required, is ``None``.

    Args:
        dy: ``(N, C_out)``, any strides.
        x: ``(N, C_in)``, any strides.
        weight: ``(C_out, C_in)``; its gradient gets the same memory layout, because autograd would otherwise copy it.
        main_grads: fp32, of the shapes of ``weight`` and the bias, or ``None``.
        needs_dweight: whether the gradient of ``weight`` is required.
        needs_dbias: whether the gradient of the bias is required.
    """
    weight_main_grad, bias_main_grad = main_grads
    accumulate = weight_main_grad is not None
    transposed = not accumulate and weight.T.is_contiguous() and not weight.is_contiguous()
    # On a CPU the product sums the rows of dy.T in the same pass, and adds the sums if it adds its result.
    in_the_product = needs_dweight and not on_gpu(dy) and not transposed and (accumulate or bias_main_grad is None)
    dbias = row_sums = None
    if needs_dbias and not in_the_product:
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
    """Return the sum of ``dy``, ``(N, C)``, over its rows; ``None`` if it is added to ``main_grad``, ``(C,)`` fp32."""
    if main_grad is None:
        return dy.sum(0)
    dispatch.resolve("add_column_sums_", dy)(main_grad, dy)
    return None
