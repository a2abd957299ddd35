"""The two branches of a block, each one autograd function: ``branch(norm(x + residual))`` and the sum itself.

The same kernels as one by one, with the same results; but autograd walks one node where there were four or five,
and what the backward can make again in one pass is not kept. Floats that the backward finds per token and channel:

              kept                                                one by one
    attention sum, q, k, v, attended                5             and norm(sum)          6
    MLP       sum, hidden (4)                       5             norm(sum), gelu (4)   10

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt import kernels
from fastgpt.kernels import autocast, ops
from fastgpt.kernels.attention import draw_seed, scale_or_default
from fastgpt.kernels.autograd import apply, first_order
from fastgpt.kernels.main_grad import main_grad_of
from fastgpt.kernels.matmul import matmul_into, weight_and_bias_gradient


def available(x: Tensor) -> bool:
    """Whether the branches can stand in for their parts: a compiler has to see these, and so has autocast."""
    return not torch.compiler.is_compiling() and not autocast.enabled(x.device.type)


def attention(
    x: Tensor, residual: Tensor | None, norm: kernels.LayerNorm, qkv: kernels.Linear, projection: kernels.Linear,
    n_head: int, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal self-attention on the norm of ``x + residual``.

    Args:
        x: ``(B, T, C)``.
        residual: ``(B, T, C)`` or ``None``.
        norm: over C; of it and the layers the parameters are read.
        qkv: C to 3C.
        projection: C to C.
        n_head: number of heads; divides C.
        dropout_p: probability of dropping an attention weight.

    Returns:
        What the branch adds, ``(B, T, C)``, and ``x + residual``.
    """
    out, total = apply(
        _Attention, x, residual, norm.weight, norm.bias, qkv.weight, qkv.bias, projection.weight, projection.bias,
        main_grad_of(qkv.weight), main_grad_of(projection.weight), norm.eps, n_head, dropout_p,
        draw_seed(dropout_p, x.device),
    )  # fmt: skip
    return out, x if residual is None else total


def mlp(
    x: Tensor, residual: Tensor | None, norm: kernels.LayerNorm, fc: kernels.Linear, projection: kernels.Linear
) -> tuple[Tensor, Tensor]:
    """Two linear layers with a GELU between them, on the norm of ``x + residual``.

    Args:
        x: ``(B, T, C)``.
        residual: ``(B, T, C)`` or ``None``.
        norm: over C; of it and the layers the parameters are read.
        fc: C to the hidden width.
        projection: the hidden width to C.

    Returns:
        What the branch adds, ``(B, T, C)``, and ``x + residual``.
    """
    out, total = apply(
        _MLP, x, residual, norm.weight, norm.bias, fc.weight, fc.bias, projection.weight, projection.bias,
        main_grad_of(fc.weight), main_grad_of(projection.weight), norm.eps,
    )  # fmt: skip
    return out, x if residual is None else total


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, qkv_weight: Tensor,
        qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
        qkv_main_grad: Tensor | None, proj_main_grad: Tensor | None, eps: float, n_head: int, dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        B, T, C = x.shape
        y, total, mean, rstd = _normalise(x, residual, norm_weight, norm_bias, eps)
        qkv = _product(y.view(B * T, C), qkv_weight.T, qkv_bias).view(B, T, 3 * C)
        scale = scale_or_default(None, C // n_head)
        attended, lse = ops.resolve("attention_qkv", x)(qkv, n_head, True, scale, dropout_p, seed)
        ctx.save_for_backward(
            total, mean, rstd, qkv, attended, lse, seed, norm_weight, norm_bias, qkv_weight, proj_weight
        )
        ctx.options = n_head, True, scale, dropout_p
        ctx.eps, ctx.main_grads = eps, (qkv_main_grad, proj_main_grad)
        ctx.set_materialize_grads(False)
        out = _product(attended.view(B * T, C), proj_weight.T, proj_bias).view(B, T, C)
        return out, None if residual is None else total

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        total, mean, rstd, qkv, attended, lse, seed, norm_weight, norm_bias, qkv_weight, proj_weight = ctx.saved_tensors
        needed, (B, T, C) = ctx.needs_input_grad, total.shape
        dout = dout.reshape(B * T, C)
        dproj_weight, dproj_bias = weight_and_bias_gradient(
            dout, attended.view(B * T, C), proj_weight, ctx.main_grads[1], needed[6], needed[7]
        )
        dattended = _product(dout, proj_weight).view(B, T, C)
        dqkv = ops.resolve("attention_qkv_backward", qkv)(dattended, qkv, attended, lse, *ctx.options, seed)
        dqkv = dqkv.view(B * T, 3 * C)
        y = _normalise(total, None, norm_weight, norm_bias, ctx.eps)[0].view(B * T, C)
        dqkv_weight, dqkv_bias = weight_and_bias_gradient(dqkv, y, qkv_weight, ctx.main_grads[0], needed[4], needed[5])
        dx, dnorm_weight, dnorm_bias = ops.resolve("layer_norm_backward", total)(
            _product(dqkv, qkv_weight, into=y).view(B, T, C), dtotal, total, norm_weight, mean, rstd, needed[3]
        )
        return dx, dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dproj_weight, dproj_bias


class _MLP(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, fc_weight: Tensor,
        fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, fc_main_grad: Tensor | None,
        proj_main_grad: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        B, T, C = x.shape
        y, total, mean, rstd = _normalise(x, residual, norm_weight, norm_bias, eps)
        hidden = _product(y.view(B * T, C), fc_weight.T)
        activated = ops.resolve("gelu", x)(hidden, fc_bias, True)
        ctx.save_for_backward(total, mean, rstd, hidden, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight)
        ctx.eps, ctx.main_grads = eps, (fc_main_grad, proj_main_grad)
        ctx.set_materialize_grads(False)
        return _product(activated, proj_weight.T, proj_bias).view(B, T, C), None if residual is None else total

    @staticmethod
    @first_order("mlp")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        total, mean, rstd, hidden, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight = ctx.saved_tensors
        needed, (B, T, C) = ctx.needs_input_grad, total.shape
        dout = dout.reshape(B * T, C)
        dhidden = _product(dout, proj_weight)  # of what GELU returned, until the next line
        activated, dfc_bias = ops.resolve("gelu_again_backward_", hidden)(dhidden, hidden, fc_bias, True)
        dproj_weight, dproj_bias = weight_and_bias_gradient(
            dout, activated, proj_weight, ctx.main_grads[1], needed[6], needed[7]
        )
        y = _normalise(total, None, norm_weight, norm_bias, ctx.eps)[0].view(B * T, C)
        dfc_weight, _ = weight_and_bias_gradient(dhidden, y, fc_weight, ctx.main_grads[0], needed[4], False)
        dx, dnorm_weight, dnorm_bias = ops.resolve("layer_norm_backward", total)(
            _product(dhidden, fc_weight, into=y).view(B, T, C), dtotal, total, norm_weight, mean, rstd, needed[3]
        )
        return dx, dx, dnorm_weight, dnorm_bias, dfc_weight, dfc_bias, dproj_weight, dproj_bias


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of the sum, the sum, and the norm's mean and reciprocal standard deviation."""
    if residual is not None:
        return ops.resolve("add_layer_norm", x)(x, residual, weight, bias, eps)
    y, mean, rstd = ops.resolve("layer_norm", x)(x, weight, bias, eps)
    return y, x, mean, rstd


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """``x @ matrix + bias``, in memory that is no longer needed if there is some."""
    return matmul_into(x.new_empty(x.shape[0], matrix.shape[1]) if into is None else into, x, matrix, bias)
