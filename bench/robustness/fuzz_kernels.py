"""Random calls of fastgpt's kernels on the CPU: any shapes, layouts, dtypes and gradients, and wrong arguments.

A call must either be refused by one line that begins with an argument's name, on every backend alike, or give what
the same call in float64 gives, as far as rounding its inputs allows. ``tests/kernels/test_properties.py`` is stricter
with good calls, and ``test_malformed_calls.py`` spoils one argument at a time; here everything is drawn at once.
"""

import math
import re
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastgpt import kernels

# ---- what an example is made of: its repr is Python ----


@dataclass(frozen=True)
class Floats:
    """A tensor of random numbers.

    Attributes:
        shape: of it.
        dtype: its name.
        layout: one of ``LAYOUTS``.
        fill: one of ``FILLS``.
        asks: for a gradient.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    fill: str = "normal"
    asks: bool = True


@dataclass(frozen=True)
class Indices:
    """A tensor of random integers in ``[0, below)``, some of which are ``others``."""

    shape: tuple[int, ...]
    below: int
    others: tuple[int, ...] = ()
    dtype: str = "int64"
    layout: str = "contiguous"


@dataclass(frozen=True)
class Wrong:
    """One of ``WRONG`` or ``WRONG_TENSORS``, by its name."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of a public function, and what is given to its backward."""

    function: str
    arguments: dict[str, Any]
    dout: str = "contiguous"  # the layout of the incoming gradients


@dataclass(frozen=True)
class Steps:
    """Steps of FusedAdamW: parameters, the gradients of each step, the optimizer's arguments and those of a step."""

    params: tuple[Any, ...]
    grads: tuple[Any, ...]
    options: dict[str, Any]
    step: dict[str, Any]
    n_steps: int = 2


def turned(t: Tensor) -> Tensor:
    """The dimensions in the opposite order in memory."""
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def window(t: Tensor) -> Tensor:
    """Rows that overlap: each begins an element after the one before it."""
    flat = t.flatten()
    return flat.as_strided(t.shape, [1] * t.dim()) if t.numel() else t


def every_other(t: Tensor, d: int) -> Tensor:
    """``t`` as every other entry of a dimension; what lies between is NaN."""
    junk = math.nan if t.is_floating_point() else 100
    larger = t.new_full([2 * n + 1 if i == d % t.dim() else n for i, n in enumerate(t.shape)], junk)
    part = larger.transpose(0, d)[1::2].transpose(0, d)
    return part.copy_(t)


def offset(t: Tensor) -> Tensor:
    """``t`` at an odd number of elements behind the start of its memory."""
    larger = t.new_empty(t.numel() + 4)[3 : 3 + t.numel()].view(t.shape)
    return larger.copy_(t)


def negative(t: Tensor) -> Tensor:
    """``t`` as a view whose sign is still to be applied."""
    return torch.complex(torch.zeros_like(t).float(), -t.float()).conj().imag if t.dtype == torch.float32 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "offset": offset,
    "reversed": turned,
    "every other": lambda t: every_other(t, -1) if t.dim() else t,
    "every other row": lambda t: every_other(t, 0) if t.dim() else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and t.numel() else t,
    "expanded at the end": lambda t: t[..., :1].expand_as(t) if t.dim() and t.numel() else t,
    "one element": lambda t: t.flatten()[0].expand_as(t) if t.numel() else t,
    "window": window,
    "negative": negative,
    "copy on write": torch._lazy_clone,
}  # fmt: skip


