"""Every malformed call of a public function or module is refused by one line that begins with an argument's name.

The calls are generated: for everything public one good call, and each of its arguments spoilt in every way that
the docstring rules out.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastgpt.kernels as kernels
from fastgpt.kernels.heads import MAX_HEAD_SIZE

HUGE = 10**400  # finite, and yet no float holds it

# ---- the good calls ----


@dataclass(frozen=True)
class Argument:
    """How an argument may be spoilt; a dimension is counted from the last, which is -1.

    Attributes:
        values: what is put in its place; without them it is a tensor, and is spoilt as tensors are.
        optional: ``None`` is allowed.
        any_rank: more or fewer dimensions are allowed.
        any_size: dimensions that may be longer or shorter.
        any_shorter: dimensions that may be shorter.
        empty: dimensions that may be empty.
        any_dtype: no other argument's dtype has to be its own.
        any_device: nor has any other's device.
        n_classes: what its indices must stay below.
        int32: int32 is allowed beside int64.
    """

    values: tuple[Any, ...] = ()
    optional: bool = False
    any_rank: bool = False
    any_size: tuple[int, ...] = ()
    any_shorter: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    any_dtype: bool = False
    any_device: bool = False
    n_classes: int | None = None
    int32: bool = False


@dataclass(frozen=True)
class Target:
    """Something public.

    Attributes:
        call: it.
        good: arguments that it takes.
        arguments: how they, and others that it has, may be spoilt.
        others: names that its errors may begin with besides those of ``arguments``.
    """

    call: Callable[..., Any]
    good: dict[str, Any]
    arguments: dict[str, Argument]
    others: set[str] = field(default_factory=set)


def floats(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, math.prod(shape)).reshape(shape)


def made_and_called(module: type[torch.nn.Module], *inputs: str) -> Callable[..., Any]:
    """A module as a function of the arguments it is made with and of its ``inputs``."""

    def call(**arguments: Any) -> Any:
        given = [arguments.pop(name) for name in inputs]
        return module(**arguments)(*given)

    return call


NO_NUMBERS = ("1", [1.0], True, torch.tensor(1.0), 1j, math.nan, math.inf, -math.inf, HUGE)
NO_INTEGERS = (None, 2.0, "2", True, [2], torch.tensor(2), HUGE)

PLAIN = Argument()
OPTIONAL = Argument(optional=True)
ROWS = Argument(any_rank=True, any_size=(-3, -2), empty=(-3, -2))
EPS = Argument((None, *NO_NUMBERS, -1e-5))
SCALE = Argument(NO_NUMBERS)
PROBABILITY = Argument((None, *NO_NUMBERS, -0.1, 1.0, 1, 1.5))
BOOL = Argument((None, 1, 0.0, "True", torch.tensor(True)))
INDEX = Argument((*NO_INTEGERS, 2**63, -(2**63) - 1))
SIZE = Argument((*NO_INTEGERS, 0, -2))
KIND = Argument(("", "erf", "TANH", None, True, 0, ["tanh"]))

INDICES = torch.tensor([1, -1, 4, 0])
SEVEN = Argument(n_classes=7)
NORM = {"weight": OPTIONAL, "bias": OPTIONAL, "eps": EPS}
OPTIONS = {"causal": BOOL, "scale": SCALE, "dropout_p": PROBABILITY, "deterministic": BOOL}

TARGETS = {
    "layer_norm": Target(
        kernels.layer_norm, {"x": floats(2, 3, 8), "weight": floats(8), "bias": floats(8)}, {"x": ROWS, **NORM}
    ),
    "add_layer_norm": Target(
        kernels.add_layer_norm,
        {"x": floats(2, 3, 8), "residual": floats(2, 3, 8), "weight": floats(8), "bias": floats(8)},
        {"x": PLAIN, "residual": PLAIN, **NORM},
    ),
    "gelu": Target(
        kernels.gelu,
        {"x": floats(2, 3, 8), "bias": floats(8)},
        {"x": ROWS, "approximate": KIND, "bias": OPTIONAL},
    ),
    "attention": Target(
        kernels.attention,
        {"q": floats(2, 2, 5, 4), "k": floats(2, 2, 5, 4), "v": floats(2, 2, 5, 4)},
        {"q": Argument(any_shorter=(-2,)), "k": PLAIN, "v": PLAIN, **OPTIONS},  # fewer queries are the last ones
    ),
    "attention, full": Target(
        kernels.attention,
        {"q": floats(2, 2, 3, 4), "k": floats(2, 2, 5, 4), "v": floats(2, 2, 5, 4), "causal": False},
        {"q": Argument(any_size=(-2,)), "k": PLAIN, "v": PLAIN},
    ),
    "attention, heads too large": Target(
        lambda D: kernels.attention(*(floats(1, 1, 2, D) for _ in range(3))),
        {"D": MAX_HEAD_SIZE},
        {"D": Argument((MAX_HEAD_SIZE + 1,))},
        {"q"},
    ),
    "attention_qkv": Target(
        kernels.attention_qkv,
        {"qkv": floats(2, 5, 24), "n_head": 2},
        {
            "qkv": Argument(any_size=(-3, -2), empty=(-3,), any_dtype=True, any_device=True),
            "n_head": Argument((*SIZE.values, 3, 16, 3 * 10**9)),
            **OPTIONS,
        },
    ),
    "attention_qkv, heads of 512": Target(
        kernels.attention_qkv, {"qkv": floats(1, 2, 3 * 512), "n_head": 2}, {"n_head": Argument((1,))}
    ),
    "cross_entropy": Target(
        kernels.cross_entropy,
        {"logits": floats(4, 7), "targets": INDICES},
        {"logits": Argument(any_size=(-1,), any_dtype=True), "targets": SEVEN, "ignore_index": INDEX},
    ),
    "linear": Target(
        kernels.linear,
        {"x": floats(2, 3, 8), "weight": floats(7, 8), "bias": floats(7)},
        {"x": ROWS, "weight": PLAIN, "bias": OPTIONAL},
    ),
    "embedding": Target(
        kernels.embedding,
        {"index": INDICES.abs(), "weight": floats(7, 8)},
        {
            "index": Argument(any_rank=True, any_size=(-1,), empty=(-1,), n_classes=7, int32=True),
            "weight": Argument(any_size=(-2, -1), empty=(-1,), any_dtype=True),
        },
    ),
    "linear_cross_entropy": Target(
        kernels.linear_cross_entropy,
        {"x": floats(4, 8), "weight": floats(7, 8), "targets": INDICES},
        {
            "x": PLAIN,
            "weight": Argument(any_size=(-2,)),
            "targets": SEVEN,
            "ignore_index": INDEX,
            "gradient_scale": Argument((2.0, "1", True, 1j, [1.0], torch.ones(2), torch.ones((), dtype=torch.float64))),
        },
    ),
    # The modules: what they do not inherit from torch.nn, and what they are called with.
    "Linear": Target(
        made_and_called(kernels.Linear, "x"),
        {"x": floats(2, 3, 8), "in_features": 8, "out_features": 7},
        {"x": ROWS},
        {"weight"},
    ),
    "Embedding": Target(
        made_and_called(kernels.Embedding, "index"),
        {"index": INDICES.abs(), "num_embeddings": 7, "embedding_dim": 8},
        {
            "index": Argument(any_rank=True, any_size=(-1,), empty=(-1,), n_classes=7, int32=True),
            "padding_idx": Argument((0, 3, -1)),
            "max_norm": Argument((0.0, 1.0)),
            "scale_grad_by_freq": Argument((True,)),
            "sparse": Argument((True,)),
        },
    ),
    "LayerNorm": Target(
        made_and_called(kernels.LayerNorm, "x"),
        {"x": floats(2, 3, 8), "normalized_shape": 8},
        {"x": ROWS, "normalized_shape": Argument(((3, 8), ())), "eps": EPS},
        {"weight"},
    ),
    "AddLayerNorm": Target(
        made_and_called(kernels.AddLayerNorm, "x", "residual"),
        {"x": floats(2, 3, 8), "residual": floats(2, 3, 8), "normalized_shape": 8},
        {"x": PLAIN, "residual": PLAIN, "eps": EPS},
        {"weight"},
    ),
    "GELU": Target(
        made_and_called(kernels.GELU, "x"),
        {"x": floats(2, 3, 8)},
        {
            "x": Argument(any_rank=True, any_size=(-3, -2, -1), empty=(-3, -2, -1), any_dtype=True, any_device=True),
            "approximate": KIND,
        },
    ),
    "CausalSelfAttention": Target(
        made_and_called(kernels.CausalSelfAttention, "x"),
        {"x": floats(2, 5, 8), "embed_dim": 8, "num_heads": 2},
        {
            "x": Argument(any_size=(-3, -2), empty=(-3,)),
            "embed_dim": SIZE,
            "num_heads": Argument((*SIZE.values, 3, 16)),
            "dropout": PROBABILITY,
            "bias": BOOL,
        },
        {"weight"},
    ),
    "CausalSelfAttention, heads of 512": Target(
        made_and_called(kernels.CausalSelfAttention, "x"),
        {"x": floats(1, 2, 512), "embed_dim": 512, "num_heads": 2},
        {"num_heads": Argument((1,))},
    ),
    "CrossEntropyLoss": Target(
        made_and_called(kernels.CrossEntropyLoss, "input", "target"),
        {"input": floats(4, 7), "target": INDICES, "ignore_index": -1},
        {
            "input": Argument(any_size=(-1,), any_dtype=True),
            "target": SEVEN,
            "ignore_index": INDEX,
            "weight": Argument((floats(7),)),
            "label_smoothing": Argument((0.1,)),
            "reduction": Argument(("sum", "none")),
        },
        {"logits", "targets"},
    ),
    "LinearCrossEntropyLoss": Target(
        made_and_called(kernels.LinearCrossEntropyLoss, "input", "target"),
        {"input": floats(4, 8), "target": INDICES, "in_features": 8, "num_classes": 7, "ignore_index": -1},
        {
            "input": PLAIN,
            "target": SEVEN,
            "in_features": SIZE,
            "num_classes": SIZE,
            "ignore_index": Argument(INDEX.values[1:]),
            "out_features": Argument(((2,),)),
            "bias": Argument((True,)),
            "reduction": Argument(("sum", "none")),
            "weight": Argument((floats(7),)),
            "label_smoothing": Argument((0.1,)),
            "options": Argument((object(),)),
        },
        {"weight", "targets"},
    ),
}

# ---- what spoils them ----


class Spoilt(NamedTuple):
    """A value that an argument must not have.

    Attributes:
        how: in a few words.
        value: it.
        by_itself: whether it is wrong whatever the other arguments are, so that no other may be blamed.
        cast: whether autocast makes it right.
        seen_on_a_gpu: whether the host can tell.
    """

    how: str
    value: Any
    by_itself: bool = True
    cast: bool = False
    seen_on_a_gpu: bool = True


def spoilt(t: Tensor, argument: Argument) -> Iterator[Spoilt]:
    """``t`` in every way in which the argument must not be."""
    if argument.values:
        for value in argument.values:
            yield Spoilt(f"{type(value).__name__} {str(value)[:20]}", value)
        return
    if not argument.optional:
        yield Spoilt("None", None)
    for value in (t.tolist(), t.numpy(), "a tensor", 1):
        yield Spoilt(type(value).__name__, value)
    whole = t.dtype == torch.int64
    for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int32 if whole else torch.int64):
        if not (argument.int32 and dtype == torch.int32):
            yield Spoilt(str(dtype), t.to(dtype))
    for dtype in () if argument.any_dtype else (torch.float64, torch.bfloat16, torch.float16):
        yield Spoilt(str(dtype), t.to(dtype), by_itself=whole, cast=not whole and dtype != torch.float64)
    yield Spoilt("COO", t.to_sparse())
    if t.dim() > 1:
        yield Spoilt("CSR", t.to_sparse_csr())
    yield Spoilt("nested", torch.nested.nested_tensor([t, t]))
    yield Spoilt("jagged", torch.nested.nested_tensor([t, t], layout=torch.jagged))
    if not argument.any_device:
        yield Spoilt("meta", t.to("meta"), by_itself=False)
    if not argument.any_rank:
        yield Spoilt("a dimension more", t.unsqueeze(0), by_itself=False)
        yield Spoilt("one column", t.unsqueeze(-1), by_itself=False)
        yield Spoilt("0-dim", t.flatten()[0], by_itself=False)
    for d in range(-t.dim(), 0):
        if d not in argument.any_size:
            yield Spoilt(f"dimension {d} longer", torch.cat([t, t.narrow(d, 0, 1)], d), by_itself=False)
        if d not in (*argument.any_size, *argument.any_shorter):
            yield Spoilt(f"dimension {d} shorter", t.narrow(d, 0, t.shape[d] - 1), by_itself=False)
            yield Spoilt(f"dimension {d} of 1", t.narrow(d, 0, 1), by_itself=False)
        if d not in argument.empty:
            yield Spoilt(f"dimension {d} empty", t.narrow(d, 0, 0), by_itself=False)
    if t.dim() > 1 and -1 not in argument.any_size and not argument.any_rank:
        yield Spoilt("transposed", t.transpose(0, -1), by_itself=False)
    if argument.n_classes is not None:
        for index in (argument.n_classes, -2, 2**31, 2**62, 2**63 - 1, -(2**63)):
            outside = t.clone()
            outside[2] = index
            yield Spoilt(f"{index} is no class", outside, seen_on_a_gpu=False)


class Case(NamedTuple):
    """One malformed call."""

    target: Target
    argument: str
    spoilt: Spoilt


def cases() -> dict[str, Case]:
    """Every malformed call, by what is wrong with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that its CSR and nested tensors are not finished
        return {
            f"{name}: {argument}: {wrong.how}": Case(target, argument, wrong)
            for name, target in TARGETS.items()
            for argument, kind in target.arguments.items()
            for wrong in spoilt(target.good.get(argument), kind)
        }


