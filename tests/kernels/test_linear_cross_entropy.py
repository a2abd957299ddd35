"""linear_cross_entropy: the output layer and its loss in one, chunk by chunk."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.kernels import linear_cross_entropy
from fastgpt.kernels.dry_run import dry_run
from tests.kernels.peers import product

# `import ... as` would find the function of the same name.
module = importlib.import_module("fastgpt.kernels.linear_cross_entropy")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, the fewest."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)


def both(targets, ignore_index=-1):
    """Ours and plain PyTorch's, of x and weight."""
    return (
        lambda x, weight: linear_cross_entropy(x, weight, targets, ignore_index),
        lambda x, weight: F.cross_entropy(product(x, weight), targets, ignore_index=ignore_index),
    )


def operands(N, C, V, *, dtype=torch.float32, device=None, ignored=False):
    x, weight = torch.randn(N, C, device=device), torch.randn(V, C, device=device) / C**0.5
    targets = torch.randint(V, (N,), device=device)
    if ignored:
        targets[::3] = -1
    return x.to(dtype), weight.to(dtype), targets


SHAPES = [(1, 1, 1), (1, 63, 127), (63, 5, 1), (127, 33, 63), (100, 64, 1023), (3, 16, 50257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy_is_as_accurate_as_pytorch(device, dtype, rule, shape):
    *tensors, targets = operands(*shape, dtype=dtype, device=device)
    rule.accuracy(*both(targets), tensors)


@pytest.mark.parametrize("N", [15, 16, 17, 100, 127])
@pytest.mark.usefixtures("small_chunks")
def test_a_number_of_rows_that_chunks_do_not_divide_is_as_accurate(device, dtype, rule, N):
    *tensors, targets = operands(N, 33, 63, dtype=dtype, device=device, ignored=True)
    rule.accuracy(*both(targets), tensors)


def test_several_chunks_equal_one(device, rule, monkeypatch):
    x, weight, targets = operands(100, 33, 63, device=device, ignored=True)
    one = rule.run(both(targets)[0], [x, weight], [torch.ones((), device=device)])
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    several = rule.run(both(targets)[0], [x, weight], [torch.ones((), device=device)])
    torch.testing.assert_close(several[0], one[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(several[1], one[1], rtol=1e-5, atol=1e-8)


def test_a_chunk_is_as_many_rows_as_fit_in_chunk_bytes(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    assert module.chunk_rows(torch.empty(2560, 4), 1000) == 256  # 1 MiB / 4000 bytes = 262, less the rest of 16
    assert module.chunk_rows(torch.empty(300, 4), 1000) == 160  # two chunks, as even as steps of 16 rows allow
    assert module.chunk_rows(torch.empty(100, 4), 1000) == 100
    assert module.chunk_rows(torch.empty(10_000, 4), 10**6) == 16


def test_any_strides(device, dtype, rule, strided):
    x, weight, targets = operands(33, 20, 63, dtype=dtype, device=device)
    rule.accuracy(*both(targets), [strided(x), weight])
    rule.accuracy(*both(targets), [x, strided(weight)])


def test_the_gradient_is_multiplied_by_the_one_that_comes_in(device, rule):
    x, weight, targets = operands(33, 20, 63, device=device)
    ours, plain = both(targets)
    rule.accuracy(lambda *t: -2.5 * ours(*t), lambda *t: -2.5 * plain(*t), [x, weight])


def largest_allocation(function):
    """On a GPU, where they are not told apart, the most that all together take."""
    if torch.get_default_device().type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_the_logits_never_exist_whole(backend, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(module, "CHUNK_ROWS_GPU", 48)
    x, weight, targets = operands(1024, 16, 5000)
    x.requires_grad_()
    weight.requires_grad_()
    logits, gradients = 1024 * 5000 * 4, 5000 * 16 * 4
    largest = largest_allocation(lambda: linear_cross_entropy(x, weight, targets).backward())
    if backend == "reference":  # makes them, and so shows that the measurement would see them
        assert largest >= logits
    else:
        assert gradients <= largest <= (4 << 20 if torch.get_default_device().type == "cuda" else 1 << 20)


def test_ignored_rows_get_no_gradient_and_do_not_count(device, dtype, rule):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device, ignored=True)
    counted = targets != -1
    one = torch.ones((), device=device)
    (loss,), (dx, dweight) = rule.run(both(targets)[0], [x, weight], [one])
    expected = rule.run(both(targets[counted])[0], [x[counted], weight], [one])
    assert torch.equal((dx == 0).all(-1), ~counted)
    torch.testing.assert_close(loss, expected[0][0])
    torch.testing.assert_close(dx[counted], expected[1][0])
    torch.testing.assert_close(dweight, expected[1][1])


@pytest.mark.parametrize("N", [0, 4])
def test_without_a_counted_row_the_loss_is_nan_and_the_gradients_zero_as_in_pytorch(device, dtype, N):
    x, weight, targets = operands(N, 20, 63, dtype=dtype, device=device)
    targets[:] = -1
    for function in both(targets):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        loss = function(*leaves)
        loss.backward()
        assert loss.isnan()
        for leaf in leaves:
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("target", [63, -2])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_target_outside_the_classes_is_refused_or_shows_as_nan(backend, device, dtype, target, with_gradient):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device)
    targets[39] = target
    x.requires_grad_(with_gradient)
    if backend == "triton":
        assert linear_cross_entropy(x, weight, targets).isnan()
    else:
        with pytest.raises(RuntimeError, match="targets"):
            linear_cross_entropy(x, weight, targets)


def test_huge_logits_do_not_overflow(device, rule):
    x, weight, targets = operands(33, 20, 63, device=device)
    rule.accuracy(*both(targets), [x * 100, weight * 100])


def test_only_the_gradients_that_are_needed_are_computed(device, dtype):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device)
    everything = [t.clone().requires_grad_() for t in (x, weight)]
    linear_cross_entropy(*everything, targets).backward()
    for needed in (0, 1):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((x, weight))]
        linear_cross_entropy(*leaves, targets).backward()
        assert torch.equal(leaves[needed].grad, everything[needed].grad)
        assert leaves[1 - needed].grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(*everything, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(*everything, targets).detach())


def test_the_loss_is_fp32_and_gradients_have_the_dtype_of_their_tensors(device, dtype):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == dtype


def test_a_nan_in_is_nan_out(device, dtype):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device)
    x[3, 5] = torch.nan
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*leaves, targets)
    loss.backward()
    assert loss.isnan()
    assert torch.equal(leaves[0].grad.isnan().all(-1).nonzero(), torch.tensor([[3]], device=device))
    assert leaves[1].grad.isnan().all()


