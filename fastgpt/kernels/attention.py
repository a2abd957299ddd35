"""Scaled dot-product attention that never materialises the T x T weights, forward or backward.

Dao et al., "FlashAttention", 2022; Dao, "FlashAttention-2", 2023. Heads may share keys: Ainslie et al., "GQA", 2023.
A window of keys as in Beltagy et al., "Longformer", 2020, and Jiang et al., "Mistral 7B", 2023. Soft-capped scores:
"Gemma 2", 2024. Blocks of keys that no query of a block sees, because of the causal mask, a window or a document's
edge, are not computed.

Dropout draws from Philox-4x32-10 (philox.py) with a seed from torch's generator. So ``torch.manual_seed`` determines
it, the backward redraws the mask instead of storing it, and a seed gives the same mask on every backend.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, distinct, once_differentiable
from fastgpt.kernels.documents import check_documents
from fastgpt.kernels.heads import MAX_HEAD_SIZE


class _Attention(Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
        deterministic: bool, window: int, softcap: float, documents: Tensor | None,
    ) -> Any:  # fmt: skip
        return dispatch.resolve("attention", q)(
            q, k, v, causal, scale, dropout_p, seed, window, softcap, documents
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, ctx.causal, ctx.scale, ctx.dropout_p, seed, ctx.deterministic, *ctx.of_scores, documents = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse, seed, documents)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> Any:
        if dout is None:
            return ()
        q, k, v, out, lse, seed, documents = ctx.saved_tensors
        return dispatch.resolve("attention_backward", q)(
            dout, q, k, v, out, lse, ctx.causal, ctx.scale, ctx.dropout_p, seed, ctx.deterministic, *ctx.of_scores,
            documents,
        )  # fmt: skip


class _AttentionQKV(Function):
    @staticmethod
    def forward(
        qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
        deterministic: bool, n_kv_head: int, window: int, softcap: float, documents: Tensor | None,
    ) -> Any:  # fmt: skip
        return dispatch.resolve("attention_qkv", qkv)(
            qkv, n_head, causal, scale, dropout_p, seed, n_kv_head, window, softcap, documents
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, ctx.n_head, ctx.causal, ctx.scale, ctx.dropout_p, seed, ctx.deterministic, *ctx.others, documents = inputs
        out, lse = output
        ctx.save_for_backward(qkv, out, lse, seed, documents)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("attention_qkv")
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> Any:
        if dout is None:
            return ()
        qkv, out, lse, seed, documents = ctx.saved_tensors
        dqkv = dispatch.resolve("attention_qkv_backward", qkv)(
            dout, qkv, out, lse, ctx.n_head, ctx.causal, ctx.scale, ctx.dropout_p, seed, ctx.deterministic, *ctx.others,
            documents,
        )  # fmt: skip
        return (dqkv,)


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Return a 0-dim int64 seed on ``device``, or ``None`` without dropout.

    It stays a tensor, because reading its value would wait for the GPU.
    """
    return torch.randint(2**62, (), device=device) if dropout_p > 0.0 else None


def scale_or_default(scale: float | None, D: int) -> float:
    """Return ``scale``, or ``1 / sqrt(D)`` if it is ``None``."""
    if scale is None:
        return 1.0 / math.sqrt(D)
    checks.number("scale", scale)
    return float(scale)