CASES = cases()

# ---- the claims ----


def memory(value: Any) -> Any:
    """The bytes of a tensor that has some."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.is_nested:
        return None
    return value.detach().contiguous().view(-1).view(torch.uint8).tolist() if value.numel() else []


def with_gradients(value: Any, asked_for: bool) -> Any:
    """A tensor of its own, which asks for a gradient if it can."""
    if not isinstance(value, Tensor):
        return value
    t = value.detach()
    return t.requires_grad_() if asked_for and (t.is_floating_point() or t.is_complex()) else t


def test_there_are_hundreds_of_them_and_every_argument_is_spoilt():
    assert len(CASES) >= 200
    public = {name for name in kernels.__all__ if name not in ("FusedAdamW", "FusedMuon", "backends", "use_backend")}
    assert {name.split(",")[0] for name in TARGETS} == public
    for name in public:
        function = getattr(kernels, name)
        if not isinstance(function, type):
            assert set(TARGETS[name].arguments) == set(function.__annotations__) - {"return"}


@pytest.mark.no_kernel
@pytest.mark.parametrize("name", TARGETS)
def test_the_call_is_good_before_it_is_spoilt(backend, device, name):
    target = TARGETS[name]
    good = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.good.items()}
    with torch.device(device):
        assert target.call(**good) is not None


def refuse(case: Case, gradients: bool) -> None:
    """Make the call, and check all that a refusal is."""
    target, argument, wrong = case
    arguments = {key: with_gradients(value, gradients) for key, value in target.good.items()}
    arguments[argument] = with_gradients(wrong.value, gradients)
    before = {key: memory(value) for key, value in arguments.items()}
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as caught:
        target.call(**arguments)
    message = str(caught.value)
    named = {argument, *target.others} if wrong.by_itself else {*target.arguments, *target.others}
    assert re.split("[:=]", message)[0] in named, message
    assert re.fullmatch(r"[^\n]+: [^\n]+", message), f"not one line: {message}"
    assert {key: memory(value) for key, value in arguments.items()} == before


@pytest.mark.no_kernel
@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_one_line_that_begins_with_the_name(backend, name):
    case = CASES[name]
    if backend == "triton" and not case.spoilt.seen_on_a_gpu:
        pytest.skip("a kernel on a GPU could not stop the queue to complain")
    for gradients in (False, True):
        refuse(case, gradients)


@pytest.mark.no_kernel
@pytest.mark.parametrize("name", TARGETS)
def test_under_autocast_it_is_refused_likewise(name):
    for key, case in CASES.items():
        if key.startswith(f"{name}: ") and not case.spoilt.cast:
            with torch.autocast("cpu", torch.bfloat16):
                refuse(case, gradients=True)