def extremes(t: Tensor) -> Tensor:
    """Infinities, NaN, the largest numbers and the smallest in the place of some of the elements."""
    values = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0, 1e30])
    chosen = values[torch.randint(len(values), t.shape)]
    return torch.where(torch.rand(t.shape) < 0.3, chosen, t)


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda t: t,
    "zeros": torch.zeros_like,
    "large": lambda t: t * 1e3,
    "extremes": extremes,
}

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "1.5": lambda: 1.5,
    "nan": lambda: math.nan,
    "-inf": lambda: -math.inf,
    "True": lambda: True,
    "1j": lambda: 1j,
    "text": lambda: "text",
    "[]": lambda: [],
    "[1.0]": lambda: [1.0],
    "a dict": lambda: {},
    "an object": object,
    "a type": lambda: float,
    "a scalar tensor": lambda: torch.tensor(1.0),
}
WRONG_TENSORS: dict[str, Callable[[], Any]] = {
    "an empty tensor": lambda: torch.empty(0),
    "NumPy's": lambda: torch.ones(2, 3).numpy(),
    "bool": lambda: torch.ones(2, 3, dtype=torch.bool),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(2, 3, device="meta"),
}

# ---- drawing them ----

SIZES = st.one_of(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 65]), st.integers(1, 80))
LEADING = st.lists(st.sampled_from([1, 2, 3, 5, 17, 0]), max_size=3).map(tuple)
FEW = st.sampled_from([1, 2, 3])
HEAD_SIZES = st.sampled_from([1, 2, 8, 16, 20, 33, 64, 256])
DTYPES = st.sampled_from(["float32"] * 4 + ["bfloat16"] * 4 + ["float16", "float64"])
IGNORED = st.sampled_from([-1, -100, 0, 3])


def mostly(value: Any, others: Iterable[Any]) -> st.SearchStrategy[Any]:
    """``value`` twice as often as all the others."""
    others = list(others)
    return st.one_of(st.just(value), st.just(value), st.sampled_from(others))


