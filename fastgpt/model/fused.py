"""A block as one autograd function, or as one for each of its two branches.

A branch is attention or the MLP behind its norm: ``branch(norm(x + residual))``, and the sum ``x + residual`` itself.
``gpt.py`` says what a block computes. This file computes the same with the same kernels, to the same bits, but:

- autograd walks one node where there were four or five;
- a parameter with a ``main_grad`` gets its gradient there, without autograd's help;
- what the backward can compute again need not be kept.

:func:`block` runs in training and evaluation. With a KV cache, under autocast and under ``torch.compile``, which has to
see the parts, the text of ``gpt.py`` runs (:func:`available`).

Numbers that the backward finds in memory per token and channel, by what is recomputed:

             none                                        cheap: norms, activation   block: all that is not
    attention sum, norm(sum), q, k, v, attended   6      sum, q, k, v, attended 5   sum                  1
    MLP       sum, norm(sum), hidden (4), gelu (4) 10    sum, hidden (4)        5   nothing              0

``cheap`` costs a pass over the memory for each norm and activation, ``block`` the forward but for its last product, a
quarter of the step. Dropout on a branch's result keeps another byte of each, its mask. Rotary positions, QK-norm and
value embeddings change q, k and v where they lie, and their gradients where those lie: nothing else is kept.

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
from fastgpt.kernels.ops import SILU
from fastgpt.kernels.rms_norm import backward as rms_norm_backward
from fastgpt.model.config import QK_NORM_EPS

RECOMPUTE = ("none", "cheap", "block")


def available(x: Tensor) -> bool:
    """Whether :func:`block` can stand in for the text of ``gpt.py``: not under a compiler, nor under autocast."""
    return not torch.compiler.is_compiling() and not autocast.enabled(x.device.type)


def block(
    layer: Any, x: Tensor, residual: Tensor | None, context: Any, value_embedding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``layer.forward``: attention and MLP, each behind its norm.

    Args:
        layer: a ``gpt.Block``, whose parameters and options are read, ``recompute`` among them.
        x: ``(B, T, C)``, what the last branch adds.
        residual: ``(B, T, C)``, the sum before it; ``None`` at the first block.
        context: a ``gpt.Context``.
        value_embedding: ``(B, T, n_kv_head D)``, added to the values, or ``None``.

    Returns:
        What the MLP adds, ``(B, T, C)``, and the sum before it.
    """
    attn, p = layer.attn, layer.attn.dropout if layer.training else 0.0
    keep, rms = layer.recompute == "none", isinstance(layer.ln_1, kernels.RMSNorm)
    attention = AttentionOptions(
        layer.ln_1.eps, rms, keep, attn.n_head, attn.n_kv_head or 0, attn.qk_norm, attn.window or 0, p,
        attn.deterministic,
    )  # fmt: skip
    mlp = MLPOptions(layer.ln_2.eps, rms, keep, layer.mlp.kind)
    attention_parameters = BranchParameters.of(layer.ln_1, attn.c_attn, attn.c_proj)
    mlp_parameters = BranchParameters.of(layer.ln_2, layer.mlp.c_fc, layer.mlp.c_proj)
    given = Given(draw_seed(p, x.device), *context)

    if layer.recompute == "block":
        parameters = (*attention_parameters, *mlp_parameters)
        before, own = _links(x, residual, layer.mlp.c_proj.bias)
        own = None if p else own  # dropout is inside the function, between the projection and its result
        out, total = apply(
            _Block, x, residual, value_embedding, *parameters, main_grads_of(*parameters), attention, mlp, given,
            before, own,
        )  # fmt: skip
        return tied(out, own), total

    before, own = _links(x, residual, attn.c_proj.bias)
    grads = main_grads_of(*attention_parameters)
    x, residual = apply(
        _Attention, x, residual, value_embedding, *attention_parameters, grads, attention, given, before, own
    )  # fmt: skip
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
    in_weight: Tensor  # (W, C) of q, k, v, in GPT-2 (3C, C); or (4C, C) of the MLP, or another width
    in_bias: Tensor | None
    out_weight: Tensor  # (C, C) or (C, 4C)
    out_bias: Tensor | None  # (C,)

    @classmethod
    def of(cls, norm: Any, inner: kernels.Linear, outer: kernels.Linear) -> "BranchParameters":
        return cls(norm.weight, getattr(norm, "bias", None), inner.weight, inner.bias, outer.weight, outer.bias)


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
    """``eps`` of the norm, whether it is an RMS norm, whether its result is kept; the rest as the operators take it.

    ``n_kv_head`` is 0 if it is ``n_head``, and ``window`` 0 if there is none.
    """

    eps: float
    rms: bool
    keep: bool
    n_head: int
    n_kv_head: int
    qk_norm: bool
    window: int
    dropout_p: float
    deterministic: bool

    def of_operator(self, C: int) -> tuple[int, bool, float, float]:
        """Number of heads, causal, scale and dropout, as the operators take them."""
        return self.n_head, True, scale_or_default(None, C // self.n_head), self.dropout_p

    def queries_and_keys(self, qkv: Tensor) -> Tensor:
        """Their heads in ``qkv``, (B, T, W): a view (B, T, n_head + n_kv_head, D)."""
        n_kv_head = self.n_kv_head or self.n_head
        return qkv.unflatten(2, (self.n_head + 2 * n_kv_head, -1))[:, :, : self.n_head + n_kv_head]

    def values(self, qkv: Tensor) -> Tensor:
        """Those in ``qkv``, (B, T, W): a view (B, T, n_kv_head D)."""
        n_kv_head = self.n_kv_head or self.n_head
        return qkv[..., -(qkv.shape[2] // (self.n_head + 2 * n_kv_head) * n_kv_head) :]


class MLPOptions(NamedTuple):
    """``eps`` of the norm, and whether it is an RMS norm; whether its result and the activation's are kept."""

    eps: float
    rms: bool
    keep: bool
    kind: str  # gelu, relu2 or swiglu


class Given(NamedTuple):
    """What attention is given besides its input: of dropout, rotary positions and documents, ``None`` without them."""

    seed: Tensor | None
    cos: Tensor | None  # (T, D / 2)
    sin: Tensor | None
    documents: Tensor | None  # (B, 2, T)


N_GIVEN = len(Given._fields)


class AttentionSaved(NamedTuple):
    """What attention's backward reads besides parameters and seed."""

    total: Tensor  # (B, T, C), the sum that the norm read
    mean: Tensor | None  # (B, T) fp32; an RMS norm has none
    rstd: Tensor  # (B, T) fp32
    normed: Tensor | None  # (B, T, C), if it is kept
    qkv: Tensor  # (B, T, W), as attention read it
    qk_rstd: Tensor | None  # (B, T, n_head + n_kv_head) fp32, of QK-norm
    attended: Tensor  # (B, T, C)
    lse: Tensor  # (B, H, T) fp32


class MLPSaved(NamedTuple):
    """What the MLP's backward reads besides parameters."""

    total: Tensor  # (B, T, C)
    mean: Tensor | None  # (B, T) fp32
    rstd: Tensor  # (B, T) fp32
    normed: Tensor | None  # (B, T, C), if it is kept
    activated: Tensor | None  # (B T, 4C), the activation's result, if it is kept
    hidden: Tensor  # (B T, 4C), before GELU and its bias; or what another activation reads


# ---- forward and backward of a branch ----


def _attention_forward(
    x: Tensor, residual: Tensor | None, value_embedding: Tensor | None, parameters: BranchParameters,
    options: AttentionOptions, given: Given,
) -> tuple[Tensor, AttentionSaved]:  # fmt: skip
    """The branch's result, ``(B, T, C)``."""
    w, o = parameters, options
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, w, o)
    qkv = _product(y.view(B * T, C), w.in_weight.T, w.in_bias).view(B, T, -1)
    if value_embedding is not None:
        o.values(qkv).add_(value_embedding)
    qk_rstd = None
    if o.qk_norm:
        qk_rstd = dispatch.resolve("rms_norm_rotary_", x)(
            o.queries_and_keys(qkv), given.cos, given.sin, QK_NORM_EPS, False
        )
    elif given.cos is not None:
        dispatch.resolve("rotary_", x)(o.queries_and_keys(qkv), given.cos, given.sin, False, False)
    attended, lse = dispatch.resolve("attention_qkv", x)(
        qkv, *o.of_operator(C), given.seed, o.n_kv_head, o.window, 0.0, given.documents
    )
    out = _product(attended.view(B * T, C), w.out_weight.T, w.out_bias).view(B, T, C)
    return out, AttentionSaved(total, mean, rstd, y if o.keep else None, qkv, qk_rstd, attended, lse)


def _attention_backward(
    dout: Tensor, dtotal: Tensor | None, saved: AttentionSaved, parameters: BranchParameters,
    main_grads: BranchMainGrads, options: AttentionOptions, given: Given, needed: tuple[bool, ...],
    before: HandedOn | None, own: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of the sum, the value embedding and the six parameters, last layer first.

    ``needed`` is about the value embedding and the parameters.
    """
    w, s, o = parameters, saved, options
    B, T, C = s.total.shape
    needs_dvalues, *needed = needed  # type: ignore[assignment]
    needs_dbias = needed[5] and not (own is not None and own.settle(dout))
    dout = dout.reshape(B * T, C)
    attended = s.attended.view(B * T, C)
    dproj = weight_and_bias_gradient(dout, attended, w.out_weight, main_grads[4:], needed[4], needs_dbias)
    dattended = _product(dout, w.out_weight).view(B, T, C)
    dqkv = dispatch.resolve("attention_qkv_backward", s.qkv)(
        dattended, s.qkv, s.attended, s.lse, *o.of_operator(C), given.seed, o.deterministic, o.n_kv_head, o.window, 0.0,
        given.documents,
    )  # fmt: skip
    if s.qk_rstd is not None:
        dispatch.resolve("rms_norm_rotary_backward_", dqkv)(
            o.queries_and_keys(dqkv), o.queries_and_keys(s.qkv), given.cos, given.sin, s.qk_rstd, False
        )
    elif given.cos is not None:
        dispatch.resolve("rotary_", dqkv)(o.queries_and_keys(dqkv), given.cos, given.sin, False, True)
    dvalues = o.values(dqkv) if needs_dvalues else None
    dqkv = dqkv.view(B * T, -1)
    y, spare = _normalised(s.total, s.normed, w, o)
    dinner = weight_and_bias_gradient(dqkv, y, w.in_weight, main_grads[2:4], *needed[2:4])
    dy = _product(dqkv, w.in_weight, into=spare).view(B, T, C)
    dx, *dnorm = _norm_backward(dy, dtotal, s, w, o, main_grads, needed[1], before)
    return dx, dvalues, *dnorm, *dinner, *dproj


def _mlp_forward(
    x: Tensor, residual: Tensor | None, parameters: BranchParameters, options: MLPOptions, *, with_result: bool = True
) -> tuple[Any, MLPSaved]:
    """The branch's result, ``(B, T, C)``, if it is asked for."""
    w = parameters
    B, T, C = x.shape
    y, total, mean, rstd = _normalise(x, residual, w, options)
    # GELU adds the bias itself
    hidden = _product(y.view(B * T, C), w.in_weight.T, None if options.kind == "gelu" else w.in_bias)
    out = activated = None
    if with_result:
        activated = _activate(hidden, w.in_bias, options.kind)
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
    dactivated = _product(dout, w.out_weight)
    dhidden, activated, dfc_bias = _activate_backward(dactivated, s, w.in_bias, options.kind, main_grads.in_bias)
    dproj = weight_and_bias_gradient(dout, activated, w.out_weight, main_grads[4:], needed[4], needs_dbias)
    y, spare = _normalised(s.total, s.normed, w, options)
    by_gelu = options.kind == "gelu"  # which has summed the bias's gradient
    dfc = weight_and_bias_gradient(dhidden, y, w.in_weight, main_grads[2:4], needed[2], needed[3] and not by_gelu)
    if by_gelu:
        dfc = dfc[0], *for_autograd([dfc_bias], [main_grads.in_bias])
    dy = _product(dhidden, w.in_weight, into=spare).view(B, T, C)
    return *_norm_backward(dy, dtotal, s, w, options, main_grads, needed[1], before), *dfc, *dproj


def _activate(hidden: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """(B T, 4C), or (B T, 8C) of gates and what they let through, to (B T, 4C)."""
    if kind == "gelu":
        return dispatch.resolve("gelu", hidden)(hidden, bias, True)
    if kind == "relu2":
        return dispatch.resolve("relu2", hidden)(hidden)
    return dispatch.resolve("glu", hidden)(*hidden.chunk(2, dim=1), SILU)


def _activate_backward(
    dactivated: Tensor, saved: MLPSaved, bias: Tensor | None, kind: str, bias_main_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of what :func:`_activate` read, its result, kept or computed again, and the gradient of GELU's bias.

    The first may be written over ``dactivated``.
    """
    hidden, activated = saved.hidden, saved.activated
    if kind == "swiglu":
        dhidden = torch.empty_like(hidden)
        again = torch.empty_like(dactivated) if activated is None else None
        halves = (*dhidden.chunk(2, dim=1), dactivated, *hidden.chunk(2, dim=1))
        dispatch.resolve("glu_backward_", hidden)(*halves, SILU, again)
        result = activated if again is None else again
        assert result is not None
        return dhidden, result, None
    if kind == "relu2":
        if activated is None:
            return dactivated, dispatch.resolve("relu2_backward_recompute_", hidden)(dactivated, hidden), None
        return dispatch.resolve("relu2_backward", hidden)(dactivated, hidden), activated, None
    if activated is None:
        recompute = dispatch.resolve("gelu_backward_recompute_", hidden)
        activated, dbias = recompute(dactivated, hidden, bias, True, bias_main_grad)
        return dactivated, activated, dbias
    dhidden, dbias = dispatch.resolve("gelu_backward", hidden)(dactivated, hidden, bias, True, bias_main_grad)
    return dhidden, activated, dbias


# ---- what both are made of ----


def _links(x: Tensor, residual: Tensor | None, bias: Tensor | None) -> tuple[HandedOn | None, HandedOn | None]:
    """What was handed on with ``x``, for a norm of ``x + residual``; and what to hand on with this branch's result.

    ``bias`` is that of the branch's last layer.
    """
    return None if residual is None else handed_on_with(x), to_hand_on(bias)


def _normalise(
    x: Tensor, residual: Tensor | None, w: BranchParameters, o: AttentionOptions | MLPOptions
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The norm of the sum, the sum, and the norm's mean and reciprocal standard deviation, or root mean square."""
    if o.rms and residual is not None:
        y, total, rstd = dispatch.resolve("add_rms_norm", x)(x, residual, w.norm_weight, o.eps)
        return y, total, None, rstd
    if o.rms:
        y, rstd = dispatch.resolve("rms_norm", x)(x, w.norm_weight, o.eps)
        return y, x, None, rstd
    if residual is not None:
        return dispatch.resolve("add_layer_norm", x)(x, residual, w.norm_weight, w.norm_bias, o.eps)
    y, mean, rstd = dispatch.resolve("layer_norm", x)(x, w.norm_weight, w.norm_bias, o.eps)
    return y, x, mean, rstd


def _normalised(
    total: Tensor, kept: Tensor | None, w: BranchParameters, o: AttentionOptions | MLPOptions
) -> tuple[Tensor, Tensor | None]:
    """The norm's result as rows, kept or computed again; and once more as memory free to use, if it was made here."""
    y = (_normalise(total, None, w, o)[0] if kept is None else kept).view(-1, total.shape[-1])
    return y, y if kept is None else None


def _norm_backward(
    dy: Tensor, dtotal: Tensor | None, saved: AttentionSaved | MLPSaved, w: BranchParameters,
    o: AttentionOptions | MLPOptions, main_grads: BranchMainGrads, needs_dbias: bool, before: HandedOn | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of the sum, and of the norm's weight and bias."""
    if o.rms:  # it does not sum the gradient of the bias before it, whose projection then does
        return *rms_norm_backward(dy, dtotal, saved.total, w.norm_weight, saved.rstd, main_grads.norm_weight), None
    assert saved.mean is not None
    return layer_norm_backward(
        dy, dtotal, saved.total, w.norm_weight, saved.mean, saved.rstd, main_grads[:2], needs_dbias, before
    )


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """``x @ matrix + bias``, in memory that is no longer needed if there is some."""
    return matmul_into(x.new_empty(x.shape[0], matrix.shape[1]) if into is None else into, x, matrix, bias)


def _draw_mask(x: Tensor, dropout_p: float) -> Tensor | None:
    """One byte an element, 1 where it stays; ``None`` where all do."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p) if dropout_p else None


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """What stays of ``x``, larger for what goes; and its own derivative."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - dropout_p))


# ---- the autograd functions; their inputs are x, residual, with attention the value embedding, the parameters, and
# what needs no gradient ----


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
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, value_embedding: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        parameters, rest = BranchParameters(*rest[:N_PARAMETERS]), rest[N_PARAMETERS:]
        main_grads, ctx.branch_options, given, *ctx.links = rest
        ctx.main_grads = BranchMainGrads(*main_grads)
        out, saved = _attention_forward(x, residual, value_embedding, parameters, ctx.branch_options, given)
        ctx.save_for_backward(*given, *parameters, *saved)
        ctx.set_materialize_grads(False)
        return out, saved.total

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> Any:
        if dout is None:
            return dtotal, dtotal
        given, tensors = Given(*ctx.saved_tensors[:N_GIVEN]), ctx.saved_tensors[N_GIVEN:]
        parameters, saved = BranchParameters(*tensors[:N_PARAMETERS]), AttentionSaved(*tensors[N_PARAMETERS:])
        dx, *gradients = _attention_backward(
            dout, dtotal, saved, parameters, ctx.main_grads, ctx.branch_options, given, ctx.needs_input_grad[2:],
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
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, value_embedding: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        attention, mlp = BranchParameters(*rest[:N_PARAMETERS]), BranchParameters(*rest[N_PARAMETERS:][:N_PARAMETERS])
        ctx.main_grads, *ctx.branch_options, given, ctx.before, ctx.own = rest[2 * N_PARAMETERS :]
        attention_options, mlp_options = ctx.branch_options
        p = attention_options.dropout_p
        added, saved = _attention_forward(x, residual, value_embedding, attention, attention_options, given)
        total = saved.total
        del saved
        attention_mask = _draw_mask(added, p)
        added = _dropped(added, attention_mask, p)
        out, mlp_saved = _mlp_forward(added, total, mlp, mlp_options)
        mlp_total = mlp_saved.total
        del mlp_saved
        mlp_mask = _draw_mask(out, p)
        out = _dropped(out, mlp_mask, p)
        ctx.save_for_backward(*given, value_embedding, total, attention_mask, mlp_mask, *attention, *mlp)
        ctx.set_materialize_grads(False)
        return out, mlp_total

    @staticmethod
    @once_differentiable("block")
    def backward(ctx: Any, dout: Tensor | None, dmlp_total: Any) -> Any:
        given, tensors = Given(*ctx.saved_tensors[:N_GIVEN]), ctx.saved_tensors[N_GIVEN:]
        value_embedding, total, attention_mask, mlp_mask, *parameters = tensors
        attention, mlp = BranchParameters(*parameters[:N_PARAMETERS]), BranchParameters(*parameters[N_PARAMETERS:])
        attention_grads = BranchMainGrads(*ctx.main_grads[:N_PARAMETERS])
        mlp_grads = BranchMainGrads(*ctx.main_grads[N_PARAMETERS:])
        attention_options, mlp_options = ctx.branch_options
        p, needed = attention_options.dropout_p, ctx.needs_input_grad[2:]
        added, attention_saved = _attention_forward(
            total, None, value_embedding, attention, attention_options, given
        )  # fmt: skip
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
                needed[1 + N_PARAMETERS :], between, ctx.own,
            )  # fmt: skip
            del mlp_saved
        dx, *gradients = _attention_backward(
            _dropped(dadded, attention_mask, p), dadded, attention_saved, attention, attention_grads,
            attention_options, given, needed[: 1 + N_PARAMETERS], ctx.before, between,
        )  # fmt: skip
        return dx, dx, *gradients, *mlp_gradients
