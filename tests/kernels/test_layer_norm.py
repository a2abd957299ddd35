"""layer_norm and add_layer_norm, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import add_layer_norm, dispatch, layer_norm
from fastgpt.kernels.layer_norm import layer_norm_and_input


def plain(x, weight, bias=None, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def plain_add(x, residual, weight, bias=None, eps=1e-5):
    total = x + residual
    return plain(total, weight, bias, eps), total


def operands(*shape, dtype, device, n=1):
    """N tensors of ``shape``, then weight and bias."""
    C = shape[-1]
    tensors = [torch.randn(shape, device=device) for _ in range(n)]
    return [t.to(dtype) for t in (*tensors, torch.randn(C, device=device), torch.randn(C, device=device))]


SHAPES = [(1, 63), (127, 63), (5, 1023), (1023, 127), (2, 65, 33), (16,), (2, 3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_layer_norm_is_as_accurate_as_pytorch(device, dtype, rule, shape, with_bias):
    inputs = operands(*shape, dtype=dtype, device=device)
    rule.accuracy(layer_norm, plain, inputs if with_bias else inputs[:-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_add_layer_norm_is_as_accurate_as_pytorch(device, dtype, rule, shape, with_bias):
    inputs = operands(*shape, dtype=dtype, device=device, n=2)
    rule.accuracy(add_layer_norm, plain_add, inputs if with_bias else inputs[:-1])


@pytest.mark.parametrize("rows", [1, 63, 127])
def test_a_single_column_is_normalised_away(device, dtype, rows):
    """Its own mean is subtracted from it: what is left is the bias, and no gradient but the bias's."""
    x, weight, bias = (t.requires_grad_() for t in operands(rows, 1, dtype=dtype, device=device))
    y = layer_norm(x, weight, bias)
    dy = torch.randn(rows, 1, device=device).to(dtype)
    y.backward(dy)
    assert torch.equal(y, bias.expand(rows, 1))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    torch.testing.assert_close(bias.grad, dy.float().sum(0).to(dtype))


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_layer_norm_takes_any_strides(device, dtype, rule, strided, incoming):
    inputs = operands(7, 9, 63, dtype=dtype, device=device)
    if incoming:
        rule.accuracy(layer_norm, plain, inputs, dout_layout=strided)
    else:
        rule.accuracy(layer_norm, plain, [strided(t) for t in inputs])


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_add_layer_norm_takes_any_strides(device, dtype, rule, strided, incoming):
    inputs = operands(7, 9, 63, dtype=dtype, device=device, n=2)
    if incoming:
        rule.accuracy(add_layer_norm, plain_add, inputs, dout_layout=strided)
    else:
        x, residual, weight, bias = inputs  # strides that differ between the two summands
        rule.accuracy(add_layer_norm, plain_add, [strided(x), residual, strided(weight), strided(bias)])
        rule.accuracy(add_layer_norm, plain_add, [x, strided(residual), weight, bias])


def test_a_mean_far_from_zero_costs_no_accuracy(device, rule):
    x, weight, bias = operands(1023, 127, dtype=torch.float32, device=device)
    rule.accuracy(layer_norm, plain, [x + 1000.0, weight, bias])


def test_eps_is_added_to_the_variance(device, rule):
    x, weight, bias = operands(9, 63, dtype=torch.float32, device=device)
    small = x * 0.1
    rule.accuracy(lambda *t: layer_norm(*t, eps=0.5), lambda *t: plain(*t, eps=0.5), [small, weight, bias])
    rule.accuracy(
        lambda *t: add_layer_norm(*t, eps=0.5),
        lambda *t: plain_add(*t, eps=0.5),
        [small, small.flip(0), weight, bias],
    )


def test_a_row_of_equal_numbers_becomes_the_bias(device, dtype):
    _, weight, bias = operands(4, 127, dtype=dtype, device=device)
    y = layer_norm(torch.full((4, 127), 3.0, dtype=dtype, device=device), weight, bias)
    assert torch.equal(y, bias.expand(4, 127))


def test_the_sum_is_rounded_once(device, dtype):
    x, residual, weight, bias = operands(5, 127, dtype=dtype, device=device, n=2)
    _, total = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)


def test_add_layer_norm_is_layer_norm_of_the_sum(device, dtype):
    x, residual, weight, bias = operands(5, 127, dtype=dtype, device=device, n=2)
    y, total = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(y, layer_norm(total, weight, bias))


