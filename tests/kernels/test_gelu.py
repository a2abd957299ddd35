"""gelu, exact and by tanh, forward and backward; through it, the exponential of csrc/simd.h."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import dispatch, gelu

KINDS = ["tanh", "none"]
kinds = pytest.mark.parametrize("kind", KINDS)


def both(kind):
    """Ours and plain PyTorch's."""
    return lambda x: gelu(x, kind), lambda x: F.gelu(x, approximate=kind)


@kinds
@pytest.mark.parametrize("shape", [(63,), (127,), (1023,), (3, 5, 7), (65, 257)], ids=str)
def test_gelu_is_as_accurate_as_pytorch(device, dtype, rule, kind, shape):
    rule.accuracy(*both(kind), [torch.randn(shape, device=device).to(dtype)])


@kinds
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_number_alone_gives_what_it_gives_among_others(device, dtype, kind, shape):
    x = torch.randn(63, device=device).to(dtype)
    among = x.clone().requires_grad_()
    gelu(among, kind).sum().backward()
    for i in range(63):
        alone = x[i].view(shape).clone().requires_grad_()
        y = gelu(alone, kind)
        y.backward(torch.ones_like(y))
        assert y.shape == alone.grad.shape == shape
        torch.testing.assert_close(y.flatten(), gelu(x, kind)[i : i + 1])
        torch.testing.assert_close(alone.grad.flatten(), among.grad[i : i + 1])


@kinds
@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_gelu_takes_any_strides(device, dtype, rule, strided, kind, incoming):
    x = torch.randn(5, 9, 33, device=device).to(dtype)
    if incoming:
        rule.accuracy(*both(kind), [x], dout_layout=strided)
    else:
        rule.accuracy(*both(kind), [strided(x)])


def bits(t):
    """As integers, which tell -0 from 0; one NaN stands for all."""
    return t.masked_fill(t.isnan(), math.nan).view({2: torch.int16, 4: torch.int32}[t.itemsize])


def check_recompute(dy, x, bias, kind):
    """The one operator against the two that it stands for."""
    tanh = kind == "tanh"
    expected = dispatch.resolve("gelu", x)(x, bias, tanh), *dispatch.resolve("gelu_backward", x)(dy, x, bias, tanh)
    y, dbias = dispatch.resolve("gelu_backward_recompute_", x)(dy, x, bias, tanh)
    for ours, other in zip((y, dy, dbias), expected, strict=True):
        assert torch.equal(bits(ours), bits(other))


with_and_without_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])


@kinds
@with_and_without_bias
@pytest.mark.parametrize("shape", [(63,), (1, 1), (65, 257), (2, 33, 129), (1023, 33), (1, 4100)], ids=str)
def test_the_forward_made_again_in_the_backward_has_the_same_bits(device, dtype, kind, with_bias, shape):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    check_recompute(dy, x, torch.randn(shape[-1], device=device).to(dtype) if with_bias else None, kind)


@kinds
@with_and_without_bias
def test_the_forward_is_made_again_from_any_strides(device, dtype, strided, kind, with_bias):
    x, dy = (torch.randn(5, 9, 33, device=device).to(dtype) for _ in range(2))
    check_recompute(dy, strided(x), strided(torch.randn(33, device=device).to(dtype)) if with_bias else None, kind)


@kinds
@with_and_without_bias
def test_the_forward_made_again_has_the_same_bits_at_the_ends_of_the_range(device, dtype, kind, with_bias):
    ends = torch.tensor([0.0, 1e-30, 1.0, 4.0, 10.0, 15.0, 30.0, 1e4, 1e30, math.inf], device=device)
    x = torch.cat([ends, -ends, torch.tensor([math.nan], device=device)]).to(dtype)
    dy, x = (t.contiguous() for t in torch.broadcast_tensors(x[:, None], x))
    check_recompute(dy, x, torch.zeros(x.shape[-1], dtype=dtype, device=device) if with_bias else None, kind)


@with_and_without_bias
def test_of_no_rows_the_forward_made_again_is_empty(device, dtype, with_bias):
    x, bias = torch.empty(0, 5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)
    check_recompute(x.clone(), x, bias if with_bias else None, "tanh")


def both_with_bias(kind):
    """Ours and plain PyTorch's, of x + bias; the sum is taken in fp32 by both."""

    def plain(x, bias):
        wide = x if x.dtype == torch.float64 else x.float()
        return F.gelu(wide + bias.to(wide.dtype), approximate=kind).to(x.dtype)

    return lambda x, bias: gelu(x, kind, bias), plain


