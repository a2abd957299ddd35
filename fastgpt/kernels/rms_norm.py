"""RMS norm, alone and fused with the residual add before it.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, distinct, once_differentiable
from fastgpt.kernels.main_grad import for_autograd, main_grads_of


class _RMSNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, weight_main_grad: Tensor | None) -> Any:
        return dispatch.resolve("rms_norm", x)(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.weight_main_grad = inputs
        _, rstd = output
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return ()
        x, weight, rstd = ctx.saved_tensors
        return backward(dy, None, x, weight, rstd, ctx.weight_main_grad)


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, weight_main_grad: Tensor | None
    ) -> Any:
        if residual is None:
            y, rstd = dispatch.resolve("rms_norm", x)(x, weight, eps)
            return y, x.view_as(x), rstd
        return dispatch.resolve("add_rms_norm", x)(x, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, _, ctx.weight_main_grad = inputs
        _, total, rstd = output
        ctx.save_for_backward(total, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("add_rms_norm")
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return dsum, dsum
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = backward(dy, dsum, total, weight, rstd, ctx.weight_main_grad)
        return dx, dx, dweight


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, weight_main_grad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``x`` and the weight; ``None`` for the weight's if it was added to its ``main_grad``.

    Args:
        dy: ``(..., C)``, the gradient of the norm's result.
        dsum: ``(..., C)``, a further gradient of ``x``, or ``None``.
        x: ``(..., C)``, the normalised tensor.
        weight: ``(C,)`` or ``None``.
        rstd: ``(...)`` fp32, the reciprocal root mean square of each row.
        weight_main_grad: ``(C,)`` fp32 or ``None``.
    """
    dx, dweight = dispatch.resolve("rms_norm_backward", x)(dy, dsum, x, weight, rstd, weight_main_grad)
    return dx, *for_autograd([dweight], [weight_main_grad])


def _check(x: Tensor, weight: Tensor | None, eps: float) -> None:
    checks.epsilon(eps)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got {tuple(x.shape)}")
    checks.same("x", x=x, weight=weight)
    if weight is not None:
        checks.shape("weight", weight, (x.shape[-1],))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Divide the last dimension of ``x`` by its root mean square, then scale it.

    ``y = x / sqrt(mean(x**2) + eps) * weight``. The statistics are computed in fp32, and only the result is rounded to
    the dtype of ``x``. One float a row is kept for the backward.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        weight: ``(C,)``, dtype and device of ``x``; or ``None`` for ones.
        eps: added to the mean square; at least 0. (``torch.nn.functional.rms_norm`` has another default.)

    Returns:
        ``(..., C)``, contiguous, dtype of ``x``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x)
    checks.floating_if_given(weight=weight)
    (main_grad,) = main_grads_of(weight)  # of the parameter itself, before autocast casts it
    x, weight = autocast.in_float32(x, weight)
    _check(x, weight, eps)
    return apply(_RMSNorm, x, weight, eps, main_grad)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(x + residual)`` and the sum itself, in one pass over memory.

    The backward adds the gradient that reaches the sum to the gradient that it returns, so the residual stream of a
    pre-norm transformer needs no pass of its own.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        residual: shape, dtype and device of ``x``.
        weight: ``(C,)``, dtype and device of ``x``; or ``None`` for ones.
        eps: added to the mean square; at least 0.

    Returns:
        ``(y, sum)``, both contiguous ``(..., C)``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x, residual=residual)
    checks.floating_if_given(weight=weight)
    (main_grad,) = main_grads_of(weight)
    x, residual, weight = autocast.in_float32(x, residual, weight)
    _check(x, weight, eps)
    checks.same("x", x=x, residual=residual)
    checks.shape("residual", residual, tuple(x.shape))
    residual = distinct(residual, x)
    y, total, _ = apply(_AddRMSNorm, x, residual, weight, eps, main_grad)
    return y, total


def rms_norm_and_input(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(x)`` and ``x`` itself, for the beginning of a residual stream.

    The backward adds both gradients in one pass, as in :func:`add_rms_norm`. Internal, without checks; the arguments
    are those of :func:`rms_norm`.
    """
    if torch.compiler.is_compiling() or autocast.enabled(x.device.type):
        return rms_norm(x, weight, eps), x
    y, total, _ = apply(_AddRMSNorm, x, None, weight, eps, *main_grads_of(weight))
    return y, total
