"""A block and its two branches, each one autograd function: ``branch(norm(x + residual))`` and the sum itself.

The same kernels as one by one, with the same results; but autograd walks one node where there were four or five,
parameters with a ``main_grad`` get their gradients there without autograd's help, and what the backward can make
again is not kept. Numbers that the backward finds per token and channel, by what is recomputed:

             none                                        cheap: norms, GELU         block: all that is not
    attention sum, norm(sum), q, k, v, attended   6      sum, q, k, v, attended 5   sum                  1
    MLP       sum, norm(sum), hidden (4), gelu (4) 10    sum, hidden (4)        5   nothing              0

``cheap`` costs a pass over the memory for each norm and GELU, ``block`` the forward but for its last product, a
quarter of the step. Dropout on a branch's result keeps another byte of each, its mask.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt import kernels
from fastgpt.kernels import autocast, ops
from fastgpt.kernels.attention import draw_seed, scale_or_default
from fastgpt.kernels.autograd import apply, first_order
from fastgpt.kernels.layer_norm import backward as layer_norm_backward
from fastgpt.kernels.main_grad import HandedOn, for_autograd, handed_on_with, main_grads_of, tied, to_hand_on
from fastgpt.kernels.matmul import matmul_into, weight_and_bias_gradient

RECOMPUTE = ("none", "cheap", "block")


def available(x: Tensor) -> bool:
    """Whether the branches can stand in for their parts: a compiler has to see these, and so has autocast."""
    return not torch.compiler.is_compiling() and not autocast.enabled(x.device.type)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``F.dropout``, by which in bf16 too the mean is kept: PyTorch rounds 1 / (1 - p) to bf16 on a CPU."""
    return _Dropout.apply(x, _draw_mask(x, p), p) if training and p else x


class Options(NamedTuple):
    """What a branch needs to know besides tensors.

    Attributes:
        eps: the norm's.
        keep: whether what a pass over memory could make again is kept instead.
        n_head: number of heads.
        dropout_p: probability of dropping an attention weight.
        deterministic: whether attention's gradient must be the same to the bit each time.
    """

    eps: float
    keep: bool
    n_head: int = 1
    dropout_p: float = 0.0
    deterministic: bool = True


