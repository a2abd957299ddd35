"""A block as one autograd function, or as one for each of its two branches.

A branch is attention or the MLP behind its norm: ``branch(norm(x + residual))``, and the sum ``x + residual`` itself.
``gpt.py`` says what a block computes. This file computes the same with the same kernels, to the same bits, but:

- autograd walks one node where there were four or five;
- a parameter with a ``main_grad`` gets its gradient there, without autograd's help;
- what the backward can compute again need not be kept.

:func:`block` runs in training and evaluation. With a KV cache, under autocast and under ``torch.compile``, which has to
see the parts, the text of ``gpt.py`` runs (:func:`available`).

Numbers that the backward finds in memory per token and channel, by what is recomputed:

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
from fastgpt.kernels import autocast, dispatch
from fastgpt.kernels.attention import draw_seed, scale_or_default
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.layer_norm import backward as layer_norm_backward
from fastgpt.kernels.main_grad import HandedOn, for_autograd, handed_on_with, main_grads_of, tied, to_hand_on
from fastgpt.kernels.matmul import matmul_into, weight_and_bias_gradient

RECOMPUTE = ("none", "cheap", "block")


def available(x: Tensor) -> bool:
    """Whether :func:`block` can stand in for the text of ``gpt.py``: not under a compiler, nor under autocast."""
    return not torch.compiler.is_compiling() and not autocast.enabled(x.device.type)


def block(layer: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``layer.forward``: attention and MLP, each behind its norm.

    Args:
        layer: a ``gpt.Block``, whose parameters and options are read, ``recompute`` among them.
        x: ``(B, T, C)``, what the last branch adds.
        residual: ``(B, T, C)``, the sum before it; ``None`` at the first block.

    Returns:
        What the MLP adds, ``(B, T, C)``, and the sum before it.
    """
    attn, p = layer.attn, layer.attn.dropout if layer.training else 0.0
    keep = layer.recompute == "none"
    attention = AttentionOptions(layer.ln_1.eps, keep, attn.n_head, p, attn.deterministic)
    mlp = MLPOptions(layer.ln_2.eps, keep)
    attention_parameters = BranchParameters.of(layer.ln_1, attn.c_attn, attn.c_proj)
    mlp_parameters = BranchParameters.of(layer.ln_2, layer.mlp.c_fc, layer.mlp.c_proj)
    seed = draw_seed(p, x.device)

    if layer.recompute == "block":
        parameters = (*attention_parameters, *mlp_parameters)
        before, own = _links(x, residual, layer.mlp.c_proj.bias)
        own = None if p else own  # dropout is inside the function, between the projection and its result
        out, total = apply(
            _Block, x, residual, *parameters, main_grads_of(*parameters), attention, mlp, seed, before, own
        )
        return tied(out, own), total

    before, own = _links(x, residual, attn.c_proj.bias)
    grads = main_grads_of(*attention_parameters)
    x, residual = apply(_Attention, x, residual, *attention_parameters, grads, attention, seed, before, own)
    x = dropout(tied(x, own), p, layer.training)

    before, own = _links(x, residual, layer.mlp.c_proj.bias)
    grads = main_grads_of(*mlp_parameters)
    x, residual = apply(_MLP, x, residual, *mlp_parameters, grads, mlp, before, own)
    return dropout(tied(x, own), p, layer.training), residual


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``F.dropout`` that keeps the mean in bf16 too, where PyTorch rounds 1 / (1 - p) to bf16 on a CPU."""
    return _Dropout.apply(x, _draw_mask(x, p), p) if training and p else x


# ---- what passes between a branch's forward and its backward ----


class BranchParameters(NamedTuple):
    """The parameters of a norm and two linear layers."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor | None  # (C,)
    in_weight: Tensor  # (3C, C) of q, k, v, or (4C, C) of the MLP
    in_bias: Tensor | None
    out_weight: Tensor  # (C, C) or (C, 4C)
    out_bias: Tensor | None  # (C,)

    @classmethod
    def of(cls, norm: kernels.LayerNorm, inner: kernels.Linear, outer: kernels.Linear) -> "BranchParameters":
        return cls(norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias)


