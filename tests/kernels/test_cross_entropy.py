"""cross_entropy, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import cross_entropy, dispatch


def both(targets, ignore_index=-1):
    """Ours and plain PyTorch's."""
    return (
        lambda logits: cross_entropy(logits, targets, ignore_index),
        lambda logits: F.cross_entropy(logits, targets, ignore_index=ignore_index),
    )


def operands(N, V, *, dtype=torch.float32, device=None, ignored=False):
    logits = 3 * torch.randn(N, V, device=device)
    targets = torch.randint(V, (N,), device=device)
    if ignored:
        targets[::3] = -1
    return logits.to(dtype), targets


SHAPES = [(1, 1), (63, 1), (1, 63), (127, 127), (1023, 63), (7, 1023), (5, 50257)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_is_as_accurate_as_pytorch(device, dtype, rule, shape):
    logits, targets = operands(*shape, dtype=dtype, device=device)
    rule.accuracy(*both(targets), [logits])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1], ids=str)
def test_cross_entropy_with_ignored_rows_is_as_accurate_as_pytorch(device, dtype, rule, shape):
    logits, targets = operands(*shape, dtype=dtype, device=device, ignored=True)
    rule.accuracy(*both(targets), [logits])


def test_cross_entropy_takes_any_strides(device, dtype, rule, strided):
    logits, targets = operands(33, 127, dtype=dtype, device=device, ignored=True)
    rule.accuracy(*both(targets), [strided(logits)])


def test_targets_may_have_any_strides(device, dtype):
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    for view in (targets.repeat_interleave(2)[::2], targets[:1].expand(33)):
        assert torch.equal(cross_entropy(logits, view), cross_entropy(logits, view.contiguous()))


@pytest.mark.parametrize("strides", ["expanded", "sliced"])
def test_the_incoming_gradient_of_the_losses_may_have_any_strides(device, dtype, rule, strides):
    """The operator takes one number a row; the mean sends a single number expanded."""
    logits, targets = operands(33, 127, dtype=dtype, device=device)
    _, lse = dispatch.resolve("cross_entropy", logits)(logits, targets, -1)
    dlosses = (
        torch.randn((), device=device).expand(33) if strides == "expanded" else torch.randn(66, device=device)[::2]
    )
    backward = dispatch.resolve("cross_entropy_backward", logits)
    expected = backward(dlosses.contiguous(), logits, targets, lse, -1)
    assert torch.equal(backward(dlosses, logits, targets, lse, -1), expected)


def test_the_gradient_is_multiplied_by_the_one_that_comes_in(device, rule):
    logits, targets = operands(33, 127, device=device)
    ours, plain = both(targets)
    rule.accuracy(lambda t: -2.5 * ours(t), lambda t: -2.5 * plain(t), [logits])


def test_the_loss_is_fp32_and_the_gradient_has_the_dtype_of_the_logits(device, dtype):
    logits, targets = operands(5, 63, dtype=dtype, device=device)
    loss = cross_entropy(logits.requires_grad_(), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert logits.grad.dtype == dtype
    assert logits.grad.is_contiguous()


@pytest.mark.parametrize("ignore_index", [-1, -100, 3])
def test_ignored_rows_change_no_bit_of_the_loss_and_get_no_gradient(device, dtype, ignore_index):
    logits, targets = operands(12, 63, dtype=dtype, device=device)
    targets[targets == ignore_index] = 4
    ignored = torch.arange(12, device=device) % 3 == 1
    targets[ignored] = ignore_index
    other = torch.where(ignored.unsqueeze(1), 50.0, logits)
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, ignore_index)
    loss.backward()
    assert torch.equal(loss, cross_entropy(other, targets, ignore_index))
    assert torch.equal((logits.grad == 0).all(-1), ignored)


def test_without_a_counted_row_the_loss_is_nan_and_the_gradient_zero_as_in_pytorch(device, dtype):
    logits, targets = operands(4, 63, dtype=dtype, device=device)
    targets[:] = -1
    for function in both(targets):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        assert loss.isnan()
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_no_rows_at_all_give_nan(device):
    assert cross_entropy(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)).isnan()


