"""Each operator in plain PyTorch: the oracle that kernels are held against, and the fallback of last resort.

Same signatures as the table in ops.py. Arithmetic is fp32 for half-precision inputs and in the inputs'
own dtype otherwise, so float64 inputs give a float64 oracle. Written for clarity: attention builds its
T x T weights, linear + cross-entropy its logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels.dry_run import on_gpu, stands_for


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype the arithmetic runs in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _result(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and contiguous; without a call that changes nothing, on which torch 2.11 loses gradients."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


# ---- matrix product ----

# On AMX oneDNN's products of bf16 read past the end of a row of the left operand, up to a whole tile's, and multiply
# what they find by zero: a NaN or an infinity there makes their result NaN. fp16 was not seen to do so on a CPU without
# AMX-FP16, and is treated alike as a precaution.
TILE_DEPTH = 32


def reads_past_rows(x: Tensor) -> bool:
    """Whether PyTorch's product of ``x``, as the left operand, may depend on what lies behind its rows."""
    on_cpu = stands_for(x.device.type) == "cpu"
    return x.dtype in (torch.bfloat16, torch.float16) and on_cpu and x.shape[-1] % TILE_DEPTH != 0


def _with_zeros_behind(a: Tensor) -> Tensor:
    """``a``, behind whose rows there are zeros wherever PyTorch's product would read them."""
    K = a.shape[1]
    return F.pad(a, (0, -K % TILE_DEPTH))[:, :K] if reads_past_rows(a) else a


def _sums_in_fp32(a: Tensor) -> bool:
    """Whether cuBLAS sums products of ``a`` in fp32; told to sum fp16 in fp16, it refuses to add them to fp32."""
    return a.dtype != torch.float16 or not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)


def matmul_(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool, row_sums: Tensor | None) -> None:
    if row_sums is not None and accumulate:
        row_sums.add_(a.sum(1, dtype=row_sums.dtype))
    elif row_sums is not None:
        torch.sum(a, 1, dtype=row_sums.dtype, out=row_sums)
    a = _with_zeros_behind(a)
    if accumulate and a.dtype == out.dtype:
        out.addmm_(a, b)
    elif accumulate and on_gpu(out) and _sums_in_fp32(a):  # half-precision operands, added up inside the product
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(a @ b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def add_column_sums_(sums: Tensor, x: Tensor) -> None:
    sums.add_(x.sum(0, dtype=sums.dtype))


def embedding_backward_(main_grad: Tensor, dy: Tensor, index: Tensor) -> None:
    rows = dy.to(main_grad.dtype)
    if on_gpu(rows):  # sorts, where index_add_ adds in whatever order its threads arrive
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
    return _result(y, x.dtype), _result(mean.squeeze(-1), torch.float32), _result(rstd.squeeze(-1), torch.float32)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _result(x + residual, x.dtype)
    y, mean, rstd = layer_norm(total, weight, bias, eps)
    return y, total, mean, rstd


def _delivered(gradient: Tensor, dtype: torch.dtype, main_grad: Tensor | None) -> Tensor:
    """``gradient`` in ``dtype``; or added to ``main_grad``, and an empty tensor in its place."""
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


# ---- attention ----


def _philox(seed: Tensor, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """32-bit random words, one per (head, row, column), as int64 in [0, 2**32).

    Philox-4x32-10 (Salmon et al. 2011): key = seed, counter = (column // 4, row, head, 0), word column % 4.
    int64 products wrap modulo 2**64, which keeps both 32-bit halves exact.
    """
    mask = 0xFFFFFFFF
    key0, key1 = seed & mask, (seed >> 32) & mask
    c0, c1, c2 = torch.broadcast_tensors(columns // 4, rows, heads)
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & mask) ^ c1 ^ key0, ((p0 >> 32) & mask) ^ c3 ^ key1
        c1, c3 = p1 & mask, p0 & mask
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3)).gather(0, (columns % 4).expand_as(c0).unsqueeze(0)).squeeze(0)