@pytest.mark.parametrize("used", ["y", "sum"])
def test_a_gradient_may_reach_only_one_of_the_two_outputs(device, dtype, rule, used):
    inputs = operands(9, 63, dtype=dtype, device=device, n=2)
    if used == "y":
        rule.accuracy(lambda *t: add_layer_norm(*t)[0], lambda *t: plain_add(*t)[0], inputs)
    else:
        x, residual, weight, bias = inputs
        rule.accuracy(lambda a, b: add_layer_norm(a, b, weight, bias)[1], lambda a, b: a + b, [x, residual])


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "y", "input"])
def test_where_a_residual_stream_begins_its_gradient_is_added_in_the_norms(device, dtype, rule, used):
    inputs = operands(9, 63, dtype=dtype, device=device)[: 3 if used[0] else 1]
    weight, bias = operands(9, 63, dtype=dtype, device=device)[1:]

    def of(function):
        def outputs(x, w=weight, b=bias):
            return tuple(t for t, use in zip(function(x, w, b), used, strict=True) if use)

        return outputs

    rule.accuracy(of(layer_norm_and_input), of(lambda x, w, b: (plain(x, w.to(x), b.to(x)), x)), inputs)


def test_the_two_summands_get_gradients_of_their_own(device, dtype):
    x, residual, weight, bias = (t.requires_grad_() for t in operands(4, 8, dtype=dtype, device=device, n=2))
    y, total = add_layer_norm(x, residual, weight, bias)
    (y.sum() + total.sum()).backward()
    expected = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, expected)
    assert expected.count_nonzero() > 0


def test_outputs_and_gradients_are_contiguous_in_the_dtype_of_x(device, dtype):
    x, residual, weight, bias = operands(6, 5, 33, dtype=dtype, device=device, n=2)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for t in (x, residual, weight, bias):
        t.requires_grad_()
    y, total = add_layer_norm(x, residual, weight, bias)
    gradients = torch.autograd.grad((y, total), (x, residual, weight, bias), (y.detach(), y.detach()))
    for t in (layer_norm(x, weight, bias), y, total, *gradients):
        assert t.dtype == dtype
        assert t.is_contiguous()


def test_an_empty_batch_gives_an_empty_result_and_zero_weight_gradients(device, dtype):
    x, weight, bias = (t.requires_grad_() for t in operands(0, 8, dtype=dtype, device=device))
    y = layer_norm(x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_a_nan_spoils_its_own_row_only(device, dtype):
    x, weight, bias = operands(5, 63, dtype=dtype, device=device)
    x[2, 7] = torch.nan
    x.requires_grad_()
    y = layer_norm(x, weight, bias)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    total_y, total = add_layer_norm(x, torch.ones_like(x), weight, bias)
    spoilt = torch.tensor([False, False, True, False, False], device=device)
    for t in (y, gradient, total_y):
        assert torch.equal(t.isnan().all(-1), spoilt)
        assert torch.equal(t.isnan().any(-1), spoilt)
    assert total.isnan().sum() == 1


def test_a_nan_in_the_incoming_gradient_reaches_every_gradient_it_enters(device, dtype):
    x, weight, bias = (t.requires_grad_() for t in operands(5, 63, dtype=dtype, device=device))
    y = layer_norm(x, weight, bias)
    dy = torch.ones_like(y)
    dy[2, 7] = torch.nan
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    assert dx[2].isnan().all()
    assert not dx[[0, 1, 3, 4]].isnan().any()
    for gradient in (dweight, dbias):
        assert gradient[7].isnan()
        assert gradient.isnan().sum() == 1


def test_the_same_inputs_give_the_same_bits(device, dtype, rule):
    inputs = operands(1023, 127, dtype=dtype, device=device)
    dout = torch.randn(1023, 127, device=device).to(dtype)
    (y, *_), first = rule.run(layer_norm, inputs, [dout])
    (again, *_), second = rule.run(layer_norm, inputs, [dout])
    assert torch.equal(y, again)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, rule, on_threads):
    inputs = operands(1023, 127, dtype=dtype, device=device)
    dout = torch.randn(1023, 127, device=device).to(dtype)
    (y, *_), one = on_threads(1, lambda: rule.run(layer_norm, inputs, [dout]))
    (again, *_), two = on_threads(2, lambda: rule.run(layer_norm, inputs, [dout]))
    assert torch.equal(y, again)
    assert all(map(torch.equal, one, two))


