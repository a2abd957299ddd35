"""Each operator in plain PyTorch: the oracle that the kernels are tested against, and the fallback of last resort.

Signatures, shapes and dtypes are those of the table in ops.py. Arithmetic is fp32 for half-precision inputs and in the
inputs' own dtype otherwise, so float64 inputs give a float64 oracle. Written for clarity: attention builds its T x T
weights, linear + cross-entropy its logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import torch_matmul
from fastgpt.kernels.dry_run import on_gpu
from fastgpt.kernels.heads import split_heads, split_qkv
from fastgpt.kernels.moments_8bit import MOMENT_BLOCK, decode_moment, encode_moment, in_blocks
from fastgpt.kernels.ops import GELU_EXACT, GELU_TANH, SILU, statistics_dtype
from fastgpt.kernels.philox import dropout_factors, philox
from fastgpt.kernels.torch_matmul import with_zeros_behind


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _result(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and contiguous. A call that changes nothing is avoided: torch 2.11 loses gradients on it."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


# ---- matrix product, sums of rows ----

matmul_ = torch_matmul.matmul_  # PyTorch's own


def add_column_sums_(sums: Tensor, x: Tensor) -> None:
    sums.add_(x.sum(0, dtype=sums.dtype))


def embedding_backward_(main_grad: Tensor, dy: Tensor, index: Tensor) -> None:
    rows = dy.to(main_grad.dtype)
    if on_gpu(rows):  # it sorts the indices; index_add_ would add in an order that varies from run to run
        main_grad.index_put_((index,), rows, accumulate=True)
    else:
        main_grad.index_add_(0, index, rows)


# ---- layer norm ----


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    mean, rstd = (_result(t.squeeze(-1), statistics_dtype(x.dtype)) for t in (mean, rstd))
    return _result(y, x.dtype), mean, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _result(x + residual, x.dtype)
    y, mean, rstd = layer_norm(total, weight, bias, eps)
    return y, total, mean, rstd


def _delivered(gradient: Tensor, dtype: torch.dtype, main_grad: Tensor | None) -> Tensor:
    """``gradient`` in ``dtype``; if there is a ``main_grad``, it is added there and an empty tensor is returned."""
    if main_grad is None:
        return _result(gradient, dtype)
    main_grad.add_(gradient)
    return gradient.new_empty(0, dtype=dtype)


def layer_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs_dbias: bool,
    weight_main_grad: Tensor | None = None, bias_main_grad: Tensor | None = None, dx_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, scale = _wide(dy), rstd.unsqueeze(-1).to(_wide(x).dtype)
    normal = (_wide(x) - mean.unsqueeze(-1)) * scale
    g = grad * _wide(weight)
    dx = scale * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + _wide(dsum)
    dweight = _delivered((grad * normal).reshape(-1, x.shape[-1]).sum(0), weight.dtype, weight_main_grad)
    dbias = weight.new_empty(0)
    if needs_dbias:
        dbias = _delivered(grad.reshape(-1, x.shape[-1]).sum(0), weight.dtype, bias_main_grad)
    if dx_sums is not None:
        dx_sums.add_(dx.reshape(-1, x.shape[-1]).sum(0))
    return _result(dx, x.dtype), dweight, dbias


# ---- RMS norm ----


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * _wide(weight)
    return _result(y, x.dtype), _result(rstd.squeeze(-1), statistics_dtype(x.dtype))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = _result(x + residual, x.dtype)
    y, rstd = rms_norm(total, weight, eps)
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor,
    weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad, scale = _wide(dy), rstd.unsqueeze(-1).to(_wide(x).dtype)
    normal = _wide(x) * scale
    g = grad if weight is None else grad * _wide(weight)
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + _wide(dsum)
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = _delivered((grad * normal).reshape(-1, x.shape[-1]).sum(0), weight.dtype, weight_main_grad)
    return _result(dx, x.dtype), dweight


# ---- GELU ----


def gelu(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    approximate = "tanh" if tanh else "none"
    if bias is None:
        return _result(F.gelu(x, approximate=approximate), x.dtype)
    return _result(F.gelu(_wide(x) + _wide(bias), approximate=approximate), x.dtype)


def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    approximate = "tanh" if tanh else "none"
    if bias is None:
        return _result(torch.ops.aten.gelu_backward(dy, x, approximate=approximate), x.dtype), x.new_empty(0)
    dx = torch.ops.aten.gelu_backward(_wide(dy), _wide(x) + _wide(bias), approximate=approximate)
    return _result(dx, x.dtype), _delivered(dx.reshape(-1, x.shape[-1]).sum(0), bias.dtype, bias_main_grad)


def gelu_backward_recompute_(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dx, dbias = gelu_backward(dy, x, bias, tanh, bias_main_grad)
    dy.copy_(dx)
    return gelu(x, bias, tanh), dbias


# ---- squared ReLU ----


def relu2(x: Tensor) -> Tensor:
    return _result(_wide(x).relu().square(), x.dtype)


def relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _result(_wide(dy) * (2.0 * _wide(x).relu()), x.dtype)


def relu2_backward_recompute_(dy: Tensor, x: Tensor) -> Tensor:
    dy.copy_(relu2_backward(dy, x))
    return relu2(x)


# ---- gated linear units ----


def glu(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return _result(_activated(_wide(gate), activation) * _wide(up), gate.dtype)


def glu_backward_(
    dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, activation: int, y: Tensor | None = None
) -> None:
    gradients = glu_gradients(dy, gate, up, activation)
    dgate.copy_(gradients[0])
    dup.copy_(gradients[1])
    if y is not None:
        y.copy_(glu(gate, up, activation))


def glu_gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """What glu_backward_ writes to dgate and dup, as new tensors: in the form that torch.func can map over."""
    grad, wide = _wide(dy), _wide(gate)
    slope = grad * _wide(up)
    if activation == SILU:
        dgate = torch.ops.aten.silu_backward(slope, wide)
    else:
        dgate = torch.ops.aten.gelu_backward(slope, wide, approximate=_GELU_FORMS[activation])
    return _result(dgate, gate.dtype), _result(grad * _activated(wide, activation), up.dtype)


_GELU_FORMS = {GELU_TANH: "tanh", GELU_EXACT: "none"}


def _activated(gate: Tensor, activation: int) -> Tensor:
    return F.silu(gate) if activation == SILU else F.gelu(gate, approximate=_GELU_FORMS[activation])


# ---- attention ----


def _scores(
    q: Tensor, k: Tensor, causal: bool, scale: float, window: int, softcap: float, documents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, T, S), hidden ones -inf; and their derivative by what they were before a soft cap, if there is one.

    k: (B, H, S, D), its heads already those of q.
    """
    scores = (_wide(q) @ _wide(k).transpose(-2, -1)) * scale
    slope = None
    if softcap > 0.0:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1.0 - capped.square()
    if causal:
        T, S = scores.shape[-2:]  # query t is the position S - T + t among the keys
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, -math.inf)
        if window > 0 or documents is not None:
            scores = scores.masked_fill(_before_the_first(T, S, window, documents, q.device), -math.inf)
    return scores, slope