def dropout_factors(seed: Tensor, dropout_p: float, B: int, H: int, n_query: int, n_key: int) -> Tensor:
    """(B, H, n_query, n_key) of 0 and 1 / (1 - p): the dropout that every backend draws for ``seed``."""
    device = seed.device
    heads = torch.arange(B * H, device=device).view(B, H, 1, 1)
    rows = torch.arange(n_query, device=device).view(1, 1, n_query, 1)
    columns = torch.arange(n_key, device=device).view(1, 1, 1, n_key)
    kept = _philox(seed, heads, rows, columns) >= min(int(dropout_p * 2**32), 2**32 - 1)
    return kept / (1.0 - dropout_p)


def _weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights and logsumexp of the scores."""
    scores = (_wide(q) @ _wide(k).transpose(-2, -1)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def _time_major(x: Tensor) -> Tensor:
    """(B, H, T, D), laid out in memory as (B, T, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights, lse = _weights(q, k, causal, scale)
    if dropout_p > 0.0 and seed is not None:
        weights = weights * dropout_factors(seed, dropout_p, *weights.shape).to(weights.dtype)
    return _time_major((weights @ _wide(v)).to(q.dtype)), _result(lse, torch.float32)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, _ = _weights(q, k, causal, scale)
    grad = _wide(dout)
    dweights = grad @ _wide(v).transpose(-2, -1)
    used = weights
    if dropout_p > 0.0 and seed is not None:
        factors = dropout_factors(seed, dropout_p, *weights.shape).to(weights.dtype)
        used, dweights = weights * factors, dweights * factors
    delta = (weights * dweights).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    dq, dk, dv = dscores @ _wide(k), dscores.transpose(-2, -1) @ _wide(q), used.transpose(-2, -1) @ grad
    return _time_major(dq.to(q.dtype)), _time_major(dk.to(k.dtype)), _time_major(dv.to(v.dtype))


def empty_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) as ``x``, uninitialised, laid out as (B, T, H, D), the order in which a GPT reads it next."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def split_heads(packed: Tensor, n_head: int, n: int) -> tuple[Tensor, ...]:
    """(B, T, n * C) as n views (B, H, T, D)."""
    B, T, width = packed.shape
    return packed.view(B, T, n, n_head, width // n // n_head).permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(*heads: Tensor) -> Tensor:
    """The inverse of :func:`split_heads`, contiguous."""
    B, H, T, D = heads[0].shape
    packed = torch.stack(heads, 0).permute(1, 3, 0, 2, 4).reshape(B, T, len(heads) * H * D)
    return _result(packed, packed.dtype)


def attention_qkv(
    qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = split_heads(qkv.contiguous(), n_head, 3)
    out, lse = attention(q, k, v, causal, scale, dropout_p, seed)
    return _merge_heads(out), lse


def attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    q, k, v = split_heads(qkv.contiguous(), n_head, 3)
    (dout_heads,), (out_heads,) = (split_heads(t.contiguous(), n_head, 1) for t in (dout, out))
    gradients = attention_backward(dout_heads, q, k, v, out_heads, lse, causal, scale, dropout_p, seed)
    return _merge_heads(*gradients)


# ---- cross-entropy ----


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    try:
        losses = F.cross_entropy(_wide(logits), targets, ignore_index=ignore_index, reduction="none")
    except IndexError as error:  # on a CPU
        raise RuntimeError(f"targets: {error}") from None
    return _result(losses, torch.float32), _result(_wide(logits).logsumexp(-1), torch.float32)


def _dlogits(scales: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    """Gradient of sum(scales * losses), scales of shape (N,)."""
    wide = _wide(logits)
    counted = (targets != ignore_index).unsqueeze(-1)
    at_target = targets.unsqueeze(-1).clamp(min=0) * counted
    softmax = (wide - lse.to(wide.dtype).unsqueeze(-1)).exp()
    difference = softmax.scatter_add(1, at_target, -torch.ones_like(softmax[:, :1]))  # softmax less the one-hot target
    return torch.where(counted, difference * scales.to(wide.dtype).unsqueeze(-1), 0.0).to(logits.dtype)


def cross_entropy_backward(dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return _result(_dlogits(dlosses, logits, targets, lse, ignore_index), logits.dtype)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, ignore_index: int) -> Tensor:
    losses, lse = cross_entropy(logits, targets, ignore_index)
    logits.copy_(_dlogits(scale.expand_as(lse), logits, targets, lse, ignore_index))
    return losses


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = _with_zeros_behind(x) @ weight.T
    losses, lse = cross_entropy(logits, targets, ignore_index)
    inverse_count = 1.0 / (targets != ignore_index).sum()
    scale = inverse_count if gradient_scale is None else inverse_count * gradient_scale
    dlogits = _dlogits(scale.expand_as(lse), logits, targets, lse, ignore_index)
    dx = _with_zeros_behind(dlogits) @ weight if needs_dx else x.new_empty(0)
    dweight = _with_zeros_behind(dlogits.T) @ x if needs_dweight else weight.new_empty(0)
    return losses.sum() * inverse_count, dx, dweight


# ---- AdamW ----


def grad_norm(grads: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def adamw_coefficients(
    step: Tensor, lr: Tensor, beta1: float, beta2: float, weight_decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What depends on the step, fp64: step size, square root of the second bias correction, decay factor."""
    t, rate = step.double(), lr.double()
    return rate / (1.0 - beta1**t), (1.0 - beta2**t).sqrt(), 1.0 - rate * weight_decay


def _adamw_update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, coefficients: tuple[Tensor, Tensor, Tensor],
    grad_scale: Tensor | None, beta1: float, beta2: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The new parameter and moments, not rounded yet. Moments come wide."""
    step_size, correction2, decay = (c.to(_wide(param).dtype) for c in coefficients)
    g = _wide(grad) if grad_scale is None else _wide(grad) * grad_scale
    m = exp_avg.lerp(g.to(exp_avg.dtype), 1.0 - beta1)
    v = exp_avg_sq * beta2 + (1.0 - beta2) * g * g
    return _wide(param) * decay - (step_size * m) / (v.sqrt() / correction2 + eps), m, v


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], step: Tensor, lr: Tensor, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: float, zero_grad: bool,
) -> None:  # fmt: skip
    coefficients = adamw_coefficients(step, lr, beta1, beta2, weight_decay)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        p, m, v = _adamw_update(
            param, grad, _wide(exp_avg), _wide(exp_avg_sq), coefficients, grad_scale, beta1, beta2, eps
        )
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        param.copy_(p)
        if copies:
            copies[i].copy_(p)
        if zero_grad:
            grad.zero_()


# ---- AdamW that saves memory: moments of 8 bits, bf16 rounded stochastically ----

MOMENT_BLOCK = 256  # consecutive elements of a flattened moment that share a scale

# A moment of one byte is a floating-point number with three bits of fraction, stored as the distance from the
# scale of its block: the power of two above the largest magnitude in it. Code c, without its sign, stands for
# the fp32 whose upper twelve bits are those of the scale, plus c, minus the largest code; 0 stands for zero.
#
#   exp_avg      sign in the highest bit, 127 magnitudes: 16 binades, 4.8 decades below the scale
#   exp_avg_sq   255 magnitudes: 32 binades, 9.6 decades, so that its square root reaches as far down as exp_avg
#
# Codes are rounded up or down at random so that the mean is the value itself: with beta2 = 0.999 a moment moves
# by less than half the distance of two codes, and rounding to the nearest would leave it where it is for ever.
# The scale is a power of two, so that coding is exact arithmetic on bit patterns, alike on every backend, and a
# code keeps its value when the scale changes.
#
# Below the smallest magnitude exp_avg is rounded to it or to zero, without bias too. exp_avg_sq is rounded up
# to it, because a zero there makes a step of exp_avg / eps.

MOMENT_SHIFT = 20  # bits of an fp32 below three bits of fraction
LEAST_MOMENT_SCALE = 33  # biased exponent; under it the smallest code of exp_avg_sq would not be a normal fp32


def encode_moment(x: Tensor, random: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (n, 256), uint8, and scales (n, 1), fp32, of ``x`` (n, 256), fp32.

    Args:
        x: a moment, block by block.
        random: as many numbers in [0, 2**16), int32.
        signed: whether it is ``exp_avg``; ``exp_avg_sq`` has no sign.
    """
    largest = 127 if signed else 255
    bits = x.view(torch.int32) & 0x7FFFFFFF
    scale = ((bits.amax(-1, keepdim=True) >> 23) + 1).clamp(LEAST_MOMENT_SCALE, 254) << 23
    bits = bits.minimum(scale)  # a moment that is not finite gets the largest code
    zero = (scale >> MOMENT_SHIFT) - largest
    codes = ((bits + (random << 4)) >> MOMENT_SHIFT) - zero
    if signed:
        smallest = (zero + 1) << MOMENT_SHIFT
        up = random * (smallest.view(torch.float32) * 2.0**-16) < x.abs()
        codes = torch.where(bits < smallest, up.int(), codes)
        codes = torch.where((codes > 0) & (x < 0), codes + 128, codes)
    else:
        codes = torch.where(bits > 0, codes.clamp(min=1), 0)
    return codes.to(torch.uint8), scale.view(torch.float32)


def decode_moment(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The inverse of :func:`encode_moment`: (n, 256), fp32."""
    largest = 127 if signed else 255
    magnitude = codes.int() & largest
    bits = ((scale.view(torch.int32) >> MOMENT_SHIFT) - largest + magnitude) << MOMENT_SHIFT
    values = torch.where(magnitude > 0, bits.view(torch.float32), 0.0)
    return torch.where(codes > 127, -values, values) if signed else values


def round_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """fp32 as bf16: one of the two neighbours, chosen by ``random`` in [0, 2**16) so that the mean is ``x``."""
    bits = (x.view(torch.int32) + random) & ~0xFFFF  # the carry out of the lower half rounds up
    return torch.where(x.isnan(), x, bits.view(torch.float32)).bfloat16()


def _blocks(flat: Tensor) -> Tensor:
    """(n, 256), the last row filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)


def _random_halves(key: Tensor, tensor: int, purpose: int, first: int, n: int) -> tuple[Tensor, Tensor]:
    """Two numbers in [0, 2**16), int32, for each of the elements ``first ... first + n`` of a tensor."""
    place = torch.arange(first, first + n, device=key.device)
    words = _philox(key, torch.full_like(place, purpose), torch.full_like(place, tensor), place)
    return (words >> 16).int(), (words & 0xFFFF).int()


def adamw_8bit_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], copies: list[Tensor], step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, seed: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    zero_grad: bool, stochastic_rounding: bool,
) -> None:  # fmt: skip
    """AdamW on coded moments where there are scales; where asked, all that is bf16 is rounded stochastically.

    Philox's key is ``seed + step``, its counter (element // 4, number of the tensor, purpose, 0), purpose 0 for
    the moments and 1 for the parameters; of word element % 4 the upper half is for exp_avg, the lower for
    exp_avg_sq and for the parameter.
    """
    coefficients = adamw_coefficients(step, lr, beta1, beta2, weight_decay)
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
                m = decode_moment(_blocks(exp_avg), scales[0], signed=True).view(-1)[:n]
                v = decode_moment(_blocks(exp_avg_sq), scales[1], signed=False).view(-1)[:n]
            p, *updated = _adamw_update(param, grad, m, v, coefficients, grad_scale, beta1, beta2, eps)

            halves = _random_halves(key, i, 0, first, n)
            for k, (moment, new, random) in enumerate(zip((exp_avg, exp_avg_sq), updated, halves, strict=True)):
                if scales:
                    codes, scale = encode_moment(_blocks(new.float()), _blocks(random), signed=k == 0)
                    moment.copy_(codes.view(-1)[:n])
                    scales[k].copy_(scale)
                elif stochastic_rounding and moment.dtype == torch.bfloat16:
                    moment.copy_(round_stochastically(new, random))
                else:
                    moment.copy_(new)
            if stochastic_rounding and param.dtype == torch.bfloat16:
                p = round_stochastically(p, _random_halves(key, i, 1, first, n)[1])
            param.copy_(p)
            for twin in copy:
                twin.copy_(p)
            if zero_grad:
                grad.zero_()
