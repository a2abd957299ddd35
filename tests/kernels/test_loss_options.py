"""cross_entropy and linear_cross_entropy with soft cap, z-loss, label smoothing, class weights and any reduction."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import cross_entropy, dispatch, linear_cross_entropy
from tests.kernels import peers

# `import ... as` would find the function of the same name.
module = importlib.import_module("fastgpt.kernels.linear_cross_entropy")

# Weights are made by `arguments`, since their number depends on the classes.
OPTIONS = {
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 1e-2},
    "label_smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "smoothing, weight": {"label_smoothing": 0.3, "weight": True},
    "softcap, z_loss": {"softcap": 30.0, "z_loss": 1e-4},
    "all": {"softcap": 3.7, "z_loss": 0.05, "label_smoothing": 0.2, "weight": True},
}
ALL = OPTIONS["all"]
REDUCTIONS = ["mean", "sum", "none"]

some_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, the fewest."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)


def arguments(options, V, device=None):
    """The options, with class weights if they ask for them."""
    weight = {"weight": torch.rand(V, device=device) + 0.1} if options.get("weight") else {}
    return options | weight


def both(targets, **options):
    """Ours and plain PyTorch's, of the logits."""
    return (
        lambda logits: cross_entropy(logits, targets, **options),
        lambda logits: peers.cross_entropy(logits, targets, **options),
    )


def both_linear(targets, **options):
    """Ours and plain PyTorch's, of x and the layer's weight."""
    renamed = {"class_weight" if name == "weight" else name: value for name, value in options.items()}
    return (
        lambda x, w: linear_cross_entropy(x, w, targets, **renamed),
        lambda x, w: peers.cross_entropy(peers.product(x, w), targets, **options),
    )


def operands(N, V, *, dtype=torch.float32, device=None):
    """Logits, and targets every third of which does not count."""
    logits, targets = 3 * torch.randn(N, V, device=device), torch.randint(V, (N,), device=device)
    if N > 1:
        targets[::3] = -1
    return logits.to(dtype), targets


def linear_operands(N, C, V, *, dtype=torch.float32, device=None):
    x, weight = torch.randn(N, C, device=device), torch.randn(V, C, device=device) * (3 / C**0.5)
    return x.to(dtype), weight.to(dtype), operands(N, V, device=device)[1]


# ---- accuracy ----


@some_options
@every_reduction
def test_cross_entropy_is_as_accurate_as_pytorch(device, dtype, rule, options, reduction):
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    rule.accuracy(*both(targets, reduction=reduction, **arguments(options, 127, device)), [logits])


@pytest.mark.parametrize("shape", [(1, 1), (63, 1), (1, 63), (127, 63), (7, 1023), (2, 50257)], ids=str)
@pytest.mark.parametrize("options", [ALL, OPTIONS["label_smoothing"]], ids=["all", "label_smoothing"])
def test_odd_shapes_are_as_accurate(device, dtype, rule, shape, options):
    logits, targets = operands(*shape, dtype=dtype, device=device)
    rule.accuracy(*both(targets, **arguments(options, shape[1], device)), [logits])


@some_options
@every_reduction
@pytest.mark.usefixtures("small_chunks")
def test_linear_cross_entropy_is_as_accurate_as_pytorch(device, dtype, rule, options, reduction):
    *tensors, targets = linear_operands(40, 33, 63, dtype=dtype, device=device)
    rule.accuracy(*both_linear(targets, reduction=reduction, **arguments(options, 63, device)), tensors)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 63, 127), (63, 5, 1), (127, 33, 63), (3, 16, 50257)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_odd_shapes_of_the_layer_are_as_accurate(device, dtype, rule, shape, reduction):
    *tensors, targets = linear_operands(*shape, dtype=dtype, device=device)
    rule.accuracy(*both_linear(targets, reduction=reduction, **arguments(ALL, shape[2], device)), tensors)


