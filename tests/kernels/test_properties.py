"""What holds of every public function whatever the shape, dtype, layouts, gradients asked for and rows ignored.

The error rule; outputs as documented; nothing written but the outputs; the same bits twice.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
    geglu,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    relu2,
    rms_norm,
    rms_norm_rotary,
    rotary,
    rotary_qkv,
    rotary_tables,
    swiglu,
)
from fastgpt.kernels.philox import dropout_factors
from tests.kernels import local, peers
from tests.kernels.peers import product

# fp16 is for Triton and the reference. The interpreter is a thousand times slower than C++.
DTYPES = {
    "reference": [torch.float32, torch.bfloat16, torch.float16],
    "cpp": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}
EXAMPLES = {"reference": 50, "cpp": 200, "triton": 8}

# On and off the widths of vectors and blocks, and 1
WIDTHS = [1, 2, 3, 5, 16, 17, 33, 63, 65, 127]
# Where few keys take part, or equal ones, the gradients of q and k are what rounding leaves of a difference. And where
# all channels are equal, rounding errors are equal too in sums taken one by one, and add up; sums taken by halves have
# none, by chance of the input (ours and PyTorch's differ in that on some CPUs). Both say nothing of a kernel.
LENGTHS = [5, 17, 33, 65]
LEADING = [(), (1,), (2,), (17,), (65,), (0,), (1, 3), (5, 7), (2, 0), (2, 1, 5), (3, 2, 2, 3)]
HEADS = [(1, 1), (2, 3), (3, 1), (1, 2)]
HEAD_SIZES = [1, 2, 5, 16, 20, 33, 64]
ATTENTIONS = (2, 3)  # positions and channels of (B, H, T, D)


class Draw:
    """What an example is made of, drawn from hypothesis."""

    def __init__(self, data: st.DataObject, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        torch.manual_seed(self.integer(0, 9))

    def one_of(self, values: list[Any]) -> Any:
        return self.data.draw(st.sampled_from(values))

    def integer(self, least: int, most: int) -> int:
        return self.data.draw(st.integers(least, most))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def layout(self, t: Tensor, distinct: tuple[int, ...] = ()) -> Tensor:
        """``t`` in memory of its own and a drawn layout; between its elements lies NaN, or what is no class.

        Args:
            t: a tensor.
            distinct: dimensions whose entries must not become all the same.
        """
        junk = math.nan if t.is_floating_point() else 10**6
        kind = self.one_of(["contiguous", "offset", "permuted", "sliced", "expanded"] if t.dim() else ["offset"])
        d = self.integer(0, t.dim() - 1) if kind in ("sliced", "expanded") else 0
        if kind == "offset":  # by an odd number of elements from where the memory begins
            before = self.one_of([1, 3, 7])
            larger = t.new_full((before + t.numel() + 1,), junk)
            laid_out = larger.narrow(0, before, t.numel()).view(t.shape)
        elif kind == "permuted":
            order = self.one_of(list(itertools.permutations(range(t.dim()))))
            laid_out = torch.empty_like(t.permute(order), memory_format=torch.contiguous_format)
            laid_out = laid_out.permute([order.index(i) for i in range(t.dim())])
        elif kind == "sliced":  # every other element of a dimension
            larger = t.new_full([2 * n + 3 if i == d else n for i, n in enumerate(t.shape)], junk)
            laid_out = larger.transpose(0, d)[1 : 1 + 2 * t.shape[d] : 2].transpose(0, d)
        elif kind == "expanded" and t.numel() and d not in distinct:  # the first entry of a dimension again and again
            return t.narrow(d, 0, 1).clone().expand_as(t)
        else:
            laid_out = torch.empty_like(t, memory_format=torch.contiguous_format)
        return laid_out.copy_(t)

    def tensor(self, *shape: int, scale: float = 1.0, distinct: tuple[int, ...] = ()) -> Tensor:
        """Random numbers. The first is 2, lest by chance they are all small and the error rule's floor with them."""
        t = torch.randn(shape)
        t.view(-1)[:1] = 2.0
        return self.layout((scale * t).to(self.dtype), distinct)

    def targets(self, n_rows: int, n_classes: int, ignore_index: int) -> Tensor:
        targets = torch.randint(n_classes, (n_rows,))
        ignored = self.one_of(["none", "a third", "all but one", "all", "the last"])
        if ignored == "the last":
            targets[-1:] = ignore_index
        elif ignored != "none":
            targets[{"a third": slice(0, None, 3), "all but one": slice(1, None), "all": slice(None)}[ignored]] = (
                ignore_index
            )
        return self.layout(targets)


