"""Linear layer and embedding that accumulate their weight gradients in place (see ``main_grad.py``)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastgpt.kernels.main_grad import add_product, main_grad_of


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.has_bias = main_grad, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        add_product(ctx.main_grad, rows.T, x.reshape(-1, x.shape[-1]))
        dx = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.has_bias else None, None


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.main_grad = main_grad
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]).to(ctx.main_grad.dtype)
        ctx.main_grad.index_add_(0, index.reshape(-1), rows)
        return None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``F.linear``, its weight gradient added into ``weight.main_grad`` if there is one.

    Args:
        x: ``(..., C_in)``.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)`` or ``None``; its gradient always goes through autograd.

    Returns:
        ``(..., C_out)``.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, main_grad)


def embedding(index: Tensor, weight: Tensor) -> Tensor:
    """``weight[index]``: ``F.embedding``, its gradient added into ``weight.main_grad`` if there is one.

    Args:
        index: int64 of any shape, values in ``[0, V)``.
        weight: ``(V, C)``.

    Returns:
        ``(*index.shape, C)``.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return F.embedding(index, weight)
    return _Embedding.apply(index, weight, main_grad)
