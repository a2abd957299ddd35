"""relu2, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import dispatch, relu2


def plain(x):
    return F.relu(x).square()


@pytest.mark.parametrize("shape", [(63,), (127,), (1023,), (3, 5, 7), (65, 257)], ids=str)
def test_relu2_is_as_accurate_as_pytorch(device, dtype, rule, shape):
    rule.accuracy(relu2, plain, [torch.randn(shape, device=device).to(dtype)])


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_relu2_takes_any_strides(device, dtype, rule, strided, incoming):
    x = torch.randn(5, 9, 33, device=device).to(dtype)
    if incoming:
        rule.accuracy(relu2, plain, [x], dout_layout=strided)
    else:
        rule.accuracy(relu2, plain, [strided(x)])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_number_alone_gives_what_it_gives_among_others(device, dtype, shape):
    x = torch.randn(63, device=device).to(dtype)
    among = x.clone().requires_grad_()
    relu2(among).sum().backward()
    for i in range(63):
        alone = x[i].view(shape).clone().requires_grad_()
        y = relu2(alone)
        y.backward(torch.ones_like(y))
        assert y.shape == alone.grad.shape == shape
        assert torch.equal(y.flatten(), relu2(x)[i : i + 1])
        assert torch.equal(alone.grad.flatten(), among.grad[i : i + 1])


def bits(t):
    """As integers, which tell -0 from 0; one NaN stands for all."""
    return t.masked_fill(t.isnan(), math.nan).view({2: torch.int16, 4: torch.int32}[t.itemsize])


def check_recompute(dy, x):
    """The one operator against the two that it stands for."""
    expected = dispatch.resolve("relu2", x)(x), dispatch.resolve("relu2_backward", x)(dy, x)
    y = dispatch.resolve("relu2_backward_recompute_", x)(dy, x)
    for ours, other in zip((y, dy), expected, strict=True):
        assert torch.equal(bits(ours), bits(other))


@pytest.mark.parametrize("shape", [(63,), (1, 1), (65, 257), (2, 33, 129), (1, 4100), (0, 5)], ids=str)
def test_the_forward_made_again_in_the_backward_has_the_same_bits(device, dtype, shape):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    check_recompute(dy, x)


def test_the_forward_is_made_again_from_any_strides(device, dtype, strided):
    x, dy = (torch.randn(5, 9, 33, device=device).to(dtype) for _ in range(2))
    check_recompute(dy, strided(x))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_a_gradient_that_cannot_be_written_over_is_refused(device):
    x = torch.randn(5, 7, device=device)
    with pytest.raises(RuntimeError, match=r"\bdy: expected to be contiguous"):
        dispatch.resolve("relu2_backward_recompute_", x)(torch.randn(7, 5, device=device).t(), x)


def test_relu2_at_the_ends_of_its_range(device, dtype):
    x = torch.tensor([0.0, -0.0, -1.0, -1e30, -math.inf, 3.0, math.inf], device=device).to(dtype).requires_grad_()
    y = relu2(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 9.0, math.inf]
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 6.0, math.inf]


@pytest.mark.parametrize("n", [1, 16, 63])
def test_a_nan_in_is_one_nan_out(device, dtype, n):
    x = torch.randn(n, device=device).to(dtype)
    dy = torch.ones_like(x)
    spoilt, dspoilt = x.clone(), dy.clone()
    spoilt[n // 2] = dspoilt[n // 2] = math.nan
    for value, incoming in ((spoilt, dy), (x, dspoilt)):
        leaf = value.clone().requires_grad_()
        y = relu2(leaf)
        y.backward(incoming)
        assert torch.equal(y.isnan(), value.isnan())
        assert torch.equal(leaf.grad.isnan(), value.isnan() | incoming.isnan())


def test_the_result_is_contiguous_in_the_dtype_of_x(device, dtype):
    x = torch.randn(5, 7, device=device).to(dtype).t().requires_grad_()
    y = relu2(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(5, 7, device=device).to(dtype).t())
    for t in (y, gradient):
        assert t.dtype == dtype
        assert t.is_contiguous()


def test_an_empty_tensor_stays_empty(device, dtype):
    x = torch.empty(0, 3, dtype=dtype, device=device, requires_grad=True)
    relu2(x).sum().backward()
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, rule, on_threads):
    x, dy = (torch.randn(40_001, device=device).to(dtype) for _ in range(2))
    (y,), (dx,) = on_threads(1, lambda: rule.run(relu2, [x], [dy]))
    (again,), (dagain,) = on_threads(2, lambda: rule.run(relu2, [x], [dy]))
    assert torch.equal(y, again)
    assert torch.equal(dx, dagain)


@pytest.mark.parametrize("x", [1.0, None, torch.arange(3)], ids=["number", "missing", "integers"])
def test_a_wrong_argument_is_named(backend, x):
    with pytest.raises(TypeError, match=r"^x: "):
        relu2(x)


def test_float64_gradients_agree_with_finite_differences():
    assert torch.autograd.gradcheck(relu2, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))