# ---- gradients that go into main_grad ----


def backward(dy, dsum, x, weight, mean, rstd, needs_dbias, *rest):
    return dispatch.resolve("layer_norm_backward", x)(dy, dsum, x, weight, mean, rstd, needs_dbias, *rest)


@pytest.mark.parametrize("shape", [(1, 63), (127, 63), (1023, 127), (2, 65, 33), (3, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=["both", "weight", "bias"])
def test_gradients_are_added_to_a_main_grad_unrounded(device, dtype, rule, shape, given):
    x, dsum, dy, weight, bias = operands(*shape, dtype=dtype, device=device, n=3)
    _, mean, rstd = dispatch.resolve("layer_norm", x)(x, weight, bias, 1e-5)
    starts = [torch.randn_like(weight, dtype=torch.float32) for _ in range(2)]
    main_grads = [start.clone() if there else None for start, there in zip(starts, given, strict=True)]
    arguments = dy, dsum, x, weight, mean, rstd, True
    dx, *returned = backward(*arguments, *main_grads)
    expected_dx, *expected = backward(*arguments)
    assert torch.equal(dx, expected_dx)
    normal = (x.double() - mean.double().unsqueeze(-1)) * rstd.double().unsqueeze(-1)
    columns = tuple(range(x.dim() - 1))
    truths = (dy.double() * normal).sum(columns), dy.double().sum(columns)
    for i, main_grad in enumerate(main_grads):
        if main_grad is None:
            assert torch.equal(returned[i], expected[i])
            continue
        assert returned[i].shape == (0,)
        peer = starts[i] + (dy.float() * (normal.float() if i == 0 else 1.0)).sum(columns)
        truth = starts[i].double() + truths[i]
        rule.error(f"main_grad {i}", main_grad, [peer], truth, torch.float32, rule.gradient)


@pytest.mark.parametrize("shape", [(1, 63), (127, 63), (1023, 127), (2, 65, 33), (3, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("with_dsum", [True, False], ids=["dsum", "no dsum"])
@pytest.mark.parametrize("needs_dbias", [True, False], ids=["bias", "no bias"])
def test_the_columns_of_dx_are_summed_unrounded_on_top_of_what_is_there(
    device, dtype, rule, shape, with_dsum, needs_dbias
):
    x, dsum, dy, weight, bias = operands(*shape, dtype=dtype, device=device, n=3)
    _, mean, rstd = dispatch.resolve("layer_norm", x)(x, weight, bias, 1e-5)
    before = torch.randn(shape[-1], device=device)
    arguments = dy, dsum if with_dsum else None, x, weight, mean, rstd, needs_dbias
    main_grads = (torch.zeros_like(before), torch.zeros_like(before) if needs_dbias else None)
    sums, again = before.clone(), before.clone()
    results = backward(*arguments, None, None, sums)
    assert all(map(torch.equal, results, backward(*arguments)))
    assert torch.equal(backward(*arguments, *main_grads, again)[0], results[0])
    assert torch.equal(again, sums)

    def plain(wide):
        normal = (x.to(wide) - mean.to(wide).unsqueeze(-1)) * rstd.to(wide).unsqueeze(-1)
        g = dy.to(wide) * weight.to(wide)
        projection = (g * normal).mean(-1, keepdim=True)
        dx = rstd.to(wide).unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - normal * projection)
        dx = dx + dsum.to(wide) if with_dsum else dx
        return before.to(wide) + dx.sum(tuple(range(x.dim() - 1)))

    # what is left of a single column is the difference of equal numbers, and of the columns of few rows little more
    floor = 1e-6 * (1 + dy.double().abs().sum().item() / max(1, shape[-1]))
    truth = plain(torch.float64)
    error, allowed = (sums.double() - truth).abs().max(), 3 * (plain(torch.float32).double() - truth).abs().max()
    assert error <= allowed + floor


def test_without_a_bias_only_the_weight_has_a_main_grad(device, dtype):
    x, dy, weight, _ = operands(9, 63, dtype=dtype, device=device, n=2)
    _, mean, rstd = dispatch.resolve("layer_norm", x)(x, weight, None, 1e-5)
    main_grad = torch.ones(63, device=device)
    _, dweight, dbias = backward(dy, None, x, weight, mean, rstd, False, main_grad)
    assert dweight.shape == dbias.shape == (0,)
    expected = backward(dy, None, x, weight, mean, rstd, False)[1].float()
    torch.testing.assert_close(main_grad - 1, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("function", [layer_norm, lambda *t: add_layer_norm(t[0], t[0].detach(), *t[1:])[0]])
def test_parameters_with_a_main_grad_get_their_gradients_there(device, dtype, function):
    tensors = [t.requires_grad_() for t in operands(127, 63, dtype=dtype, device=device)]
    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    for parameter in tensors[1:]:
        parameter.main_grad = torch.ones(63, device=device)
    function(*tensors).sum().backward()
    assert torch.equal(tensors[0].grad, expected[0])
    for parameter, gradient in zip(tensors[1:], expected[1:], strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad - 1, gradient.float(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_parameter_keeps_its_main_grad_as_it_is(device, frozen):
    tensors = [t.requires_grad_() for t in operands(9, 63, dtype=torch.float32, device=device)]
    for parameter in tensors[1:]:
        parameter.main_grad = torch.ones(63, device=device)
    tensors[frozen].requires_grad_(False)
    layer_norm(*tensors).backward(torch.randn(9, 63, device=device))
    for i in (1, 2):
        assert (tensors[i].main_grad == 1.0).all() == (i == frozen)


@pytest.mark.parametrize("wrong", [torch.ones(8), torch.ones(63).bfloat16(), torch.ones(126)[::2]])
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_main_grad_that_cannot_be_added_to_is_refused(device, wrong):
    x, dy, weight, _ = operands(9, 63, dtype=torch.float32, device=device, n=2)
    rows = torch.ones(9, device=device)
    with pytest.raises((RuntimeError, ValueError), match="main_grad: expected 63 elements of float32"):
        backward(dy, None, x, weight, rows, rows, False, wrong.to(device))


def wrong_arguments():
    x, weight = torch.randn(3, 8), torch.randn(8)
    yield "x: not a tensor", TypeError, "x: ", ([1.0], weight, None)
    yield "x: integers", TypeError, "x: ", (x.long(), weight, None)
    yield "x: 0-dim", ValueError, "x: ", (torch.tensor(1.0), weight, None)
    yield "x: no columns", ValueError, "x: ", (torch.empty(3, 0), torch.empty(0), None)
    yield "weight: dtype", TypeError, "weight: ", (x, weight.bfloat16(), None)
    yield "weight: shape", ValueError, "weight: ", (x, torch.randn(7), None)
    yield "weight: two dimensions", ValueError, "weight: ", (x, torch.randn(1, 8), None)
    yield "weight: device", ValueError, "weight: ", (x, weight.to("meta"), None)
    yield "bias: dtype", TypeError, "bias: ", (x, weight, weight.double())
    yield "bias: shape", ValueError, "bias: ", (x, weight, torch.randn(1))
    yield "bias: device", ValueError, "bias: ", (x, weight, weight.to("meta"))


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [pytest.param(*case[1:], id=case[0]) for case in wrong_arguments()]
)
def test_a_wrong_argument_is_named(backend, error, message, arguments):
    with pytest.raises(error, match="^" + message):
        layer_norm(*arguments)
    x, *rest = arguments
    with pytest.raises(error, match="^" + message):
        add_layer_norm(x, x, *rest)


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
        add_layer_norm(torch.randn(3, 8), residual, torch.randn(8))


@pytest.mark.parametrize(
    "function",
    [layer_norm, lambda x, *rest: add_layer_norm(x / 2, x / 2, *rest)[0]],
    ids=["layer_norm", "add_layer_norm"],
)
def test_float64_has_statistics_in_float64(function):
    """A mean that is rounded to fp32 is off by more here than these numbers differ from it."""
    inputs = [1000.0 + 1e-5 * torch.randn(3, 8, dtype=torch.float64), *torch.randn(2, 8, dtype=torch.float64)]
    gradients = []
    for norm in (lambda x, w, b: function(x, w, b, 1e-12), lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-12)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        norm(*leaves).backward(torch.arange(24.0, dtype=torch.float64).view(3, 8).sin())
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0)


def test_float64_gradients_agree_with_finite_differences():
    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(layer_norm, (random(3, 5), random(5), random(5)))
    assert torch.autograd.gradcheck(layer_norm, (random(3, 5), random(5)))
    assert torch.autograd.gradcheck(add_layer_norm, (random(3, 5), random(3, 5), random(5), random(5)))