def attention(
    x: Tensor, residual: Tensor | None, norm: kernels.LayerNorm, qkv: kernels.Linear, projection: kernels.Linear,
    n_head: int, dropout_p: float, keep: bool = False, deterministic: bool = True,
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
        keep: keep the norm's result for the backward instead of making it again.
        deterministic: as :func:`kernels.attention_qkv` takes it.

    Returns:
        What the branch adds, ``(B, T, C)``, and ``x + residual``.
    """
    parameters = _parameters(norm, qkv, projection)
    options = Options(norm.eps, keep, n_head, dropout_p, deterministic)
    seed = draw_seed(dropout_p, x.device)
    links = _links(x, residual, projection)
    out, total = apply(_Attention, x, residual, *parameters, main_grads_of(*parameters), options, seed, *links)
    return tied(out, links[1]), total


def mlp(
    x: Tensor, residual: Tensor | None, norm: kernels.LayerNorm, fc: kernels.Linear, projection: kernels.Linear,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two linear layers with a GELU between them, on the norm of ``x + residual``.

    Args:
        x: ``(B, T, C)``.
        residual: ``(B, T, C)`` or ``None``.
        norm: over C; of it and the layers the parameters are read.
        fc: C to the hidden width.
        projection: the hidden width to C.
        keep: keep the norm's and GELU's results for the backward instead of making them again.

    Returns:
        What the branch adds, ``(B, T, C)``, and ``x + residual``.
    """
    parameters = _parameters(norm, fc, projection)
    links = _links(x, residual, projection)
    out, total = apply(_MLP, x, residual, *parameters, main_grads_of(*parameters), Options(norm.eps, keep), *links)
    return tied(out, links[1]), total


def block(
    x: Tensor, residual: Tensor | None, attention_layers: tuple[kernels.LayerNorm, kernels.Linear, kernels.Linear],
    mlp_layers: tuple[kernels.LayerNorm, kernels.Linear, kernels.Linear], n_head: int, dropout_p: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both branches one after the other, of which only ``x + residual`` is kept.

    Args:
        x: ``(B, T, C)``.
        residual: ``(B, T, C)`` or ``None``.
        attention_layers: as :func:`attention` takes them.
        mlp_layers: as :func:`mlp` takes them.
        n_head: number of heads; divides C.
        dropout_p: probability of dropping an attention weight, and a number that a branch adds.
        deterministic: as :func:`kernels.attention_qkv` takes it.

    Returns:
        What the MLP adds, ``(B, T, C)``, and the sum before it.
    """
    parameters = (*_parameters(*attention_layers), *_parameters(*mlp_layers))
    attention_options = Options(attention_layers[0].eps, True, n_head, dropout_p, deterministic)
    options = attention_options, Options(mlp_layers[0].eps, True)
    seed = draw_seed(dropout_p, x.device)
    before, own = _links(x, residual, mlp_layers[2])
    own = None if dropout_p else own  # what is dropped is dropped inside
    out, total = apply(_Block, x, residual, *parameters, main_grads_of(*parameters), *options, seed, before, own)
    return tied(out, own), total


# ---- what the functions are made of. Six parameters a branch: of the norm, of the layer in and of the one out ----

Parameters = tuple[Any, ...]  # each a tensor or None
Saved = tuple[Any, ...]


def _parameters(norm: kernels.LayerNorm, inner: kernels.Linear, outer: kernels.Linear) -> Parameters:
    return norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias


def _links(x: Tensor, residual: Tensor | None, projection: kernels.Linear) -> tuple[HandedOn | None, HandedOn | None]:
    """What was handed on with ``x``, for a norm of ``x + residual``; and what to hand on with this branch's result."""
    return None if residual is None else handed_on_with(x), to_hand_on(projection.bias)


def _attention_forward(
    x: Tensor, residual: Tensor | None, parameters: Parameters, options: Options, seed: Tensor | None
) -> tuple[Tensor, Tensor, Saved]:
    """The branch's result, the sum, and what the backward needs besides parameters and seed."""
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = parameters
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, norm_weight, norm_bias, options.eps)
    qkv = _product(y.view(B * T, C), qkv_weight.T, qkv_bias).view(B, T, 3 * C)
    attended, lse = ops.resolve("attention_qkv", x)(qkv, *_head_options(qkv, options), seed)
    out = _product(attended.view(B * T, C), proj_weight.T, proj_bias).view(B, T, C)
    return out, total, (total, mean, rstd, y if options.keep else None, qkv, attended, lse)


def _attention_backward(
    dout: Tensor, dtotal: Tensor | None, saved: Saved, parameters: Parameters, main_grads: Parameters,
    options: Options, seed: Tensor | None, needed: tuple[bool, ...], before: HandedOn | None, own: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of the sum and of the six parameters."""
    norm_weight, norm_bias, qkv_weight, _, proj_weight, _ = parameters
    total, mean, rstd, kept, qkv, attended, lse = saved
    B, T, C = total.shape
    needs_dbias = needed[5] and not (own is not None and own.settle(dout))
    dout = dout.reshape(B * T, C)
    dproj = weight_and_bias_gradient(dout, attended.view(B * T, C), proj_weight, main_grads[4:], needed[4], needs_dbias)
    dattended = _product(dout, proj_weight).view(B, T, C)
    dqkv = ops.resolve("attention_qkv_backward", qkv)(
        dattended, qkv, attended, lse, *_head_options(qkv, options), seed, options.deterministic
    )
    dqkv = dqkv.view(B * T, 3 * C)
    y, spare = _normalised(total, kept, norm_weight, norm_bias, options.eps)
    dinner = weight_and_bias_gradient(dqkv, y, qkv_weight, main_grads[2:4], *needed[2:4])
    dy = _product(dqkv, qkv_weight, into=spare).view(B, T, C)
    norm = layer_norm_backward(dy, dtotal, total, norm_weight, mean, rstd, main_grads[:2], needed[1], before)
    return *norm, *dinner, *dproj


def _mlp_forward(
    x: Tensor, residual: Tensor | None, parameters: Parameters, options: Options, *, with_result: bool = True
) -> tuple[Any, Tensor, Saved]:
    """The branch's result if it is asked for, the sum, and what the backward needs besides parameters."""
    norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias = parameters
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, norm_weight, norm_bias, options.eps)
    hidden = _product(y.view(B * T, C), fc_weight.T)
    out = activated = None
    if with_result:
        activated = ops.resolve("gelu", x)(hidden, fc_bias, True)
        out = _product(activated, proj_weight.T, proj_bias).view(B, T, C)
    return out, total, (total, mean, rstd, *((y, activated) if options.keep else (None, None)), hidden)


def _mlp_backward(
    dout: Tensor, dtotal: Tensor | None, saved: Saved, parameters: Parameters, main_grads: Parameters,
    options: Options, needed: tuple[bool, ...], before: HandedOn | None, own: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of the sum and of the six parameters."""
    norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, _ = parameters
    total, mean, rstd, kept, activated, hidden = saved
    B, T, C = total.shape
    needs_dbias = needed[5] and not (own is not None and own.settle(dout))
    dout = dout.reshape(B * T, C)
    dhidden = _product(dout, proj_weight)  # of what GELU returned, until the next lines
    if activated is None:
        activated, dfc_bias = ops.resolve("gelu_again_backward_", hidden)(dhidden, hidden, fc_bias, True, main_grads[3])
    else:
        dhidden, dfc_bias = ops.resolve("gelu_backward", hidden)(dhidden, hidden, fc_bias, True, main_grads[3])
    dproj = weight_and_bias_gradient(dout, activated, proj_weight, main_grads[4:], needed[4], needs_dbias)
    y, spare = _normalised(total, kept, norm_weight, norm_bias, options.eps)
    dfc_weight, _ = weight_and_bias_gradient(dhidden, y, fc_weight, main_grads[2:4], needed[2], False)
    dy = _product(dhidden, fc_weight, into=spare).view(B, T, C)
    norm = layer_norm_backward(dy, dtotal, total, norm_weight, mean, rstd, main_grads[:2], needed[1], before)
    return *norm, dfc_weight, *for_autograd([dfc_bias], main_grads[3:4]), *dproj


def _head_options(qkv: Tensor, options: Options) -> tuple[int, bool, float, float]:
    """Number of heads, causal, scale and dropout, as the operators take them."""
    scale = scale_or_default(None, qkv.shape[-1] // 3 // options.n_head)
    return options.n_head, True, scale, options.dropout_p


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of the sum, the sum, and the norm's mean and reciprocal standard deviation."""
    if residual is not None:
        return ops.resolve("add_layer_norm", x)(x, residual, weight, bias, eps)
    y, mean, rstd = ops.resolve("layer_norm", x)(x, weight, bias, eps)
    return y, x, mean, rstd


def _normalised(
    total: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The norm's result as rows, kept or made again; and once more as memory free to use, if it was made here."""
    y = (_normalise(total, None, weight, bias, eps)[0] if kept is None else kept).view(-1, total.shape[-1])
    return y, y if kept is None else None


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """``x @ matrix + bias``, in memory that is no longer needed if there is some."""
    return matmul_into(x.new_empty(x.shape[0], matrix.shape[1]) if into is None else into, x, matrix, bias)


def _draw_mask(x: Tensor, dropout_p: float) -> Tensor | None:
    """One byte an element, 1 where it stays; ``None`` where all do."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p) if dropout_p else None


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """What stays of ``x``, larger for what goes; and its own derivative."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - dropout_p))


# ---- the functions ----


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dropout_p = dropout_p
        return _dropped(x, mask, dropout_p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _dropped(grads[0], mask, ctx.dropout_p), None, None


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        parameters, (ctx.main_grads, ctx.branch_options, seed, *ctx.links) = rest[:6], rest[6:]
        out, total, saved = _attention_forward(x, residual, parameters, ctx.branch_options, seed)
        ctx.save_for_backward(seed, *parameters, *saved)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        seed, *tensors = ctx.saved_tensors
        dx, *gradients = _attention_backward(
            dout, dtotal, tuple(tensors[6:]), tuple(tensors[:6]), ctx.main_grads, ctx.branch_options, seed,
            ctx.needs_input_grad[2:8], *ctx.links,
        )  # fmt: skip
        return dx, dx, *gradients


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor | None, Tensor]:
        parameters, (ctx.main_grads, ctx.branch_options, *ctx.links) = rest[:6], rest[6:]
        out, total, saved = _mlp_forward(x, residual, parameters, ctx.branch_options)
        ctx.save_for_backward(*parameters, *saved)
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @first_order("mlp")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        tensors = ctx.saved_tensors
        dx, *gradients = _mlp_backward(
            dout, dtotal, tensors[6:], tensors[:6], ctx.main_grads, ctx.branch_options, ctx.needs_input_grad[2:8],
            *ctx.links,
        )  # fmt: skip
        return dx, dx, *gradients


class _Block(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor | None, Tensor]:
        parameters, (ctx.main_grads, *ctx.branch_options, seed, ctx.before, ctx.own) = rest[:12], rest[12:]
        attention_options, mlp_options = ctx.branch_options
        p = attention_options.dropout_p
        added, total = _attention_forward(x, residual, parameters[:6], attention_options, seed)[:2]
        attention_mask = _draw_mask(added, p)
        added = _dropped(added, attention_mask, p)
        out, mlp_total = _mlp_forward(added, total, parameters[6:], mlp_options)[:2]
        mlp_mask = _draw_mask(out, p)
        out = _dropped(out, mlp_mask, p)
        ctx.save_for_backward(seed, total, attention_mask, mlp_mask, *parameters)
        ctx.set_materialize_grads(False)
        return out, mlp_total

    @staticmethod
    @first_order("block")
    def backward(ctx: Any, dout: Tensor | None, dmlp_total: Any) -> Any:
        seed, total, attention_mask, mlp_mask, *parameters = ctx.saved_tensors
        attention_parameters, mlp_parameters = tuple(parameters[:6]), tuple(parameters[6:])
        attention_options, mlp_options = ctx.branch_options
        p, needed = attention_options.dropout_p, ctx.needs_input_grad[2:14]
        added, _, attention_saved = _attention_forward(total, None, attention_parameters, attention_options, seed)
        added = _dropped(added, attention_mask, p)
        # the attention's bias, whose gradient the MLP's norm sums
        between = None if attention_mask is not None or ctx.main_grads[5] is None else HandedOn(ctx.main_grads[5])
        dadded, mlp_gradients = dmlp_total, [None] * 6
        if dout is not None:
            _, _, mlp_saved = _mlp_forward(added, total, mlp_parameters, mlp_options, with_result=False)
            del added
            dadded, *mlp_gradients = _mlp_backward(
                _dropped(dout, mlp_mask, p), dmlp_total, mlp_saved, mlp_parameters, ctx.main_grads[6:], mlp_options,
                needed[6:], between, ctx.own,
            )  # fmt: skip
            del mlp_saved
        dx, *gradients = _attention_backward(
            _dropped(dadded, attention_mask, p), dadded, attention_saved,
            attention_parameters, ctx.main_grads[:6], attention_options, seed, needed[:6], ctx.before, between,
        )  # fmt: skip
        return dx, dx, *gradients, *mlp_gradients
