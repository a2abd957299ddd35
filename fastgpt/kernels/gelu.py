"""GELU. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016."""

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastgpt.kernels import checks, ops


class _Gelu(Function):
    @staticmethod
    def forward(x: Tensor, tanh: bool) -> Any:
        return ops.resolve("gelu", x)(x, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.tanh = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ops.resolve("gelu_backward", x)(dy, x, ctx.tanh), None


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """``x * Phi(x)``, Phi being the standard normal distribution function.

    Args:
        x: any shape and strides, fp32, bf16 or fp16.
        approximate: ``"tanh"`` for GPT-2's approximation, ``"none"`` for the exact (erf) form.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: ``approximate`` is neither of the two.
    """
    checks.floating(x=x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: expected 'tanh' or 'none', got {approximate!r}")
    return _Gelu.apply(x, approximate == "tanh")
