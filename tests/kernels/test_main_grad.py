"""The bias's gradient that the norm behind a projection sums: whatever becomes of the result, it is the right one."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import add_layer_norm, dispatch, linear, reference
from fastgpt.kernels.main_grad import handed_on_with

C = 33


def parameters(dtype, device):
    """Input, weight and bias of a projection, residual, weight and bias of a norm."""
    shapes = (127, 20), (C, 20), (C,), (127, C), (C,), (C,)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def direct(y, residual, weight, bias):
    normed, total = add_layer_norm(y, residual, weight, bias)
    return normed.square().sum() + total.sin().sum()


def used_twice(y, residual, weight, bias):
    return direct(y, residual, weight, bias) + y.cos().sum()


def two_norms(y, residual, weight, bias):
    return direct(y, residual, weight, bias) + direct(y, y, weight, bias)


def only_the_sum(y, residual, weight, bias):
    return add_layer_norm(y, residual, weight, bias)[1].sin().sum()


def changed(y, residual, weight, bias):
    return direct(y * 2.0, residual, weight, bias)


def gradient_changed(y, residual, weight, bias):
    y.register_hook(lambda dy: dy * 3.0)
    return direct(y, residual, weight, bias)


def of_another_shape(y, residual, weight, bias):
    return direct(y.view(1, 127, C).expand(2, 127, C), residual.expand(2, 127, C), weight, bias)


def as_the_residual(y, residual, weight, bias):
    return direct(residual, y, weight, bias)


def without_a_norm(y, residual, weight, bias):
    return (y + residual).square().sum()


USES = [
    direct, used_twice, two_norms, only_the_sum, changed, gradient_changed, of_another_shape,
    as_the_residual, without_a_norm,
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("times", [1, 2])
def test_the_bias_gets_its_gradient_whatever_becomes_of_the_result(device, dtype, rule, use, times):
    x, weight, bias, *rest = parameters(dtype, device)
    bias.main_grad = torch.ones(C, device=device)

    def plainly(x, weight, bias, residual, norm_weight, norm_bias):
        def norm(y, r, w, b):
            return F.layer_norm(y + r, (C,), w, b), y + r

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "add_layer_norm", norm)
            return use(F.linear(x, weight, bias), residual, norm_weight, norm_bias)

    leaves = [x, weight, bias, *rest]
    one = torch.ones((), device=device)
    peer = rule.run(plainly, leaves, [one])[1][2]
    truth = rule.run(plainly, [t.double() for t in leaves], [one.double()])[1][2]
    for i in range(1, times + 1):
        loss = use(linear(x, weight, bias), *rest)
        loss.backward(one.to(loss.dtype), retain_graph=i < times)
    assert bias.grad is None
    rule.error("main_grad", (bias.main_grad - 1.0) / times, [peer], truth, dtype, rule.gradient)


def test_a_gradient_that_a_hook_changes_in_place_is_refused():
    x, weight, bias, *rest = parameters(torch.float32, None)
    bias.main_grad = torch.zeros(C)
    y = linear(x, weight, bias)
    y.register_hook(lambda dy: dy.mul_(2.0))
    with pytest.raises(RuntimeError, match=r"^linear: a hook changed the gradient of its result in place"):
        direct(y, *rest).backward()


def test_where_the_norm_has_summed_the_projection_does_not(device, monkeypatch):
    x, weight, bias, *rest = parameters(torch.float32, device)
    for parameter in (weight, bias):
        parameter.main_grad = torch.zeros(parameter.shape, device=device)
    asked = []
    resolve = dispatch.resolve
    monkeypatch.setattr(dispatch, "resolve", lambda name, tensor: asked.append(name) or resolve(name, tensor))
    sums = []
    monkeypatch.setattr(
        "fastgpt.kernels.torch_matmul.matmul_", lambda *args: sums.append(args[-1]) or reference.matmul_(*args)
    )
    direct(linear(x, weight, bias), *rest).backward()
    assert "add_column_sums_" not in asked
    assert all(row_sums is None for row_sums in sums)
    assert bias.main_grad.count_nonzero() > 0


def test_only_a_bias_with_a_main_grad_that_is_being_trained_is_handed_on():
    x, weight, bias, *_ = parameters(torch.float32, None)
    assert handed_on_with(linear(x, weight, bias)) is None
    bias.main_grad = torch.zeros(C)
    y = linear(x, weight, bias)
    assert handed_on_with(y).main_grad is bias.main_grad
    assert handed_on_with(y + 0.0) is None
    assert handed_on_with(linear(x, weight)) is None
    with torch.no_grad():
        assert handed_on_with(linear(x, weight, bias)) is None
    assert handed_on_with(linear(x, weight, bias.requires_grad_(False))) is None


def test_after_a_backward_no_gradient_is_kept_alive():
    x, weight, bias, *rest = parameters(torch.float32, None)
    bias.main_grad = torch.zeros(C)
    y = linear(x, weight, bias)
    direct(y, *rest).backward()
    assert handed_on_with(y).summed == []


def test_a_compiled_graph_returns_the_biass_gradient():
    leaves = parameters(torch.float32, None)
    leaves[2].main_grad = torch.zeros(C)
    expected = torch.autograd.grad(direct(F.linear(*leaves[:3]), *leaves[3:]), leaves)

    def function(x, weight, bias, *rest):
        return direct(linear(x, weight, bias), *rest)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert leaves[2].main_grad.count_nonzero() == 0
