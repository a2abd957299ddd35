"""FusedAdamW against torch.optim.AdamW."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fastgpt.kernels import FusedAdamW, dispatch, reference

SIZES = [(1,), (63,), (127, 3), (1023,), (33_000,)]  # the last is more than the kernel's chunk of 2**15

# Triton's interpreter takes milliseconds a program: there the last parameter is just more than one chunk of the
# update, and long runs are cut short.
SMALL_SIZES = [*SIZES[:-1], (2100,)]


def interpreted(device):
    """Whether the kernels run in Triton's interpreter."""
    return dispatch.backend_of(torch.device(device).type, torch.float32)[1] == "Triton's interpreter"


def parameters(dtype=torch.float32, device="cpu", sizes=None):
    if sizes is None:
        sizes = SMALL_SIZES if interpreted(device) else SIZES
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
def test_many_steps_are_as_accurate_as_pytorchs(device, dtype, rule, options):
    params = parameters(dtype, device)
    peers, truths = clones(params), clones(params, torch.float64)
    optimizers = [
        FusedAdamW(params, **options),
        torch.optim.AdamW(peers, **options),
        torch.optim.AdamW(truths, **options),
    ]
    for step, grads in enumerate(gradients(params, 10 if interpreted(device) else 200)):
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
    for grads in gradients(params, 12 if interpreted(device) else 200):
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
    for grads in gradients(params, 5 if interpreted(device) else 20):
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
    steps = list(gradients(params, 6 if interpreted(device) else 30))
    third = len(steps) // 3
    train(torch.optim.AdamW(reference, **options), reference, steps)

    first = classes[0](params, **options)
    train(first, params, steps[:third])
    moved = clones(params)
    second = classes[1](moved, lr=123.0)  # everything else comes with the state
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, moved, steps[third:])
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
            torch.testing.assert_close(ours[index][key], value, check_device=False)  # PyTorch keeps steps on the CPU


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


def test_a_step_waits_for_no_tensor_to_be_read(monkeypatch, device):
    """Which on a GPU would stop the host; the steps of parameters that joined late are told apart all the same."""
    params = parameters(device=device, sizes=[(5,), (7,)])
    ours = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0)
    steps = list(gradients(params, 3))
    train(ours, params[:1], [grads[:1] for grads in steps])
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(ours, params, steps[:1])  # reads what was loaded, once

    def read(*args):
        raise AssertionError("a tensor was read")

    late = Parameter(torch.ones(3, device=device))
    assign([*params, late], [*steps[1], torch.ones_like(late)])
    updated, resolve = [], dispatch.resolve

    def noted(name, tensor):
        # Triton's interpreter itself reads tensors
        operator = getattr(reference, name) if interpreted(device) else resolve(name, tensor)
        return lambda first, *rest: updated.append((name, first)) or operator(first, *rest)

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        patch.setattr(dispatch, "resolve", noted)
        ours.param_groups[0]["params"].append(late)
        ours.step()
    assert [first for name, first in updated if name == "adamw_"] == [params[:1], params[1:], [late]]
    assert [int(ours.state[p]["step"]) for p in (*params, late)] == [5, 2, 1]