@kinds
@pytest.mark.parametrize("shape", [(63,), (1, 1), (127, 63), (1023, 33), (2, 65, 257), (1, 4100)], ids=str)
def test_a_bias_is_added_and_gets_its_gradient(device, dtype, rule, kind, shape):
    inputs = [torch.randn(size, device=device).to(dtype) for size in (shape, shape[-1:])]
    rule.accuracy(*both_with_bias(kind), inputs)


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_gelu_with_a_bias_takes_any_strides(device, dtype, rule, strided, incoming):
    x, bias = (torch.randn(size, device=device).to(dtype) for size in ((5, 9, 33), (33,)))
    if incoming:
        rule.accuracy(*both_with_bias("tanh"), [x, bias], dout_layout=strided)
    else:
        rule.accuracy(*both_with_bias("tanh"), [strided(x), strided(bias)])


def test_gelu_with_a_bias_of_no_rows_has_a_gradient_of_zeros(device, dtype):
    x, bias = torch.empty(0, 5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)
    gelu(x.requires_grad_(), bias=bias.requires_grad_()).sum().backward()
    assert x.grad.shape == (0, 5)
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit_of_the_bias_gradient(device, dtype, on_threads):
    x, bias = (torch.randn(size, device=device).to(dtype).requires_grad_() for size in ((1023, 300), (300,)))

    def gradient():
        return torch.autograd.grad(gelu(x, bias=bias).float().sum(), bias)[0]

    assert torch.equal(on_threads(1, gradient), on_threads(2, gradient))


@kinds
@pytest.mark.parametrize("shape", [(1, 63), (127, 63), (1023, 33), (2, 65, 257), (3, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "made again"])
def test_the_gradient_of_a_bias_is_added_to_its_main_grad_unrounded(device, dtype, rule, kind, shape, again):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    bias, before = torch.randn(shape[-1], device=device).to(dtype), torch.randn(shape[-1], device=device)
    name, main_grad = "gelu_backward_recompute_" if again else "gelu_backward", before.clone()
    first, dbias = dispatch.resolve(name, x)(dy.clone(), x, bias, kind == "tanh", main_grad)
    expected, rounded = dispatch.resolve(name, x)(dy.clone(), x, bias, kind == "tanh")
    assert torch.equal(first, expected)
    assert dbias.shape == (0,)
    assert rounded.shape == bias.shape
    columns = tuple(range(x.dim() - 1))
    sums = []
    for wide in (torch.float32, torch.float64):
        z = x.to(wide) + bias.to(wide)
        sums.append(before.to(wide) + torch.ops.aten.gelu_backward(dy.to(wide), z, approximate=kind).sum(columns))
    rule.error("main_grad", main_grad, sums[:1], sums[1], torch.float32, rule.gradient)


def test_a_bias_with_a_main_grad_gets_its_gradient_there_unless_it_is_frozen(device, dtype):
    x, bias = (torch.randn(size, device=device).to(dtype).requires_grad_() for size in ((9, 33), (33,)))
    dx, dbias = torch.autograd.grad(gelu(x, bias=bias).sum(), (x, bias))
    bias.main_grad = torch.ones(33, device=device)
    bias.requires_grad_(False)
    assert torch.equal(*torch.autograd.grad(gelu(x, bias=bias).sum(), x), dx)
    assert (bias.main_grad == 1.0).all()
    gelu(x, bias=bias.requires_grad_()).sum().backward()
    assert bias.grad is None
    torch.testing.assert_close(bias.main_grad - 1, dbias.float(), rtol=2**-8, atol=1e-5)


def truth(kind):
    """GELU by formulas that lose nothing to cancellation on the left, where PyTorch's float64 gives 0."""
    if kind == "tanh":
        return lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


@kinds
@pytest.mark.parametrize(("start", "end"), [(-14, -5), (-5, 0), (0, 5), (5, 14)])
def test_gelu_is_as_accurate_as_pytorch_in_every_part_of_its_range(device, dtype, rule, kind, start, end):
    x = torch.linspace(start, end, 40_001, device=device).to(dtype)
    rule.accuracy(*both(kind), [x], oracle=truth(kind))


@kinds
def test_the_distribution_function_inside_gelu_is_good_to_4e_7_everywhere(device, kind):
    """|gelu(x) - truth| <= 4e-7 |x|, point by point; PyTorch's own float32 is off by up to 3.5e-7 |x|."""
    x = torch.linspace(-14.0, 14.0, 400_001, device=device)
    error = (gelu(x, kind).double() - truth(kind)(x.double())).abs()
    allowed = 4e-7 * x.double().abs()
    worst = (error - allowed).argmax()
    assert error[worst] <= allowed[worst], f"at {x[worst]}: {error[worst]:.3e} > {allowed[worst]:.3e}"


@kinds
def test_gelu_at_the_ends_of_its_range_has_its_limits(device, dtype, kind):
    tiny = torch.tensor(1e-30, dtype=dtype).item()
    x = torch.tensor([0.0, -0.0, tiny, -tiny, 1e4, -1e4, 10.0], dtype=dtype, device=device, requires_grad=True)
    y = gelu(x, kind)
    y.sum().backward()
    expected = torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2, 1e4, -0.0, 10.0], dtype=dtype, device=device)
    slope = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0], dtype=dtype, device=device)
    assert torch.equal(y, expected)
    # PyTorch's own exact GELU drops the sign of zero with AVX2
    if dispatch.backend_of(x.device, x.dtype)[0] != "reference":
        assert torch.equal(y.signbit(), expected.signbit())
    assert torch.equal(x.grad, slope)