class Draw:
    """Arguments of one call: tensors of one dtype, some of which are spoilt."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.of = draw
        self._dtype = draw(DTYPES)
        self._spoils = draw(st.booleans())

    def size(self) -> int:
        return self.of(SIZES)

    def _spoilt(self, value: Any) -> bool:
        return self._spoils and self.of(st.integers(0, 5)) == 0

    def floats(self, *shape: int) -> Any:
        """A tensor of this shape, or something that is none."""
        layout, fill = self.of(mostly("contiguous", LAYOUTS)), self.of(mostly("normal", FILLS))
        tensor = Floats(tuple(shape), self._dtype, layout, fill, self.of(mostly(True, [False])))
        return self._another(tensor) if self._spoilt(tensor) else tensor

    def indices(self, *shape: int, below: int, ignored: int | None = None) -> Any:
        others = () if ignored is None else self.of(st.sampled_from([(), (ignored,)]))
        tensor = Indices(tuple(shape), below, others, layout=self.of(mostly("contiguous", LAYOUTS)))
        if not self._spoilt(tensor):
            return tensor
        kind = self.of(st.sampled_from(["outside", "dtype", "other"]))
        if kind == "outside":
            return replace(tensor, others=self.of(st.sampled_from([(below,), (-2,), (2**63 - 1,), (-(2**63),)])))
        if kind == "dtype":
            return replace(tensor, dtype=self.of(st.sampled_from(["int32", "int8", "uint8", "bool"])))
        return self._another(tensor)

    def _another(self, tensor: Any) -> Any:
        """A tensor of another shape or dtype, or no tensor."""
        how = self.of(st.sampled_from(["size", "more", "less", "dtype", "wrong", "wrong"]))
        shape, n = tensor.shape, len(tensor.shape)
        if how == "size" and n:
            d = self.of(st.integers(0, n - 1))
            return replace(tensor, shape=(*shape[:d], self.size(), *shape[d + 1 :]))
        if how == "more":
            d = self.of(st.integers(0, n))
            return replace(tensor, shape=(*shape[:d], self.of(FEW), *shape[d:]))
        if how == "less" and n:
            return replace(tensor, shape=shape[1:])
        if how == "dtype":
            return replace(
                tensor, dtype=self.of(st.sampled_from(["float32", "bfloat16", "float16", "float64", "int64"]))
            )
        return Wrong(self.of(st.sampled_from([*WRONG, *WRONG_TENSORS])))

    def option(self, *values: Any) -> Any:
        """One of the values, or something wrong."""
        value = self.of(st.sampled_from(values))
        return Wrong(self.of(st.sampled_from(list(WRONG)))) if self._spoilt(value) else value

    def tensor_or_none(self, *shape: int) -> Any:
        return self.floats(*shape) if self.of(st.booleans()) else None


EPS = (1e-5, 0.5, 1e-12)
SCALES = (None, None, 0.3, 2, 0.0, -1.0)
DROPOUTS = (0.0, 0.0, 0.0, 0.1, 0.9, 0.999999)


def a_layer_norm(draw: Draw) -> dict[str, Any]:
    C = draw.size()
    return {
        "x": draw.floats(*draw.of(LEADING), C), "weight": draw.tensor_or_none(C), "bias": draw.tensor_or_none(C),
        "eps": draw.option(*EPS),
    }  # fmt: skip


def an_add_layer_norm(draw: Draw) -> dict[str, Any]:
    shape = (*draw.of(LEADING), draw.size())
    return {
        "x": draw.floats(*shape), "residual": draw.floats(*shape), "weight": draw.tensor_or_none(shape[-1]),
        "bias": draw.tensor_or_none(shape[-1]), "eps": draw.option(*EPS),
    }  # fmt: skip


def an_rms_norm(draw: Draw) -> dict[str, Any]:
    C = draw.size()
    return {"x": draw.floats(*draw.of(LEADING), C), "weight": draw.tensor_or_none(C), "eps": draw.option(*EPS)}


def an_add_rms_norm(draw: Draw) -> dict[str, Any]:
    shape = (*draw.of(LEADING), draw.size())
    return {
        "x": draw.floats(*shape), "residual": draw.floats(*shape), "weight": draw.tensor_or_none(shape[-1]),
        "eps": draw.option(*EPS),
    }  # fmt: skip


def a_gelu(draw: Draw) -> dict[str, Any]:
    C = draw.size()
    return {
        "x": draw.floats(*draw.of(LEADING), C), "approximate": draw.option("tanh", "none"),
        "bias": draw.tensor_or_none(C),
    }  # fmt: skip


def a_relu2(draw: Draw) -> dict[str, Any]:
    return {"x": draw.floats(*draw.of(LEADING), draw.size())}


def a_swiglu(draw: Draw) -> dict[str, Any]:
    shape, H = draw.of(LEADING), draw.size()
    up = draw.tensor_or_none(*shape, H)
    return {"gate": draw.floats(*shape, 2 * H if up is None else H), "up": up}


def a_geglu(draw: Draw) -> dict[str, Any]:
    return {**a_swiglu(draw), "approximate": draw.option("tanh", "none")}


def attention_options(draw: Draw) -> dict[str, Any]:
    return {
        "causal": draw.option(True, False), "scale": draw.option(*SCALES), "dropout_p": draw.option(*DROPOUTS),
        "deterministic": draw.option(True, False),
    }  # fmt: skip


def local_options(draw: Draw, B: int, S: int) -> dict[str, Any]:
    """What hides keys, and the soft cap: each of them or not. Starts of documents may make no sense."""
    options = {
        "window": draw.option(None, 1, 16, 2**40), "softcap": draw.option(None, 1.0, 30, 1e-30),
        "documents": replace(draw.indices(B, S, below=max(1, S // 2)), dtype="int32") if S else None,
    }  # fmt: skip
    chosen = draw.of(st.sets(st.sampled_from(sorted(options))))
    return {name: options[name] for name in sorted(chosen)}


def an_attention(draw: Draw) -> dict[str, Any]:
    heads = () if draw.of(mostly(False, [True])) else (draw.of(FEW),)
    B, T, D = draw.of(FEW), draw.size(), draw.of(HEAD_SIZES)
    options = attention_options(draw)
    S = T + draw.of(FEW) * draw.of(FEW) if options["causal"] is True else draw.size()
    group = draw.of(mostly(1, [2, 3])) if heads else 1
    of_queries = tuple(group * n for n in heads)
    q, k, v = (draw.floats(B, *h, n, D) for h, n in ((of_queries, T), (heads, S), (heads, S)))
    return {"q": q, "k": k, "v": v, **options, **local_options(draw, B, S)}


def an_attention_qkv(draw: Draw) -> dict[str, Any]:
    n_kv_head, group, D = draw.of(FEW), draw.of(mostly(1, [2, 3])), draw.of(HEAD_SIZES)
    n_head, B, T = group * n_kv_head, draw.of(FEW), draw.size()
    qkv = draw.floats(B, T, (n_head + 2 * n_kv_head) * D)
    options = {**attention_options(draw), **local_options(draw, B, T)}
    if group > 1:
        options["n_kv_head"] = draw.option(n_kv_head, n_kv_head, 3)
    return {"qkv": qkv, "n_head": draw.option(n_head, n_head, 3), **options}


def loss_options(draw: Draw, V: int, weight_name: str) -> dict[str, Any]:
    """Some of the options of a loss. Class weights have no gradient."""
    weight = draw.tensor_or_none(V)
    options = {
        "softcap": draw.option(None, 30.0, 1), "z_loss": draw.option(0.0, 1e-4, 1),
        "label_smoothing": draw.option(0.0, 0.1, 1), "reduction": draw.option("mean", "sum", "none"),
        weight_name: replace(weight, asks=False) if isinstance(weight, Floats) else weight,
    }  # fmt: skip
    chosen = draw.of(st.sets(st.sampled_from(sorted(options))))
    return {name: options[name] for name in sorted(chosen)}


def angles(draw: Draw, B: int, T: int, D: int) -> dict[str, Any]:
    """Tables: fp32 whatever the rest is, and they get no gradient; now and then one that is wrong or asks for one."""
    shape = draw.of(st.sampled_from([(T, D // 2), (B, T, D // 2)]))
    layout = draw.of(mostly("contiguous", LAYOUTS))
    tables = {}
    for name in ("cos", "sin"):
        drawn = draw.floats(*shape)
        good = isinstance(drawn, Floats) and drawn.shape == shape and drawn.fill != "extremes"
        tables[name] = replace(drawn, dtype="float32", layout=layout, asks=False) if good else drawn
    return tables


def a_rotary(draw: Draw) -> dict[str, Any]:
    B, T, H, D = draw.of(FEW), draw.size(), draw.of(FEW), draw.of(HEAD_SIZES)
    x = draw.floats(B, T, H, D)
    return {"x": x, **angles(draw, B, T, D), "interleaved": draw.option(True, False)}


def a_rms_norm_rotary(draw: Draw) -> dict[str, Any]:
    B, T, H, D = draw.of(FEW), draw.size(), draw.of(FEW), draw.of(HEAD_SIZES)
    turns = angles(draw, B, T, D) if draw.of(st.booleans()) else {}
    return {
        "x": draw.floats(B, T, H, D), **turns, "weight": draw.tensor_or_none(D), "eps": draw.option(*EPS),
        "interleaved": draw.option(True, False),
    }  # fmt: skip


def a_rotary_qkv(draw: Draw) -> dict[str, Any]:
    B, T, D, n_kv_head = draw.of(FEW), draw.size(), draw.of(HEAD_SIZES), draw.of(FEW)
    n_head = n_kv_head * draw.of(FEW)
    # without the norm: its gradient divides by the lengths of (cos, sin), which angles have, and these need not
    return {
        "qkv": draw.floats(B, T, (n_head + 2 * n_kv_head) * D), "n_head": draw.option(n_head), **angles(draw, B, T, D),
        "n_kv_head": draw.option(n_kv_head), "interleaved": draw.option(True, False),
    }  # fmt: skip


def a_cross_entropy(draw: Draw) -> dict[str, Any]:
    N, V, ignored = draw.size(), draw.size(), draw.of(IGNORED)
    targets = draw.indices(N, below=V, ignored=ignored)
    return {
        "logits": draw.floats(N, V), "targets": targets, "ignore_index": draw.option(ignored),
        **loss_options(draw, V, "weight"),
    }  # fmt: skip


def a_linear_cross_entropy(draw: Draw) -> dict[str, Any]:
    N, V, C, ignored = draw.size(), draw.size(), draw.size(), draw.of(IGNORED)
    scale = draw.of(st.sampled_from([None, None, Floats((), asks=False)]))
    return {
        "x": draw.floats(N, C), "weight": draw.floats(V, C), "targets": draw.indices(N, below=V, ignored=ignored),
        "ignore_index": draw.option(ignored), "gradient_scale": draw.option(scale),
        **loss_options(draw, V, "class_weight"),
    }  # fmt: skip


def a_linear(draw: Draw) -> dict[str, Any]:
    C_in, C_out = draw.size(), draw.size()
    x = draw.floats(*draw.of(LEADING), C_in)
    return {"x": x, "weight": draw.floats(C_out, C_in), "bias": draw.tensor_or_none(C_out)}


def an_embedding(draw: Draw) -> dict[str, Any]:
    V, C = draw.size(), draw.size()
    return {"index": draw.indices(*draw.of(LEADING), below=V), "weight": draw.floats(V, C)}


ARGUMENTS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "layer_norm": a_layer_norm,
    "add_layer_norm": an_add_layer_norm,
    "rms_norm": an_rms_norm,
    "add_rms_norm": an_add_rms_norm,
    "gelu": a_gelu,
    "relu2": a_relu2,
    "swiglu": a_swiglu,
    "geglu": a_geglu,
    "attention": an_attention,
    "attention_qkv": an_attention_qkv,
    "rotary": a_rotary,
    "rms_norm_rotary": a_rms_norm_rotary,
    "rotary_qkv": a_rotary_qkv,
    "cross_entropy": a_cross_entropy,
    "linear_cross_entropy": a_linear_cross_entropy,
    "linear": a_linear,
    "embedding": an_embedding,
}


@st.composite
def calls(of: Any) -> Call:
    """A call of a function."""
    name, draw = of(st.sampled_from(sorted(ARGUMENTS))), Draw(of)
    return Call(name, ARGUMENTS[name](draw), of(mostly("contiguous", LAYOUTS)))


@st.composite
def steps(of: Any) -> Steps:
    """Steps of the optimizer."""
    draw = Draw(of)
    shapes = of(st.lists(st.lists(SIZES, max_size=2).map(tuple), min_size=1, max_size=3))
    params = tuple(draw.floats(*shape) for shape in shapes)
    grads = tuple(draw.floats(*shape) if of(mostly(True, [False])) else None for shape in shapes)
    defaults = {
        "lr": draw.option(1e-3, 1e-3, 0.0, 1, Floats((), asks=False)), "betas": draw.option((0.9, 0.99), (0.0, 0.0)),
        "eps": draw.option(1e-8, 1e-3), "weight_decay": draw.option(0.0, 0.1),
        "max_grad_norm": draw.option(None, 1.0, math.inf), "state_bits": draw.option(32, 32, 8),
        "stochastic_rounding": draw.option(False, False, True), "skip_nonfinite": draw.option(False, True),
    }  # fmt: skip
    chosen = of(st.sets(st.sampled_from(sorted(defaults))))
    options = {name: defaults[name] for name in sorted(chosen)}
    step = {"grad_scale": draw.option(1.0, 1.0, 0.5, Floats((), asks=False)), "zero_grad": draw.option(False, True)}
    return Steps(params, grads, options, step, of(st.integers(1, 3)))


def examples() -> st.SearchStrategy[Any]:
    """All of them."""
    return st.one_of(calls(), calls(), calls(), calls(), steps())


# ---- making them ----


def make(given: Any) -> Any:
    """The value that a part of an example stands for."""
    if isinstance(given, Wrong):
        return (WRONG | WRONG_TENSORS)[given.name]()
    if isinstance(given, Floats):
        dtype = getattr(torch, given.dtype)
        t = FILLS[given.fill](torch.randn(given.shape)).to(dtype)
        t = LAYOUTS[given.layout](t)
        return t.detach().requires_grad_(given.asks and dtype.is_floating_point)
    if isinstance(given, Indices):
        t = torch.randint(max(1, given.below), given.shape)
        if given.others:
            t = torch.where(torch.rand(given.shape) < 0.3, given.others[0], t)
        return LAYOUTS[given.layout](t.to(getattr(torch, given.dtype)))
    if isinstance(given, dict):
        return {name: make(value) for name, value in given.items()}
    return given


def is_floats(value: Any) -> bool:
    """Whether it is a dense tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse and not value.is_nested