def test_a_step_count_written_from_outside_is_honoured(device):
    """As by the trainer, which resumes by filling the state in place."""
    params = parameters(device=device, sizes=[(5,), (7,)])
    others = clones(params)
    ours, theirs = FusedAdamW(params, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    steps = list(gradients(params, 3))
    train(ours, params, steps[:1])
    train(theirs, others, steps[:1])
    for p, q in zip(params, others, strict=True):
        ours.state[p]["step"].fill_(10 + len(p))
        theirs.state[q]["step"].fill_(10 + len(q))
    train(ours, params, steps[1:])
    train(theirs, others, steps[1:])
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


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


@pytest.mark.parametrize("state_bits", [32, 8])
def test_moments_may_lie_in_memory_of_the_callers(state_bits):
    runs, moments = [], {}
    for given in (False, True):
        torch.manual_seed(0)
        (param,) = parameters(sizes=[(300,)])
        optimizer = FusedAdamW([param], state_bits=state_bits)
        if given:
            optimizer.use_state(param, moments)
        for _ in range(3):
            param.grad = torch.randn(300, generator=torch.Generator().manual_seed(1))
            optimizer.step()
        runs.append((param.detach().clone(), optimizer.state[param]["exp_avg"].clone()))
        if not given:
            moments = {name: torch.zeros_like(t) for name, t in optimizer.state[param].items() if name != "step"}
    assert moments["exp_avg"].count_nonzero() > 0
    assert optimizer.state[param]["exp_avg"] is moments["exp_avg"]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_moments_of_the_callers_that_do_not_fit_are_refused():
    (param,) = parameters(sizes=[(300,)])
    optimizer = FusedAdamW([param])
    moments = {"exp_avg": torch.zeros(300), "exp_avg_sq": torch.zeros(299)}
    with pytest.raises(ValueError, match=r"moments: expected exp_avg_sq of shape \(300,\)"):
        optimizer.use_state(param, moments)
    with pytest.raises(ValueError, match="moments: expected exp_avg_sq"):
        optimizer.use_state(param, {"exp_avg": torch.zeros(300)})


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
    norm = dispatch.resolve("grad_norm", grads[0])(grads)
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


SKIPPING = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "8 bits": (torch.float32, {"state_bits": 8}),
    "8 bits, stochastic rounding": (torch.bfloat16, {"state_bits": 8, "stochastic_rounding": True}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(("kind", "options"), SKIPPING.values(), ids=list(SKIPPING))
def test_a_step_that_is_skipped_leaves_no_trace(device, kind, options, bad, max_grad_norm):
    """Parameters, moments, copies and step counts have the bits of a run without it, also after the next step."""
    params = parameters(kind, device, [(63,), (300, 3)])
    others = clones(params)
    steps = list(gradients(params, 3))
    runs = []
    for tensors in (params, others):
        torch.manual_seed(5)
        copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in tensors} if kind == torch.float32 else None
        optimizer = FusedAdamW(
            tensors, 1e-2, max_grad_norm=max_grad_norm, copies=copies, skip_nonfinite=True, **options
        )
        runs.append((optimizer, tensors))
    for i, grads in enumerate(steps):
        for optimizer, tensors in runs:
            if i == 1 and tensors is params:
                assign(params, grads)
                params[1].grad[7, 1] = bad
                optimizer.step(zero_grad=True)
                assert optimizer.found_inf.item() == 1
                assert not optimizer.grad_norm.isfinite()
                assert all(p.grad.count_nonzero() == 0 for p in params)
            assign(tensors, grads)
            optimizer.step()
            assert optimizer.found_inf.item() == 0
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)
        for name, moment in runs[0][0].state[p].items():
            assert torch.equal(moment, runs[1][0].state[other][name]), name
        if kind == torch.float32:
            assert torch.equal(runs[0][0].copies[p], runs[1][0].copies[other])
    assert runs[0][0].state[params[0]]["step"].item() == 3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_whose_norm_is_above_a_limit_is_skipped(device, as_tensor):
    p = Parameter(torch.ones(3, device=device))
    ours = FusedAdamW([p], 1e-2, skip_nonfinite=True, max_grad_norm=0.5)
    p.grad = torch.tensor([2.0, 0.0, 0.0], device=device)  # its norm is 1 after the scale
    for limit, skipped in ((0.999, 1), (1.0, 0), (-1.0, 1), (math.inf, 0), (math.nan, 1)):
        before = p.detach().clone()
        if not (as_tensor or math.isfinite(limit)):
            continue
        ours.step(grad_scale=0.5, skip_above=torch.tensor(limit, device=device) if as_tensor else limit)
        assert ours.found_inf.item() == skipped, limit
        assert torch.equal(p, before) == bool(skipped)
    assert ours.state[p]["step"].item() == (2 if as_tensor else 1)


@pytest.mark.parametrize("limit", ["1", math.nan, torch.ones(2)], ids=str)
def test_a_wrong_limit_is_named(limit):
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=r"^skip_above: "):
        FusedAdamW([p], skip_nonfinite=True).step(skip_above=limit)
    with pytest.raises(ValueError, match=r"^skip_above: needs skip_nonfinite"):
        FusedAdamW([p]).step(skip_above=1.0)


def test_steps_are_skipped_only_as_long_as_that_is_asked_for():
    p = Parameter(torch.ones(3))
    ours = FusedAdamW([p], 1e-2, skip_nonfinite=True)
    p.grad = torch.full((3,), math.nan)
    ours.step()
    assert ours.found_inf.item() == 1
    p.grad = None
    ours.step()
    assert ours.found_inf is None
    ours.skip_nonfinite, p.grad = False, torch.ones(3)
    ours.step()
    assert (p < 1).all()


