"""Layer norm, alone and fused with the residual add before it.

Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, distinct, once_differentiable
from fastgpt.kernels.main_grad import HandedOn, for_autograd, handed_on_with, main_grads_of


class _LayerNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *main_grads: Tensor | None) -> Any:
        return dispatch.resolve("layer_norm", x)(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, _, *ctx.main_grads = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return ()
        x, weight, mean, rstd = ctx.saved_tensors
        return backward(dy, None, x, weight, mean, rstd, ctx.main_grads, ctx.needs_input_grad[2])


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, before: HandedOn | None,
        *main_grads: Tensor | None,
    ) -> Any:  # fmt: skip
        if residual is None:
            y, mean, rstd = dispatch.resolve("layer_norm", x)(x, weight, bias, eps)
            return y, x.view_as(x), mean, rstd
        return dispatch.resolve("add_layer_norm", x)(x, residual, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, _, _, ctx.before, *ctx.main_grads = inputs
        _, total, mean, rstd = output
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("add_layer_norm")
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return dsum, dsum
        total, weight, mean, rstd = ctx.saved_tensors
        needs_dbias = ctx.needs_input_grad[3]
        dx, *gradients = backward(dy, dsum, total, weight, mean, rstd, ctx.main_grads, needs_dbias, ctx.before)
        return dx, dx, *gradients


def backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    main_grads: Sequence[Tensor | None], needs_dbias: bool, before: HandedOn | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of ``x``, the weight and the bias; ``None`` for one that was added to its ``main_grad``.

    Args:
        dy: ``(..., C)``, the gradient of the norm's result.
        dsum: ``(..., C)``, a further gradient of ``x``, or ``None``.
        x: ``(..., C)``, the normalised tensor.
        weight: ``(C,)``.
        mean: ``(...)`` fp32, of each row.
        rstd: ``(...)`` fp32, the reciprocal standard deviation of each row.
        main_grads: those of the weight and the bias, ``(C,)`` fp32 or ``None``.
        needs_dbias: whether there is a bias that needs its gradient.
        before: what the summand of ``x`` carries whose gradient ``dx`` is (see ``main_grad.py``), or ``None``.
    """
    sums = (*main_grads, None if before is None else before.main_grad)
    dx, *gradients = dispatch.resolve("layer_norm_backward", x)(dy, dsum, x, weight, mean, rstd, needs_dbias, *sums)
    if before is not None:
        before.note(dx)
    return dx, *for_autograd(gradients, main_grads)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    checks.epsilon(eps)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got {tuple(x.shape)}")
    checks.same("x", x=x, weight=weight, bias=bias)
    checks.shape("weight", weight, (x.shape[-1],))
    if bias is not None:
        checks.shape("bias", bias, (x.shape[-1],))


def _or_ones(weight: Tensor | None, x: Tensor) -> Tensor:
    return x.new_ones(x.shape[-1:]) if weight is None else weight


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of ``x`` to mean 0 and variance 1, then scale and shift it.

    Statistics are computed in fp32. Two floats a row are kept for the backward.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        weight: ``(C,)``, dtype and device of ``x``; or ``None`` for ones.
        bias: ``(C,)`` or ``None``.
        eps: added to the variance; at least 0.

    Returns:
        ``(..., C)``, contiguous, dtype of ``x``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x)
    checks.floating_if_given(weight=weight, bias=bias)
    weight = _or_ones(weight, x)
    main_grads = main_grads_of(weight, bias)  # of the parameters themselves, before autocast casts them
    x, weight, bias = autocast.in_float32(x, weight, bias)
    _check(x, weight, bias, eps)
    return apply(_LayerNorm, x, weight, bias, eps, *main_grads)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return ``layer_norm(x + residual)`` and the sum itself, in one pass over memory.

    The backward adds the gradient that reaches the sum to the gradient that it returns, so the residual stream of a
    pre-norm transformer needs no pass of its own.

    Args:
        x: ``(..., C)``, any strides, fp32, bf16 or fp16.
        residual: shape, dtype and device of ``x``.
        weight: ``(C,)``, dtype and device of ``x``; or ``None`` for ones.
        bias: ``(C,)`` or ``None``.
        eps: added to the variance; at least 0.

    Returns:
        ``(y, sum)``, both contiguous ``(..., C)``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape, a device or ``eps`` does not fit.
    """
    checks.floating(x=x, residual=residual)
    checks.floating_if_given(weight=weight, bias=bias)
    weight = _or_ones(weight, x)
    main_grads = main_grads_of(weight, bias)
    x, residual, weight, bias = autocast.in_float32(x, residual, weight, bias)
    _check(x, weight, bias, eps)
    checks.same("x", x=x, residual=residual)
    checks.shape("residual", residual, tuple(x.shape))
    residual = distinct(residual, x)
    y, total, _, _ = apply(_AddLayerNorm, x, residual, weight, bias, eps, handed_on_with(x), *main_grads)
    return y, total


def layer_norm_and_input(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return ``layer_norm(x)`` and ``x`` itself, for the beginning of a residual stream.

    The backward adds both gradients in one pass, as in :func:`add_layer_norm`. Internal, without checks; the arguments
    are those of :func:`layer_norm`.
    """
    if torch.compiler.is_compiling() or autocast.enabled(x.device.type):
        return layer_norm(x, weight, bias, eps), x
    y, total, _, _ = apply(_AddLayerNorm, x, None, weight, bias, eps, None, *main_grads_of(weight, bias))
    return y, total