def wide(value: Any, off_by: float = 0.0) -> Any:
    """A tensor of floats in float64, each element off by at most such a part of itself, up or down."""
    if not is_floats(value):
        return value
    t = value.detach().double()
    if off_by and not t.is_meta:
        t = t * (1 + off_by * (2 * torch.rand(t.shape) - 1))
    return t.requires_grad_(value.requires_grad)


class Fault(AssertionError):
    """Something other than a result or a refusal."""


@dataclass
class Refused:
    """A call that was refused, and how."""

    error: Exception


REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError)


def is_named(error: Exception, names: Container[str]) -> bool:
    """Whether an error is one line that begins with one of these names."""
    return re.split("[:=]", str(error))[0] in names and "\n" not in str(error)


def outcome(call: Call, arguments: dict[str, Any]) -> list[Tensor | None] | Refused:
    """Outputs and gradients of a call, or its refusal.

    Raises:
        Fault: an error in the backward, or one that names no argument in one line.
    """
    torch.manual_seed(5)  # of dropout
    try:
        outputs = getattr(kernels, call.function)(**arguments)
    except REFUSALS as error:
        if not is_named(error, arguments):
            raise Fault(f"refused with {type(error).__name__}: {str(error)!r}") from error
        return Refused(error)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    gradients: Sequence[Tensor | None] = []
    if leaves and all(t.requires_grad for t in outputs):
        torch.manual_seed(6)
        douts = [LAYOUTS[call.dout](torch.randn(t.shape).to(t.dtype)).to(t.device) for t in outputs]
        gradients = torch.autograd.grad(outputs, leaves, douts, allow_unused=True)
    return [*outputs, *gradients]


