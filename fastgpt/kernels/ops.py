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


# ---- RMS norm ----


@operator("rms_norm", "(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)", kind="norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """y = x * rstd * weight, with rstd = 1 / sqrt(mean(x^2) + eps) of each row.

    x, y: (..., C). weight: (C,), or None for ones. rstd: (...) fp32, or fp64 if x is.
    """
    return x.new_empty(x.shape), _statistics(x)


@operator(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)",
    kind="norm",
)
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """sum = x + residual, rounded to the dtype of x; y and rstd are those of rms_norm(sum).

    x, residual, y, sum: (..., C). weight: (C,), or None for ones. rstd: (...) fp32, or fp64 if x is.
    """
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistics(x)


@operator(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor rstd, Tensor(a!)? weight_main_grad=None)"
    " -> (Tensor dx, Tensor dweight)",
    kind="norm",
)
def _(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor,
    weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of rms_norm; of add_rms_norm, if x is its sum and dsum the sum's own gradient.

    dy, dsum, x, dx: (..., C). rstd: (...), as the forward returned it. weight: (C,), or None for ones.
    dweight: (C,), empty without a weight or with weight_main_grad. weight_main_grad: (C,) fp32.
    """
    weight_shape = (0,) if weight is None or weight_main_grad is not None else weight.shape
    return x.new_empty(x.shape), x.new_empty(weight_shape)


# ---- GELU ----


@operator("gelu", "(Tensor x, Tensor? bias, bool tanh) -> Tensor", kind="activation")
def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """GELU of x + bias, exact (erf) or, with tanh, GPT-2's approximation.

    x, result: (..., C), any shape without a bias. bias: (C,).
    """
    return x.new_empty(x.shape)


@operator(
    "gelu_backward",
    "(Tensor dy, Tensor x, Tensor? bias, bool tanh, Tensor(a!)? bias_main_grad=None) -> (Tensor dx, Tensor dbias)",
    kind="activation",
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
    kind="activation",
)
def _(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    """gelu_backward with dx written over dy, and y = gelu(x, bias, tanh) recomputed, so that it need not be kept.

    dy: (..., C), contiguous; dx afterwards. x, y: (..., C). bias, dbias, bias_main_grad: as in gelu_backward.
    """
    bias_shape = (0,) if bias is None or bias_main_grad is not None else bias.shape
    return x.new_empty(x.shape), x.new_empty(bias_shape)


# ---- squared ReLU ----


@operator("relu2", "(Tensor x) -> Tensor", kind="activation")
def _(x: Tensor) -> Tensor:
    """max(x, 0)^2.

    x, result: any shape.
    """
    return x.new_empty(x.shape)


@operator("relu2_backward", "(Tensor dy, Tensor x) -> Tensor", kind="activation")
def _(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of relu2, 2 max(x, 0) dy.

    dy, x, result: any shape.
    """
    return x.new_empty(x.shape)


@operator("relu2_backward_recompute_", "(Tensor(a!) dy, Tensor x) -> Tensor y", kind="activation")
def _(dy: Tensor, x: Tensor) -> Tensor:
    """relu2_backward with dx written over dy, and y = relu2(x) recomputed, so that it need not be kept.

    dy: any shape, contiguous; dx afterwards. x, y: the same shape.
    """
    return x.new_empty(x.shape)


# ---- gated linear units ----

# The activation of the gate.
SILU, GELU_TANH, GELU_EXACT = 0, 1, 2


@operator("glu", "(Tensor gate, Tensor up, int activation) -> Tensor", kind="activation")
def _(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """activation(gate) * up; only the product is rounded to the dtype of gate.

    gate, up, result: (..., H). Halves of one packed tensor, whose rows are further apart than H, are read in place.
    """
    return gate.new_empty(gate.shape)


@operator(
    "glu_backward_",
    "(Tensor(a!) dgate, Tensor(b!) dup, Tensor dy, Tensor gate, Tensor up, int activation, Tensor(c!)? y=None) -> ()",
    kind="activation",
)
def _(
    dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, activation: int, y: Tensor | None = None
) -> None:
    """The gradients of glu(gate, up, activation), and y = glu(gate, up, activation) recomputed if there is a y.

    dgate, dup, y: (..., H), written, none of them in memory that is read. Their rows are contiguous and evenly spaced,
    so that dgate and dup may be the halves of one packed tensor. dy, gate, up: (..., H).
    """


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


# ---- rotary position embeddings, and the RMS norm of each head before them ----

# cos and sin are fp32, (T, D/2), or (B, T, D/2) for positions that differ between sequences. The pairs that they turn
# are (i, i + D/2), or with interleaved (2i, 2i + 1): y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. inverse turns by the
# negative angles. That is the transposed matrix, and so the gradient.


@operator("rotary", "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor")
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """The heads of x, each pair turned by the angle of its position.

    x, result: (B, T, H, D). cos, sin: (T, D/2) or (B, T, D/2), fp32.
    """
    return x.new_empty(x.shape)


@operator("rotary_", "(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()")
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """rotary in place.

    x: (B, T, H, D), any strides by which no two elements share memory. cos, sin: as in rotary.
    """


@operator(
    "rms_norm_rotary",
    "(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, float eps, bool interleaved) -> (Tensor y, Tensor rstd)",
    kind="norm",
)
def _(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> tuple[Tensor, ...]:
    """y = rotary(x * rstd * weight), with rstd = 1 / sqrt(mean(x^2) + eps) of each head of each position.

    x, y: (B, T, H, D). weight: (D,), shared by the heads, or None for ones. rstd: (B, T, H) fp32, or fp64 if x is.
    cos, sin: as in rotary, or None for no rotation.
    """
    return x.new_empty(x.shape), _statistics(x)


@operator(
    "rms_norm_rotary_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor rstd, bool interleaved,"
    " Tensor(a!)? weight_main_grad=None) -> (Tensor dx, Tensor dweight)",
    kind="norm",
)
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, rstd: Tensor,
    interleaved: bool, weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of rms_norm_rotary, from its input.

    dy, x, dx: (B, T, H, D). weight, cos, sin: as in the forward. rstd: (B, T, H), as the forward returned it.
    dweight: (D,), empty without a weight or with weight_main_grad. weight_main_grad: (D,) fp32.
    """
    weight_shape = (0,) if weight is None or weight_main_grad is not None else weight.shape
    return x.new_empty(x.shape), x.new_empty(weight_shape)


@operator(
    "rms_norm_rotary_",
    "(Tensor(a!) x, Tensor? cos, Tensor? sin, float eps, bool interleaved) -> Tensor rstd",
    kind="norm",
)
def _(x: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    """rms_norm_rotary without a weight, in place.

    x: (B, T, H, D), any strides by which no two elements share memory. rstd: (B, T, H) fp32, or fp64 if x is.
    cos, sin: as in rotary, or None for no rotation.
    """
    return _statistics(x)


@operator(
    "rms_norm_rotary_backward_",
    "(Tensor(a!) dy, Tensor y, Tensor? cos, Tensor? sin, Tensor rstd, bool interleaved) -> ()",
    kind="norm",
)
def _(
    dy: Tensor, y: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, interleaved: bool
) -> None:  # fmt: skip
    """The gradient of rms_norm_rotary without a weight, from its result, written over dy.

    dy: (B, T, H, D), any strides by which no two elements share memory; dx afterwards. y: (B, T, H, D), the result.
    rstd: (B, T, H), as the forward returned it. cos, sin: as in the forward; no pair of them may be (0, 0).
    """


@operator(
    "rotary_qkv",
    "(Tensor qkv, int n_head, int n_kv_head, Tensor? cos, Tensor? sin, bool qk_norm, float eps, bool interleaved)"
    " -> (Tensor out, Tensor rstd)",
)
def _(
    qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor | None, sin: Tensor | None, qk_norm: bool, eps: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """rotary, or with qk_norm rms_norm_rotary, of the q and k of packed q, k and v; v is copied.

    qkv, out: (B, T, (n_head + 2 n_kv_head) D). rstd: (B, T, n_head + n_kv_head) fp32, or fp64 if qkv is; without
    qk_norm empty, (0,). cos, sin: as in rotary, or None for no rotation.
    """
    rstd_shape = (*qkv.shape[:2], n_head + n_kv_head) if qk_norm else (0,)
    return qkv.new_empty(qkv.shape), qkv.new_empty(rstd_shape, dtype=statistics_dtype(qkv.dtype))


@operator(
    "rotary_qkv_backward",
    "(Tensor dout, Tensor? out, Tensor? rstd, int n_head, int n_kv_head, Tensor? cos, Tensor? sin, bool interleaved)"
    " -> Tensor",
)
def _(
    dout: Tensor, out: Tensor | None, rstd: Tensor | None, n_head: int, n_kv_head: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    """The gradient of rotary_qkv; where it normalised, from its result, as in rms_norm_rotary_backward_.

    dout, result: (B, T, (n_head + 2 n_kv_head) D). cos, sin: as in the forward.
    out, rstd: as the forward returned them, or None without qk_norm.
    """
    return dout.new_empty(dout.shape)


# ---- cross-entropy ----

# The last arguments of each of these operators say which loss. In a row of logits l with the target t:
#
#     z = softcap tanh(l / softcap), or l if softcap is 0;   p = softmax(z);   lse = logsumexp(z)
#     loss = (1 - s) w[t] (lse - z[t]) + s / V sum_c w[c] (lse - z[c]) + z_loss lse**2,   s = label_smoothing
#
# class_weight is w, (V,), of the statistics' dtype, or None for ones. It has no gradient.


@operator(
    "cross_entropy",
    "(Tensor logits, Tensor targets, int ignore_index, float softcap=0.0, float z_loss=0.0,"
    " float label_smoothing=0.0, Tensor? class_weight=None) -> (Tensor losses, Tensor lse)",
    kind="loss",
)
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The losses and lse of each row, as above; a row's loss is 0 where its target is ignore_index.

    logits: (N, V). targets: (N,) int64. losses, lse: (N,) fp32, or fp64 if the logits are. class_weight: (V,).
    """
    return _statistics(logits), _statistics(logits)


@operator(
    "cross_entropy_backward",
    "(Tensor dlosses, Tensor logits, Tensor targets, Tensor lse, int ignore_index, float softcap=0.0,"
    " float z_loss=0.0, float label_smoothing=0.0, Tensor? class_weight=None) -> Tensor",
    kind="loss",
)
def _(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits; rows whose target is ignore_index get zeros.

    dlosses, lse: (N,) fp32, or fp64 if the logits are. logits, result: (N, V). targets: (N,) int64.
    class_weight: (V,).
    """
    return logits.new_empty(logits.shape)


@operator(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, Tensor scale, int ignore_index, float softcap=0.0, float z_loss=0.0,"
    " float label_smoothing=0.0, Tensor? class_weight=None) -> Tensor losses",
    kind="loss",
)
def _(
    logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The losses of cross_entropy; the gradient of (scale * losses).sum() is written over the logits.

    logits: (N, V), contiguous. targets: (N,) int64. scale: () or (N,) fp32. losses: (N,) fp32, or fp64 if the logits
    are. class_weight: (V,).
    """
    return _statistics(logits)


@operator(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, Tensor? gradient_scale, bool needs_dx,"
    " bool needs_dweight, float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, Tensor? class_weight=None,"
    ' str reduction="mean")'
    " -> (Tensor loss, Tensor dx, Tensor dweight)",
)
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, reduction: str = "mean",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The cross-entropy of x @ weight.T over the rows that count, and its gradients times gradient_scale.

    reduction: "mean", divided by the number of rows that count, or by the sum of their targets' class weights; "sum";
    or "none", the loss of each row, without gradients.
    x, dx: (N, C). weight, dweight: (V, C). targets: (N,) int64. gradient_scale: () fp32, or None for 1.
    loss: (), with "none" (N,), fp32, or fp64 if x is. dx is empty without needs_dx, dweight without needs_dweight.
    class_weight: (V,).
    """
    return (
        x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=statistics_dtype(x.dtype)),
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
    )


@operator(
    "linear_cross_entropy_backward",
    "(Tensor dlosses, Tensor x, Tensor weight, Tensor targets, int ignore_index, bool needs_dx, bool needs_dweight,"
    " float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, Tensor? class_weight=None)"
    " -> (Tensor dx, Tensor dweight)",
)
def _(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of linear_cross_entropy with the reduction "none"; the logits are computed again.

    dlosses: (N,) fp32, or fp64 if x is. x, dx: (N, C). weight, dweight: (V, C). targets: (N,) int64.
    class_weight: (V,). dx is empty without needs_dx, dweight without needs_dweight.
    """
    return (
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
