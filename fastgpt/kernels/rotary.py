"""Rotary position embeddings, and QK-norm: the RMS norm of each head before them.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. Henry et al., "Query-Key Normalization
for Transformers", 2020; with the RMS in the place of the L2 norm, as in Qwen3, modded-nanogpt and nanochat.

Each pair of elements of a head is turned by an angle that grows with its position: y1 = x1 cos - x2 sin, y2 = x2 cos +
x1 sin. So the product of a query and a key depends on the distance of their positions only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, distinct, once_differentiable
from fastgpt.kernels.heads import MAX_HEAD_SIZE
from fastgpt.kernels.main_grad import for_autograd, main_grad_of


class _Rotary(Function):
    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        return dispatch.resolve("rotary", x)(x, cos, sin, interleaved, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    @once_differentiable("rotary")
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return (dispatch.resolve("rotary", dy)(dy, cos, sin, ctx.interleaved, True),)


class _RMSNormRotary(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, interleaved: bool,
        weight_main_grad: Tensor | None,
    ) -> Any:  # fmt: skip
        return dispatch.resolve("rms_norm_rotary", x)(x, weight, cos, sin, eps, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, cos, sin, _, ctx.interleaved, ctx.weight_main_grad = inputs
        _, rstd = output
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("rms_norm_rotary")
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return ()
        x, weight, cos, sin, rstd = ctx.saved_tensors
        dx, dweight = dispatch.resolve("rms_norm_rotary_backward", x)(
            dy, x, weight, cos, sin, rstd, ctx.interleaved, ctx.weight_main_grad
        )
        return dx, *for_autograd([dweight], [ctx.weight_main_grad])


class _RotaryQKV(Function):
    @staticmethod
    def forward(
        qkv: Tensor, n_head: int, n_kv_head: int, cos: Tensor | None, sin: Tensor | None, qk_norm: bool, eps: float,
        interleaved: bool,
    ) -> Any:  # fmt: skip
        return dispatch.resolve("rotary_qkv", qkv)(qkv, n_head, n_kv_head, cos, sin, qk_norm, eps, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.n_head, ctx.n_kv_head, cos, sin, qk_norm, _, ctx.interleaved = inputs
        out, rstd = output
        # The result, which attention keeps anyway, serves in the place of the input; see ops.py.
        ctx.save_for_backward(*(out, rstd) if qk_norm else (None, None), cos, sin)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("rotary_qkv")
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> Any:
        if dout is None:
            return ()
        out, rstd, cos, sin = ctx.saved_tensors
        dqkv = dispatch.resolve("rotary_qkv_backward", dout)(
            dout, out, rstd, ctx.n_head, ctx.n_kv_head, cos, sin, ctx.interleaved
        )
        return (dqkv,)


def rotary_tables(
    n_positions: int,
    head_size: int,
    base: float = 10000.0,
    *,
    device: torch.device | str | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles ``position * base ** (-2 i / head_size)``, i = 0 … head_size / 2 - 1.

    The angles are computed in fp64 on the CPU, so that they are exact at any position and have the same bits on every
    device. Make the tables once, not in every step.

    Args:
        n_positions: number of rows; at least 1.
        head_size: D, elements of a head; even.
        base: greater than 0. 10000 in RoFormer and Llama 2, 500000 in Llama 3; larger ones for longer contexts.
        device: of the tables; default torch's.
        start: the first position, for tokens that continue a text whose keys are cached.

    Returns:
        ``(cos, sin)``, both ``(n_positions, head_size / 2)`` fp32.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``head_size`` is odd, a number is too small, or ``device`` is none.
    """
    checks.size("n_positions", n_positions)
    _check_head_size(head_size)
    checks.number("base", base)
    if base <= 0.0:
        raise ValueError(f"base: expected more than 0, got {base}")
    checks.integer("start", start)
    try:
        place = torch.get_default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {str(error).splitlines()[0]}") from None
    except TypeError:
        raise TypeError(f"device: expected a device or its name, got {type(device).__name__}") from None
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    frequencies = float(base) ** (torch.arange(0, head_size, 2, **wide) / -head_size)
    angles = torch.outer(torch.arange(n_positions, **wide) + start, frequencies)
    return angles.cos().float().to(place), angles.sin().float().to(place)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Return the heads of ``x``, each pair of elements turned by the angle of its position.

    The positions come before the heads, as a linear layer leaves them: ``q.view(B, T, H, D)`` and also a slice of
    packed q, k and v are read where they lie. :func:`attention` takes ``(B, H, T, D)`` of any strides; so there is no
    copy in

        q, k = (rotary(t.view(B, T, H, D), cos, sin).transpose(1, 2) for t in (q, k))  # both (B, H, T, D)

    and none in ``rotary(q.transpose(1, 2), cos, sin).transpose(1, 2)`` of a q that is ``(B, H, T, D)`` already.
    Arithmetic is fp32, and the result is rounded once.

    Args:
        x: ``(B, T, H, D)``, any strides, fp32, bf16, fp16 or fp64; D even, at most ``heads.MAX_HEAD_SIZE``, 256.
        cos: ``(T, D / 2)``, of :func:`rotary_tables`, or ``(B, T, D / 2)`` for positions that differ between sequences;
            fp32 whatever ``x`` is. It gets no gradient.
        sin: the same of the sines.
        interleaved: the pairs are (2i, 2i + 1), as in RoFormer, GPT-J and Meta's own Llama, instead of (i, i + D / 2),
            as in GPT-NeoX, and in transformers' Llama, whose weights are permuted for it.

    Returns:
        ``(B, T, H, D)``, contiguous, dtype of ``x``.

    Raises:
        TypeError: a dtype is not a float, ``cos`` or ``sin`` is not fp32, or ``interleaved`` is no bool.
        ValueError: a shape or a device does not fit, or ``cos`` or ``sin`` requires a gradient.
    """
    checks.floating(x=x, cos=cos, sin=sin)
    _check_heads(x)
    _check_tables("x", x, x.shape[3], cos, sin, interleaved)
    return apply(_Rotary, x, cos, distinct(sin, cos), interleaved)


def rms_norm_rotary(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Return :func:`rotary` of ``x``, each head of which is divided by its root mean square first, in one pass.

    This is QK-norm: with a weight as Qwen3 has it, without one as in modded-nanogpt and nanochat. The norm and the
    rotation are fp32, and the result is rounded once. Under autocast the weight is cast to the dtype of ``x``, and
    nothing else: the result goes into attention, which would cast it back.

    Args:
        x: ``(B, T, H, D)``, as in :func:`rotary`.
        cos: as in :func:`rotary`, or ``None`` for the norm alone.
        sin: as in :func:`rotary`, or ``None`` if ``cos`` is.
        weight: ``(D,)``, multiplies every head before it is turned; dtype and device of ``x``; or ``None`` for ones.
        eps: added to the mean square; at least 0.
        interleaved: as in :func:`rotary`.

    Returns:
        ``(B, T, H, D)``, contiguous, dtype of ``x``.

    Raises:
        TypeError: a dtype is not a float, ``weight`` has not that of ``x``, ``cos`` or ``sin`` is not fp32, or an
            option has a wrong type.
        ValueError: a shape, a device or ``eps`` does not fit, only one of ``cos`` and ``sin`` is given, or one
            requires a gradient.
    """
    checks.floating(x=x)
    checks.floating_if_given(weight=weight)
    main_grad = None if weight is None else main_grad_of(weight)  # of the parameter itself, before autocast casts it
    if weight is not None and autocast.enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        weight = weight.to(x.dtype)
    _check_heads(x)
    checks.epsilon(eps)
    if weight is not None:
        checks.same("x", x=x, weight=weight)
        checks.shape("weight", weight, (x.shape[3],))
    _check_tables("x", x, x.shape[3], cos, sin, interleaved)
    if cos is not None and sin is not None:
        sin = distinct(sin, cos)
    return apply(_RMSNormRotary, x, weight, cos, sin, eps, interleaved, main_grad)[0]