def test_an_optimizer_pickled_by_a_version_that_skipped_nothing_goes_on():
    p = Parameter(torch.ones(3))
    state = FusedAdamW([p]).__getstate__()
    del state["skip_nonfinite"], state["found_inf"]
    ours = FusedAdamW.__new__(FusedAdamW)
    ours.__setstate__(state)
    (p,) = ours.param_groups[0]["params"]
    p.grad = torch.ones(3)
    ours.step()
    assert (p < 1).all()


def test_a_parameter_that_missed_the_skipped_step_keeps_its_own_step_count(device):
    """The host takes both for having taken one step, but only one of them has."""
    params = parameters(torch.float32, device, [(5,), (5,)])
    others = clones(params)
    ours = FusedAdamW(params, 1e-2, skip_nonfinite=True)
    params[0].grad, params[1].grad = torch.full_like(params[0], math.nan), None
    ours.step()
    params[0].grad, params[1].grad = None, torch.ones_like(params[1])
    ours.step()
    theirs = torch.optim.AdamW(others, 1e-2)
    others[1].grad = torch.ones_like(others[1])
    theirs.step()
    for tensors, optimizer in ((params, ours), (others, theirs)):
        for p in tensors:
            p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(params, others)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, on_threads):
    grads = [g.detach() for g in parameters(dtype, device, [*SIZES, (200_000,)])]
    one, two = (on_threads(n, lambda: dispatch.resolve("grad_norm", grads[0])(grads)) for n in (1, 2))
    assert torch.equal(one, two)


def test_the_same_inputs_give_the_same_bits(device, dtype):
    params = parameters(dtype, device)
    others = clones(params)
    steps = list(gradients(params, 3))
    train(FusedAdamW(params, max_grad_norm=1.0), params, steps)
    train(FusedAdamW(others, max_grad_norm=1.0), others, steps)
    assert all(map(torch.equal, params, others))


# ---- the code of moments of 8 bits ----

HALF = 2**16  # a code is rounded by a random number below it


def randoms(like, value=None):
    """Random numbers to round by, or one of them for all."""
    return torch.randint(HALF, like.shape, dtype=torch.int32) if value is None else torch.full(like.shape, value).int()


def coded(x, signed, value=None):
    return reference.decode_moment(*reference.encode_moment(x, randoms(x, value), signed), signed)


def moments(signed, decades):
    """(64, 256), magnitudes uniform in their logarithm over some decades, at every scale from 1e-18 to 1e18."""
    x = 10 ** (-decades * torch.rand(64, 256) + torch.linspace(-18, 18, 64).unsqueeze(-1))
    x[:, 0] = x.amax(1)
    return x * torch.randn(64, 256).sign() if signed else x


SIGNED = pytest.mark.parametrize(("signed", "decades"), [(True, 4.2), (False, 9.0)], ids=["exp_avg", "exp_avg_sq"])


@SIGNED
def test_over_its_range_a_code_is_an_eighth_off_at_most_and_either_neighbour_can_be_drawn(signed, decades):
    x = moments(signed, decades)
    low, high = coded(x, signed, 0), coded(x, signed, HALF - 1)
    assert (low.abs() <= x.abs()).all()
    assert (high.abs() >= x.abs() * (1 - 1e-4)).all()
    assert (high.abs() <= low.abs() * 1.125).all()
    drawn = coded(x, signed)
    assert ((drawn == low) | (drawn == high)).all()
    assert (drawn == low).any()
    assert (drawn == high).any()


@SIGNED
def test_the_mean_over_all_random_numbers_is_the_value(signed, decades):
    x = moments(signed, decades + signed)[::16]  # exp_avg also below the smallest code
    every = range(8, HALF, 16)
    mean = torch.stack([coded(x, signed, value).double() for value in every]).mean(0)
    smallest = x.abs().amax(1, keepdim=True) * (2.0**-14.6 if signed else 0.0)  # or zero is next to it
    step = (x.abs() / 8).maximum(smallest)
    assert ((mean - x).abs() <= step / len(every)).all()