def check_call(call: Call) -> None:
    """Make the call on both backends, and compare it with float64."""
    torch.manual_seed(4)
    arguments = make(call.arguments)
    given = [value for value in call.arguments.values() if isinstance(value, Floats)]
    found = {}
    for backend in ("auto", "reference"):
        with kernels.use_backend(backend):
            found[backend] = outcome(call, arguments)
    ours, reference = found["auto"], found["reference"]
    if isinstance(ours, Refused) or isinstance(reference, Refused):
        if isinstance(ours, Refused) and isinstance(reference, Refused):
            return
        raise Fault(f"refused by one backend alone: {found}")
    comparable = all(t.fill != "extremes" for t in given) and all(t is None or not t.is_meta for t in ours)
    for a, b in zip(ours, reference, strict=True):
        if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or a.dtype != b.dtype)):
            raise Fault("the backends' results differ in shape or dtype")
    if not comparable:
        return
    dtype = next((getattr(torch, t.dtype) for t in given), torch.float32)
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    in_float64 = []
    for off_by in (0.0, *5 * [2 * eps]):
        wider = {name: wide(value, off_by) for name, value in arguments.items()}
        for name in ("gradient_scale", "cos", "sin"):  # are fp32 whatever the rest is
            if wider.get(name) is not None:
                wider[name] = arguments[name]
        in_float64.append(outcome(call, wider))
    if any(isinstance(result, Refused) for result in in_float64):
        raise Fault(f"refused in float64 alone: {in_float64}")
    # Where terms cancel, what is left of them is rounding of theirs.
    largest = max((t.abs().max().item() for t in arguments.values() if is_floats(t) and t.numel()), default=0.0)
    floor = max(1e-4, 10 * eps) * (largest**2 if any(t.fill == "large" for t in given) else 1.0)
    for backend, results in found.items():
        for i, (result, *truths) in enumerate(zip(results, *in_float64, strict=True)):
            if result is not None:
                compare(f"{backend}: result {i}", result, truths, floor)