@every_reduction
def test_any_strides(device, dtype, rule, strided, reduction):
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    options = arguments(ALL, 127, device)
    laid_out = options | {"weight": strided(options["weight"])}
    for called in (options, laid_out):
        layout = strided if reduction == "none" else lambda t: t
        rule.accuracy(*both(targets, reduction=reduction, **called), [strided(logits)], layout)


@pytest.mark.usefixtures("small_chunks")
def test_any_strides_of_the_layer(device, dtype, rule, strided):
    x, weight, targets = linear_operands(33, 20, 63, dtype=dtype, device=device)
    functions = both_linear(targets, reduction="none", **arguments(ALL, 63, device))
    rule.accuracy(*functions, [strided(x), weight], strided)
    rule.accuracy(*functions, [x, strided(weight)], strided)


def test_far_logits_smoothed_are_as_accurate(device, rule):
    """Their distances from the maximum are added up, not the logits."""
    logits, targets = operands(33, 1023, device=device)
    ours, plain = both(targets, **arguments(OPTIONS["smoothing, weight"], 1023, device))
    for far in (logits + 1e4, torch.cat([logits[:, :1] - 1e4, logits[:, 1:]], 1)):
        rule.error("loss", ours(far), [plain(far)], plain(far.double()), torch.float32, rule.output)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 0.3, 10.0], ids=str)
def test_a_cap_is_as_accurate_wherever_the_logits_lie(device, rule, scale):
    logits, targets = operands(33, 127, device=device)
    rule.accuracy(*both(targets, softcap=5.0), [scale * logits])


def test_the_slope_of_the_cap_keeps_its_digits_where_it_is_small(device):
    """1 - tanh**2 has none left there."""
    logits = torch.tensor([[40.0, -45.0, 0.0]], device=device, requires_grad=True)
    targets = torch.tensor([1], device=device)
    cross_entropy(logits, targets, softcap=5.0).backward()
    wide = logits.detach().double().requires_grad_()
    (5.0 * (wide / 5.0).tanh()).log_softmax(-1)[0, 1].neg().backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=0)


# ---- what stays as it was ----


NO_OPTIONS = {"softcap": None, "z_loss": 0.0, "label_smoothing": 0.0, "reduction": "mean"}


def test_options_that_are_off_change_no_bit(device, dtype, rule):
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    one = torch.ones((), device=device)
    plain, spelt = (
        rule.run(lambda t, options=options: cross_entropy(t, targets, **options), [logits], [one])
        for options in ({}, NO_OPTIONS | {"weight": None})
    )
    assert torch.equal(plain[0][0], spelt[0][0])
    assert torch.equal(plain[1][0], spelt[1][0])


@pytest.mark.parametrize("V", [127, 5000])
def test_weights_of_1_change_no_bit(device, dtype, V):
    logits, targets = operands(5, V, dtype=dtype, device=device)
    plain, weighted = (
        dispatch.resolve("cross_entropy", logits)(logits, targets, -1, 0.0, 0.0, 0.0, weight)
        for weight in (None, torch.ones(V, device=device))
    )
    assert all(map(torch.equal, plain, weighted))


def test_logits_whose_square_overflows_have_a_loss_without_a_z_loss(device):
    logits = torch.tensor([[1e20, 3e20]], device=device)
    assert cross_entropy(logits, torch.tensor([1], device=device)).item() == 0.0


# ---- rows that do not count, targets that are no classes ----


@every_reduction
@some_options
def test_ignored_rows_change_no_bit_and_get_no_gradient(device, options, reduction):
    logits, targets = operands(12, 63, device=device)
    options = arguments(options, 63, device) | {"reduction": reduction}
    ignored = targets == -1
    other = torch.where(ignored.unsqueeze(1), math.nan, logits)
    loss = cross_entropy(leaf := logits.requires_grad_(), targets, **options)
    loss.sum().backward()
    assert torch.equal(loss, cross_entropy(other, targets, **options))
    assert torch.equal((leaf.grad == 0).all(-1), ignored)
    if reduction == "none":
        assert torch.equal(loss == 0, ignored)