def _of_scores(
    causal: bool, window: int | None, softcap: float | None, documents: Tensor | None, B: int, S: int,
    device: torch.device,
) -> tuple[int, float, Tensor | None]:  # fmt: skip
    """Check what changes the scores, and return it as the operators take it."""
    for name, value in (("window", window), ("documents", documents)):
        if value is not None and not causal:
            raise ValueError(f"{name}: needs causal=True")
    if window is not None:
        checks.size("window", window)
    if softcap is not None:
        checks.soft_cap("softcap", softcap)
    if documents is not None:
        documents = check_documents(documents, B, S, device)
    hides_nothing = window is None or window >= S
    return 0 if hides_nothing else window, float(softcap or 0.0), documents  # type: ignore[return-value]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Return ``softmax(q k^T * scale) v``, like ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        q: ``(B, H, T, D)``, any strides, fp32, bf16, fp16 or fp64; D up to ``heads.MAX_HEAD_SIZE``, 256. If all three
            are 3-D, ``(B, T, D)``, there is one head.
        k: ``(B, Hk, S, D)``, dtype and device of ``q``. Hk is H, or divides it: then head h of ``q`` reads head
            h // (H / Hk) of ``k`` and ``v``, as SDPA's ``enable_gqa`` has it (grouped queries).
        v: shape of ``k``.
        causal: the queries are the last T of the S positions, and each attends to the positions up to its own: query t
            to the keys up to t + S - T. Needs S >= T. (SDPA's ``is_causal`` counts from the first key. For S = T they
            are the same.)
        scale: default ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention weight; pass 0.0 in evaluation.
        deterministic: the same inputs give bitwise equal gradients. ``False`` lets an NVIDIA GPU accumulate the
            gradient of q with atomics, in one pass instead of two. This needs an fp32 buffer of the size of q. It
            changes nothing on other devices, nor under ``torch.use_deterministic_algorithms(True)``.
        window: the number of positions that a query sees, its own and those before it; default all. FlashAttention's
            ``window_size=(window - 1, 0)``. Only with ``causal``.
        softcap: bounds the scores: s becomes ``softcap * tanh(s / softcap)``, where s is already scaled. Gemma 2 has
            50. Default none.
        documents: tokens of different documents in one sequence do not see each other: ``(B, S)`` int32, the first
            position of each position's document (:func:`document_starts`), or ``(B, 2, S)``, ready made by
            :func:`document_bounds`. Only with ``causal``.

    Returns:
        The shape and dtype of ``q``, laid out in memory as ``(B, T, H, D)``, so that
        ``out.transpose(1, 2).reshape(B, T, H * D)`` copies nothing.

    Raises:
        TypeError: a dtype is not floating-point or differs from that of ``q``, or an option has a wrong type.
        ValueError: a shape, a device or an option does not fit.
    """
    checks.floating(q=q, k=k, v=v)
    q, k, v = autocast.in_autocast_dtype(q, k, v)
    checks.same("q", q=q, k=k, v=v)
    one_head = q.dim() == k.dim() == v.dim() == 3
    if one_head:
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    if q.dim() != 4 or 0 in q.shape[1:] or q.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(f"q: expected (B, H, T, D), only B may be 0, D <= {MAX_HEAD_SIZE}, got {tuple(q.shape)}")
    B, H, T, D = q.shape
    if k.dim() != 4 or 0 in k.shape[1:3]:
        raise ValueError(f"k: expected (B, Hk, S, D) with Hk > 0 and S > 0, got {tuple(k.shape)}")
    if H % k.shape[1]:
        raise ValueError(f"k: its {k.shape[1]} heads do not divide the {H} heads of q")
    checks.shape("k", k, (B, k.shape[1], k.shape[2], D))
    checks.shape("v", v, tuple(k.shape))
    checks.boolean("causal", causal)
    if causal and k.shape[2] < T:
        raise ValueError(f"k: causal attention needs at least as many keys as queries, got {k.shape[2]} and {T}")
    checks.probability("dropout_p", dropout_p)
    checks.boolean("deterministic", deterministic)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    scale = scale_or_default(scale, D)
    of_scores = _of_scores(causal, window, softcap, documents, B, k.shape[2], q.device)
    if B == 0:  # nothing to compute
        out = q + k.sum() + v.sum()  # so that all three have gradients
        return out.squeeze(1) if one_head else out
    k = distinct(k, q)
    v = distinct(v, q, k)
    seed = draw_seed(dropout_p, q.device)
    out = apply(_Attention, q, k, v, causal, scale, float(dropout_p), seed, deterministic, *of_scores)[0]
    return out.squeeze(1) if one_head else out


def attention_qkv(
    qkv: Tensor,
    n_head: int,
    *,
    n_kv_head: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Self-attention on the packed output of one linear layer, read in place.

    The backward writes the gradients of q, k and v straight into one packed tensor: no split, transpose
    or concatenation, forward or backward.

    Args:
        qkv: ``(B, T, (n_head + 2 n_kv_head) D)``, q, k and v side by side, ``n_head`` heads of D and twice
            ``n_kv_head``; any strides, fp32, bf16, fp16 or fp64. As a rule ``(B, T, 3C)`` with C = ``n_head`` D.
        n_head: number of heads.
        n_kv_head: number of heads of k and of v; divides ``n_head``, which is the default. Head h of q reads head
            h // (``n_head`` / ``n_kv_head``) of k and v (grouped queries).
        causal: position t attends to positions up to t only.
        scale: default ``1 / sqrt(D)``.
        dropout_p: probability of dropping an attention weight; pass 0.0 in evaluation.
        deterministic: the same inputs give bitwise equal gradients. ``False`` lets an NVIDIA GPU accumulate the
            gradient of q with atomics, in one pass instead of two. This needs an fp32 buffer of the size of q. It
            changes nothing on other devices, nor under ``torch.use_deterministic_algorithms(True)``.
        window: as in :func:`attention`.
        softcap: as in :func:`attention`.
        documents: as in :func:`attention`, with S = T.

    Returns:
        ``(B, T, C)``, contiguous, dtype of ``qkv``.

    Raises:
        TypeError: ``qkv`` is not a floating-point tensor, or a number of heads or an option has a wrong type.
        ValueError: the shape, a number of heads or an option does not fit.
    """
    checks.floating(qkv=qkv)
    (qkv,) = autocast.in_autocast_dtype(qkv)
    checks.integer("n_head", n_head)
    if n_kv_head is None:
        if qkv.dim() != 3 or 0 in qkv.shape[1:] or qkv.shape[2] % 3:
            raise ValueError(f"qkv: expected (B, T, 3C), only B may be 0, got {tuple(qkv.shape)}")
        C, n_kv_head = qkv.shape[2] // 3, 0
        checks.heads("n_head", n_head, "C", C)
    else:
        C = _width_of_queries(qkv, n_head, n_kv_head)
    checks.boolean("causal", causal)
    checks.probability("dropout_p", dropout_p)
    checks.boolean("deterministic", deterministic)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    scale = scale_or_default(scale, C // n_head)
    of_scores = _of_scores(causal, window, softcap, documents, qkv.shape[0], qkv.shape[1], qkv.device)
    if qkv.shape[0] == 0:
        return qkv[..., :C].clone()
    seed = draw_seed(dropout_p, qkv.device)
    return apply(
        _AttentionQKV, qkv, n_head, causal, scale, float(dropout_p), seed, deterministic, n_kv_head, *of_scores
    )[0]  # fmt: skip


def _width_of_queries(qkv: Tensor, n_head: int, n_kv_head: int) -> int:
    """Check packed queries, keys and values with fewer heads of keys, and return the width of the queries."""
    checks.size("n_head", n_head)
    checks.size("n_kv_head", n_kv_head)
    if n_head % n_kv_head:
        raise ValueError(f"n_kv_head: {n_kv_head} does not divide n_head = {n_head}")
    n = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or 0 in qkv.shape[1:] or qkv.shape[2] % n or qkv.shape[2] // n > MAX_HEAD_SIZE:
        raise ValueError(f"qkv: expected (B, T, {n} D), only B may be 0, D <= {MAX_HEAD_SIZE}, got {tuple(qkv.shape)}")
    return qkv.shape[2] // n * n_head
