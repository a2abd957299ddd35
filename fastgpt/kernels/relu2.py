"""Squared ReLU. So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable


class _ReLU2(Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return dispatch.resolve("relu2", x)(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable("relu2")
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return (dispatch.resolve("relu2_backward", x)(dy, x),)


def relu2(x: Tensor) -> Tensor:
    """Return ``max(x, 0)**2``.

    Args:
        x: any shape and strides, fp32, bf16 or fp16.

    Returns:
        Shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: the dtype is not a float.
    """
    checks.floating(x=x)
    return apply(_ReLU2, x)