@every_reduction
@pytest.mark.parametrize("N", [0, 4])
@pytest.mark.parametrize("of_a_layer", [False, True], ids=["logits", "layer"])
def test_without_a_counted_row_it_is_as_in_pytorch(device, dtype, N, reduction, of_a_layer):
    x, weight, targets = linear_operands(N, 20, 63, dtype=dtype, device=device)
    targets[:] = -1
    options = arguments(ALL, 63, device) | {"reduction": reduction}
    functions = both_linear(targets, **options) if of_a_layer else both(targets, **options)
    found = []
    for function in functions:
        leaves = [t.clone().requires_grad_() for t in ((x, weight) if of_a_layer else (x @ weight.T,))]
        loss = function(*leaves)
        loss.sum().backward()
        found.append(loss)
        assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert found[0].isnan().any() == (reduction == "mean")


@every_reduction
@pytest.mark.parametrize("target", [63, 10**9, -2])
@pytest.mark.parametrize("of_a_layer", [False, True], ids=["logits", "layer"])
def test_a_target_outside_the_classes_is_refused_or_shows_as_nan(backend, device, target, reduction, of_a_layer):
    x, weight, targets = linear_operands(40, 20, 63, device=device)
    targets[38] = target
    options = arguments(ALL, 63, device) | {"reduction": reduction}
    leaves = [t.requires_grad_() for t in ((x, weight) if of_a_layer else (x @ weight.T,))]
    function = (both_linear if of_a_layer else both)(targets, **options)[0]
    if backend != "triton":
        with pytest.raises(RuntimeError, match="targets"):
            function(*leaves)
        return
    loss = function(*leaves)
    loss.sum().backward()
    assert loss.isnan().nonzero().flatten().tolist() == ([38] if reduction == "none" else [])
    assert loss.sum().isnan()
    if reduction != "mean":  # whose divisor is unknown, and NaN for all
        assert leaves[0].grad.isnan().any(1).nonzero().flatten().tolist() == [38]


# ---- numbers at the edge ----


def test_infinite_logits_are_capped_as_in_pytorch(device, dtype):
    logits = torch.tensor([[math.inf, -math.inf, 1.0, 1e30], [-1e30, 0.5, -math.inf, 2.0]], dtype=dtype, device=device)
    targets = torch.tensor([1, 3], device=device)
    for cap in (4.0, 5.0, 30.0):
        found = []
        for function in both(targets, softcap=cap, label_smoothing=0.1, z_loss=0.01):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf)
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_a_logit_of_minus_infinity_is_a_class_ruled_out(device, dtype):
    """With smoothed labels its share of the label costs infinitely much, as in PyTorch, and the gradient is finite."""
    logits, targets = operands(9, 63, dtype=dtype, device=device)
    targets[targets == 7] = 8
    logits[:, 7] = -math.inf
    weight = torch.rand(63, device=device) + 0.1
    for options in ({"z_loss": 0.1, "weight": weight}, {"label_smoothing": 0.1}):
        leaf, peer = (logits.clone().requires_grad_() for _ in range(2))
        ours, plain = both(targets, **options)
        loss, expected = ours(leaf), plain(peer)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(leaf.grad, peer.grad)


def test_a_nan_logit_makes_loss_and_row_gradient_nan(device, dtype):
    logits, targets = operands(5, 63, dtype=dtype, device=device)
    logits[2, 17] = math.nan
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, targets, reduction="none", **arguments(ALL, 63, device))
    losses.sum().backward()
    assert losses.isnan().nonzero().flatten().tolist() == [2]
    assert leaf.grad[2].isnan().all()
    assert not leaf.grad[[0, 1, 3, 4]].isnan().any()


def test_weights_that_add_up_to_nothing_make_the_mean_nan_as_in_pytorch(device):
    logits, targets = operands(5, 63, device=device)
    for function in both(targets, weight=torch.zeros(63, device=device)):
        assert function(logits).isnan()


@pytest.mark.parametrize("label_smoothing", [0, 1])
def test_the_ends_of_the_range_of_smoothing(device, rule, label_smoothing):
    logits, targets = operands(33, 127, device=device)
    rule.accuracy(*both(targets, label_smoothing=label_smoothing), [logits])