def _before_the_first(T: int, S: int, window: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """(T, S) or (B, 1, T, S) booleans: the key lies before the query's window, or before its document."""
    keys = torch.arange(S, device=device)
    positions = keys[S - T :]
    first = (positions - window + 1 if window > 0 else torch.zeros_like(positions)).clamp(min=0)
    if documents is not None:  # a position sees at least itself
        first = torch.maximum(first, torch.minimum(documents[:, None, 0, S - T :], positions))
    return keys < first.unsqueeze(-1)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """``x``, (B, Hk, S, D), with the head that each head of ``q`` reads: (B, H, S, D)."""
    H, Hk = q.shape[1], x.shape[1]
    return x if Hk == H else x.repeat_interleave(H // Hk, 1)


def _per_key_head(gradient: Tensor, x: Tensor) -> Tensor:
    """The sums of a gradient of :func:`_per_query_head`'s result over the heads that read one of ``x``."""
    H, Hk = gradient.shape[1], x.shape[1]
    return gradient if Hk == H else gradient.unflatten(1, (Hk, H // Hk)).sum(2)


def _time_major(x: Tensor) -> Tensor:
    """(B, H, T, D), laid out in memory as (B, T, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    scores, _ = _scores(q, k, causal, scale, window, softcap, documents)
    weights, lse = scores.softmax(-1), scores.logsumexp(-1)
    if dropout_p > 0.0 and seed is not None:
        weights = weights * dropout_factors(seed, dropout_p, *weights.shape).to(weights.dtype)
    return _time_major((weights @ _wide(v)).to(q.dtype)), _result(lse, statistics_dtype(q.dtype))


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, window: int = 0, softcap: float = 0.0,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, values = _per_query_head(k, q), _per_query_head(v, q)
    scores, slope = _scores(q, keys, causal, scale, window, softcap, documents)
    weights = scores.softmax(-1)
    grad = _wide(dout)
    dweights = grad @ _wide(values).transpose(-2, -1)
    used = weights
    if dropout_p > 0.0 and seed is not None:
        factors = dropout_factors(seed, dropout_p, *weights.shape).to(weights.dtype)
        used, dweights = weights * factors, dweights * factors
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    if slope is not None:
        dscores = dscores * slope
    dq, dk, dv = dscores @ _wide(keys), dscores.transpose(-2, -1) @ _wide(q), used.transpose(-2, -1) @ grad
    dk, dv = _per_key_head(dk, k), _per_key_head(dv, v)
    return _time_major(dq.to(q.dtype)), _time_major(dk.to(k.dtype)), _time_major(dv.to(v.dtype))


def _merge_heads(*heads: Tensor) -> Tensor:
    """The inverse of :func:`split_heads` and of :func:`split_qkv`, contiguous."""
    packed = torch.cat(heads, 1).transpose(1, 2).flatten(2)
    return _result(packed, packed.dtype)


def attention_qkv(
    qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None, n_kv_head: int = 0,
    window: int = 0, softcap: float = 0.0, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = split_qkv(qkv.contiguous(), n_head, n_kv_head or n_head)
    out, lse = attention(q, k, v, causal, scale, dropout_p, seed, window, softcap, documents)
    return _merge_heads(out), lse


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True, n_kv_head: int = 0, window: int = 0,
    softcap: float = 0.0, documents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    q, k, v = split_qkv(qkv.contiguous(), n_head, n_kv_head or n_head)
    (dout_heads,), (out_heads,) = (split_heads(t.contiguous(), n_head, 1) for t in (dout, out))
    gradients = attention_backward(
        dout_heads, q, k, v, out_heads, lse, causal, scale, dropout_p, seed, deterministic, window, softcap, documents
    )
    return _merge_heads(*gradients)


# ---- rotary position embeddings, and the RMS norm of each head before them ----


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, inverse: bool = False) -> Tensor:
    """Heads (..., T, H, D), in the dtype of the arithmetic, turned by the angles of their positions."""
    if cos is None or sin is None:
        return x
    c, s = (t.unsqueeze(-2).to(x.dtype) for t in (cos, -sin if inverse else sin))  # (..., T, 1, D/2)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = first * c - second * s, second * c + first * s
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return _result(_rotated(_wide(x), cos, sin, interleaved, inverse), x.dtype)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    x.copy_(_rotated(_wide(x), cos, sin, interleaved, inverse))


def rms_norm_rotary(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal = wide * rstd if weight is None else wide * rstd * _wide(weight)
    y = _rotated(normal, cos, sin, interleaved)
    return _result(y, x.dtype), _result(rstd.squeeze(-1), statistics_dtype(x.dtype))


def rms_norm_rotary_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, rstd: Tensor,
    interleaved: bool, weight_main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale = rstd.unsqueeze(-1)
    normal = _wide(x) * scale
    g = _rotated(_wide(dy), cos, sin, interleaved, inverse=True)
    dweight = x.new_empty(0)
    if weight is not None:
        dweight = _delivered((g * normal).reshape(-1, x.shape[-1]).sum(0), weight.dtype, weight_main_grad)
        g = g * _wide(weight)
    return _result(scale * (g - normal * (g * normal).mean(-1, keepdim=True)), x.dtype), dweight


def rms_norm_rotary_(x: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    y, rstd = rms_norm_rotary(x, None, cos, sin, eps, interleaved)
    x.copy_(y)
    return rstd


def _rms_norm_rotary_dx(
    dy: Tensor, y: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, interleaved: bool
) -> Tensor:
    """The gradient of rms_norm_rotary without a weight, from its result ``y``, not rounded yet."""
    grad, wide = _wide(dy), _wide(y)
    projection = (grad * wide).mean(-1, keepdim=True)  # turned back, both have the same product
    g, normal = (_rotated(t, cos, sin, interleaved, inverse=True) for t in (grad, wide))
    if cos is not None and sin is not None:  # the transposed matrix is the inverse but for the length of (cos, sin)
        squares = (cos.square() + sin.square()).unsqueeze(-2).to(normal.dtype)
        normal = normal / (squares.repeat_interleave(2, -1) if interleaved else torch.cat([squares, squares], -1))
    return rstd.unsqueeze(-1) * (g - normal * projection)


def rms_norm_rotary_backward_(
    dy: Tensor, y: Tensor, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, interleaved: bool
) -> None:
    dy.copy_(_rms_norm_rotary_dx(dy, y, cos, sin, rstd, interleaved))


def _queries_and_keys(qkv: Tensor, n_head: int, n_kv_head: int) -> Tensor:
    """A view (B, T, n_head + n_kv_head, D) of packed q, k and v."""
    n = n_head + 2 * n_kv_head
    return qkv.unflatten(-1, (n, qkv.shape[-1] // n))[:, :, : n_head + n_kv_head]


def rotary_qkv(
    qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor | None, sin: Tensor | None, qk_norm: bool, eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = qkv.clone(memory_format=torch.contiguous_format)
    heads = _queries_and_keys(out, n_head, n_kv_head)
    if qk_norm:
        return out, rms_norm_rotary_(heads, cos, sin, eps, interleaved)
    heads.copy_(_rotated(_wide(heads), cos, sin, interleaved))
    return out, qkv.new_empty(0, dtype=statistics_dtype(qkv.dtype))


def rotary_qkv_backward(
    dout: Tensor, out: Tensor | None, rstd: Tensor | None, n_head: int, n_kv_head: int, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    dqkv = dout.clone(memory_format=torch.contiguous_format)
    heads = _queries_and_keys(dqkv, n_head, n_kv_head)
    if out is not None and rstd is not None:
        rms_norm_rotary_backward_(heads, _queries_and_keys(out, n_head, n_kv_head), cos, sin, rstd, interleaved)
    else:
        heads.copy_(_rotated(_wide(heads), cos, sin, interleaved, inverse=True))
    return dqkv


# ---- cross-entropy ----


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """The logits in the dtype of the arithmetic, and capped if ``softcap`` is not 0."""
    wide = _wide(logits)
    return softcap * (wide / softcap).tanh() if softcap else wide


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = _capped(logits, softcap)
    weight = None if class_weight is None else class_weight.to(wide.dtype)
    try:
        losses = F.cross_entropy(
            wide, targets, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
    except IndexError as error:  # on a CPU
        raise RuntimeError(f"targets: {error}") from None
    lse = wide.logsumexp(-1)
    if z_loss:
        losses = losses + torch.where(targets != ignore_index, z_loss * lse.square(), 0.0)
    return _result(losses, wide.dtype), _result(lse, wide.dtype)


def _dlogits(
    scales: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of sum(scales * losses) for logits (N, V) and scales (N,)."""
    capped = _capped(logits, softcap)
    counted = (targets != ignore_index).unsqueeze(-1)
    at_target = targets.unsqueeze(-1).clamp(min=0) * counted
    lse = lse.to(capped.dtype).unsqueeze(-1)
    softmax = (capped - lse).exp()
    weight = capped.new_ones(1) if class_weight is None else class_weight.to(capped.dtype)
    weight, spread = weight.expand(logits.shape[1]), label_smoothing / logits.shape[1]
    of_target = weight[at_target] * (1.0 - label_smoothing)
    factor = of_target  # of the softmax
    if label_smoothing:
        factor = factor + spread * weight.sum()
    if label_smoothing:
        label = (spread * weight).expand_as(softmax).scatter_add(1, at_target, of_target)
        difference = softmax * factor - label
    else:
        difference = (softmax * factor).scatter_add(1, at_target, -of_target)  # softmax - onehot(target) if w is 1
    if z_loss:
        difference = difference + softmax * (2.0 * z_loss * lse)
    gradient = difference * scales.to(capped.dtype).unsqueeze(-1)
    if softcap:
        gradient = gradient * (_wide(logits) / softcap).cosh().square().reciprocal()  # 1 - tanh**2 would cancel
    return torch.where(counted, gradient, 0.0).to(logits.dtype)


def cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, softcap: float = 0.0,
    z_loss: float = 0.0, label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options = softcap, z_loss, label_smoothing, class_weight
    return _result(_dlogits(dlosses, logits, targets, lse, ignore_index, *options), logits.dtype)


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int, softcap: float = 0.0, z_loss: float = 0.0,
    label_smoothing: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options = softcap, z_loss, label_smoothing, class_weight
    losses, lse = cross_entropy(logits, targets, ignore_index, *options)
    logits.copy_(_dlogits(scale.expand_as(lse), logits, targets, lse, ignore_index, *options))
    return losses


def divisor_of_mean(targets: Tensor, ignore_index: int, class_weight: Tensor | None) -> Tensor:
    """What the sum of the losses is divided by for their mean: the rows that count, or the weights of their targets."""
    counted = targets != ignore_index
    if class_weight is None:
        return torch.count_nonzero(counted)
    inside = targets.clamp(0, len(class_weight) - 1)  # a target outside of the classes is the kernels' to deal with
    return torch.where(counted, class_weight[inside], 0.0).sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = softcap, z_loss, label_smoothing, class_weight
    logits = with_zeros_behind(x) @ weight.T
    losses, lse = cross_entropy(logits, targets, ignore_index, *options)
    if reduction == "none":
        return losses, x.new_empty(0), weight.new_empty(0)
    factor = losses.new_ones(())
    if reduction == "mean":
        factor = divisor_of_mean(targets, ignore_index, class_weight).to(losses.dtype).reciprocal()
    scale = factor if gradient_scale is None else factor * gradient_scale
    dlogits = _dlogits(scale.expand_as(lse), logits, targets, lse, ignore_index, *options)
    dx = with_zeros_behind(dlogits) @ weight if needs_dx else x.new_empty(0)
    dweight = with_zeros_behind(dlogits.T) @ x if needs_dweight else weight.new_empty(0)
    return losses.sum() * factor, dx, dweight


def linear_cross_entropy_backward(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = softcap, z_loss, label_smoothing, class_weight
    logits = with_zeros_behind(x) @ weight.T
    lse = _capped(logits, softcap).logsumexp(-1)
    dlogits = _dlogits(dlosses, logits, targets, lse, ignore_index, *options)
    dx = with_zeros_behind(dlogits) @ weight if needs_dx else x.new_empty(0)
    dweight = with_zeros_behind(dlogits.T) @ x if needs_dweight else weight.new_empty(0)
    return dx, dweight


# ---- AdamW ----


def grad_norm(grads: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def _adamw_coefficients(
    step: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 numbers that depend on the step: step size, square root of the second bias correction, decay factor."""
    t, rate = step.double(), lr.double()
    return rate / (1.0 - beta1**t), (1.0 - beta2**t).sqrt(), 1.0 - rate * weight_decay


def _adamw_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, coefficients: tuple[Tensor, Tensor, Tensor],
    grad_scale: Tensor | None, beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The new parameter and moments, not rounded yet. The moments are given in the dtype of the arithmetic."""
    step_size, correction2, decay = (c.to(_wide(param).dtype) for c in coefficients)
    g = _wide(grad) if grad_scale is None else _wide(grad) * grad_scale
    m = exp_avg.lerp(g.to(exp_avg.dtype), 1.0 - beta1)
    v = exp_avg_sq * beta2 + (1.0 - beta2) * g * g
    return _wide(param) * decay - (step_size * m) / (v.sqrt() / correction2 + eps), m, v


def _write(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """Copy ``new`` to ``old``, unless ``found_inf`` is not 0; its value is not read by the host."""
    old.copy_(new if found_inf is None else torch.where(found_inf == 0, new.to(old.dtype), old))


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], step: Tensor, lr: Tensor, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: float, zero_grad: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    coefficients = _adamw_coefficients(step, lr, beta1, beta2, weight_decay)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        p, m, v = _adamw_update(
            param, grad, _wide(exp_avg), _wide(exp_avg_sq), coefficients, grad_scale, beta1, beta2, eps
        )
        _write(exp_avg, m, found_inf)
        _write(exp_avg_sq, v, found_inf)
        _write(param, p, found_inf)
        if copies:
            _write(copies[i], p, found_inf)
        if zero_grad:
            grad.zero_()


# ---- AdamW with moments of 8 bits (moments_8bit.py), or with bf16 rounded stochastically ----


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbours in bf16, chosen by ``random`` in [0, 2**16) so that the mean is ``x``."""
    bits = (x.view(torch.int32) + random) & ~0xFFFF  # the carry out of the lower half rounds up
    return torch.where(x.isnan(), x, bits.view(torch.float32)).bfloat16()


def _random_halves(key: Tensor, tensor: int, purpose: int, first: int, n: int) -> tuple[Tensor, Tensor]:
    """Two int32 numbers in [0, 2**16) for each of the elements [first, first + n) of a tensor; see philox.py."""
    place = torch.arange(first, first + n, device=key.device)
    words = philox(key, torch.full_like(place, purpose), torch.full_like(place, tensor), place)
    return (words >> 16).int(), (words & 0xFFFF).int()


def adamw_8bit_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], copies: list[Tensor], step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, seed: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    zero_grad: bool, stochastic_rounding: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    coefficients = _adamw_coefficients(step, lr, beta1, beta2, weight_decay)
    key = seed + step.long()
    part = 2**20  # elements at a time, so that temporaries stay small
    for i in range(len(params)):
        tensors = [t[i] for t in (params, grads, exp_avgs, exp_avg_sqs, copies) if t]
        for first in range(0, params[i].numel(), part):
            param, grad, exp_avg, exp_avg_sq, *copy = (t.view(-1)[first : first + part] for t in tensors)
            n = len(param)
            blocks = slice(first // MOMENT_BLOCK, (first + part) // MOMENT_BLOCK)
            scales = [s[i][blocks].unsqueeze(-1) for s in (exp_avg_scales, exp_avg_sq_scales) if s]
            m, v = _wide(exp_avg), _wide(exp_avg_sq)
            if scales:
                m = decode_moment(in_blocks(exp_avg), scales[0], signed=True).view(-1)[:n]
                v = decode_moment(in_blocks(exp_avg_sq), scales[1], signed=False).view(-1)[:n]
            p, *updated = _adamw_update(param, grad, m, v, coefficients, grad_scale, beta1, beta2, eps)

            halves = _random_halves(key, i, 0, first, n)
            for k, (moment, new, random) in enumerate(zip((exp_avg, exp_avg_sq), updated, halves, strict=True)):
                if scales:
                    codes, scale = encode_moment(in_blocks(new.float()), in_blocks(random), signed=k == 0)
                    _write(moment, codes.view(-1)[:n], found_inf)
                    _write(scales[k], scale, found_inf)
                elif stochastic_rounding and moment.dtype == torch.bfloat16:
                    _write(moment, round_stochastically(new, random), found_inf)
                else:
                    _write(moment, new, found_inf)
            if stochastic_rounding and param.dtype == torch.bfloat16:
                p = round_stochastically(p, _random_halves(key, i, 1, first, n)[1])
            _write(param, p, found_inf)
            for twin in copy:
                _write(twin, p, found_inf)
            if zero_grad:
                grad.zero_()