# ---- a call of each function ----


def as_documented(output: Tensor, dtype: torch.dtype) -> bool:
    return output.is_contiguous() and output.dtype == dtype


@dataclass
class Call:
    """A function's call.

    Attributes:
        ours: the function, of ``tensors``.
        plain: the same in plain PyTorch.
        tensors: what it can be differentiated by.
        peer: another way to compute it in plain PyTorch; the worse of the two is the measure.
        result: dtype of the outputs, if it is not that of the tensors.
        is_laid_out: whether an output lies in memory as documented.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    tensors: list[Tensor]
    peer: Callable[..., Any] | None = None
    result: torch.dtype | None = None
    is_laid_out: Callable[[Tensor], bool] = Tensor.is_contiguous


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def a_layer_norm(draw: Draw) -> Call:
    shape, eps = (*draw.one_of(LEADING), draw.one_of(WIDTHS)), draw.one_of([1e-5, 0.5])
    sizes = [shape, shape[-1:], shape[-1:]][: 2 + draw.flag()]
    return Call(
        lambda *t: layer_norm(*t, eps=eps),
        lambda x, *rest: F.layer_norm(x, shape[-1:], *rest, eps=eps),
        [draw.tensor(*size) for size in sizes],
    )


def an_add_layer_norm(draw: Draw) -> Call:
    call = a_layer_norm(draw)
    x, *rest = call.tensors

    def plain(x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x + residual, x.shape[-1:], *rest), x + residual

    return Call(add_layer_norm, plain, [x, draw.tensor(*x.shape), *rest])


def an_rms_norm(draw: Draw) -> Call:
    shape, eps = (*draw.one_of(LEADING), draw.one_of(WIDTHS)), draw.one_of([1e-6, 0.5])
    sizes = [shape, shape[-1:]][: 1 + draw.flag()]
    return Call(
        lambda *t: rms_norm(*t, eps=eps),
        lambda x, *weight: F.rms_norm(x, shape[-1:], *weight, eps=eps),
        [draw.tensor(*size) for size in sizes],
    )


def an_add_rms_norm(draw: Draw) -> Call:
    x, *weight = an_rms_norm(draw).tensors

    def plain(x: Tensor, residual: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x + residual, x.shape[-1:], *weight, eps=1e-6), x + residual

    return Call(add_rms_norm, plain, [x, draw.tensor(*x.shape), *weight])


def a_gelu(draw: Draw) -> Call:
    kind = draw.one_of(["tanh", "none"])
    return Call(
        lambda x: gelu(x, kind),
        lambda x: F.gelu(x, approximate=kind),
        [draw.tensor(*draw.one_of(LEADING), *draw.one_of([(), (33,), (0,)]))],
    )


def a_gelu_with_bias(draw: Draw) -> Call:
    kind, shape = draw.one_of(["tanh", "none"]), (*draw.one_of(LEADING), draw.one_of(WIDTHS))
    return Call(
        lambda x, bias: gelu(x, kind, bias),
        lambda x, bias: F.gelu(wide(x) + wide(bias), approximate=kind).to(x.dtype),
        [draw.tensor(*shape), draw.tensor(shape[-1])],
    )


def a_relu2(draw: Draw) -> Call:
    tensors = [draw.tensor(*draw.one_of(LEADING), *draw.one_of([(), (33,), (0,)]))]
    return Call(relu2, lambda x: F.relu(x).square(), tensors)


def a_gated_unit(draw: Draw) -> Call:
    kind, packed = draw.one_of(["silu", "tanh", "none"]), draw.flag()
    shape = (*draw.one_of(LEADING), *draw.one_of([(33,), (1,), (0,)] if packed else [(), (33,), (1,), (0,)]))

    def ours(*t: Tensor) -> Tensor:
        return swiglu(*t) if kind == "silu" else geglu(*t, approximate=kind)

    def plain(gate: Tensor, *up: Tensor) -> Tensor:
        a, b = (wide(t) for t in ((gate, *up) if up else gate.chunk(2, -1)))
        return ((F.silu(a) if kind == "silu" else F.gelu(a, approximate=kind)) * b).to(gate.dtype)

    shapes = [(*shape[:-1], 2 * shape[-1])] if packed else [shape, shape]
    return Call(ours, plain, [draw.tensor(*each) for each in shapes])


def formula(causal: bool, scale: float | None, factors: Tensor | None = None) -> Callable[..., Tensor]:
    """Attention as it is written down, its weights multiplied by dropout's ``factors``."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            later = q.shape[-2] - k.shape[-2] + torch.arange(k.shape[-2], device=k.device)  # than the first query
            hidden = later > torch.arange(q.shape[-2], device=q.device)[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1)
        return (weights if factors is None else weights * factors.to(weights.dtype)) @ v

    return plain