def compare(what: str, result: Tensor, truths: Sequence[Tensor], floor: float) -> None:
    """``result`` may be off by some times what rounding the inputs of the truth makes of it, and by ``floor``."""
    truth, *rounded = truths
    most = torch.finfo(result.dtype).max / 100
    if not truth.numel() or not all((t.abs() < most).all() for t in truths):  # nor NaN
        return
    spread = max((t - truth).abs().max().item() for t in rounded)
    allowed = 10 * spread + 20 * torch.finfo(result.dtype).eps * truth.abs().max().item() + floor
    error = (result.double() - truth).abs().max().item()
    if not error <= allowed:
        raise Fault(f"{what}: off by {error:.3e}, allowed {allowed:.3e}")


# ---- the optimizer ----

ADAMW_NAMES = {
    "params", "lr", "betas", "eps", "weight_decay", "max_grad_norm", "copies", "state_bits", "stochastic_rounding",
    "skip_nonfinite", "grad", "exp_avg", "grad_scale", "step", "zero_grad",
}  # fmt: skip


def updated(example: Steps, backend: str) -> list[Tensor] | Refused:
    """The parameters after the steps."""
    torch.manual_seed(4)
    params = [make(p) for p in example.params]
    options, step = make(example.options), make(example.step)
    with kernels.use_backend(backend):
        try:
            optimizer = kernels.FusedAdamW(params, **options)
            for _ in range(example.n_steps):
                for p, grad in zip(params, example.grads, strict=True):
                    try:
                        p.grad = make(grad)
                    except (RuntimeError, TypeError):  # PyTorch takes no such gradient
                        p.grad = None
                optimizer.step(**step)
        except Exception as error:
            if "torch/optim" in traceback.extract_tb(error.__traceback__)[-1].filename:
                return Refused(error)  # as torch.optim refuses it
            if not isinstance(error, REFUSALS) or not is_named(error, ADAMW_NAMES):
                raise Fault(f"refused with {type(error).__name__}: {str(error)!r}") from error
            return Refused(error)
    return params


