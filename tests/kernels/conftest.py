"""What the kernel tests share: the backends under test, the error rule, strided tensors, memory full of NaN.

Everything is a fixture. A test that takes ``backend`` runs once on each backend; one more backend is one more
line in ``BACKENDS``.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import dispatch, use_backend
from tests.kernels import interpreted

# Name for use_backend: the device its tensors live on.
BACKENDS = {"reference": "cpu", "cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}

# ---- the backends ----


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases of Triton's interpreter that have passed with the same sources (``interpreted.py``)."""
    left_out = dict.fromkeys(interpreted.left_out(items))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lets fastgpt hand CPU tensors to the Triton kernels, in these tests and no others."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, _interpreter: None) -> Iterator[str]:
    """The name of the backend that every operator of the test runs on; tensors are made on its device by default."""
    place = BACKENDS[request.param]
    try:
        with use_backend(request.param):
            dispatch.backend_of(place, torch.float32)
    except RuntimeError as error:
        pytest.skip(str(error))
    with use_backend(request.param), nullcontext() if place == "cpu" else torch.device(place):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of the backend under test live."""
    return torch.device(BACKENDS[backend])


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that every backend takes."""
    return getattr(torch, request.param)


# ---- the inputs ----


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


def _contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _permuted(t: Tensor) -> Tensor:
    """The dimensions in the opposite order in memory."""
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    """Every other element of each row of a larger tensor; what lies between is NaN."""
    larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), math.nan)
    larger[..., 1:-2:2] = t
    return larger[..., 1:-2:2]


def _expanded(t: Tensor) -> Tensor:
    """The first entry repeated along the first dimension by a stride of zero."""
    return t[:1].expand_as(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "permuted": _permuted,
    "sliced": _sliced,
    "expanded": _expanded,
}


@pytest.fixture(params=list(LAYOUTS))
def strided(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Lays a tensor out in memory in some other way than contiguously."""
    return LAYOUTS[request.param]


# ---- the error rule ----

# An error may be this many times the error of plain PyTorch at the same dtype, which allows another order of
# summation and another formula of the same quality, and not a worse one.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

# And this many units in the last place at the magnitude of the largest true value come on top: where few
# numbers are added, plain PyTorch can be exact by luck, while the rounding of the result and of the operand
# before it (half a unit each) is in nobody's power to avoid; a function of two such roundings gets twice that.
FLOOR_ULPS = 2.0


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of ``dtype`` at ``magnitude``."""
    if magnitude == 0.0:
        return 0.0
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))


def check_error(
    what: str, ours: Tensor, peers: Sequence[Tensor], truth: Tensor, dtype: torch.dtype, factor: float
) -> None:
    """The largest error of ``ours`` is at most ``factor`` times the largest of the ``peers``, plus the floor."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert truth.isfinite().all(), f"{what}: the oracle itself is not finite"
    error = (ours.double() - truth).abs().max().item()
    peer_error = max((peer.double() - truth).abs().max().item() for peer in peers)
    floor = FLOOR_ULPS * ulp(truth.abs().max().item(), dtype)
    allowed = factor * peer_error + floor
    assert error <= allowed, (
        f"{what}: error {error:.3e}, allowed {allowed:.3e} = {factor:g} * {peer_error:.3e} + {floor:.3e}"
    )


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor], douts: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs and input gradients of ``function``; strides of the inputs are kept."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [d.to(o.dtype) for d, o in zip(douts, outputs, strict=True)])
    return tuple(o.detach() for o in outputs), [leaf.grad for leaf in leaves]


def check_accuracy(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    dout_layout: Callable[[Tensor], Tensor] = _contiguous,
    *,
    oracle: Callable[..., Any] | None = None,
    second_peer: Callable[..., Any] | None = None,
) -> None:
    """The error rule for every output of ``ours`` and every gradient of its inputs.

    Args:
        ours: the function under test.
        plain: the same maths in plain PyTorch, run at the inputs' dtype as the peer, and in float64 as the truth.
        inputs: floating-point tensors of one dtype; every one gets a gradient.
        dout_layout: how the incoming gradients lie in memory.
        oracle: a formula better than ``plain`` for the truth, if there is one.
        second_peer: another way to compute the same in plain PyTorch; the worse of the two is the measure.
    """
    oracle = oracle or plain
    dtype = inputs[0].dtype
    wide = [t.double() for t in inputs]
    shapes = oracle(*wide)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    douts = [torch.randn(s.shape, device=s.device).to(dtype) for s in shapes]
    douts = [dout_layout(d) if d.dim() else d for d in douts]
    got, got_gradients = run(ours, inputs, douts)
    peers = [run(peer, inputs, douts) for peer in (plain, second_peer) if peer]
    truth, true_gradients = run(oracle, wide, [d.double() for d in douts])
    for i in range(len(truth)):
        check_error(f"output {i}", got[i], [p[0][i] for p in peers], truth[i], dtype, OUTPUT_FACTOR)
    for i in range(len(inputs)):
        what = f"gradient of input {i}"
        peer_gradients = [p[1][i] for p in peers]
        check_error(what, got_gradients[i], peer_gradients, true_gradients[i], dtype, GRADIENT_FACTOR)


@pytest.fixture
def rule() -> SimpleNamespace:
    """The error rule: ``accuracy`` of a function and its gradients, ``error`` of one tensor, ``run``, ``ulp``."""
    return SimpleNamespace(
        accuracy=check_accuracy,
        error=check_error,
        run=run,
        ulp=ulp,
        output=OUTPUT_FACTOR,
        gradient=GRADIENT_FACTOR,
    )


# ---- the surroundings ----

M_PERTURB = -6  # glibc's malloc.h: fill memory with the complement of this byte when it is handed out
PERTURB_WITH_ONES = 0x100  # its lowest byte is 0, and as a whole it is not 0, which would mean "off"


@pytest.fixture(autouse=True, scope="module")
def memory_of_nan() -> Iterator[bool]:
    """Memory is handed out with all bits set, NaN in every float dtype, so an element never written shows.

    Reaches ``torch.empty``, the C++ kernels' outputs and their scratch buffers alike. False without glibc. On a
    GPU it is torch that fills what ``empty`` hands out.
    """
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield False
        return
    mallopt(M_PERTURB, PERTURB_WITH_ONES)
    yield True
    mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_threads() -> Iterator[Callable[[int, Callable[[], Any]], Any]]:
    """``on_threads(n, function)`` calls ``function`` on n of torch's threads."""
    before = torch.get_num_threads()

    def call(n: int, function: Callable[[], Any]) -> Any:
        torch.set_num_threads(n)
        return function()

    yield call
    torch.set_num_threads(before)
