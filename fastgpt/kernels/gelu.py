"""GELU. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.main_grad import for_autograd, main_grad_of


class _Gelu(Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None) -> Any:
        return dispatch.resolve("gelu", x)(x, bias, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, bias, ctx.tanh, ctx.bias_main_grad = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    @once_differentiable("gelu")
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        dx, dbias = dispatch.resolve("gelu_backward", x)(dy, x, bias, ctx.tanh, ctx.bias_main_grad)
        return dx, *for_autograd([dbias], [ctx.bias_main_grad])


def gelu(x: Tensor, approximate: str = "tanh", bias: Tensor | None = None) -> Tensor:
    """Return ``z * Phi(z)`` of ``z = x + bias``, where Phi is the standard normal distribution function.

    If a linear layer's bias is added here instead of in the layer, its gradient needs no pass of its own.

    Args:
        x: any shape and strides, fp32, bf16 or fp16.
        approximate: ``"tanh"`` for GPT-2's approximation, ``"none"`` for the exact (erf) form.
        bias: ``(C,)`` with C the last dimension of ``x``, dtype and device of ``x``, or ``None``.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: ``approximate`` has another value, or a shape or device does not fit.
    """
    checks.floating(x=x)
    checks.floating_if_given(bias=bias)
    bias_main_grad = None if bias is None else main_grad_of(bias)  # of the parameter itself, before autocast casts it
    if bias is not None and autocast.enabled(x.device.type) and torch.float64 not in (x.dtype, bias.dtype):
        bias = bias.to(x.dtype)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: expected 'tanh' or 'none', got {approximate!r}")
    if bias is not None:
        checks.same("x", x=x, bias=bias)
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"x: expected at least one dimension for a bias, the last not empty, got {tuple(x.shape)}")
        checks.shape("bias", bias, (x.shape[-1],))
    return apply(_Gelu, x, bias, approximate == "tanh", bias_main_grad)