def sdpa(causal: bool, scale: float | None) -> Callable[..., Tensor]:
    """PyTorch's own, which like ours recomputes the weights in the backward."""

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, S = q.shape[-2], k.shape[-2]
        if causal and S != T:  # PyTorch's flag counts from the first key
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    return peer


def an_attention(draw: Draw) -> Call:
    causal, scale, dropout_p = draw.flag(), draw.one_of([None, 0.3]), draw.one_of([0.0, 0.0, 0.1, 0.5, 0.9])
    (B, H), T, D = draw.one_of(HEADS), draw.one_of(LENGTHS), draw.one_of(HEAD_SIZES)
    S = draw.one_of([n for n in LENGTHS if n >= T or not causal])
    options, deterministic = {"causal": causal, "scale": scale}, draw.flag()
    tensors = [draw.tensor(B, H, n, D, distinct=ATTENTIONS) for n in (T, S, S)]
    if not dropout_p:
        return Call(
            lambda *t: attention(*t, **options, deterministic=deterministic), formula(**options), tensors,
            sdpa(**options), is_laid_out=time_major,
        )  # fmt: skip
    torch.manual_seed(3)  # what attention will draw, and the mask that this means on every backend
    factors = dropout_factors(torch.randint(2**62, ()), dropout_p, B, H, T, S)

    def ours(*t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(*t, **options, dropout_p=dropout_p, deterministic=deterministic)

    return Call(ours, formula(**options, factors=factors), tensors, is_laid_out=time_major)


def a_local_attention(draw: Draw) -> Call:
    """With fewer heads of keys, a window, documents and a soft cap, each of them or not.

    Some query sees two keys: if all see one, the gradient of q is 0 but for rounding, of which plain PyTorch has none.
    """
    B, T, D = draw.one_of([1, 2]), draw.one_of(LENGTHS), draw.one_of(HEAD_SIZES)
    Hk, group, S = draw.one_of([1, 2]), draw.one_of([1, 2, 3]), draw.one_of([n for n in LENGTHS if n >= max(T, 2)])
    lengths = draw.one_of([None, [S], [50, 3]] if T > 1 else [None, [S]])
    options = {
        "window": draw.one_of([None, 2, 7, 64, S]), "softcap": draw.one_of([None, 1.0, 30.0]),
        "documents": None if lengths is None else local.starts_of(lengths, S, B),
    }  # fmt: skip
    deterministic, shapes = draw.flag(), [(B, Hk * group, T, D), (B, Hk, S, D), (B, Hk, S, D)]
    return Call(
        lambda *t: attention(*t, **options, deterministic=deterministic), local.formula(**options),
        [draw.tensor(*shape, distinct=ATTENTIONS) for shape in shapes], local.sdpa(**options), is_laid_out=time_major,
    )  # fmt: skip


def time_major(out: Tensor) -> bool:
    return out.transpose(1, 2).is_contiguous()


def on_packed(function: Callable[..., Tensor], n_head: int) -> Callable[..., Tensor]:
    """``function`` of q, k and v as one of their packing."""

    def packed(qkv: Tensor) -> Tensor:
        B, T, width = qkv.shape
        parts = qkv.reshape(B, T, 3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4).unbind(0)
        return function(*parts).transpose(1, 2).reshape(B, T, width // 3)

    return packed


def an_attention_qkv(draw: Draw) -> Call:
    causal, scale = draw.flag(), draw.one_of([None, 0.3])
    (B, n_head), T, D = draw.one_of(HEADS), draw.one_of(LENGTHS), draw.one_of(HEAD_SIZES)
    options, deterministic = {"causal": causal, "scale": scale}, draw.flag()
    return Call(
        lambda qkv: attention_qkv(qkv, n_head, **options, deterministic=deterministic),
        on_packed(formula(**options), n_head),
        [draw.tensor(B, T, 3 * n_head * D, distinct=(1, 2))],
        on_packed(sdpa(**options), n_head),
    )


def angles(draw: Draw, B: int, T: int, D: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, one row for each position, or for each position of each sequence, in a drawn layout."""
    cos, sin = rotary_tables(B * T, D, draw.one_of([10.0, 10000.0]), start=draw.one_of([0, 100]))
    shape = draw.one_of([(T, D // 2), (B, T, D // 2)])
    return tuple(draw.layout(t[: math.prod(shape[:-1])].view(shape)) for t in (cos, sin))  # type: ignore[return-value]


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation as it is written down, in the dtype of ``x``."""
    c, s = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    parts = a * c - b * s, b * c + a * s
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def heads_to_turn(draw: Draw) -> tuple[int, int, int]:
    return draw.one_of([0, 1, 2, 3]), draw.one_of([1, 2, 5, 17, 33]), draw.one_of([2, 4, 10, 16, 34, 64])


def a_rotary(draw: Draw) -> Call:
    (B, T, D), interleaved = heads_to_turn(draw), draw.flag()
    cos, sin = angles(draw, B, T, D) if B else rotary_tables(T, D)
    return Call(
        lambda x: rotary(x, cos, sin, interleaved=interleaved),
        lambda x: turned(x, cos, sin, interleaved),
        [draw.tensor(B, T, draw.one_of([1, 2, 5]), D)],
    )


def a_rms_norm_rotary(draw: Draw) -> Call:
    (B, T, D), interleaved, eps = heads_to_turn(draw), draw.flag(), draw.one_of([1e-6, 0.5])
    cos, sin = angles(draw, B, T, D) if B else rotary_tables(T, D)
    turns = draw.flag()

    def plain(x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = F.rms_norm(x, (D,), weight, eps)
        return turned(y, cos, sin, interleaved) if turns else y

    def ours(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_norm_rotary(x, *(cos, sin) if turns else (None, None), weight, eps, interleaved=interleaved)

    # where all elements of a head are equal, its gradient is what rounding leaves of a difference
    x = draw.tensor(B, T, draw.one_of([1, 2, 5]), D, distinct=(3,))
    return Call(ours, plain, [x, draw.tensor(D)][: 1 + draw.flag()])


def a_rotary_qkv(draw: Draw) -> Call:
    (B, T, D), interleaved, qk_norm = heads_to_turn(draw), draw.flag(), draw.flag()
    n_head, n_kv_head = draw.one_of([(1, 1), (2, 2), (4, 2), (3, 1)])
    cos, sin = angles(draw, B, T, D) if B else rotary_tables(T, D)
    options = {"n_kv_head": n_kv_head, "qk_norm": qk_norm, "interleaved": interleaved}

    def plain(qkv: Tensor) -> Tensor:
        heads, v = qkv.unflatten(-1, (-1, D)).split([n_head + n_kv_head, n_kv_head], 2)
        heads = F.rms_norm(heads, (D,), eps=1e-6) if qk_norm else heads
        return torch.cat([turned(heads, cos, sin, interleaved), v], 2).flatten(-2)

    qkv = draw.tensor(B, T, (n_head + 2 * n_kv_head) * D, distinct=(2,))
    return Call(lambda x: rotary_qkv(x, n_head, cos, sin, **options), plain, [qkv])


def a_cross_entropy(draw: Draw) -> Call:
    N, V, ignore_index = draw.one_of([1, 2, 5, 33, 127, 0]), draw.one_of(WIDTHS), draw.one_of([-1, -100, 0])
    logits, targets = draw.tensor(N, V), draw.targets(N, V, ignore_index)
    return Call(
        lambda x: cross_entropy(x, targets, ignore_index),
        lambda x: F.cross_entropy(wide(x), targets, ignore_index=ignore_index),
        [logits],
        result=torch.float32,
    )


def loss_options(draw: Draw, V: int) -> dict[str, Any]:
    """Any combination of the options of a loss."""
    weight = draw.layout(torch.rand(V) + 0.1) if draw.flag() else None
    return {
        "softcap": draw.one_of([None, 4.0, 30.0]), "z_loss": draw.one_of([0.0, 0.01]),
        "label_smoothing": draw.one_of([0.0, 0.1, 1.0]), "weight": weight,
        "reduction": draw.one_of(["mean", "sum", "none"]),
    }  # fmt: skip


def a_cross_entropy_with_options(draw: Draw) -> Call:
    N, V, ignore_index = draw.one_of([1, 2, 5, 33, 127, 0]), draw.one_of(WIDTHS), draw.one_of([-1, -100, 0])
    logits, targets, options = draw.tensor(N, V), draw.targets(N, V, ignore_index), loss_options(draw, V)
    return Call(
        lambda x: cross_entropy(x, targets, ignore_index, **options),
        lambda x: peers.cross_entropy(x, targets, ignore_index, **options),
        [logits],
        result=torch.float32,
    )


def a_linear_cross_entropy_with_options(draw: Draw) -> Call:
    call = a_linear_cross_entropy(draw)
    (N, _), (V, _) = (t.shape for t in call.tensors)
    ignore_index = draw.one_of([-1, -100, 0])
    targets, options = draw.targets(N, V, ignore_index), loss_options(draw, V)
    renamed = {"class_weight" if name == "weight" else name: value for name, value in options.items()}
    return Call(
        lambda x, weight: linear_cross_entropy(x, weight, targets, ignore_index, **renamed),
        lambda x, weight: peers.cross_entropy(product(x, weight), targets, ignore_index, **options),
        call.tensors,
        result=torch.float32,
    )


def a_linear_cross_entropy(draw: Draw) -> Call:
    N, V, ignore_index = draw.one_of([1, 2, 5, 33, 127, 0]), draw.one_of(WIDTHS), draw.one_of([-1, -100, 0])
    C = draw.one_of(WIDTHS)
    x, weight, targets = draw.tensor(N, C), draw.tensor(V, C, scale=1 / C), draw.targets(N, V, ignore_index)
    return Call(
        lambda x, weight: linear_cross_entropy(x, weight, targets, ignore_index),
        lambda x, weight: F.cross_entropy(wide(product(x, weight)), targets, ignore_index=ignore_index),
        [x, weight],
        result=torch.float32,
    )


def a_linear(draw: Draw) -> Call:
    C_in, C_out = draw.one_of(WIDTHS), draw.one_of(WIDTHS)
    sizes = [(*draw.one_of(LEADING), C_in), (C_out, C_in), (C_out,)][: 2 + draw.flag()]
    return Call(linear, product, [draw.tensor(*size) for size in sizes])


CALLS = {
    "layer_norm": a_layer_norm,
    "add_layer_norm": an_add_layer_norm,
    "rms_norm": an_rms_norm,
    "add_rms_norm": an_add_rms_norm,
    "gelu": a_gelu,
    "gelu with bias": a_gelu_with_bias,
    "relu2": a_relu2,
    "swiglu and geglu": a_gated_unit,
    "attention": an_attention,
    "attention_qkv": an_attention_qkv,
    "rotary": a_rotary,
    "rms_norm_rotary": a_rms_norm_rotary,
    "rotary_qkv": a_rotary_qkv,
    "local attention": a_local_attention,
    "cross_entropy": a_cross_entropy,
    "linear_cross_entropy": a_linear_cross_entropy,
    "cross_entropy with options": a_cross_entropy_with_options,
    "linear_cross_entropy with options": a_linear_cross_entropy_with_options,
    "linear": a_linear,
}

# ---- the properties ----


def memory(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of all bytes of what the tensors lie in, between their elements too."""
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in tensors]


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Also where they are NaN."""
    if a is None or b is None:
        return a is b
    return torch.equal(
        *(t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    )


def outcome(call: Call, asking: tuple[bool, ...], douts: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the gradients of the tensors that ask."""
    leaves = [t.detach().requires_grad_(asks) for t, asks in zip(call.tensors, asking, strict=True)]
    outputs = call.ours(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.autograd.backward(outputs, douts)
    return outputs, [leaf.grad for leaf in leaves]


def on_rounded_inputs(function: Callable[..., Any], eps: float, seed: int) -> Callable[..., Any]:
    """``function`` in float64, each of whose inputs is off by ``eps`` of itself, up or down.

    As a peer it tells how far the function magnifies a few errors of rounding: on a few numbers, or where
    differences of equal ones are taken, plain PyTorch can be exact by luck. (The tests of each operator hold it
    to plain PyTorch alone, on enough numbers.)
    """

    def peer(*tensors: Tensor) -> Any:
        signs = torch.Generator().manual_seed(seed)
        return function(
            *(
                t.double() * (1 + eps * (2 * torch.randint(2, t.shape, generator=signs, device="cpu").to(t.device) - 1))
                for t in tensors
            )
        )

    return peer


def check(call: Call, draw: Draw, rule: Any) -> None:
    asking = draw.one_of([a for a in itertools.product([True, False], repeat=len(call.tensors)) if any(a)])
    result = call.result or draw.dtype
    shapes = call.plain(*(t.double() for t in call.tensors))
    douts = [draw.tensor(*t.shape).to(result) for t in (shapes if isinstance(shapes, tuple) else (shapes,))]
    note(f"{[(t.dtype, tuple(t.shape), t.stride()) for t in (*call.tensors, *douts)]}, asking {asking}")

    before = memory([*call.tensors, *douts])
    outputs, gradients = outcome(call, asking, douts)
    again, gradients_again = outcome(call, asking, douts)
    assert all(map(torch.equal, before, memory([*call.tensors, *douts]))), "an input or incoming gradient changed"
    assert all(map(same_bits, [*outputs, *gradients], [*again, *gradients_again])), "not the same bits twice"
    for output in outputs:
        assert call.is_laid_out(output)
        assert output.dtype == result
    assert tuple(g is not None for g in gradients) == asking

    rounded = (on_rounded_inputs(call.plain, 4 * torch.finfo(result).eps, seed) for seed in range(5))
    peers = [rule.run(peer, call.tensors, douts) for peer in (call.plain, call.peer, *rounded) if peer]
    truth, true_gradients = rule.run(call.plain, [t.double() for t in call.tensors], [d.double() for d in douts])
    for i, output in enumerate(outputs):
        if output.dim() == 0 and truth[i].isnan():  # the mean over no rows
            assert output.isnan()
            continue
        rule.error(f"output {i}", output, [p[0][i] for p in peers], truth[i], result, rule.output)
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            assert gradient.dtype == draw.dtype
            what = f"gradient of input {i}"
            rule.error(what, gradient, [p[1][i] for p in peers], true_gradients[i], draw.dtype, rule.gradient)


@pytest.mark.parametrize("name", CALLS)
def test_whatever_it_is_given_it_is_accurate_and_writes_nothing_else(backend, rule, name):
    @settings(max_examples=EXAMPLES[backend], derandomize=True, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        draw = Draw(data, data.draw(st.sampled_from(DTYPES[backend])))
        check(CALLS[name](draw), draw, rule)

    holds()