def rotary_qkv(
    qkv: Tensor,
    n_head: int,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    n_kv_head: int | None = None,
    qk_norm: bool = False,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> Tensor:
    """Return packed q, k and v with q and k turned, for :func:`attention_qkv`, in one pass forward and one backward.

    ``attention_qkv(rotary_qkv(linear(x, w), n_head, cos, sin), n_head)`` has no split and no concatenation. With
    ``qk_norm`` each head of q and k is divided by its root mean square first. The backward then needs the result, which
    attention keeps anyway, and not ``qkv``.

    Args:
        qkv: ``(B, T, (n_head + 2 n_kv_head) D)``, q, k and v side by side; any strides, fp32, bf16, fp16 or fp64; D
            even, at most ``heads.MAX_HEAD_SIZE``, 256.
        n_head: number of heads of q.
        cos: as in :func:`rotary`, or with ``qk_norm`` also ``None`` for the norm alone. With ``qk_norm``, no pair of a
            cosine and a sine may be (0, 0), because the backward turns the result back; those of angles never are.
        sin: as in :func:`rotary`, or ``None`` if ``cos`` is.
        n_kv_head: number of heads of k and of v; divides ``n_head``, which is the default.
        qk_norm: whether q and k are normalised.
        eps: added to the mean square; at least 0.
        interleaved: as in :func:`rotary`.

    Returns:
        The shape and dtype of ``qkv``, contiguous.

    Raises:
        TypeError: ``qkv`` is not a floating-point tensor, ``cos`` or ``sin`` is not fp32, or an option has a wrong
            type.
        ValueError: a shape, a device, a number of heads or ``eps`` does not fit, only one of ``cos`` and ``sin`` is
            given or, without ``qk_norm``, none, or one requires a gradient.
    """
    checks.floating(qkv=qkv)
    checks.size("n_head", n_head)
    if n_kv_head is None:
        n_kv_head = n_head
    checks.size("n_kv_head", n_kv_head)
    if n_head % n_kv_head:
        raise ValueError(f"n_kv_head: {n_kv_head} does not divide n_head = {n_head}")
    checks.boolean("qk_norm", qk_norm)
    checks.epsilon(eps)
    n = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or 0 in qkv.shape[1:]:
        raise ValueError(f"qkv: expected (B, T, {n} D), only B may be 0, got {tuple(qkv.shape)}")
    D = qkv.shape[2] // n
    if qkv.shape[2] % n or D % 2 or D > MAX_HEAD_SIZE:
        raise ValueError(
            f"n_head: {n_head} heads of q and {n_kv_head} of k and v do not divide qkv's {qkv.shape[2]} columns into "
            f"heads of an even size of at most {MAX_HEAD_SIZE}"
        )
    if cos is None and not qk_norm:
        raise ValueError("cos: expected a Tensor, or qk_norm=True")
    _check_tables("qkv", qkv, D, cos, sin, interleaved)
    if cos is not None and sin is not None:
        sin = distinct(sin, cos)
    return apply(_RotaryQKV, qkv, n_head, n_kv_head, cos, sin, qk_norm, eps, interleaved)[0]


def _check_head_size(head_size: int) -> None:
    checks.size("head_size", head_size)
    if head_size % 2:
        raise ValueError(f"head_size: expected an even number, got {head_size}")


def _check_heads(x: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape[1:] or x.shape[3] % 2 or x.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(
            f"x: expected (B, T, H, D), only B may be 0, D even and at most {MAX_HEAD_SIZE}, got {tuple(x.shape)}"
        )


def _check_tables(
    first: str, x: Tensor, D: int, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> None:  # fmt: skip
    """Check the tables for ``x``, (B, T, …), the argument ``first``, with heads of D, and the form of the pairs."""
    if cos is None and sin is not None:
        raise ValueError("cos: expected a Tensor, because there is a sin")
    if sin is None and cos is not None:
        raise ValueError("sin: expected a Tensor, because there is a cos")
    checks.boolean("interleaved", interleaved)
    if cos is None or sin is None:
        return
    checks.floating(cos=cos, sin=sin)
    B, T = x.shape[:2]
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name}: expected float32, whatever {first} is, got {table.dtype}")
        if tuple(table.shape) not in ((T, D // 2), (B, T, D // 2)):
            raise ValueError(f"{name}: expected shape {(T, D // 2)} or {(B, T, D // 2)}, got {tuple(table.shape)}")
    checks.shape("sin", sin, tuple(cos.shape))
    checks.on_one_device(first, **{first: x, "cos": cos, "sin": sin})
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad:
            raise ValueError(f"{name}: gets no gradient, so it must not require one")