@kinds
@pytest.mark.parametrize("x", [-30.0, -15.0, -10.0])
def test_far_to_the_left_gelu_and_its_slope_vanish(device, dtype, kind, x):
    t = torch.tensor([x], dtype=dtype, device=device, requires_grad=True)
    y = gelu(t, kind)
    y.backward()
    assert abs(y.item()) < 1e-20
    assert abs(t.grad.item()) < 1e-20


@kinds
def test_gelu_of_infinity_and_nan_is_what_pytorch_gives_or_its_limit(device, dtype, kind):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype, device=device, requires_grad=True)
    y = gelu(x, kind)
    y.sum().backward()
    assert y[0] == math.inf or y[0].isnan()  # PyTorch's exact form gives NaN: inf * (1 - 0)
    assert y[1] == 0.0 or y[1].isnan()  # -inf * 0
    assert x.grad[0] == 1.0 or x.grad[0].isnan()
    assert x.grad[1] == 0.0 or x.grad[1].isnan()
    assert y[2].isnan()
    assert x.grad[2].isnan()
    assert y[3].isfinite()
    assert x.grad[3].isfinite()


@kinds
@pytest.mark.parametrize("n", [1, 16, 63])
def test_a_nan_in_is_one_nan_out(device, dtype, kind, n):
    x = torch.randn(n, device=device).to(dtype)
    dy = torch.ones_like(x)
    spoilt = x.clone()
    spoilt[n // 2] = math.nan
    dspoilt = dy.clone()
    dspoilt[n // 2] = math.nan
    for value, incoming in ((spoilt, dy), (x, dspoilt)):
        leaf = value.clone().requires_grad_()
        y = gelu(leaf, kind)
        y.backward(incoming)
        assert torch.equal(y.isnan(), value.isnan())
        assert torch.equal(leaf.grad.isnan(), value.isnan() | incoming.isnan())


@kinds
def test_the_result_is_contiguous_in_the_dtype_of_x(device, dtype, kind):
    x = torch.randn(5, 7, device=device).to(dtype).t().requires_grad_()
    y = gelu(x, kind)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(5, 7, device=device).to(dtype).t())
    for t in (y, gradient):
        assert t.dtype == dtype
        assert t.is_contiguous()


def test_an_empty_tensor_stays_empty(device, dtype):
    x = torch.empty(0, 3, dtype=dtype, device=device, requires_grad=True)
    gelu(x).sum().backward()
    assert x.grad.shape == (0, 3)


def test_the_default_is_gpt2s_approximation(device):
    x = torch.linspace(-3, 3, 101, device=device)
    assert torch.equal(gelu(x), gelu(x, "tanh"))
    assert not torch.equal(gelu(x), gelu(x, "none"))


@kinds
def test_the_same_inputs_give_the_same_bits(device, dtype, rule, kind):
    x, dy = (torch.randn(40_001, device=device).to(dtype) for _ in range(2))
    (y,), (dx,) = rule.run(lambda t: gelu(t, kind), [x], [dy])
    (again,), (dagain,) = rule.run(lambda t: gelu(t, kind), [x], [dy])
    assert torch.equal(y, again)
    assert torch.equal(dx, dagain)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        pytest.param(TypeError, "x: ", (1.0,), id="x: not a tensor"),
        pytest.param(TypeError, "x: ", (torch.arange(3),), id="x: integers"),
        pytest.param(ValueError, "approximate: ", (torch.ones(3), "sigmoid"), id="approximate: unknown"),
        pytest.param(ValueError, "approximate: ", (torch.ones(3), True), id="approximate: bool"),
    ],
)
def test_a_wrong_argument_is_named(backend, error, message, arguments):
    with pytest.raises(error, match="^" + message):
        gelu(*arguments)


@kinds
def test_float64_gradients_agree_with_finite_differences(kind):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gelu(t, kind), (x,))
