"""FusedAdamW against torch.optim.AdamW."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fastgpt.kernels import FusedAdamW, ops

SIZES = [(1,), (63,), (127, 3), (1023,), (33_000,)]  # the last is more than the kernel's chunk of 2**15


def parameters(dtype=torch.float32, device="cpu", sizes=SIZES):
    return [Parameter(torch.randn(size, device=device).to(dtype)) for size in sizes]


def clones(tensors, dtype=None):
    return [Parameter(t.detach().clone().to(dtype or t.dtype)) for t in tensors]


def gradients(params, steps, dtype=None):
    """Gradients of each step, growing and shrinking over two orders of magnitude, so that clipping sets in."""
    for i in range(steps):
        scale = 10 ** math.sin(i / 5)
        yield [(scale * torch.randn(p.shape, device=p.device)).to(dtype or p.dtype) for p in params]


def assign(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype, copy=True)


def check(rule, params, peers, truths, dtype):
    """The error rule for all parameters as one vector: two hundred roundings of a single number are mere luck."""
    ours, theirs, truth = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (params, peers, truths))
    rule.error("parameters", ours, [theirs], truth, dtype, rule.output)


OPTIONS = {
    "plain": {"lr": 1e-2, "weight_decay": 0.0},
    "weight decay": {"lr": 1e-2, "weight_decay": 0.3},
    "gpt": {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1},
    "no momentum, large eps": {"lr": 1e-2, "betas": (0.0, 0.5), "eps": 1e-2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_two_hundred_steps_are_as_accurate_as_pytorchs(device, dtype, rule, options):
    params = parameters(dtype, device)
    peers, truths = clones(params), clones(params, torch.float64)
    optimizers = [
        FusedAdamW(params, **options),
        torch.optim.AdamW(peers, **options),
        torch.optim.AdamW(truths, **options),
    ]
    for step, grads in enumerate(gradients(params, 200)):
        for tensors, optimizer in zip((params, peers, truths), optimizers, strict=True):
            assign(tensors, grads)
            optimizer.step()
        if step in (0, 1, 9, 199):
            check(rule, params, peers, truths, dtype)


def test_clipping_is_clip_grad_norm_over_all_groups(device, dtype, rule):
    params = parameters(dtype, device)
    peers, truths = clones(params), clones(params, torch.float64)

    def groups(tensors):
        return [
            {"params": tensors[:2], "weight_decay": 0.0},
            {"params": tensors[2:], "lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6},
        ]

    ours = FusedAdamW(groups(params), lr=1e-2, weight_decay=0.1, max_grad_norm=300.0)
    theirs = [torch.optim.AdamW(groups(tensors), lr=1e-2, weight_decay=0.1) for tensors in (peers, truths)]
    clipped = set()
    for grads in gradients(params, 200):
        assign(params, grads)
        ours.step()
        for tensors, optimizer in zip((peers, truths), theirs, strict=True):
            assign(tensors, grads)
            norm = clip_grad_norm_(tensors, 300.0)
            optimizer.step()
        torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-5, atol=0)
        clipped.add(norm.item() > 300.0)
    assert clipped == {True, False}
    check(rule, params, peers, truths, dtype)


def test_one_flat_buffer_gives_the_bits_of_its_parts(device, dtype):
    params = parameters(dtype, device)
    flat = Parameter(torch.cat([p.detach().flatten() for p in params]))
    ours, whole = FusedAdamW(params, lr=1e-2), FusedAdamW([flat], lr=1e-2)
    for grads in gradients(params, 20):
        assign(params, grads)
        flat.grad = torch.cat([g.flatten() for g in grads])
        ours.step()
        whole.step()
    assert torch.equal(flat, torch.cat([p.flatten() for p in params]))


def test_views_of_a_flat_buffer_are_updated_in_place(device):
    flat, grad = torch.randn(1000, device=device), torch.randn(1000, device=device)
    before = flat.clone()
    view = Parameter(flat[100:163])
    view.grad = grad[100:163]
    FusedAdamW([view], lr=0.1).step()
    changed = flat != before
    assert changed[100:163].all()
    assert not changed[:100].any()
    assert not changed[163:].any()


def test_a_copy_receives_every_new_value_rounded_to_bf16(device):
    params = parameters(device=device)
    copies = {p: torch.full_like(p, math.nan, dtype=torch.bfloat16) for p in params}
    plain = clones(params)
    ours, without = FusedAdamW(params, lr=1e-2, copies=copies), FusedAdamW(plain, lr=1e-2)
    for grads in gradients(params, 5):
        for tensors, optimizer in ((params, ours), (plain, without)):
            assign(tensors, grads)
            optimizer.step()
        for p, q in zip(params, plain, strict=True):
            assert torch.equal(copies[p], p.bfloat16())
            assert torch.equal(p, q)


def test_zero_grad_zeroes_the_gradients_after_using_them(device, dtype):
    params = parameters(dtype, device)
    others = clones(params)
    ours, plain = FusedAdamW(params, max_grad_norm=1.0), FusedAdamW(others, max_grad_norm=1.0)
    for grads in gradients(params, 3):
        assign(params, grads)
        assign(others, grads)
        ours.step(zero_grad=True)
        plain.step()
        for p, q in zip(params, others, strict=True):
            assert p.grad.count_nonzero() == 0
            assert torch.equal(p, q)
    assert all(q.grad.count_nonzero() > 0 for q in others)


@pytest.mark.parametrize("max_grad_norm", [None, 3.0, 1e9])
def test_grad_scale_is_a_factor_on_every_gradient(device, dtype, max_grad_norm):
    params = parameters(dtype, device)
    scaled = clones(params)
    ours = FusedAdamW(params, lr=1e-2, max_grad_norm=max_grad_norm)
    plain = FusedAdamW(scaled, lr=1e-2, max_grad_norm=max_grad_norm)
    for grads in gradients(params, 5):
        assign(params, grads)
        assign(scaled, [g / 8 for g in grads])  # a power of two rounds nothing
        ours.step(grad_scale=1 / 8)
        plain.step()
        if max_grad_norm is not None:
            torch.testing.assert_close(ours.grad_norm, plain.grad_norm)
    for p, q in zip(params, scaled, strict=True):
        torch.testing.assert_close(p, q)


def test_bf16_parameters_take_fp32_steps(device):
    """Both moments and the update are computed in fp32 and rounded once: 0.1 + 0.2 ulp is not lost midway."""
    p = Parameter(torch.tensor([1.0, 256.0], dtype=torch.bfloat16, device=device))
    p.grad = torch.tensor([1.0, -1.0], dtype=torch.bfloat16, device=device)
    FusedAdamW([p], lr=0.0041, weight_decay=0.0).step()
    # 1 - 0.0041 lies nearest to 1 - 2**-8 = 0.99609375; 256.0041 to 256
    assert p.tolist() == [0.99609375, 256.0]


# ---- state ----


def train(optimizer, params, grads):
    for step in grads:
        assign(params, step)
        optimizer.step()


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours, then PyTorch's", "PyTorch's, then ours"])
def test_a_state_dict_loads_into_the_other_and_training_goes_on(device, ours_first):
    classes = (FusedAdamW, torch.optim.AdamW) if ours_first else (torch.optim.AdamW, FusedAdamW)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    params = parameters(device=device)
    reference = clones(params)
    steps = list(gradients(params, 30))
    train(torch.optim.AdamW(reference, **options), reference, steps)

    first = classes[0](params, **options)
    train(first, params, steps[:10])
    moved = clones(params)
    second = classes[1](moved, lr=123.0)  # everything else comes with the state
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, moved, steps[10:])
    for p, q in zip(moved, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_state_dict_has_the_layout_of_pytorchs(device):
    params = parameters(device=device)
    others = clones(params)
    ours, theirs = FusedAdamW(params), torch.optim.AdamW(others)
    steps = list(gradients(params, 2))
    train(ours, params, steps)
    train(theirs, others, steps)
    ours, theirs = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index in ours:
        assert ours[index].keys() == theirs[index].keys()
        for key, value in theirs[index].items():
            assert ours[index][key].dtype == value.dtype
            assert ours[index][key].shape == value.shape
            torch.testing.assert_close(ours[index][key], value)


def test_a_state_dict_of_ours_restores_every_bit(device, dtype):
    params = parameters(dtype, device)
    steps = list(gradients(params, 10))
    ours = FusedAdamW(params, lr=1e-2)
    train(ours, params, steps[:5])
    restored = clones(params)
    again = FusedAdamW(restored, lr=1e-2)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, params, steps[5:])
    train(again, restored, steps[5:])
    assert all(map(torch.equal, params, restored))


# ---- the optimizer's manners ----


def test_a_scheduler_governs_the_learning_rate(device):
    params = parameters(device=device)
    others = clones(params)
    ours, theirs = FusedAdamW(params, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (ours, theirs)]
    for grads in gradients(params, 5):
        train(ours, params, [grads])
        train(theirs, others, [grads])
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_parameter_without_a_gradient_is_left_alone(device):
    first, second = parameters(device=device, sizes=[(5,), (7,)])
    before = second.detach().clone()
    ours = FusedAdamW([first, second], max_grad_norm=1.0)
    first.grad = torch.ones_like(first)
    ours.step()
    assert torch.equal(second, before)
    assert second not in ours.state
    first.grad = None
    now = first.detach().clone()
    ours.step()
    assert torch.equal(first, now)


def test_a_parameter_that_joins_late_counts_its_own_steps(device):
    params = parameters(device=device, sizes=[(5,), (7,)])
    others = clones(params)
    ours, theirs = FusedAdamW(params, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    for step, grads in enumerate(gradients(params, 6)):
        for tensors, optimizer in ((params, ours), (others, theirs)):
            assign(tensors, grads)
            if step < 3:
                tensors[1].grad = None
            optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_gradient_may_have_any_strides(device, strided):
    p, q = (Parameter(torch.ones(7, 5, device=device)) for _ in range(2))
    p.grad = strided(torch.randn(7, 5, device=device))
    q.grad = p.grad.clone(memory_format=torch.contiguous_format)
    norms = []
    for parameter in (p, q):
        optimizer = FusedAdamW([parameter], lr=1e-2, max_grad_norm=1.0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(p, q)


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned(device):
    p = Parameter(torch.tensor([1.0], device=device))
    ours = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        ours.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = ours.step(closure)
    assert calls == [True]
    assert loss.item() == 1.0
    torch.testing.assert_close(p.detach(), torch.tensor([0.9], device=device))


def test_float64_parameters_agree_with_pytorch():
    params = parameters(torch.float64)
    others = clones(params)
    steps = list(gradients(params, 20))
    train(FusedAdamW(params, lr=1e-2), params, steps)
    train(torch.optim.AdamW(others, lr=1e-2), others, steps)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


# ---- the norm ----


@pytest.mark.parametrize("sizes", [[(1,)], [(63,), (127,)], [(1023,), (100_000,)], SIZES], ids=str)
def test_grad_norm_is_the_norm_of_all_gradients_as_one_vector(device, dtype, rule, sizes):
    grads = [g.detach() for g in parameters(dtype, device, sizes)]
    norm = ops.resolve("grad_norm", grads[0])(grads)
    peer = torch.cat([g.flatten() for g in grads]).float().norm()
    truth = torch.cat([g.flatten() for g in grads]).double().norm()
    rule.error("norm", norm, [peer], truth, torch.float32, rule.output)
    assert norm.dtype == torch.float32


def test_without_clipping_no_norm_is_kept(device):
    (p,) = parameters(device=device, sizes=[(5,)])
    p.grad = torch.ones_like(p)
    ours = FusedAdamW([p])
    ours.step()
    assert ours.grad_norm is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(device, dtype, bad):
    params = parameters(dtype, device)
    assign(params, next(gradients(params, 1)))
    params[3].grad[1000] = bad
    ours = FusedAdamW(params, max_grad_norm=1.0)
    ours.step()
    assert not ours.grad_norm.isfinite()


def test_a_nan_gradient_spoils_its_own_element_only(device, dtype):
    params = parameters(dtype, device)
    assign(params, next(gradients(params, 1)))
    params[3].grad[1000] = math.nan
    FusedAdamW(params).step()
    assert params[3].isnan().nonzero().tolist() == [[1000]]
    assert not any(p.isnan().any() for p in params[:3] + params[4:])


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, on_threads):
    grads = [g.detach() for g in parameters(dtype, device, [*SIZES, (200_000,)])]
    one, two = (on_threads(n, lambda: ops.resolve("grad_norm", grads[0])(grads)) for n in (1, 2))
    assert torch.equal(one, two)


def test_the_same_inputs_give_the_same_bits(device, dtype):
    params = parameters(dtype, device)
    others = clones(params)
    steps = list(gradients(params, 3))
    train(FusedAdamW(params, max_grad_norm=1.0), params, steps)
    train(FusedAdamW(others, max_grad_norm=1.0), others, steps)
    assert all(map(torch.equal, params, others))


# ---- arguments ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("lr", math.nan),
        ("max_grad_norm", math.nan),
    ],
)
def test_a_wrong_hyperparameter_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        FusedAdamW([Parameter(torch.ones(3))], **{name: value})


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match=r"^params: "):
        FusedAdamW([Parameter(torch.ones(3, 4).t())])


@pytest.mark.parametrize(
    "twin",
    [torch.empty(3), torch.empty(2, dtype=torch.bfloat16), torch.empty(6, dtype=torch.bfloat16)[::2]],
    ids=["fp32", "too small", "not contiguous"],
)
def test_a_copy_that_the_kernel_cannot_write_is_refused(twin):
    p = Parameter(torch.ones(3))
    with pytest.raises((TypeError, ValueError), match=r"^copies: "):
        FusedAdamW([p], copies={p: twin})
