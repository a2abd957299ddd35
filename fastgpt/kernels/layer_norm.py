"""Layer norm, alone and fused with the residual add before it.

Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, ops
from fastgpt.kernels.autograd import apply, distinct, first_order


class _LayerNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        return ops.resolve("layer_norm", x)(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, *_ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order("layer_norm")
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return ()
        x, weight, mean, rstd = ctx.saved_tensors
        return ops.resolve("layer_norm_backward", x)(dy, None, x, weight, mean, rstd, ctx.needs_input_grad[2])


class _AddLayerNorm(Function):
    @staticmethod
    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        return ops.resolve("add_layer_norm", x)(x, residual, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, *_ = inputs
        _, total, mean, rstd = output
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order("add_layer_norm")
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
        total, weight, mean, rstd = ctx.saved_tensors
        if dy is None:
            return dsum, dsum
        dx, dweight, dbias = ops.resolve("layer_norm_backward", total)(
            dy, dsum, total, weight, mean, rstd, ctx.needs_input_grad[3]
        )
        return dx, dx, dweight, dbias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    checks.epsilon(eps)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got {tuple(x.shape)}")
    checks.same("x", x=x, weight=weight, bias=bias)
    checks.shape("weight", weight, (x.shape[-1],))
    if bias is not None:
        checks.shape("bias", bias, (x.shape[-1],))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of ``x`` to mean 0 and variance 1, then scale and shift it.

    Statistics are taken in fp32. Two tensors of one float per row are kept for the backward.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        weight: ``(C,)``, dtype and device of ``x``.
        bias: ``(C,)`` or ``None``.
        eps: added to the variance; at least 0.

    Returns:
        ``(..., C)``, contiguous, dtype of ``x``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x, weight=weight)
    checks.floating_if_given(bias=bias)
    x, weight, bias = autocast.in_float32(x, weight, bias)
    _check(x, weight, bias, eps)
    return apply(_LayerNorm, x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``layer_norm(x + residual)`` and the sum itself, in one pass over memory.

    The backward adds the gradient that reaches the sum directly into the one it returns, so the residual
    stream of a pre-norm transformer costs no pass of its own.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        residual: shape, dtype and device of ``x``.
        weight: ``(C,)``, dtype and device of ``x``.
        bias: ``(C,)`` or ``None``.
        eps: added to the variance; at least 0.

    Returns:
        ``(y, sum)``, both contiguous ``(..., C)``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x, residual=residual, weight=weight)
    checks.floating_if_given(bias=bias)
    x, residual, weight, bias = autocast.in_float32(x, residual, weight, bias)
    _check(x, weight, bias, eps)
    checks.same("x", x=x, residual=residual)
    checks.shape("residual", residual, tuple(x.shape))
    residual = distinct(residual, x)
    y, total, _, _ = apply(_AddLayerNorm, x, residual, weight, bias, eps)
    return y, total