@pytest.mark.usefixtures("small_chunks")
def test_the_same_inputs_give_the_same_bits(device, dtype, rule):
    x, weight, targets = operands(100, 33, 1023, dtype=dtype, device=device)
    first, second = (rule.run(both(targets)[0], [x, weight], [torch.ones((), device=device)]) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(map(torch.equal, first[1], second[1]))


# ---- main_grad ----


def with_main_grad(x, weight, targets, calls=1, start=0.0):
    """dx, main_grad and loss after ``calls`` passes; autograd must give the weight none."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    weight.main_grad = torch.full(weight.shape, start, dtype=torch.float32, device=weight.device)
    for _ in range(calls):
        x.grad = None
        loss = linear_cross_entropy(x, weight, targets)
        loss.backward()
    assert weight.grad is None
    return x.grad, weight.main_grad, loss.detach()


@pytest.mark.parametrize("with_main_grad", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_gradients_are_multiplied_by_the_scale_and_the_loss_is_not(device, with_main_grad):
    x, weight, targets = operands(40, 33, 63, device=device, ignored=True)
    found = []
    for scale in (None, torch.tensor(8.0, device=device)):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if with_main_grad:
            w.main_grad = torch.zeros_like(weight)
        loss = linear_cross_entropy(a, w, targets, gradient_scale=scale)
        loss.backward()
        found.append((loss.detach(), a.grad, w.main_grad if with_main_grad else w.grad))
    (loss, dx, dweight), (scaled_loss, scaled_dx, scaled_dweight) = found
    assert torch.equal(loss, scaled_loss)
    torch.testing.assert_close(scaled_dx, 8 * dx)
    torch.testing.assert_close(scaled_dweight, 8 * dweight)


def test_a_scale_of_another_dtype_or_shape_is_named():
    x, weight, targets = operands(4, 3, 5)
    with pytest.raises(TypeError, match=r"gradient_scale: expected torch\.float32"):
        linear_cross_entropy(x, weight, targets, gradient_scale=torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="gradient_scale"):
        linear_cross_entropy(x, weight, targets, gradient_scale=torch.ones(2))


@pytest.mark.usefixtures("small_chunks")
def test_main_grad_receives_what_autograd_would_give(device, dtype, rule):
    x, weight, targets = operands(100, 33, 63, dtype=dtype, device=device, ignored=True)
    dx, main_grad, loss = with_main_grad(x, weight, targets)
    one = torch.ones((), device=device)
    peer = rule.run(both(targets)[1], [x, weight], [one])
    truth = rule.run(both(targets)[1], [x.double(), weight.double()], [one.double()])
    for what, got, i in (("dx", dx, 0), ("main_grad", main_grad, 1)):
        rule.error(what, got, [peer[1][i]], truth[1][i], dtype, rule.gradient)
    rule.error("loss", loss, [peer[0][0]], truth[0][0], dtype, rule.output)
    assert main_grad.dtype == torch.float32


def test_main_grad_accumulates(device, dtype):
    x, weight, targets = operands(40, 20, 63, dtype=dtype, device=device)
    _, once, _ = with_main_grad(x, weight, targets)
    _, twice, _ = with_main_grad(x, weight, targets, calls=2)
    _, from_one, _ = with_main_grad(x, weight, targets, start=1.0)
    assert once.abs().max() > 1e-3
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(from_one, 1 + once, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that has found it is of no use to the other tests")
def test_main_grad_needs_the_loss_to_be_the_root(device):
    x, weight, targets = operands(40, 20, 63, device=device)
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="root of backward"):
        (0.5 * loss).backward()


def test_on_a_gpu_that_is_asked_of_the_gpu():
    """Which the host does not wait for."""
    with dry_run("cuda"), torch.device("meta"):
        x, weight = torch.randn(40, 20, requires_grad=True), torch.randn(63, 20, requires_grad=True)
        weight.main_grad = torch.zeros(63, 20)
        loss = linear_cross_entropy(x, weight, torch.zeros(40, dtype=torch.int64))
        calls = []
        with Calls(calls):
            loss.backward()
    assert "_assert_async" in calls


class Calls(TorchDispatchMode):
    """Notes the names of the operators called."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_main_grad_is_left_alone_when_nothing_is_differentiated(device):
    x, weight, targets = operands(40, 20, 63, device=device)
    weight.main_grad = torch.zeros_like(weight)
    linear_cross_entropy(x, weight, targets)
    weight.requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    assert weight.main_grad.count_nonzero() == 0


# ---- arguments ----


def wrong_arguments():
    x, weight, targets = torch.randn(4, 8), torch.randn(7, 8), torch.zeros(4, dtype=torch.int64)
    yield "x: not a tensor", TypeError, "x: ", (None, weight, targets)
    yield "x: integers", TypeError, "x: ", (x.long(), weight, targets)
    yield "x: three dimensions", ValueError, "x: ", (x.view(2, 2, 8), weight, targets)
    yield "x: no columns", ValueError, "x: ", (x[:, :0], weight[:, :0], targets)
    yield "weight: dtype", TypeError, "weight: ", (x, weight.bfloat16(), targets)
    yield "weight: columns", ValueError, "weight: ", (x, weight[:, :7], targets)
    yield "weight: transposed", ValueError, "weight: ", (x, weight.T, targets)
    yield "weight: no classes", ValueError, "weight: ", (x, weight[:0], targets)
    yield "weight: device", ValueError, "weight: ", (x, weight.to("meta"), targets)
    yield "targets: not a tensor", TypeError, "targets: ", (x, weight, 0)
    yield "targets: int32", TypeError, "targets: ", (x, weight, targets.int())
    yield "targets: length", ValueError, "targets: ", (x, weight, targets[:3])
    yield "targets: device", ValueError, "targets: ", (x, weight, targets.to("meta"))


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [pytest.param(*case[1:], id=case[0]) for case in wrong_arguments()]
)
def test_a_wrong_argument_is_named(backend, error, message, arguments):
    with pytest.raises(error, match="^" + message):
        linear_cross_entropy(*arguments)


def test_float64_gradients_agree_with_finite_differences():
    x, weight, _ = (t.double().requires_grad_() if t.is_floating_point() else t for t in operands(4, 3, 5))
    targets = torch.tensor([0, 3, -1, 2])
    assert torch.autograd.gradcheck(both(targets)[0], (x, weight))
