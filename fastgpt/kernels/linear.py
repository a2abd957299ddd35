"""Linear layer and embedding, which accumulate gradients in place for a parameter with a ``main_grad``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.main_grad import HandedOn, main_grad_of, main_grads_of, tied, to_hand_on
from fastgpt.kernels.matmul import matmul_into, weight_and_bias_gradient
from fastgpt.kernels.torch_matmul import TILE_DEPTH, reads_past_rows


class _Linear(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, handed_on: HandedOn | None, *main_grads: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = matmul_into(x.new_empty(rows.shape[0], weight.shape[0]), rows, weight.T, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.handed_on, *ctx.main_grads = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = matmul_into(x.new_empty(x_rows.shape), rows, weight).view(x.shape)
        needs_dbias = ctx.needs_input_grad[2] and not (ctx.handed_on is not None and ctx.handed_on.settle(dy))
        needs_dweight = ctx.needs_input_grad[1]
        return dx, *weight_and_bias_gradient(rows, x_rows, weight, ctx.main_grads, needs_dweight, needs_dbias)


class _Embedding(Function):
    @staticmethod
    def forward(index: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        return F.embedding(index, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        index, _, ctx.main_grad = inputs
        ctx.save_for_backward(index)

    @staticmethod
    @once_differentiable("embedding")
    def backward(ctx: Any, dy: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dispatch.resolve("embedding_backward_", rows)(ctx.main_grad, rows, index.reshape(-1))
        return ()


class _AddPositions(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, start: int, main_grad: Tensor) -> Tensor:
        return x + weight[start : start + x.shape[-2]]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, start, main_grad = inputs
        ctx.main_grad = main_grad[start : start + x.shape[-2]]
        ctx.save_for_backward()

    @staticmethod
    @once_differentiable("add_positions")
    def backward(ctx: Any, dy: Tensor) -> Any:
        rows = dy.reshape(-1, ctx.main_grad.numel())
        dispatch.resolve("add_column_sums_", rows)(ctx.main_grad.view(-1), rows)
        return (dy,)


def _pytorch_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, on whole tiles if it would read past the rows of ``x``, or its backward past the rows of ``dy``."""
    if not (reads_past_rows(x) or reads_past_rows(weight.T)):
        return F.linear(x, weight, bias)
    (C_out, C_in), tile = weight.shape, TILE_DEPTH
    bias = None if bias is None else F.pad(bias, (0, -C_out % tile))
    y = F.linear(F.pad(x, (0, -C_in % tile)), F.pad(weight, (0, -C_in % tile, 0, -C_out % tile)), bias)
    return y[..., :C_out]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` like ``F.linear``; gradients are added to a parameter's ``main_grad``, if any.

    Args:
        x: ``(..., C_in)``, any strides.
        weight: ``(C_out, C_in)``, neither of them 0.
        bias: ``(C_out,)`` or ``None``.

    Returns:
        ``(..., C_out)``.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``x``.
        ValueError: a shape or a device does not fit.
    """
    checks.floating(x=x, weight=weight)
    checks.floating_if_given(bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected (C_out, C_in) with C_in that of x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],))
    if autocast.enabled(x.device.type) and torch.float64 not in (t.dtype for t in (x, weight, bias) if t is not None):
        checks.on_one_device("x", x=x, weight=weight, bias=bias)
        return _pytorch_linear(*autocast.in_autocast_dtype(x, weight, bias))
    checks.same("x", x=x, weight=weight, bias=bias)
    if torch.compiler.is_compiling():
        return _pytorch_linear(x, weight, bias)
    handed_on = to_hand_on(bias)
    return tied(apply(_Linear, x, weight, bias, handed_on, *main_grads_of(weight, bias)), handed_on)


def embedding(index: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight[index]`` like ``F.embedding``; the gradient is added to ``weight.main_grad``, if any.

    Args:
        index: int64 or int32 of any shape, values in ``[0, V)``.
        weight: ``(V, C)``.

    Returns:
        ``(*index.shape, C)``.

    Raises:
        TypeError: ``index`` is not int64 or int32, or ``weight`` is not a floating-point tensor.
        ValueError: ``weight`` is not a matrix, or on another device than ``index``.
        IndexError: a value lies outside ``[0, V)`` (on a CPU).
    """
    checks.floating(weight=weight)
    if isinstance(index, Tensor) and index.dtype == torch.int32:
        index = index.long()
    checks.indices("index", index, weight.device)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected (V, C) with V > 0, got {tuple(weight.shape)}")
    main_grad = main_grad_of(weight)
    try:
        return F.embedding(index, weight) if main_grad is None else apply(_Embedding, index, weight, main_grad)
    except IndexError:
        raise IndexError(f"index: a value lies outside [0, {weight.shape[0]})") from None


def add_positions(x: Tensor, weight: Tensor, start: int) -> Tensor:
    """Return ``x + weight[start : start + T]``; the gradient of ``weight`` is added to its ``main_grad``, if any.

    Args:
        x: ``(..., T, C)``.
        weight: ``(block_size, C)``, dtype of ``x``.
        start: the position of the first token.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return x + weight[start : start + x.shape[-2]]
    return apply(_AddPositions, x, weight, start, main_grad)
