"""rms_norm and add_rms_norm, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import add_rms_norm, dispatch, linear, rms_norm
from fastgpt.kernels.rms_norm import rms_norm_and_input


def plain(x, weight=None, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def plain_add(x, residual, weight=None, eps=1e-6):
    total = x + residual
    return plain(total, weight, eps), total


def operands(*shape, dtype, device, n=1):
    """N tensors of ``shape``, then a weight."""
    tensors = [torch.randn(shape, device=device) for _ in range(n)]
    return [t.to(dtype) for t in (*tensors, torch.randn(shape[-1], device=device))]


SHAPES = [(1, 63), (127, 63), (5, 1023), (1023, 127), (2, 65, 33), (16,), (2, 3, 5, 7)]
with_and_without_weight = pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no weight"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@with_and_without_weight
def test_rms_norm_is_as_accurate_as_pytorch(device, dtype, rule, shape, with_weight):
    inputs = operands(*shape, dtype=dtype, device=device)
    rule.accuracy(rms_norm, plain, inputs if with_weight else inputs[:-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@with_and_without_weight
def test_add_rms_norm_is_as_accurate_as_pytorch(device, dtype, rule, shape, with_weight):
    inputs = operands(*shape, dtype=dtype, device=device, n=2)
    rule.accuracy(add_rms_norm, plain_add, inputs if with_weight else inputs[:-1])


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_rms_norm_takes_any_strides(device, dtype, rule, strided, incoming):
    inputs = operands(7, 9, 63, dtype=dtype, device=device)
    if incoming:
        rule.accuracy(rms_norm, plain, inputs, dout_layout=strided)
    else:
        rule.accuracy(rms_norm, plain, [strided(t) for t in inputs])


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_add_rms_norm_takes_any_strides(device, dtype, rule, strided, incoming):
    inputs = operands(7, 9, 63, dtype=dtype, device=device, n=2)
    if incoming:
        rule.accuracy(add_rms_norm, plain_add, inputs, dout_layout=strided)
    else:
        x, residual, weight = inputs  # strides that differ between the two summands
        rule.accuracy(add_rms_norm, plain_add, [strided(x), residual, strided(weight)])
        rule.accuracy(add_rms_norm, plain_add, [x, strided(residual), weight])


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_the_size_of_the_numbers_costs_no_accuracy(device, rule, scale):
    """Whose squares are as small as 1e-30 or as large as 1e30."""
    x, weight = operands(127, 63, dtype=torch.float32, device=device)
    rule.accuracy(lambda *t: rms_norm(*t, eps=0.0), lambda *t: plain(*t, eps=0.0), [x * scale, weight])


def test_eps_is_added_to_the_mean_square(device, rule):
    x, weight = operands(9, 63, dtype=torch.float32, device=device)
    small = x * 0.1
    rule.accuracy(lambda *t: rms_norm(*t, eps=0.5), lambda *t: plain(*t, eps=0.5), [small, weight])
    rule.accuracy(
        lambda *t: add_rms_norm(*t, eps=0.5), lambda *t: plain_add(*t, eps=0.5), [small, small.flip(0), weight]
    )


def test_a_row_of_zeros_stays_one_and_gets_the_gradient_of_its_scale(device, dtype):
    _, weight = operands(4, 127, dtype=dtype, device=device)
    x = torch.zeros(4, 127, dtype=dtype, device=device, requires_grad=True)
    y = rms_norm(x, weight, eps=0.25)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(x.grad, (2.0 * weight).expand(4, 127))


def test_the_sum_is_rounded_once(device, dtype):
    x, residual, weight = operands(5, 127, dtype=dtype, device=device, n=2)
    _, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)


@with_and_without_weight
def test_add_rms_norm_is_rms_norm_of_the_sum(device, dtype, with_weight):
    x, residual, *weight = operands(5, 127, dtype=dtype, device=device, n=2)[: 3 if with_weight else 2]
    y, total = add_rms_norm(x, residual, *weight)
    assert torch.equal(y, rms_norm(total, *weight))


@with_and_without_weight
def test_no_weight_is_a_weight_of_ones(device, dtype, rule, with_weight):
    x, dy = operands(5, 127, dtype=dtype, device=device, n=2)[:2]
    ones = [torch.ones(127, dtype=dtype, device=device)] if with_weight else []
    (y,), (dx, *_) = rule.run(rms_norm, [x, *ones], [dy])
    (expected,), (dexpected,) = rule.run(rms_norm, [x], [dy])
    assert torch.equal(y, expected)
    torch.testing.assert_close(dx, dexpected)


@pytest.mark.parametrize("used", ["y", "sum"])
def test_a_gradient_may_reach_only_one_of_the_two_outputs(device, dtype, rule, used):
    inputs = operands(9, 63, dtype=dtype, device=device, n=2)
    if used == "y":
        rule.accuracy(lambda *t: add_rms_norm(*t)[0], lambda *t: plain_add(*t)[0], inputs)
    else:
        x, residual, weight = inputs
        rule.accuracy(lambda a, b: add_rms_norm(a, b, weight)[1], lambda a, b: a + b, [x, residual])


@with_and_without_weight
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "y", "input"])
def test_where_a_residual_stream_begins_its_gradient_is_added_in_the_norms(device, dtype, rule, used, with_weight):
    x, weight = operands(9, 63, dtype=dtype, device=device)
    weighted = [weight] if with_weight and used[0] else []

    def of(function):
        def outputs(x, *weight):
            return tuple(t for t, use in zip(function(x, *weight), used, strict=True) if use)

        return outputs

    rule.accuracy(of(rms_norm_and_input), of(lambda x, *w: (plain(x, *w), x)), [x, *weighted])


def test_the_two_summands_get_gradients_of_their_own(device, dtype):
    x, residual, weight = (t.requires_grad_() for t in operands(4, 8, dtype=dtype, device=device, n=2))
    y, total = add_rms_norm(x, residual, weight)
    (y.sum() + total.sum()).backward()
    expected = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, expected)
    assert expected.count_nonzero() > 0


def test_outputs_and_gradients_are_contiguous_in_the_dtype_of_x(device, dtype):
    x, residual, weight = operands(6, 5, 33, dtype=dtype, device=device, n=2)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for t in (x, residual, weight):
        t.requires_grad_()
    y, total = add_rms_norm(x, residual, weight)
    gradients = torch.autograd.grad((y, total), (x, residual, weight), (y.detach(), y.detach()))
    for t in (rms_norm(x, weight), y, total, *gradients):
        assert t.dtype == dtype
        assert t.is_contiguous()


def test_an_empty_batch_gives_an_empty_result_and_a_weight_gradient_of_zeros(device, dtype):
    x, weight = (t.requires_grad_() for t in operands(0, 8, dtype=dtype, device=device))
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_nan_spoils_its_own_row_only(device, dtype):
    x, weight = operands(5, 63, dtype=dtype, device=device)
    x[2, 7] = torch.nan
    x.requires_grad_()
    y = rms_norm(x, weight)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    total_y, total = add_rms_norm(x, torch.ones_like(x), weight)
    spoilt = torch.tensor([False, False, True, False, False], device=device)
    for t in (y, gradient, total_y):
        assert torch.equal(t.isnan().all(-1), spoilt)
        assert torch.equal(t.isnan().any(-1), spoilt)
    assert total.isnan().sum() == 1


def test_a_nan_in_the_incoming_gradient_reaches_every_gradient_it_enters(device, dtype):
    x, weight = (t.requires_grad_() for t in operands(5, 63, dtype=dtype, device=device))
    y = rms_norm(x, weight)
    dy = torch.ones_like(y)
    dy[2, 7] = torch.nan
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert dx[2].isnan().all()
    assert not dx[[0, 1, 3, 4]].isnan().any()
    assert dweight[7].isnan()
    assert dweight.isnan().sum() == 1


def test_the_same_inputs_give_the_same_bits(device, dtype, rule):
    inputs = operands(1023, 127, dtype=dtype, device=device)
    dout = torch.randn(1023, 127, device=device).to(dtype)
    (y, *_), first = rule.run(rms_norm, inputs, [dout])
    (again, *_), second = rule.run(rms_norm, inputs, [dout])
    assert torch.equal(y, again)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, rule, on_threads):
    inputs = operands(1023, 127, dtype=dtype, device=device)
    dout = torch.randn(1023, 127, device=device).to(dtype)
    (y, *_), one = on_threads(1, lambda: rule.run(rms_norm, inputs, [dout]))
    (again, *_), two = on_threads(2, lambda: rule.run(rms_norm, inputs, [dout]))
    assert torch.equal(y, again)
    assert all(map(torch.equal, one, two))


# ---- gradients that go into main_grad ----


def backward(dy, dsum, x, weight, rstd, *rest):
    return dispatch.resolve("rms_norm_backward", x)(dy, dsum, x, weight, rstd, *rest)


@pytest.mark.parametrize("shape", [(1, 63), (127, 63), (1023, 127), (2, 65, 33), (3, 1), (0, 8)], ids=str)
def test_the_weights_gradient_is_added_to_a_main_grad_unrounded(device, dtype, rule, shape):
    x, dsum, dy, weight = operands(*shape, dtype=dtype, device=device, n=3)
    _, rstd = dispatch.resolve("rms_norm", x)(x, weight, 1e-6)
    before = torch.randn_like(weight, dtype=torch.float32)
    main_grad = before.clone()
    dx, dweight = backward(dy, dsum, x, weight, rstd, main_grad)
    assert torch.equal(dx, backward(dy, dsum, x, weight, rstd)[0])
    assert dweight.shape == (0,)
    columns = tuple(range(x.dim() - 1))
    sums = [
        before.to(wide) + (dy.to(wide) * x.to(wide) * rstd.to(wide).unsqueeze(-1)).sum(columns)
        for wide in (torch.float32, torch.float64)
    ]
    rule.error("main_grad", main_grad, sums[:1], sums[1], torch.float32, rule.gradient)


def test_without_a_weight_there_is_no_gradient_of_one(device, dtype):
    x, dy, _ = operands(9, 63, dtype=dtype, device=device, n=2)
    _, rstd = dispatch.resolve("rms_norm", x)(x, None, 1e-6)
    dx, dweight = backward(dy, None, x, None, rstd)
    assert dx.shape == x.shape
    assert dweight.shape == (0,)
    assert dweight.dtype == dtype


@pytest.mark.parametrize("function", [rms_norm, lambda x, w: add_rms_norm(x, x.detach(), w)[0]])
def test_a_weight_with_a_main_grad_gets_its_gradient_there_unless_it_is_frozen(device, dtype, function):
    x, weight = (t.requires_grad_() for t in operands(127, 63, dtype=dtype, device=device))
    dx, dweight = torch.autograd.grad(function(x, weight).sum(), (x, weight))
    weight.main_grad = torch.ones(63, device=device)
    assert torch.equal(*torch.autograd.grad(function(x, weight.requires_grad_(False)).sum(), x), dx)
    assert (weight.main_grad == 1.0).all()
    function(x, weight.requires_grad_()).sum().backward()
    assert torch.equal(x.grad, dx)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, dweight.float(), rtol=2**-8, atol=1e-5)


def test_a_projection_before_it_sums_its_own_biases_gradient(device, dtype):
    """Which only layer norm does for it."""
    x, residual, gain = operands(127, 63, dtype=dtype, device=device, n=2)
    weight, bias = (torch.randn(size, device=device).to(dtype).requires_grad_() for size in ((63, 63), (63,)))

    def loss():
        return add_rms_norm(linear(x, weight, bias), residual, gain)[0].float().square().sum()

    expected = torch.autograd.grad(loss(), bias)[0]
    bias.main_grad = torch.ones(63, device=device)
    loss().backward()
    torch.testing.assert_close(bias.main_grad - 1, expected.float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("wrong", [torch.ones(8), torch.ones(63).bfloat16(), torch.ones(126)[::2]])
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_main_grad_that_cannot_be_added_to_is_refused(device, wrong):
    x, dy, weight = operands(9, 63, dtype=torch.float32, device=device, n=2)
    with pytest.raises((RuntimeError, ValueError), match="main_grad: expected 63 elements of float32"):
        backward(dy, None, x, weight, torch.ones(9, device=device), wrong.to(device))


def wrong_arguments():
    x, weight = torch.randn(3, 8), torch.randn(8)
    yield "x: not a tensor", TypeError, "x: ", ([1.0], weight)
    yield "x: integers", TypeError, "x: ", (x.long(), weight)
    yield "x: 0-dim", ValueError, "x: ", (torch.tensor(1.0), weight)
    yield "x: no columns", ValueError, "x: ", (torch.empty(3, 0), torch.empty(0))
    yield "weight: dtype", TypeError, "weight: ", (x, weight.bfloat16())
    yield "weight: shape", ValueError, "weight: ", (x, torch.randn(7))
    yield "weight: two dimensions", ValueError, "weight: ", (x, torch.randn(1, 8))
    yield "weight: device", ValueError, "weight: ", (x, weight.to("meta"))
    yield "eps: negative", ValueError, "eps: ", (x, weight, -1e-6)
    yield "eps: missing", TypeError, "eps: ", (x, weight, None)


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [pytest.param(*case[1:], id=case[0]) for case in wrong_arguments()]
)
def test_a_wrong_argument_is_named(backend, error, message, arguments):
    with pytest.raises(error, match="^" + message):
        rms_norm(*arguments)
    x, *rest = arguments
    with pytest.raises(error, match="^" + message):
        add_rms_norm(x, x, *rest)


@pytest.mark.parametrize(
    ("error", "residual"),
    [
        pytest.param(TypeError, torch.randn(3, 8).double(), id="dtype"),
        pytest.param(TypeError, torch.ones(3, 8, dtype=torch.int32), id="integers"),
        pytest.param(TypeError, None, id="missing"),
        pytest.param(ValueError, torch.randn(8), id="shape"),
        pytest.param(ValueError, torch.randn(3, 8, device="meta"), id="device"),
    ],
)
def test_a_wrong_residual_is_named(backend, error, residual):
    with pytest.raises(error, match=r"^residual: "):
        add_rms_norm(torch.randn(3, 8), residual, torch.randn(8))


@pytest.mark.parametrize(
    "function", [rms_norm, lambda x, *rest: add_rms_norm(x / 2, x / 2, *rest)[0]], ids=["rms_norm", "add_rms_norm"]
)
def test_float64_has_statistics_in_float64(function):
    inputs = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    gradients = []
    for norm in (function, plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        norm(*leaves).backward(torch.arange(24.0, dtype=torch.float64).view(3, 8).sin())
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_float64_gradients_agree_with_finite_differences():
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(rms_norm, (random(3, 5), random(5)))
    assert torch.autograd.gradcheck(rms_norm, (random(3, 5),))
    assert torch.autograd.gradcheck(add_rms_norm, (random(3, 5), random(3, 5), random(5)))
    assert torch.autograd.gradcheck(add_rms_norm, (random(3, 5), random(3, 5)))