class BranchMainGrads(NamedTuple):
    """Their ``main_grad``s, fp32, ``None`` where autograd is to get the gradient."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    in_weight: Tensor | None
    in_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None


N_PARAMETERS = len(BranchParameters._fields)


class AttentionOptions(NamedTuple):
    """``eps`` of the norm; whether its result is kept; the rest as :func:`kernels.attention_qkv` takes it."""

    eps: float
    keep: bool
    n_head: int
    dropout_p: float
    deterministic: bool

    def of_operator(self, C: int) -> tuple[int, bool, float, float]:
        """Number of heads, causal, scale and dropout, as the operators take them."""
        return self.n_head, True, scale_or_default(None, C // self.n_head), self.dropout_p


class MLPOptions(NamedTuple):
    """``eps`` of the norm; whether its result and GELU's are kept."""

    eps: float
    keep: bool


class AttentionSaved(NamedTuple):
    """What attention's backward reads besides parameters and seed."""

    total: Tensor  # (B, T, C), the sum that the norm read
    mean: Tensor  # (B, T) fp32
    rstd: Tensor  # (B, T) fp32
    normed: Tensor | None  # (B, T, C), if it is kept
    qkv: Tensor  # (B, T, 3C)
    attended: Tensor  # (B, T, C)
    lse: Tensor  # (B, H, T) fp32


class MLPSaved(NamedTuple):
    """What the MLP's backward reads besides parameters."""

    total: Tensor  # (B, T, C)
    mean: Tensor  # (B, T) fp32
    rstd: Tensor  # (B, T) fp32
    normed: Tensor | None  # (B, T, C), if it is kept
    activated: Tensor | None  # (B T, 4C), GELU's result, if it is kept
    hidden: Tensor  # (B T, 4C), before GELU and its bias


# ---- forward and backward of a branch ----


def _attention_forward(
    x: Tensor, residual: Tensor | None, parameters: BranchParameters, options: AttentionOptions, seed: Tensor | None
) -> tuple[Tensor, AttentionSaved]:
    """The branch's result, ``(B, T, C)``."""
    w = parameters
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, w.norm_weight, w.norm_bias, options.eps)
    qkv = _product(y.view(B * T, C), w.in_weight.T, w.in_bias).view(B, T, 3 * C)
    attended, lse = dispatch.resolve("attention_qkv", x)(qkv, *options.of_operator(C), seed)
    out = _product(attended.view(B * T, C), w.out_weight.T, w.out_bias).view(B, T, C)
    return out, AttentionSaved(total, mean, rstd, y if options.keep else None, qkv, attended, lse)


def _attention_backward(
    dout: Tensor, dtotal: Tensor | None, saved: AttentionSaved, parameters: BranchParameters,
    main_grads: BranchMainGrads, options: AttentionOptions, seed: Tensor | None, needed: tuple[bool, ...],
    before: HandedOn | None, own: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of the sum and of the six parameters, last layer first."""
    w, s = parameters, saved
    B, T, C = s.total.shape
    needs_dbias = needed[5] and not (own is not None and own.settle(dout))
    dout = dout.reshape(B * T, C)
    attended = s.attended.view(B * T, C)
    dproj = weight_and_bias_gradient(dout, attended, w.out_weight, main_grads[4:], needed[4], needs_dbias)
    dattended = _product(dout, w.out_weight).view(B, T, C)
    dqkv = dispatch.resolve("attention_qkv_backward", s.qkv)(
        dattended, s.qkv, s.attended, s.lse, *options.of_operator(C), seed, options.deterministic
    )
    dqkv = dqkv.view(B * T, 3 * C)
    y, spare = _normalised(s.total, s.normed, w.norm_weight, w.norm_bias, options.eps)
    dinner = weight_and_bias_gradient(dqkv, y, w.in_weight, main_grads[2:4], *needed[2:4])
    dy = _product(dqkv, w.in_weight, into=spare).view(B, T, C)
    norm = layer_norm_backward(dy, dtotal, s.total, w.norm_weight, s.mean, s.rstd, main_grads[:2], needed[1], before)
    return *norm, *dinner, *dproj


def _mlp_forward(
    x: Tensor, residual: Tensor | None, parameters: BranchParameters, options: MLPOptions, *, with_result: bool = True
) -> tuple[Any, MLPSaved]:
    """The branch's result, ``(B, T, C)``, if it is asked for."""
    w = parameters
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, w.norm_weight, w.norm_bias, options.eps)
    hidden = _product(y.view(B * T, C), w.in_weight.T)
    out = activated = None
    if with_result:
        activated = dispatch.resolve("gelu", x)(hidden, w.in_bias, True)
        out = _product(activated, w.out_weight.T, w.out_bias).view(B, T, C)
    keep = options.keep
    return out, MLPSaved(total, mean, rstd, y if keep else None, activated if keep else None, hidden)