# ---- gradients ----


@every_reduction
@some_options
def test_float64_gradients_agree_with_finite_differences(options, reduction):
    targets = torch.tensor([0, 3, -1, 2])
    options = arguments(options, 5) | {"reduction": reduction}
    logits, x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 3), (5, 3)))
    assert torch.autograd.gradcheck(both(targets, **options)[0], (logits,))
    assert torch.autograd.gradcheck(both_linear(targets, **options)[0], (x, weight))


@some_options
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each row"])
def test_the_in_place_operator_gives_the_same_losses_and_gradient(device, dtype, options, each):
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    given = arguments(options, 127, device)
    last = given.get("softcap", 0.0), given.get("z_loss", 0.0), given.get("label_smoothing", 0.0), given.get("weight")
    losses, lse = dispatch.resolve("cross_entropy", logits)(logits, targets, -1, *last)
    scale = torch.randn(66, device=device)[::2] if each else torch.tensor(0.37, device=device)
    backward = dispatch.resolve("cross_entropy_backward", logits)
    expected = backward(scale.expand(33), logits, targets, lse, -1, *last)
    overwritten = logits.clone()
    assert torch.equal(dispatch.resolve("cross_entropy_", logits)(overwritten, targets, scale, -1, *last), losses)
    torch.testing.assert_close(overwritten, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_class_weights_that_ask_for_a_gradient_are_refused_when_it_is_asked_for(device):
    x, w, targets = linear_operands(5, 4, 7, device=device)
    weight = torch.ones(7, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^weight: class weights have no gradient"):
        cross_entropy((x @ w.T).requires_grad_(), targets, weight=weight).backward()
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x.requires_grad_(), w, targets, class_weight=weight, reduction=reduction)
        with pytest.raises(RuntimeError, match=r"^class_weight: class weights have no gradient"):
            loss.sum().backward()


@pytest.mark.usefixtures("small_chunks")
def test_the_same_inputs_give_the_same_bits_on_any_number_of_threads(backend, device, dtype, rule, on_threads):
    x, weight, targets = linear_operands(100 if backend != "triton" else 20, 33, 1023, dtype=dtype, device=device)
    options = arguments(ALL, 1023, device)
    for reduction in REDUCTIONS:
        functions = (
            both(targets, reduction=reduction, **options)[0],
            both_linear(targets, reduction=reduction, **options)[0],
        )
        douts = [torch.linspace(1, 2, len(targets), device=device) if reduction == "none" else x.new_ones(())]
        for function, tensors in zip(functions, ([x @ weight.T], [x, weight]), strict=True):
            first, second = (on_threads(n, lambda f=function, t=tensors, d=douts: rule.run(f, t, d)) for n in (1, 2))
            assert torch.equal(first[0][0], second[0][0])
            assert all(map(torch.equal, first[1], second[1]))


# ---- the loss of each row of a layer ----


@pytest.mark.usefixtures("small_chunks")
def test_only_the_gradients_that_are_needed_are_computed(device, dtype):
    x, weight, targets = linear_operands(40, 20, 63, dtype=dtype, device=device)
    dlosses = torch.linspace(-1, 2, 40, device=device)
    everything = [t.clone().requires_grad_() for t in (x, weight)]
    linear_cross_entropy(*everything, targets, reduction="none").backward(dlosses)
    for needed in (0, 1):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((x, weight))]
        linear_cross_entropy(*leaves, targets, reduction="none").backward(dlosses)
        assert torch.equal(leaves[needed].grad, everything[needed].grad)
        assert leaves[1 - needed].grad is None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_are_multiplied_by_the_scale_and_the_losses_are_not(device, reduction):
    x, weight, targets = linear_operands(40, 33, 63, device=device)
    found = []
    for scale in (None, torch.tensor(8.0, device=device)):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(a, w, targets, gradient_scale=scale, reduction=reduction)
        loss.sum().backward()
        found.append((loss.detach(), a.grad, w.grad))
    (loss, dx, dweight), (scaled_loss, scaled_dx, scaled_dweight) = found
    assert torch.equal(loss, scaled_loss)
    torch.testing.assert_close(scaled_dx, 8 * dx)
    torch.testing.assert_close(scaled_dweight, 8 * dweight)