@pytest.mark.parametrize("row", [0, 199])
@pytest.mark.parametrize("target", [63, 10**9, -2, -100])
def test_a_target_outside_the_classes_is_refused_or_shows_as_nan(backend, device, dtype, row, target):
    logits, targets = operands(200, 63, dtype=dtype, device=device)
    targets[row] = target
    if backend != "triton":  # whose kernels could not stop the queue to complain
        with pytest.raises(RuntimeError, match="targets"):
            cross_entropy(logits, targets)
        return
    loss = cross_entropy(logits.requires_grad_(), targets)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().any(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_do_not_overflow(device, dtype, value):
    logits = torch.tensor([[value, 0.0, 0.0], [value, value, 0.0]], dtype=dtype, device=device, requires_grad=True)
    targets = torch.tensor([0, 2], device=device)
    loss = cross_entropy(logits, targets)
    loss.backward()
    wide = logits.detach().double().requires_grad_()
    truth = F.cross_entropy(wide, targets)
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=0, atol=1e-3)


def test_a_logit_of_minus_infinity_is_a_class_ruled_out(device, dtype):
    logits, targets = operands(9, 63, dtype=dtype, device=device)
    targets[targets == 7] = 8
    logits[:, 7] = -math.inf
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(leaf.grad[:, 7], torch.zeros_like(leaf[:, 7]))
    rest = cross_entropy(logits[:, [i for i in range(63) if i != 7]], targets - (targets > 7).long())
    torch.testing.assert_close(loss, rest)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFFFFFFF, 0x7F800001], ids=hex)
@pytest.mark.parametrize("column", [0, 17, 62])
def test_a_nan_logit_makes_loss_and_row_gradient_nan_whatever_its_bits(device, bits, column):
    nan = torch.tensor([bits - 2**32 * (bits >> 31)], dtype=torch.int32).view(torch.float32).to(device)
    logits, targets = operands(5, 63, device=device)
    logits[2, column] = nan
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, targets)
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[2].isnan().all()
    assert not leaf.grad[[0, 1, 3, 4]].isnan().any()


def test_a_nan_in_an_ignored_row_does_no_harm(device, dtype):
    logits, targets = operands(5, 63, dtype=dtype, device=device)
    logits[2], targets[2] = math.nan, -1
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, targets)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


def test_the_in_place_operator_gives_the_same_losses_and_gradient(backend, device, dtype):
    logits, targets = operands(33, 127, dtype=dtype, device=device, ignored=True)
    losses, lse = dispatch.resolve("cross_entropy", logits)(logits, targets, -1)
    scale = torch.tensor(0.37, device=device)
    expected = dispatch.resolve("cross_entropy_backward", logits)(scale.expand(33), logits, targets, lse, -1)
    overwritten = logits.clone()
    assert torch.equal(dispatch.resolve("cross_entropy_", logits)(overwritten, targets, scale, -1), losses)
    if backend == "triton":  # in place it has the row's maximum and sum at hand, nearer the truth than their logarithm
        torch.testing.assert_close(overwritten, expected, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(overwritten, expected)


def test_the_same_inputs_give_the_same_bits(device, dtype, rule):
    logits, targets = operands(127, 1023, dtype=dtype, device=device)
    dout = torch.ones((), device=device)
    first, second = (rule.run(both(targets)[0], [logits], [dout]) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


def wrong_arguments():
    logits, targets = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    yield "logits: not a tensor", TypeError, "logits: ", ([[1.0]], targets)
    yield "logits: integers", TypeError, "logits: ", (logits.long(), targets)
    yield "logits: three dimensions", ValueError, "logits: ", (torch.randn(2, 4, 7), targets)
    yield "logits: no classes", ValueError, "logits: ", (torch.randn(4, 0), targets)
    yield "targets: not a tensor", TypeError, "targets: ", (logits, [0, 1, 2, 3])
    yield "targets: int32", TypeError, "targets: ", (logits, targets.int())
    yield "targets: probabilities", TypeError, "targets: ", (logits, logits.softmax(-1))
    yield "targets: length", ValueError, "targets: ", (logits, targets[:3])
    yield "targets: shape", ValueError, "targets: ", (logits, targets.view(4, 1))
    yield "targets: device", ValueError, "targets: ", (logits, targets.to("meta"))


@pytest.mark.parametrize(
    ("error", "message", "arguments"), [pytest.param(*case[1:], id=case[0]) for case in wrong_arguments()]
)
def test_a_wrong_argument_is_named(backend, error, message, arguments):
    with pytest.raises(error, match="^" + message):
        cross_entropy(*arguments)


def test_float64_gradients_agree_with_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, -1, 2])
    assert torch.autograd.gradcheck(lambda t: cross_entropy(t, targets), (logits,))