def test_a_second_moment_that_is_not_zero_is_never_decoded_as_zero():
    exponents = torch.arange(-149, 128)
    x = torch.zeros(len(exponents), 256)
    x[:, :255] = torch.linspace(-149, 127, 255).round().exp2()  # from the smallest fp32 there is
    x = x.minimum(exponents.double().exp2().float().unsqueeze(-1))
    for value in (0, HALF - 1):
        decoded = coded(x, False, value)
        assert (decoded[x > 0] > 0).all()
        assert (decoded[x == 0] == 0).all()


@SIGNED
def test_zeros_stay_zeros_beside_anything(signed, decades):
    x = moments(signed, decades)
    x[:, 1::2] = 0.0
    x[7] = 0.0
    for value in (0, HALF - 1):
        assert torch.equal(coded(x, signed, value) == 0, x == 0)


@SIGNED
def test_a_decoded_value_is_coded_again_without_error_under_a_scale_up_to_four_times_as_large(signed, decades):
    x = coded(moments(signed, decades - 1), signed)
    assert torch.equal(coded(x, signed), x)
    x[:, 0] = 4 * x.abs().amax(1)
    assert torch.equal(coded(x, signed), x)


@SIGNED
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_moment_that_is_not_finite_is_coded_as_a_large_number(signed, decades, bad):
    x = moments(signed, decades)
    x[:, 5] = bad
    decoded = coded(x, signed)
    assert (decoded[:, 5] > 1e38).all()
    assert decoded.isfinite().all()


# ---- optimizers that save memory ----