@every_reduction
@pytest.mark.usefixtures("small_chunks")
def test_main_grad_receives_what_autograd_would_give(device, dtype, rule, reduction):
    """For the loss of each row whatever gradients come in; otherwise for a gradient of 1."""
    x, weight, targets = linear_operands(100, 33, 63, dtype=dtype, device=device)
    options = arguments(ALL, 63, device) | {"reduction": reduction}
    ours, plain = both_linear(targets, **options)
    dout = torch.linspace(-1, 2, 100, device=device) if reduction == "none" else torch.ones((), device=device)
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    w.main_grad = torch.zeros(63, 33, device=device)
    for _ in range(2):
        a.grad = None
        ours(a, w).backward(dout)
    assert w.grad is None
    peer = rule.run(plain, [x, weight], [dout])
    truth = rule.run(plain, [x.double(), weight.double()], [dout.double()])
    rule.error("dx", a.grad, [peer[1][0]], truth[1][0], dtype, rule.gradient)
    rule.error("main_grad", w.main_grad / 2, [peer[1][1]], truth[1][1], dtype, rule.gradient)


@pytest.mark.usefixtures("small_chunks")
def test_main_grad_gets_nothing_where_the_weight_is_not_trained(device):
    x, weight, targets = linear_operands(40, 20, 63, device=device)
    weight.main_grad = torch.zeros_like(weight)
    linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none").sum().backward()
    assert weight.main_grad.count_nonzero() == 0
    assert x.grad.count_nonzero() > 0


def test_the_logits_never_exist_whole(backend, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 18)
    if backend == "triton":
        pytest.skip("test_linear_cross_entropy measures the chunks on a GPU; the interpreter is slow")
    x, weight, targets = linear_operands(256, 16, 5000)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(*leaves, targets, reduction="none", softcap=30.0).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    logits = 256 * 5000 * 4
    assert largest >= logits if backend == "reference" else largest < logits / 8


# ---- the arguments ----


def wrong_options():
    for value in (0.0, -1.0, math.nan, math.inf, "30", True):
        yield "softcap", value
    for value in (-1e-4, math.nan, math.inf, None, "0", False):
        yield "z_loss", value
    for value in (-0.1, 1.1, math.nan, None, "0", True):
        yield "label_smoothing", value
    for value in ("average", "", None, 1):
        yield "reduction", value
    weight = torch.ones(7)
    for value in (
        [1.0] * 7,
        weight.long(),
        weight.bfloat16(),
        weight.double(),
        weight[:6],
        weight[None],
        weight.to("meta"),
    ):
        yield "weight", value


@pytest.mark.parametrize(("name", "value"), list(wrong_options()), ids=lambda v: str(v).replace("\n", "")[:30])
def test_a_wrong_option_is_named(backend, name, value):
    x, w, targets = torch.randn(4, 8), torch.randn(7, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        cross_entropy(x @ w.T, targets, **{name: value})
    name = "class_weight" if name == "weight" else name
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        linear_cross_entropy(x, w, targets, **{name: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_class_weights_may_be_fp32_or_of_the_dtype_of_the_logits(dtype):
    logits, targets = operands(12, 63, dtype=dtype)
    weight = torch.randint(1, 9, (63,)) / 8.0  # exact in each dtype
    assert torch.equal(
        cross_entropy(logits, targets, weight=weight), cross_entropy(logits, targets, weight=weight.to(dtype))
    )


def test_it_is_plain_cross_entropy_where_pytorch_has_the_option():
    """The peer above is not the only witness."""
    logits, targets = operands(33, 127)
    weight = torch.rand(127)
    for reduction in REDUCTIONS:
        options = {"label_smoothing": 0.1, "weight": weight, "reduction": reduction}
        torch.testing.assert_close(
            cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, ignore_index=-1, **options)
        )