def _mlp_backward(
    dout: Tensor, dtotal: Tensor | None, saved: MLPSaved, parameters: BranchParameters, main_grads: BranchMainGrads,
    options: MLPOptions, needed: tuple[bool, ...], before: HandedOn | None, own: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of the sum and of the six parameters, last layer first."""
    w, s = parameters, saved
    B, T, C = s.total.shape
    needs_dbias = needed[5] and not (own is not None and own.settle(dout))
    dout = dout.reshape(B * T, C)
    dhidden = _product(dout, w.out_weight)  # of what GELU returned, until the next lines
    activated, in_bias_main_grad = s.activated, main_grads.in_bias
    if activated is None:
        again = dispatch.resolve("gelu_backward_recompute_", s.hidden)
        activated, dfc_bias = again(dhidden, s.hidden, w.in_bias, True, in_bias_main_grad)
    else:
        backward = dispatch.resolve("gelu_backward", s.hidden)
        dhidden, dfc_bias = backward(dhidden, s.hidden, w.in_bias, True, in_bias_main_grad)
    dproj = weight_and_bias_gradient(dout, activated, w.out_weight, main_grads[4:], needed[4], needs_dbias)
    y, spare = _normalised(s.total, s.normed, w.norm_weight, w.norm_bias, options.eps)
    dfc_weight, _ = weight_and_bias_gradient(dhidden, y, w.in_weight, main_grads[2:4], needed[2], False)
    dy = _product(dhidden, w.in_weight, into=spare).view(B, T, C)
    norm = layer_norm_backward(dy, dtotal, s.total, w.norm_weight, s.mean, s.rstd, main_grads[:2], needed[1], before)
    return *norm, dfc_weight, *for_autograd([dfc_bias], [in_bias_main_grad]), *dproj


# ---- what both are made of ----


def _links(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[HandedOn | None, HandedOn | None]:
    """What was handed on with ``x``, for a norm of ``x + residual``; and what to hand on with this branch's result.

    ``bias`` is that of the branch's last layer.
    """
    return None if residual is None else handed_on_with(x), to_hand_on(bias)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of the sum, the sum, and the norm's mean and reciprocal standard deviation."""
    if residual is not None:
        return dispatch.resolve("add_layer_norm", x)(x, residual, weight, bias, eps)
    y, mean, rstd = dispatch.resolve("layer_norm", x)(x, weight, bias, eps)
    return y, x, mean, rstd


def _normalised(
    total: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """The norm's result as rows, kept or computed again; and once more as memory free to use, if it was made here."""
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


# ---- the autograd functions; their inputs are x, residual, the parameters, and what needs no gradient ----


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
        parameters, rest = BranchParameters(*rest[:N_PARAMETERS]), rest[N_PARAMETERS:]
        main_grads, ctx.branch_options, seed, *ctx.links = rest
        ctx.main_grads = BranchMainGrads(*main_grads)
        out, saved = _attention_forward(x, residual, parameters, ctx.branch_options, seed)
        ctx.save_for_backward(seed, *parameters, *saved)
        ctx.set_materialize_grads(False)
        return out, saved.total

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        seed, *tensors = ctx.saved_tensors
        parameters, saved = BranchParameters(*tensors[:N_PARAMETERS]), AttentionSaved(*tensors[N_PARAMETERS:])
        dx, *gradients = _attention_backward(
            dout, dtotal, saved, parameters, ctx.main_grads, ctx.branch_options, seed, ctx.needs_input_grad[2:],
            *ctx.links,
        )  # fmt: skip
        return dx, dx, *gradients


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        parameters, rest = BranchParameters(*rest[:N_PARAMETERS]), rest[N_PARAMETERS:]
        main_grads, ctx.branch_options, *ctx.links = rest
        ctx.main_grads = BranchMainGrads(*main_grads)
        out, saved = _mlp_forward(x, residual, parameters, ctx.branch_options)
        ctx.save_for_backward(*parameters, *saved)
        ctx.set_materialize_grads(False)
        return out, saved.total

    @staticmethod
    @once_differentiable("mlp")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        tensors = ctx.saved_tensors
        parameters, saved = BranchParameters(*tensors[:N_PARAMETERS]), MLPSaved(*tensors[N_PARAMETERS:])
        dx, *gradients = _mlp_backward(
            dout, dtotal, saved, parameters, ctx.main_grads, ctx.branch_options, ctx.needs_input_grad[2:], *ctx.links
        )
        return dx, dx, *gradients


class _Block(Function):
    """Both branches, of which only the sum ``x + residual`` is kept: the backward runs the forward again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        attention, mlp = BranchParameters(*rest[:N_PARAMETERS]), BranchParameters(*rest[N_PARAMETERS:][:N_PARAMETERS])
        ctx.main_grads, *ctx.branch_options, seed, ctx.before, ctx.own = rest[2 * N_PARAMETERS :]
        attention_options, mlp_options = ctx.branch_options
        p = attention_options.dropout_p
        added, saved = _attention_forward(x, residual, attention, attention_options, seed)
        total = saved.total
        del saved
        attention_mask = _draw_mask(added, p)
        added = _dropped(added, attention_mask, p)
        out, mlp_saved = _mlp_forward(added, total, mlp, mlp_options)
        mlp_total = mlp_saved.total
        del mlp_saved
        mlp_mask = _draw_mask(out, p)
        out = _dropped(out, mlp_mask, p)
        ctx.save_for_backward(seed, total, attention_mask, mlp_mask, *attention, *mlp)
        ctx.set_materialize_grads(False)
        return out, mlp_total

    @staticmethod
    @once_differentiable("block")
    def backward(ctx: Any, dout: Tensor | None, dmlp_total: Any) -> Any:
        seed, total, attention_mask, mlp_mask, *parameters = ctx.saved_tensors
        attention, mlp = BranchParameters(*parameters[:N_PARAMETERS]), BranchParameters(*parameters[N_PARAMETERS:])
        attention_grads = BranchMainGrads(*ctx.main_grads[:N_PARAMETERS])
        mlp_grads = BranchMainGrads(*ctx.main_grads[N_PARAMETERS:])
        attention_options, mlp_options = ctx.branch_options
        p, needed = attention_options.dropout_p, ctx.needs_input_grad[2:]
        added, attention_saved = _attention_forward(total, None, attention, attention_options, seed)
        added = _dropped(added, attention_mask, p)
        # the attention's bias, whose gradient the MLP's norm sums
        bias_grad = attention_grads.out_bias
        between = None if attention_mask is not None or bias_grad is None else HandedOn(bias_grad)
        dadded, mlp_gradients = dmlp_total, [None] * N_PARAMETERS
        if dout is not None:
            _, mlp_saved = _mlp_forward(added, total, mlp, mlp_options, with_result=False)
            del added
            dadded, *mlp_gradients = _mlp_backward(
                _dropped(dout, mlp_mask, p), dmlp_total, mlp_saved, mlp, mlp_grads, mlp_options,
                needed[N_PARAMETERS:], between, ctx.own,
            )  # fmt: skip
            del mlp_saved
        dx, *gradients = _attention_backward(
            _dropped(dadded, attention_mask, p), dadded, attention_saved, attention, attention_grads,
            attention_options, seed, needed, ctx.before, between,
        )  # fmt: skip
        return dx, dx, *gradients, *mlp_gradients