def check_steps(example: Steps) -> None:
    """Take the steps on both backends, and compare the parameters."""
    ours, reference = updated(example, "auto"), updated(example, "reference")
    if isinstance(ours, Refused) or isinstance(reference, Refused):
        # the C++ kernels take gradients of fewer dtypes
        if isinstance(reference, Refused) != isinstance(ours, Refused) and "grad" not in str(ours):
            raise Fault(f"refused by one backend alone: {ours}, {reference}")
        return
    at_random = example.options.get("stochastic_rounding") is True or example.options.get("state_bits") == 8
    parts = (*example.params, *example.grads, *example.options.values(), *example.step.values())
    if at_random or any(isinstance(part, Floats) and part.fill == "extremes" for part in parts):
        return
    lr = example.options.get("lr", 1e-3)
    lr = lr if isinstance(lr, float | int) else 10.0
    for a, b in zip(ours, reference, strict=True):
        if a.numel() and not b.is_meta and b.isfinite().all():
            allowed = 1e-2 * lr * example.n_steps + 4 * torch.finfo(a.dtype).eps * b.abs().max().item()
            error = (a.double() - b.double()).abs().max().item()
            if not error <= allowed:
                raise Fault(f"a parameter is off by {error:.3e}, allowed {allowed:.3e}")


def check(example: Any) -> None:
    """Raise if an example shows a fault."""
    if isinstance(example, Steps):
        check_steps(example)
    else:
        check_call(example)


def checker(folder: Path) -> Callable[[Any], None]:
    """What checks an example; nothing is written to ``folder``."""
    torch.set_num_threads(1)
    return check
