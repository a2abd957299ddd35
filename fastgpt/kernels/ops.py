"""The table of operators: schema, shapes, dtypes and fake of each, one entry an operator.

An operator is declared here, once, in the dispatcher's namespace ``fastgpt::``. Up to three backends implement it:
``reference`` (reference.py, plain PyTorch, any device), ``cpp`` (csrc/, CPU) and ``triton`` (triton/, NVIDIA GPUs).
dispatch.py registers them and chooses among them. The function below an entry's schema is its fake: it returns the
results' shapes, strides and dtypes without computing them, for ``torch.compile`` and for tensors without data. Its
docstring says what the operator computes.

Notation: B batch, H heads, T queries, S keys, D head size, C width, V vocabulary, N rows. In a schema ``(a!)`` marks a
tensor that is changed in place. Conventions, unless an entry says otherwise:

- Floating-point tensors have one dtype, that of the first: fp32, bf16, fp16 or fp64. Arithmetic is fp32, and fp64 for
  fp64. Statistics (``mean``, ``rstd``, ``lse``, losses) likewise; norms of gradients are fp32 whatever that dtype is.
- Arguments may have any strides; results are new and contiguous.
- A ``main_grad`` is contiguous fp32. A gradient is added to it unrounded, and an empty tensor, shape (0,), is returned
  in the gradient's place.
- Every backend of an operator saves the same tensors for the backward, so a forward on one backend and a backward on
  another agree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels.heads import empty_heads

library = torch.library.Library("fastgpt", "DEF")


@dataclass(frozen=True)
class Operator:
    """An entry of the table.

    Attributes:
        schema: in the dispatcher's notation, without the name.
        fake: the results' shapes, strides and dtypes, without data.
        kind: what the operator counts as where the time of a step is added up by kind (train/predict/trace.py).
    """

    schema: str
    fake: Callable[..., Any]
    kind: str


OPERATORS: dict[str, Operator] = {}


def operator(name: str, schema: str, kind: str = "other") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare ``fastgpt::name``; the decorated function is its fake."""

    def declare(fake: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = Operator(schema, fake, kind)
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastgpt::{name}", fake, lib=library)
        return fake

    return declare


def _statistics(x: Tensor) -> Tensor:
    """One number for each row of ``x``: fp64 if they are, otherwise fp32."""
    return x.new_empty(x.shape[:-1], dtype=statistics_dtype(x.dtype))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of inputs of ``dtype``: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- matrix product, embedding ----


@operator("matmul_", "(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool accumulate, Tensor(b!)? row_sums) -> ()")
def _(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool, row_sums: Tensor | None
) -> None:  # fmt: skip
    """out = a @ b + bias and row_sums = a.sum(1); or with accumulate out += a @ b and row_sums += a.sum(1).

    a: (M, K). b: (K, N). bias: (N,), excluded by accumulate.
    out: (M, N), rows contiguous; dtype of a, or fp32 with accumulate.
    row_sums: (M,), dtype of a, or fp32.
    """


@operator("add_column_sums_", "(Tensor(a!) sums, Tensor x) -> ()")
def _(sums: Tensor, x: Tensor) -> None:
    """sums += x.sum(0), added up in fp32.

    sums: (C,) fp32, contiguous. x: (N, C).
    """


@operator("embedding_backward_", "(Tensor(a!) main_grad, Tensor dy, Tensor index) -> ()")
def _(main_grad: Tensor, dy: Tensor, index: Tensor) -> None:
    """main_grad[index] += dy; each sum is taken in fp32, in an order that depends on index alone.

    main_grad: (V, C) fp32, contiguous. dy: (N, C). index: (N,) int64 in [0, V).
    """


# ---- layer norm ----


@operator(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    kind="norm",
)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """y = (x - mean) * rstd * weight + bias, with the mean and rstd = 1 / sqrt(variance + eps) of each row.

    x, y: (..., C). weight, bias: (C,). mean, rstd: (...) fp32, or fp64 if x is.
    """
    return x.new_empty(x.shape), _statistics(x), _statistics(x)


@operator(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    kind="norm",
)
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """sum = x + residual, rounded to the dtype of x; y, mean and rstd are those of layer_norm(sum).

    x, residual, y, sum: (..., C). weight, bias: (C,). mean, rstd: (...) fp32, or fp64 if x is.
    """
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistics(x), _statistics(x)


@operator(
    "layer_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool needs_dbias,"
    " Tensor(a!)? weight_main_grad=None, Tensor(b!)? bias_main_grad=None, Tensor(c!)? dx_sums=None)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    kind="norm",
)
def _(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs_dbias: bool,
    weight_main_grad: Tensor | None = None, bias_main_grad: Tensor | None = None, dx_sums: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of layer_norm; of add_layer_norm, if x is its sum and dsum the sum's own gradient.

    dy, dsum, x, dx: (..., C). mean, rstd: (...), as the forward returned them. weight: (C,).
    dweight: (C,), empty with weight_main_grad. dbias: (C,), empty with bias_main_grad or without needs_dbias.
    weight_main_grad, bias_main_grad: (C,) fp32.
    dx_sums: (C,) fp32, contiguous; += dx.sum over all rows, of dx before it is rounded.
    """
    weight_shape = weight.shape if weight_main_grad is None else (0,)
    bias_shape = weight.shape if needs_dbias and bias_main_grad is None else (0,)
    return x.new_empty(x.shape), weight.new_empty(weight_shape), weight.new_empty(bias_shape)


# ---- GELU ----


@operator("gelu", "(Tensor x, Tensor? bias, bool tanh) -> Tensor", kind="GELU")
def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """GELU of x + bias, exact (erf) or, with tanh, GPT-2's approximation.

    x, result: (..., C), any shape without a bias. bias: (C,).
    """
    return x.new_empty(x.shape)


@operator(
    "gelu_backward",
    "(Tensor dy, Tensor x, Tensor? bias, bool tanh, Tensor(a!)? bias_main_grad=None) -> (Tensor dx, Tensor dbias)",
    kind="GELU",
)
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The gradients of gelu(x, bias, tanh).

    dy, x, dx: (..., C). bias: (C,). bias_main_grad: (C,) fp32.
    dbias: (C,), empty without a bias or with bias_main_grad.
    """
    bias_shape = (0,) if bias is None or bias_main_grad is not None else bias.shape
    return x.new_empty(x.shape), x.new_empty(bias_shape)


@operator(
    "gelu_backward_recompute_",
    "(Tensor(a!) dy, Tensor x, Tensor? bias, bool tanh, Tensor(b!)? bias_main_grad=None) -> (Tensor y, Tensor dbias)",
    kind="GELU",
)
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """gelu_backward with dx written over dy, and y = gelu(x, bias, tanh) recomputed, so that it need not be kept.

    dy: (..., C), contiguous; dx afterwards. x, y: (..., C). bias, dbias, bias_main_grad: as in gelu_backward.
    """
    bias_shape = (0,) if bias is None or bias_main_grad is not None else bias.shape
    return x.new_empty(x.shape), x.new_empty(bias_shape)


# ---- attention ----


@operator(
    "attention",
    "(Tensor q, Tensor k, Tensor v, bool causal, float scale, float dropout_p, Tensor? seed,"
    " int window=0, float softcap=0.0, Tensor? documents=None) -> (Tensor out, Tensor lse)",
    kind="attention",
)
def _(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out = softmax(q k^T * scale) v, with dropout of the weights; lse is the logsumexp of each row of scores.

    q: (B, H, T, D). k, v: (B, Hk, S, D), where Hk divides H; head h reads key head h // (H / Hk).
    With causal S >= T, and query t, at position p = t + S - T, sees the keys up to p. Only with causal: with a window
    > 0 it sees those from p - window + 1 on, and with documents those from documents[b, 0, p] on.
    documents: (B, 2, S) int32; of each position the first of its document, and of each key the end of the positions
    that see it. Kernels keep them within [0, p] and [0, S].
    softcap: a score s becomes softcap * tanh(s / softcap), before it is masked; 0 for none.
    seed: () int64, or None without dropout.
    out: (B, H, T, D), laid out in memory as (B, T, H, D). lse: (B, H, T) fp32, or fp64 if q is.
    """
    return empty_heads(q), _statistics(q)


@operator(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale,"
    " float dropout_p, Tensor? seed, bool deterministic=True, int window=0, float softcap=0.0,"
    " Tensor? documents=None) -> (Tensor dq, Tensor dk, Tensor dv)",
    kind="attention",
)
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, window: int = 0, softcap: float = 0.0,
    documents: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of attention; its arguments and results are those of the forward.

    dout, out, q, dq: (B, H, T, D). k, v, dk, dv: (B, Hk, S, D). lse: (B, H, T), as the forward returned it.
    dk and dv are sums over the heads that read a key head, added in fp32.
    seed: () int64, or None.
    window, softcap, documents: as in attention.
    dq, dk and dv are laid out in memory as (B, T, H, D). deterministic=False lets dq be added up in any order.
    """
    return empty_heads(q), empty_heads(k), empty_heads(v)


@operator(
    "attention_qkv",
    "(Tensor qkv, int n_head, bool causal, float scale, float dropout_p, Tensor? seed, int n_kv_head=0,"
    " int window=0, float softcap=0.0, Tensor? documents=None) -> (Tensor out, Tensor lse)",
    kind="attention",
)
def _(
    qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None, n_kv_head: int = 0,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of q, k and v packed side by side; head h of each is columns h D to (h + 1) D of its part.

    qkv: (B, T, (n_head + 2 n_kv_head) D), where n_kv_head 0 stands for n_head. out: (B, T, C) with C = n_head D.
    lse: (B, n_head, T) fp32, or fp64 if qkv is.
    seed: () int64, or None without dropout.
    window, softcap, documents: as in attention.
    """
    B, T, width = qkv.shape
    C = width // (n_head + 2 * (n_kv_head or n_head)) * n_head
    return qkv.new_empty((B, T, C)), qkv.new_empty((B, n_head, T), dtype=statistics_dtype(qkv.dtype))


@operator(
    "attention_qkv_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, bool causal, float scale,"
    " float dropout_p, Tensor? seed, bool deterministic=True, int n_kv_head=0, int window=0, float softcap=0.0,"
    " Tensor? documents=None) -> Tensor",
    kind="attention",
)
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, n_kv_head: int = 0, window: int = 0,
    softcap: float = 0.0, documents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of attention_qkv, packed like its input.

    dout, out: (B, T, C). qkv, result: (B, T, (n_head + 2 n_kv_head) D). lse: (B, n_head, T), as the forward returned
    it.
    seed: () int64, or None.
    deterministic, window, softcap, documents: as in attention_backward.
    """
    return qkv.new_empty(qkv.shape)


# ---- cross-entropy ----


@operator(
    "cross_entropy", "(Tensor logits, Tensor targets, int ignore_index) -> (Tensor losses, Tensor lse)", kind="loss"
)
def _(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    """Lse = logsumexp(logits) and losses = lse - logits[target] of each row; 0 where the target is ignore_index.

    logits: (N, V). targets: (N,) int64. losses, lse: (N,) fp32, or fp64 if the logits are.
    """
    return _statistics(logits), _statistics(logits)


@operator(
    "cross_entropy_backward",
    "(Tensor dlosses, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
    kind="loss",
)
def _(dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """The gradient of the logits; rows whose target is ignore_index get zeros.

    dlosses, lse: (N,) fp32, or fp64 if the logits are. logits, result: (N, V). targets: (N,) int64.
    """
    return logits.new_empty(logits.shape)


@operator(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, Tensor scale, int ignore_index) -> Tensor losses",
    kind="loss",
)
def _(logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    """The losses of cross_entropy; the gradient of scale * losses.sum() is written over the logits.

    logits: (N, V), contiguous. targets: (N,) int64. scale: () fp32. losses: (N,) fp32, or fp64 if
    the logits are.
    """
    return _statistics(logits)


@operator(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, Tensor? gradient_scale, bool needs_dx,"
    " bool needs_dweight)"
    " -> (Tensor loss, Tensor dx, Tensor dweight)",
)
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The mean cross-entropy of x @ weight.T over the rows that count, and its gradients times gradient_scale.

    x, dx: (N, C). weight, dweight: (V, C). targets: (N,) int64. gradient_scale: () fp32, or None for 1.
    loss: () fp32, or fp64 if x is. dx is empty without needs_dx, dweight without needs_dweight.
    """
    return (
        x.new_empty((), dtype=statistics_dtype(x.dtype)),
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
    )


# ---- AdamW ----


@operator("grad_norm", "(Tensor[] grads) -> Tensor", kind="optimizer")
def _(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all grads taken as one vector.

    grads: any shapes and dtypes. Result: () fp32.
    """
    return grads[0].new_empty((), dtype=torch.float32)


@operator(
    "adamw_",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] copies, Tensor step, Tensor lr, Tensor? grad_scale, float beta1, float beta2,"
    " float eps, float weight_decay, bool zero_grad, Tensor? found_inf=None) -> ()",
    kind="optimizer",
)
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], step: Tensor, lr: Tensor, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: float, zero_grad: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """One step of AdamW on every tensor of a list; with zero_grad the grads are then set to zero.

    params, grads, exp_avgs, exp_avg_sqs: contiguous, one shape for each index; dtypes may differ between the lists.
    copies: bf16, receive the new params; or an empty list.
    step: () fp32, counted from 1. lr: () fp64. grad_scale: () fp32, multiplies the grads first; or None for 1.
    found_inf: () fp32; if it is not 0, nothing changes but the grads that are set to zero; or None for 0. They are
    tensors on the params' device, so that a captured CUDA graph reads their current values.
    """


@operator(
    "adamw_8bit_",
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
    " Tensor(e!)[] exp_avg_scales, Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] copies, Tensor step, Tensor lr,"
    " Tensor? grad_scale, Tensor seed, float beta1, float beta2, float eps, float weight_decay, bool zero_grad,"
    " bool stochastic_rounding, Tensor? found_inf=None) -> ()",
    kind="optimizer",
)
def _(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], copies: list[Tensor], step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, seed: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    zero_grad: bool, stochastic_rounding: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """adamw_ with moments of 8 bits, or with stochastic_rounding of bf16 params and moments, or with both.

    exp_avgs, exp_avg_sqs: uint8 codes (moments_8bit.py) if there are scales; otherwise as in adamw_.
    exp_avg_scales, exp_avg_sq_scales: (ceil(numel / 256),) fp32, one scale for 256 elements; or empty lists.
    seed: () int64 on the params' device. params, grads, copies, step, lr, grad_scale, zero_grad, found_inf: as in
    adamw_.
    """