SAVERS = {
    "8 bits": (torch.float32, {"state_bits": 8}),
    "8 bits of bf16": (torch.bfloat16, {"state_bits": 8}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "both": (torch.bfloat16, {"state_bits": 8, "stochastic_rounding": True}),
}
each_saver = pytest.mark.parametrize(("kind", "options"), SAVERS.values(), ids=list(SAVERS))
ODD_SIZES = [(1,), (0,), (255,), (16, 16), (257,), (127, 3), (2100,)]


@each_saver
def test_every_backend_writes_the_codes_of_the_reference(device, kind, options):
    """The same random numbers; sums rounded in another order may end at the next code, once in a thousand."""
    params = parameters(kind, device, ODD_SIZES)
    others = [Parameter(p.detach().cpu().clone()) for p in params]
    steps = list(gradients(others, 3))
    optimizers = []
    for tensors in (params, others):
        torch.manual_seed(5)
        optimizers.append(FusedAdamW(tensors, lr=1e-2, max_grad_norm=30.0, weight_decay=0.1, **options))
    for grads in steps:
        assign(params, [g.to(device) for g in grads])
        optimizers[0].step(zero_grad=True)
        with dispatch.use_backend("reference"):
            train(optimizers[1], others, [grads])
    assert all(p.grad.count_nonzero() == 0 for p in params)
    ours, theirs = ([optimizer.state[p] for p in tensors] for optimizer, tensors in zip(
        optimizers, (params, others), strict=True))  # fmt: skip
    for name in ours[0]:
        a, b = (torch.cat([state[name].flatten().cpu() for state in states]) for states in (ours, theirs))
        assert a.dtype == b.dtype
        if a.dtype == torch.uint8:
            assert (a.int() - b.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(a, b)
        assert (a != b).float().mean() <= 1e-3
    a, b = (torch.cat([p.detach().flatten().cpu() for p in tensors]) for tensors in (params, others))
    torch.testing.assert_close(a, b)


@each_saver
def test_moments_that_are_the_gradient_and_its_square_are_rounded_as_by_the_reference(device, kind, options):
    """To the bit, as with betas of 0 nothing is rounded before: at every scale, far below it, and not finite."""
    grads = moments(True, 6.0)
    grads[13, 50] = math.nan
    grads[20:24, ::2] = 0.0
    grads[30], grads[31] = 1e-30, 1e30  # whose squares are beyond fp32
    grads = grads.repeat(3, 1).flatten()[:-100].to(kind)  # more than a chunk, and no whole blocks

    def state(place):
        torch.manual_seed(5)
        p = Parameter(torch.zeros(grads.shape, dtype=kind, device=place))
        p.grad = grads.to(place)
        optimizer = FusedAdamW([p], betas=(0.0, 0.0), **options)
        optimizer.step()
        return optimizer.state[p]

    ours = state(device)
    with dispatch.use_backend("reference"):
        theirs = state("cpu")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name].cpu(), expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_bits", [8, 32])
def test_an_8bit_step_takes_gradients_of_another_dtype_than_the_parameters(device, dtype, grad_dtype, state_bits):
    """With copies, a scale and zeroing besides."""
    sizes = [300, 1, 2100]
    n_scales = [-(-n // 256) for n in sizes] if state_bits == 8 else []
    moment_dtype = torch.uint8 if state_bits == 8 else dtype
    inputs = [
        [torch.randn(n).to(dtype) for n in sizes],
        [torch.randn(n).to(grad_dtype) for n in sizes],
        *([torch.zeros(n, dtype=moment_dtype) for n in sizes] for _ in range(2)),
        *([torch.zeros(n) for n in n_scales] for _ in range(2)),
        [torch.zeros(n, dtype=torch.bfloat16) for n in sizes],
    ]

    def stepped(place):
        tensors = [[t.to(place, copy=True) for t in one] for one in inputs]
        lr = torch.tensor(1e-2, dtype=torch.float64, device=place)
        step, scale, seed = (torch.tensor(number, device=place) for number in (1.0, 0.5, 7))
        dispatch.resolve("adamw_8bit_", tensors[0][0])(
            *tensors, step, lr, scale, seed, 0.9, 0.95, 1e-8, 0.1, True, dtype == torch.bfloat16
        )
        return tensors

    ours = stepped(device)
    with dispatch.use_backend("reference"):
        theirs = stepped("cpu")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == torch.uint8:
            assert (a.cpu().int() - b.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(a.cpu(), b)
    assert all(grad.count_nonzero() == 0 for grad in ours[1])
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(ours[-1], ours[0], strict=True))


@each_saver
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit_of_an_8bit_step(device, kind, options, on_threads):
    def trained():
        torch.manual_seed(5)
        params = parameters(kind, device, [*ODD_SIZES, (200_000,)])
        ours = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, **options)
        train(ours, params, gradients(params, 2))
        return [*params, *(ours.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq"))]

    assert all(map(torch.equal, on_threads(1, trained), on_threads(2, trained)))


def test_the_first_step_with_eight_bits_is_that_of_plain_adamw(device, dtype):
    """The moments are rounded after they have been used; clipping, copies and zeroing are as without."""
    params = parameters(dtype, device, ODD_SIZES)
    others = clones(params)
    tensors = (params, others)
    copies = [{p: torch.empty_like(p, dtype=torch.bfloat16) for p in some} for some in tensors]
    options = {"lr": 1e-2, "max_grad_norm": 1.0}
    ours = FusedAdamW(params, **options, copies=copies[0], state_bits=8)
    plain = FusedAdamW(others, **options, copies=copies[1])
    grads = next(gradients(params, 1))
    assign(params, grads)
    assign(others, [g / 8 for g in grads])
    ours.step(grad_scale=1 / 8, zero_grad=True)
    plain.step()
    assert all(p.grad.count_nonzero() == 0 for p in params)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(copies[0][p], copies[1][q])


def fit(options, betas, kind=torch.float32, steps=200):
    """The final error of a regression on noisy batches; the gradients spread over three decades."""
    torch.manual_seed(1)
    truth, scales = torch.randn(512, 4), 10 ** (-3 * torch.rand(512, 1))
    weight = Parameter(torch.zeros(512, 4, dtype=kind))
    optimizer = FusedAdamW([weight], betas=betas, weight_decay=0.0, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.04 * (1 - step / steps)
        x = torch.randn(64, 512)
        weight.grad = (x.T @ (x @ (weight.detach().float() - truth)) / 64 * scales).to(kind)
        optimizer.step()
    return (weight.detach().float() - truth).square().mean().item()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
def test_training_with_eight_bits_ends_within_six_percent_of_fp32s_loss(monkeypatch, on_threads, betas):
    fp32, ours = (on_threads(1, lambda bits=bits: fit({"state_bits": bits}, betas)) for bits in (32, 8))
    assert ours == pytest.approx(fp32, rel=0.06)
    encode = reference.encode_moment
    monkeypatch.setattr(reference, "encode_moment", lambda x, _, signed: encode(x, randoms(x, HALF // 2), signed))
    with dispatch.use_backend("reference"):
        nearest = on_threads(1, lambda: fit({"state_bits": 8}, betas))
    assert nearest != pytest.approx(fp32, rel=0.2), "rounding to the nearest would do"


def test_training_bf16_parameters_ends_within_six_percent_of_fp32s_loss(on_threads):
    def final(kind, **options):
        return on_threads(1, lambda: fit(options, (0.9, 0.999), kind))

    fp32 = final(torch.float32)
    assert final(torch.bfloat16, stochastic_rounding=True) == pytest.approx(fp32, rel=0.06)
    assert final(torch.bfloat16, stochastic_rounding=True, state_bits=8) == pytest.approx(fp32, rel=0.06)
    assert final(torch.bfloat16) > 1.2 * fp32, "rounding to the nearest would do"


def one_step(params, **options):
    """Move every element by about 0.001; returns the optimizer."""
    grads = [torch.linspace(0.1, 1.0, p.numel(), device=p.device).view(p.shape) for p in params]
    optimizer = FusedAdamW(params, lr=1e-3, weight_decay=0.0, **options)
    assign(params, grads)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("state_bits", [8, 32])
def test_stochastic_rounding_gives_one_of_two_neighbours_and_the_right_mean(device, state_bits):
    """The mean over 8192 draws lies within four standard errors of the fp32 result."""
    exact = Parameter(torch.randn(8192, device=device).bfloat16().float())
    p = Parameter(exact.detach().bfloat16())
    optimizer = one_step([p], stochastic_rounding=True, state_bits=state_bits)
    one_step([exact])  # the first step is lr * g / |g|, so that rounding g to bf16 makes no difference to speak of
    exact = exact.detach()
    low = (exact.view(torch.int32) & -HALF).view(torch.float32)
    high = ((exact.view(torch.int32) & -HALF) + HALF).view(torch.float32)
    rounded = p.detach().float()
    assert ((rounded == low) | (rounded == high)).all()
    variance = ((exact - low) * (high - exact)).abs().double()
    assert (rounded - exact).double().sum().abs() <= 4 * variance.sum().sqrt()
    assert (rounded == exact.bfloat16().float()).float().mean() < 0.9, "rounding to the nearest would do"
    assert state_bits == 8 or optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


@each_saver
def test_the_seed_comes_from_torchs_generator(device, kind, options):
    def trained(seed):
        torch.manual_seed(seed)
        p = Parameter(torch.linspace(-1, 1, 700, device=device).to(kind))
        state = one_step([p], **options).state[p]
        return p.detach(), state["exp_avg"], state["exp_avg_sq"]

    assert all(map(torch.equal, trained(1), trained(1)))
    assert not all(map(torch.equal, trained(1), trained(2)))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_plain_adamw_draws_no_random_number(kind):
    before = torch.get_rng_state()
    optimizer = one_step([Parameter(torch.ones(3, dtype=kind))])
    assert torch.equal(torch.get_rng_state(), before)
    assert "seed" not in optimizer.param_groups[0]


def test_every_step_every_tensor_and_every_group_draws_its_own_random_numbers(device):
    """Of 1000 ones moved to 0.999 each time, in steps of 1/256: a quarter is rounded, but not the same quarter."""
    torch.manual_seed(1)
    params = [Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device)) for _ in range(3)]
    ours = FusedAdamW([{"params": params[:2]}, {"params": params[2:]}], lr=1e-3, weight_decay=0.0,
                      betas=(0.0, 0.0), stochastic_rounding=True)  # fmt: skip
    patterns = []
    for _ in range(2):
        with torch.no_grad():
            for p in params:
                p.fill_(1.0)
                p.grad = torch.ones_like(p)
        ours.step()
        patterns += [p.detach() < 1.0 for p in params]
    for a, b in itertools.combinations(patterns, 2):
        assert 0.2 < a.float().mean() < 0.3
        assert (a & b).sum() < 0.6 * a.sum()  # a quarter by chance


@each_saver
def test_a_nan_gradient_leaves_no_nan_but_its_own(device, kind, options):
    params = parameters(kind, device, [(300,)])
    assign(params, next(gradients(params, 1)))
    params[0].grad[100] = math.nan
    FusedAdamW(params, **options).step()
    assert params[0].isnan().nonzero().tolist() == [[100]]


@each_saver
def test_nothing_beside_a_parameter_is_written(device, kind, options):
    for n in (1, 255, 256, 257, 1023):
        flat = torch.full((2000,), math.nan, dtype=kind, device=device)
        view = Parameter(flat[100 : 100 + n])
        with torch.no_grad():
            view.fill_(1.0)
        one_step([view], **options)
        assert view.isfinite().all()
        assert flat[:100].isnan().all()
        assert flat[100 + n :].isnan().all()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.float32, {}, 12),
        (torch.float32, {"state_bits": 8}, 4 + 2 + 8 / 256),
        (torch.bfloat16, {"stochastic_rounding": True}, 6),
        (torch.bfloat16, {"state_bits": 8, "stochastic_rounding": True}, 2 + 2 + 8 / 256),
    ],
    ids=["fp32", "8 bits", "bf16", "bf16, 8 bits"],
)
def test_bytes_a_parameter_are_as_stated(device, kind, options, expected):
    p = Parameter(torch.ones(64, 64, dtype=kind, device=device))
    state = one_step([p], **options).state[p]
    tensors = [p, *(t for name, t in state.items() if name != "step")]
    assert sum(t.untyped_storage().nbytes() for t in tensors) / p.numel() == expected


@each_saver
def test_a_saved_state_restores_every_bit(device, kind, options, tmp_path):
    params = parameters(kind, device, [(300,), (7,)])
    steps = list(gradients(params, 4))
    ours = FusedAdamW(params, lr=1e-2, **options)
    train(ours, params, steps[:2])
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    restored = clones(params)
    torch.manual_seed(99)  # the seed comes with the state
    again = FusedAdamW(restored, lr=1e-2, **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    for p, q in zip(params, restored, strict=True):
        expected = {"step", "exp_avg", "exp_avg_sq"}
        expected |= {"exp_avg_scale", "exp_avg_sq_scale"} if "state_bits" in options else set()
        assert again.state[q].keys() == ours.state[p].keys() == expected
        for name, value in ours.state[p].items():
            assert again.state[q][name].dtype == value.dtype
            assert torch.equal(again.state[q][name], value)
    train(ours, params, steps[2:])
    train(again, restored, steps[2:])
    assert all(map(torch.equal, params, restored))


@pytest.mark.parametrize("bits", [8, 32])
def test_a_state_of_other_bits_is_refused(bits):
    saved, other = (Parameter(torch.ones(3)) for _ in range(2))
    state = one_step([saved], state_bits=bits).state_dict()
    with pytest.raises(ValueError, match=rf"^state_dict: has moments of {bits} bits, but state_bits is {40 - bits}$"):
        FusedAdamW([other], state_bits=40 - bits).load_state_dict(state)


def test_a_group_added_later_is_checked_and_has_its_seed():
    ours = FusedAdamW([Parameter(torch.ones(3).bfloat16())], stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"^stochastic_rounding: expected bf16 parameters, got torch.float32$"):
        ours.add_param_group({"params": [Parameter(torch.ones(3))]})
    assert len(ours.param_groups) == 1
    ours.add_param_group({"params": [Parameter(torch.ones(3).bfloat16())]})
    assert ours.param_groups[0]["seed"] != ours.param_groups[1]["seed"]


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
        ("state_bits", 16),
        ("state_bits", 4),
        ("stochastic_rounding", True),  # the parameter is fp32
    ],
)
def test_a_wrong_hyperparameter_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        FusedAdamW([Parameter(torch.ones(3))], **{name: value})


@pytest.mark.parametrize("name", ["stochastic_rounding", "skip_nonfinite", "zero_grad"])
def test_what_is_true_or_false_takes_nothing_else(name):
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=rf"^{name}: expected a bool, got str"):
        FusedAdamW([param]).step(zero_grad="yes") if name == "zero_grad" else FusedAdamW([param], **{name: "yes"})


def test_a_parameter_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match=r"^params: "):
        FusedAdamW([Parameter(torch.ones(3, 4).t())])


def test_a_parameter_whose_sign_is_still_to_be_flipped_is_refused():
    with pytest.raises(ValueError, match=r"params: a parameter of shape \(3,\) has its negative bit set"):
        FusedAdamW([torch._neg_view(torch.ones(3)).requires_grad_()])


@pytest.mark.parametrize(
    "twin",
    [torch.empty(3), torch.empty(2, dtype=torch.bfloat16), torch.empty(6, dtype=torch.bfloat16)[::2]],
    ids=["fp32", "too small", "not contiguous"],
)
def test_a_copy_that_the_kernel_cannot_write_is_refused(twin):
    p = Parameter(torch.ones(3))
    with pytest.raises((TypeError, ValueError), match=r"^copies: "):
        FusedAdamW([p], copies={p: twin})
