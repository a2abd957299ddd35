"""FusedAdamW in the place of torch.optim.AdamW: its state, its surroundings, what it refuses, how near it stays."""

import copy
import io
import math
import pickle
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.kernels import FusedAdamW, dispatch, reference, use_backend
from tests.kernels.test_adamw import assign, clones, gradients, interpreted, parameters, train

BOTH = (FusedAdamW, torch.optim.AdamW)
SMALL = [(5,), (7, 3)]


def agree(params, others, **tolerances):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **tolerances)


def same_bits(params, others):
    return all(map(torch.equal, params, others))


# ---- numbers ----


def groups_of_three_kinds(tensors):
    """With and without weight decay, each with hyperparameters of its own."""
    return [
        {"params": tensors[::3], "weight_decay": 0.0},
        {"params": tensors[1::3], "weight_decay": 0.3, "lr": 3e-3, "betas": (0.8, 0.95)},
        {"params": tensors[2::3], "lr": 1e-2, "eps": 1e-6},
    ]


def test_after_200_steps_each_parameter_is_as_near_the_truth_as_pytorchs(device, rule):
    """At most twice PyTorch's error, and a unit in the last place, on gradients from 1e-12 to 1e4.

    Measured over five seeds, in units in the last place of a parameter's largest value: PyTorch is 95 off at most
    (108 on the interpreter's sizes), ours 95 on the reference, 98 in C++ and 108 in the interpreter. Of one parameter,
    ours is off at most 1.26 times as far as PyTorch's; between the two lie 2, 37 and 1.
    """
    sizes = [(1,), (63,), (127, 3), (300,), (256,), (2,)]
    if not interpreted(device):
        sizes += [(1023,), (5, 7, 11), (33_000,)]
    params = parameters(device=device, sizes=sizes)
    peers, truths = clones(params), clones(params, torch.float64)
    plain = {"lr": 1e-3, "foreach": False, "fused": False}
    optimizers = [
        FusedAdamW(groups_of_three_kinds(params), lr=1e-3),
        torch.optim.AdamW(groups_of_three_kinds(peers), **plain),
        torch.optim.AdamW(groups_of_three_kinds(truths), **plain),
    ]
    scales = torch.logspace(-12, 4, len(sizes)).tolist()
    for grads in gradients(params, 200):
        scaled = [scale * grad for scale, grad in zip(scales, grads, strict=True)]
        for tensors, optimizer in zip((params, peers, truths), optimizers, strict=True):
            train(optimizer, tensors, [scaled])
    for p, peer, truth in zip(params, peers, truths, strict=True):
        error, theirs = ((t.double() - truth).abs().max().item() for t in (p, peer))
        assert error <= 2 * theirs + rule.ulp(truth.abs().max().item(), torch.float32)


@pytest.mark.parametrize("cls", BOTH)
def test_a_backward_through_weights_that_have_changed_since_is_an_error(cls):
    weight = Parameter(torch.randn(5))
    x = torch.randn(5, requires_grad=True)
    (x * weight).sum().backward()
    late = (x * weight).sum()
    cls([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


# ---- state that comes and goes ----


def regression(device, dtype=torch.float32):
    """A small model, and a function that makes it and an optimizer take steps and gives their losses."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 17), nn.GELU(), nn.Linear(17, 1)).to(device, dtype)
    x = torch.randn(20, 64, 6, device=device).to(dtype)

    def losses(model, optimizer, steps):
        found = []
        for i in steps:
            loss = (model(x[i]) - x[i].sin().sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    return model, losses


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}
PYTORCHS = [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]


@pytest.mark.parametrize("flags", PYTORCHS, ids=str)
@pytest.mark.parametrize("ours_first", [True, False], ids=["ours, PyTorch's, ours", "PyTorch's, ours, PyTorch's"])
def test_a_run_passed_to_and_fro_has_the_losses_of_one_run(device, flags, ours_first):
    model, losses = regression(device)
    uninterrupted = copy.deepcopy(model)
    expected = losses(uninterrupted, torch.optim.AdamW(uninterrupted.parameters(), **OPTIONS), range(15))
    state, found = None, []
    for i in range(3):
        if ours_first == (i % 2 == 0):
            optimizer = FusedAdamW(model.parameters(), lr=123.0)  # everything else comes with the state
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=123.0, **flags)
        if state is None:
            optimizer.param_groups[0].update(OPTIONS)
        else:
            optimizer.load_state_dict(state)
        found += losses(model, optimizer, range(5 * i, 5 * i + 5))
        state = copy.deepcopy(optimizer.state_dict())
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in ({} if ours_first else flags).items():
        assert state["param_groups"][0][name] == value


def test_what_chooses_pytorchs_kernels_survives_the_way_through_ours(device):
    params = parameters(device=device, sizes=SMALL)
    flags = {"foreach": False, "capturable": False, "fused": True, "differentiable": False}
    theirs, ours, again = torch.optim.AdamW(params, fused=True), FusedAdamW(params), torch.optim.AdamW(params)
    theirs.param_groups[0].update(flags)
    ours.load_state_dict(theirs.state_dict())
    again.load_state_dict(ours.state_dict())
    assert again.param_groups[0].items() >= flags.items()
    train(again, params, gradients(params, 1))


def test_moments_of_other_strides_are_loaded_as_they_read():
    """PyTorch keeps them in the order of a channels-last parameter; ours runs over memory."""
    last = Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    theirs = torch.optim.AdamW([last], lr=1e-2)
    steps = list(gradients([last], 4))
    train(theirs, [last], steps[:2])
    (ours,) = clones([last])
    ours.data = ours.data.contiguous()
    optimizer = FusedAdamW([ours])
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, [last], steps[2:])
    train(optimizer, [ours], steps[2:])
    agree([ours], [last])


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor([3])], ids=repr)
def test_a_step_count_may_be_loaded_as_any_number(device, step):
    params = parameters(device=device, sizes=SMALL)
    others = clones(params)
    steps = list(gradients(params, 4))
    ours, theirs = FusedAdamW(params), FusedAdamW(others)
    train(ours, params, steps[:3])
    train(theirs, others, steps[:3])
    state = copy.deepcopy(ours.state_dict())
    for entry in state["state"].values():
        entry["step"] = step
    ours.load_state_dict(state)
    train(ours, params, steps[3:])
    train(theirs, others, steps[3:])
    assert same_bits(params, others)


def test_hooks_on_loading_see_and_may_change_what_is_loaded():
    params = parameters(sizes=SMALL)
    ours = FusedAdamW(params, state_bits=8)
    train(ours, params, gradients(params, 2))
    saved, seen = copy.deepcopy(ours.state_dict()), []

    def halve(optimizer, state_dict):
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.5
        for state in changed["state"].values():
            state["exp_avg_scale"] /= 2
        return changed

    ours.register_load_state_dict_pre_hook(halve)
    ours.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["exp_avg"].dtype))
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.5
    assert torch.equal(ours.state[params[0]]["exp_avg_scale"], saved["state"][0]["exp_avg_scale"] / 2)
    assert seen == [torch.uint8]


def without(name):
    return lambda state_dict: state_dict["state"][0].pop(name)


REFUSED_STATES = {
    "amsgrad": lambda s: s["param_groups"][1].update(amsgrad=True),
    "maximize": lambda s: s["param_groups"][1].update(maximize=True),
    "differentiable": lambda s: s["param_groups"][1].update(differentiable=True),
    "decoupled_weight_decay": lambda s: s["param_groups"][1].update(decoupled_weight_decay=False),
    "lr": lambda s: s["param_groups"][1].update(lr=-1.0),
    "eps": lambda s: s["param_groups"][1].update(eps=math.nan),
    "betas": lambda s: s["param_groups"][1].pop("betas"),
    "state_dict: a parameter of shape (5,) has no exp_avg_sq": without("exp_avg_sq"),
    "state_dict: a parameter of shape (5,) has no step": without("step"),
    "state_dict: expected exp_avg of shape (5,), got (4,)": lambda s: s["state"][0].update(exp_avg=torch.ones(4)),
}


@pytest.mark.parametrize(("what", "spoil"), REFUSED_STATES.items(), ids=list(REFUSED_STATES))
def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed(what, spoil):
    params = parameters(sizes=SMALL)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    ours = FusedAdamW(groups, lr=0.5)
    train(ours, params, gradients(params, 1))
    state = copy.deepcopy(ours.state_dict())
    state["param_groups"][0]["lr"] = 0.25
    spoil(state)
    before = {p: dict(ours.state[p]) for p in params}
    with pytest.raises(ValueError, match=rf"^{what.replace('(', '[(]').replace(')', '[)]')}") as error:
        ours.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert [group["lr"] for group in ours.param_groups] == [0.5, 0.5]
    assert all(before[p][name] is value for p in params for name, value in ours.state[p].items())
    assert not ours._optimizer_load_state_dict_pre_hooks


def test_other_groups_are_refused_in_pytorchs_words():
    params = parameters(sizes=SMALL)
    state = FusedAdamW(params).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        FusedAdamW([{"params": params[:1]}, {"params": params[1:]}]).load_state_dict(state)
    with pytest.raises(ValueError, match="doesn't match the size"):
        FusedAdamW(params[:1]).load_state_dict(state)


# ---- copies of the optimizer ----

KEPT = {
    "plain": (torch.float32, {}),
    "clipping": (torch.float32, {"max_grad_norm": 1.0}),
    "8 bits": (torch.float32, {"state_bits": 8, "max_grad_norm": 1.0}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "both": (torch.bfloat16, {"state_bits": 8, "stochastic_rounding": True}),
    "lr as a tensor": (torch.float32, {"lr": torch.tensor(0.1)}),
}
COPIED = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": lambda both: torch.load(io.BytesIO(_saved(both)), weights_only=False),
}


def _saved(both):
    file = io.BytesIO()
    torch.save(both, file)
    return file.getvalue()


@pytest.mark.parametrize("copied", COPIED.values(), ids=list(COPIED))
@pytest.mark.parametrize(("kind", "options"), KEPT.values(), ids=list(KEPT))
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_copy_keeps_every_option_and_goes_on_to_the_same_bits(device, kind, options, copied, steps_before):
    params = parameters(kind, device, [(5,), (300,)])
    twins = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in params}
    ours = FusedAdamW([{"params": params[:1]}, {"params": params[1:], "lr": 1e-2}], copies=twins, **options)
    steps = list(gradients(params, 6))
    train(ours, params, steps[:steps_before])
    others, their_twins, theirs = copied((params, list(twins.values()), ours))
    assert [p is q for p, q in zip(theirs.copies, others, strict=True)] == [True, True]
    assert [p is q for p, q in zip(theirs.copies.values(), their_twins, strict=True)] == [True, True]
    for name in ("max_grad_norm", "state_bits", "stochastic_rounding"):
        assert getattr(theirs, name) == getattr(ours, name)
    train(ours, params, steps[3:])
    train(theirs, others, steps[3:])
    assert same_bits(params, others)
    assert same_bits(twins.values(), their_twins)
    assert (theirs.grad_norm is None) == (ours.grad_norm is None)


# ---- groups and schedules ----


def test_groups_added_late_and_gradients_now_and_then_give_pytorchs_steps(device):
    params = parameters(device=device, sizes=[(5,), (7, 3), (1,), (130,)])
    both = params, clones(params)
    optimizers = [
        kind([{"params": tensors[:1]}, {"params": tensors[1:2], "eps": 1e-3}], lr=1e-2, weight_decay=0.1)
        for kind, tensors in zip(BOTH, both, strict=True)
    ]
    for step, grads in enumerate(gradients(params, 12)):
        for tensors, optimizer in zip(both, optimizers, strict=True):
            if step == 4:
                optimizer.add_param_group({"params": tensors[2:], "lr": 3e-2, "betas": (0.5, 0.8), "weight_decay": 0.0})
            assign(tensors, grads)
            for i, p in enumerate(tensors):
                if step % (i + 2) == 1:
                    p.grad = None
            optimizer.step()
    agree(*both)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, [lambda step: 0.7**step, lambda step: 1.0 + step]),
        lambda optimizer: OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10),  # moves beta1 as well
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
def test_schedulers_govern_rates_and_betas(device, schedule, as_tensor):
    params = parameters(device=device, sizes=SMALL)
    both = params, clones(params)
    optimizers = []
    for kind, tensors in zip(BOTH, both, strict=True):
        rates = [torch.tensor(lr) if as_tensor else lr for lr in (1e-2, 1e-3)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(tensors, rates, strict=True)]
        optimizers.append(kind(groups, lr=1.0, weight_decay=0.1))
    schedulers = [schedule(optimizer) for optimizer in optimizers]
    betas = set()
    for grads in gradients(params, 10):
        for tensors, optimizer, scheduler in zip(both, optimizers, schedulers, strict=True):
            train(optimizer, tensors, [grads])
            betas.add(optimizer.param_groups[0]["betas"])
            scheduler.step() if scheduler.last_epoch < 9 else None
    agree(*both)
    assert (len(betas) > 1) == isinstance(schedulers[0], OneCycleLR)


# ---- numbers given as tensors ----


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_read_at_every_step(device, shape, kind):
    params = parameters(device=device, sizes=SMALL)
    others = clones(params)
    lr = torch.full(shape, 1e-2, dtype=kind, device=device)
    ours, plain = FusedAdamW(params, lr=lr), FusedAdamW(others, lr=lr.item())
    for step, grads in enumerate(gradients(params, 4)):
        lr.fill_(2.0**-step)
        plain.param_groups[0]["lr"] = 2.0**-step
        train(ours, params, [grads])
        train(plain, others, [grads])
    assert same_bits(params, others)
    assert ours.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_grad_scale_in_a_tensor_is_that_number(device, max_grad_norm):
    params = parameters(device=device, sizes=SMALL)
    others = clones(params)
    ours, plain = (FusedAdamW(tensors, max_grad_norm=max_grad_norm) for tensors in (params, others))
    for scale, grads in zip((0.25, 1.0, 3.0), gradients(params, 3), strict=True):
        assign(params, grads)
        assign(others, grads)
        ours.step(grad_scale=torch.tensor(scale, device=device))
        plain.step(grad_scale=scale)
    assert same_bits(params, others)


class HostData(TorchDispatchMode):
    """Finds the operators by which data of the host enter a tensor, or a tensor's are read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.lift_fresh, torch.ops.aten._local_scalar_dense):
            self.found.append(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("in_tensors", [True, False], ids=["tensors", "numbers"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"state_bits": 8}], ids=str)
def test_after_the_first_a_step_copies_nothing_from_the_host(monkeypatch, device, options, in_tensors):
    """A CUDA graph could not capture it; on a CPU such copies show as well, where nothing else makes any."""
    params = parameters(device=device, sizes=SMALL)
    lr, scale = 1e-2, 0.5
    if in_tensors:
        lr, scale = torch.tensor(lr, device=device), torch.tensor(scale, device=device)
    ours = FusedAdamW(params, lr=lr, **options)
    train(ours, params, gradients(params, 1))
    assign(params, next(gradients(params, 1)))
    if interpreted(device):  # Triton's interpreter itself reads and makes tensors
        monkeypatch.setattr(dispatch, "resolve", lambda name, tensor: getattr(reference, name))
    with HostData() as host:
        torch.tensor(1.0)
        assert host.found, "the mode finds nothing"
        host.found.clear()
        ours.step(grad_scale=scale)
    assert not host.found


# ---- CUDA graphs ----


TOO_EARLY = r"^step: before each capture in a CUDA graph, run a step outside a graph on the same parameters$"


def test_a_graph_must_not_be_captured_before_a_step_has_run(capturing):
    params = parameters(sizes=SMALL)
    ours = FusedAdamW(params)
    assign(params, next(gradients(params, 1)))
    with capturing(), pytest.raises(RuntimeError, match=TOO_EARLY):
        ours.step()
    assert not any(ours.state.values())


def test_what_a_graph_has_counted_is_read_before_a_step_without_it(capturing):
    """Its replays are the counts written here past the host, to one of two parameters that had as many steps."""
    params = parameters(sizes=SMALL)
    both = params, clones(params)
    ours, theirs = (kind(tensors, lr=1e-2) for kind, tensors in zip(BOTH, both, strict=True))

    def step(which):
        grads = next(gradients(params, 1))
        for tensors, optimizer in zip(both, (ours, theirs), strict=True):
            assign(tensors, grads)
            for i in {0, 1} - which:
                tensors[i].grad = None
            optimizer.step()

    step({0, 1})
    with capturing():
        step({0})
        with pytest.raises(RuntimeError, match=TOO_EARLY):
            ours.step()
    step({1})
    for _ in range(3):
        step({0, 1})
        ours.state[params[0]]["step"].data.add_(10)
        theirs.state[both[1][0]]["step"].add_(10)
    agree(*both)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"state_bits": 8}], ids=str)
def test_a_graph_makes_tables_of_its_own(backend, capturing, options):
    """One that is kept may be forgotten before the graph is; one made in the graph is empty until it is replayed."""
    if torch.cuda.is_available():
        pytest.skip("there the test below captures a graph")
    from fastgpt.kernels.triton import adamw as host

    params = parameters(sizes=SMALL)
    others = clones(params)
    optimizers = []
    for tensors in (params, others):
        torch.manual_seed(5)
        optimizers.append(FusedAdamW(tensors, **options))
    first, second = gradients(params, 2)
    train(optimizers[0], params, [first])
    train(optimizers[1], others, [first, second])
    kept = [table.cache_info() for table in (host.number_table, host.chunk_tables)]
    with capturing():
        train(optimizers[0], params, [second])
    assert [table.cache_info() for table in (host.number_table, host.chunk_tables)] == kept
    assert same_bits(params, others)


def test_every_stream_has_tables_of_its_own(monkeypatch):
    """Another's might be read before they are filled."""
    from fastgpt.kernels.triton import adamw as host

    streams = iter([1, 1, 2])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    make = lru_cache(lambda numbers, device, stream: object())
    first, again, other = (host.cached(make, (1, 2), torch.device("cuda", 0)) for _ in range(3))
    assert first is again is not other


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_tables_of_the_triton_kernels_are_not_copied_from_the_host(backend):
    from fastgpt.kernels.triton import adamw as host
    from fastgpt.kernels.triton import launch

    def floats(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    launched = []
    one, codes, scale = [floats(300)], [floats(300, dtype=torch.uint8)], [floats(2)]
    rest = (floats(), floats(), floats())
    for table in (host.number_table, host.chunk_tables):
        table.cache_clear()
    rtx_4070 = launch.Device("RTX 4070", 89, 46, 99 << 10)
    with launch.ahead_of_time(rtx_4070, lambda kernel, *_: launched.append(kernel)), HostData() as host_data:
        host.grad_norm(one)
        host.adamw_(one, one, one, one, [], *rest, 0.9, 0.95, 1e-8, 0.1, True)
        host.adamw_8bit_(
            one, one, codes, codes, scale, scale, [], *rest, floats(dtype=torch.int64), 0.9, 0.95, 1e-8, 0.1, True,
            False,
        )  # fmt: skip
    assert len(launched) == 4
    assert not host_data.found


@pytest.mark.needs_gpu
@pytest.mark.parametrize("fresh_gradients", [True, False], ids=["gradients of the graph", "gradients kept"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"state_bits": 8}], ids=str)
def test_a_captured_step_replays_as_steps_without_a_graph(options, fresh_gradients):
    """Rate and scale change between replays; one with numbers in tensors on the host is refused."""
    shapes = [(5,), (7, 3), (130,), (33_000,)]
    params = [Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    others = clones(params)
    lr, scale = torch.tensor(2.0**-7, device="cuda"), torch.tensor(1.0, device="cuda")
    with use_backend("triton"):
        torch.manual_seed(7)
        ours = FusedAdamW(params, lr=lr, **options)
        torch.manual_seed(7)
        plain = FusedAdamW(others, lr=2.0**-7, **options)
        x = torch.ones((), device="cuda")

        def step(tensors, optimizer, **how):
            optimizer.zero_grad(set_to_none=fresh_gradients)
            sum((p * x).square().sum() for p in tensors).backward()
            optimizer.step(**how)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(params, ours, grad_scale=scale)
        torch.cuda.current_stream().wait_stream(side)
        for _ in range(3):
            step(others, plain, grad_scale=1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(params, ours, grad_scale=scale)
        for i in range(5):
            lr.fill_(2.0**-i)
            scale.fill_(1.0 + i)
            x.fill_(1.0 - 0.1 * i)
            graph.replay()
            plain.param_groups[0]["lr"] = 2.0**-i
            step(others, plain, grad_scale=1.0 + i)
            agree(params, others)
        step(params, ours, grad_scale=scale)
        step(others, plain, grad_scale=5.0)
        agree(params, others)
        assert all(int(ours.state[p]["step"]) == 9 for p in params)
        ours.param_groups[0]["lr"] = torch.tensor(1e-2)
        with (
            pytest.raises(RuntimeError, match=r"^lr: a CUDA graph on cuda:0 cannot read"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            ours.step(grad_scale=scale)


@pytest.mark.needs_gpu
def test_parameters_on_two_devices_are_clipped_as_one_vector():
    both = [[Parameter(torch.ones(5)), Parameter(torch.ones(7, device="cuda"))] for _ in range(2)]
    ours, theirs = FusedAdamW(both[0], max_grad_norm=1.0), torch.optim.AdamW(both[1])
    for grads in gradients(both[0], 3):
        assign(both[0], grads)
        ours.step()
        assign(both[1], grads)
        norm = nn.utils.clip_grad_norm_(both[1], 1.0)
        torch.testing.assert_close(ours.grad_norm, norm)
        theirs.step()
    agree(*both)


# ---- GradScaler, hooks ----


def test_a_grad_scaler_is_a_power_of_two_that_nothing_sees(device):
    """Not clipping either: it gets the unscaled gradients."""
    p, q = clones([torch.ones(40, device=device)] * 2)
    ours, plain = FusedAdamW([p], lr=0.1, max_grad_norm=0.5), FusedAdamW([q], lr=0.1, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    x = torch.randn(5, 40, device=device)
    for row in x:
        for optimizer in (ours, plain):
            optimizer.zero_grad()
        scaler.scale((p * row).square().sum()).backward()
        (q * row).square().sum().backward()
        scaler.step(ours)
        scaler.update()
        plain.step()
        assert torch.equal(ours.grad_norm, plain.grad_norm)
        assert torch.equal(p, q)


def test_an_inf_gradient_skips_the_step(device):
    (p,) = clones([torch.ones(5, device=device)])
    ours = FusedAdamW([p], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    for bad in (1.0, math.inf, math.nan, 1.0):
        ours.zero_grad()
        before, state = p.detach().clone(), copy.deepcopy(ours.state_dict()["state"])
        scaler.scale((p * torch.tensor([1.0, 1.0, bad, 1.0, 1.0], device=device)).sum()).backward()
        scaler.step(ours)
        scaler.update()
        assert torch.equal(p, before) == (bad != 1.0)
        if bad != 1.0:
            assert all(torch.equal(value, state[0][name]) for name, value in ours.state[p].items())
    assert int(ours.state[p]["step"]) == 2
    assert scaler.get_scale() == 2.0**10


def test_a_grad_scaler_hands_on_arguments_and_results(device):
    (p,) = clones([torch.ones(5, device=device)])
    ours = FusedAdamW([p], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(ours, grad_scale=0.5, zero_grad=True)
    assert p.grad.count_nonzero() == 0
    torch.testing.assert_close(ours.state[p]["exp_avg"], torch.full_like(p, 0.05))


def test_hooks_run_before_and_after_each_step(device):
    (p,) = clones([torch.ones(5, device=device)])
    ours = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    seen = []
    ours.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", p[0].item())))
    ours.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", p[0].item())))
    p.grad = torch.ones_like(p)
    ours.step()
    assert seen == [("before", 1.0), ("after", pytest.approx(0.9))]


# ---- parameters of every kind ----


def test_a_parameter_without_elements_is_stepped_like_any_other(device):
    for options in ({}, {"max_grad_norm": 1.0}, {"state_bits": 8, "max_grad_norm": 1.0}):
        for sizes in ([(0,)], [(0, 3), (5,), (0,)]):
            params = parameters(device=device, sizes=sizes)
            ours = FusedAdamW(params, **options)
            train(ours, params, gradients(params, 2))
            assert [int(ours.state[p]["step"]) for p in params] == [2] * len(params)
            again = FusedAdamW(params, **options)
            again.load_state_dict(ours.state_dict())
            train(again, params, gradients(params, 1))


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_fp16_parameters_take_the_steps_of_fp32_ones_rounded(device):
    """In fp16 the squares of these gradients are zero: steps would be thirty times as long by and by."""
    for options in ({}, {"state_bits": 8}):
        (p,) = parameters(torch.float16, device, [(300,)])
        (q,) = clones([p], torch.float32)
        torch.manual_seed(5)
        ours = FusedAdamW([p], lr=1e-2, **options)
        torch.manual_seed(5)
        wide = FusedAdamW([q], lr=1e-2, **options)
        for i, (grad,) in enumerate(gradients([p], 12, torch.float32)):
            if i == 6:
                ours.load_state_dict(copy.deepcopy(ours.state_dict()))
            small = (1e-4 * grad).half()
            train(ours, [p], [[small]])
            train(wide, [q], [[small.float()]])
        torch.testing.assert_close(p.float(), q, rtol=0, atol=12 * 2**-10)


def test_dtypes_may_be_mixed_in_a_group_and_are_clipped_as_one_vector(device):
    """Each by the backend that takes it."""
    triton = interpreted(device) or device.type == "cuda"
    kinds = [torch.float32, torch.float16, torch.bfloat16] + ([] if triton else [torch.float64])
    params = [Parameter(torch.ones(40, device=device).to(kind)) for kind in kinds]
    others = clones(params, torch.float64)
    ours, theirs = FusedAdamW(params, lr=0.25, max_grad_norm=1.0), torch.optim.AdamW(others, lr=0.25)
    grads = [torch.full_like(p, 2.0**i) for i, p in enumerate(params)]
    with use_backend("triton" if triton else "auto"):
        train(ours, params, [grads])
    assign(others, grads)
    norm = nn.utils.clip_grad_norm_(others, 1.0)
    theirs.step()
    torch.testing.assert_close(ours.grad_norm.double(), norm, rtol=1e-6, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q.to(p.dtype))


def test_a_gradient_may_be_of_another_dtype_that_the_kernels_take(device):
    p, q = (Parameter(torch.ones(40, device=device)) for _ in range(2))
    p.grad_dtype = None
    p.grad = torch.randn(40, device=device).bfloat16()
    q.grad = p.grad.float()
    for parameter in (p, q):
        FusedAdamW([parameter], max_grad_norm=1.0).step()
    torch.testing.assert_close(p, q)


def test_a_gradient_negated_lazily_is_negated(device):
    p, q = (Parameter(torch.ones(40, device=device)) for _ in range(2))
    p.grad = torch._neg_view(torch.ones(40, device=device))
    q.grad = -torch.ones(40, device=device)
    for parameter in (p, q):
        FusedAdamW([parameter]).step()
    assert torch.equal(p, q)


# ---- what is refused ----


def one():
    return Parameter(torch.ones(3))


REFUSED_HYPERPARAMETERS = [
    ("lr", "1e-3", TypeError),
    ("lr", None, TypeError),
    ("lr", True, TypeError),
    ("lr", math.nan, ValueError),
    ("lr", -1.0, ValueError),
    ("lr", torch.tensor(-1.0), ValueError),
    ("lr", torch.tensor(math.nan), ValueError),
    ("lr", torch.ones(2), ValueError),
    ("betas", (0.9,), ValueError),
    ("betas", (0.9, 0.95, 0.99), ValueError),
    ("betas", 0.9, ValueError),
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (math.nan, 0.9), ValueError),
    ("betas", ("0.9", 0.95), TypeError),
    ("eps", math.nan, ValueError),
    ("eps", -1e-8, ValueError),
    ("eps", "1e-8", TypeError),
    ("weight_decay", math.nan, ValueError),
    ("weight_decay", -0.1, ValueError),
    ("weight_decay", None, TypeError),
    ("amsgrad", True, ValueError),
    ("maximize", True, ValueError),
]


@pytest.mark.parametrize(("name", "value", "kind"), REFUSED_HYPERPARAMETERS)
def test_a_wrong_hyperparameter_is_named_wherever_it_stands(name, value, kind):
    ours = FusedAdamW([one()])
    group = {"params": [one()], name: value}
    calls = [
        lambda: FusedAdamW([one()], **{name: value}),
        lambda: FusedAdamW([{"params": [one()]}, group]),
        lambda: ours.add_param_group(dict(group)),
    ]
    for call in calls:
        with pytest.raises(kind, match=rf"^{name}: ") as error:
            call()
        assert "\n" not in str(error.value)
    assert len(ours.param_groups) == 1


@pytest.mark.parametrize(("name", "value"), [("differentiable", True), ("decoupled_weight_decay", False)])
def test_a_group_that_asks_for_other_maths_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        FusedAdamW([{"params": [one()], name: value}])


@pytest.mark.parametrize("value", [False, True, "1", math.nan])
def test_a_norm_that_is_no_number_is_refused(value):
    """In torch.optim.AdamW amsgrad stands in this place."""
    with pytest.raises((TypeError, ValueError), match=r"^max_grad_norm: "):
        FusedAdamW([one()], 1e-3, (0.9, 0.999), 1e-8, 1e-2, value)


def test_without_a_parameter_there_is_nothing_to_optimize():
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedAdamW([])


@pytest.mark.parametrize(
    ("param", "kind"),
    [
        (torch.ones(3, dtype=torch.complex64), TypeError),
        (torch.ones(3, dtype=torch.int64), TypeError),
        (torch.eye(3).to_sparse(), TypeError),
        (torch.ones(3, 4).t(), ValueError),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), ValueError),
    ],
    ids=["complex", "integer", "sparse", "transposed", "channels last"],
)
def test_a_parameter_that_no_kernel_takes_is_refused(param, kind):
    with pytest.raises(kind, match=r"^params: "):
        FusedAdamW([param])


def test_a_parameter_given_twice_is_refused():
    p = one()
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match=r"^params: a parameter is given twice$"),
    ):
        FusedAdamW([p, p])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p, q: {p: p.bfloat16()}, r"has none for one of shape \(3,\)"),
        (lambda p, q: {t: t.bfloat16() for t in (p, q, one())}, r"has a key that is not a parameter"),
        (lambda p, q: {p: p.bfloat16(), q: q.tolist()}, "expected a Tensor, got list"),
        (lambda p, q: {p: p.bfloat16(), q: q.bfloat16().to("meta")}, "device meta differs"),
        (lambda p, q: [p.bfloat16(), q.bfloat16()], "expected a dict"),
    ],
    ids=["missing", "stranger", "list", "device", "no dict"],
)
def test_copies_that_do_not_mirror_the_parameters_are_refused(made, message):
    p, q = one(), one()
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=rf"^copies: .*{message}"):
        FusedAdamW([p, q], copies=made(p, q))


def test_a_group_added_late_brings_its_copies():
    p, q = one(), one()
    ours = FusedAdamW([p], copies={p: p.detach().bfloat16()})
    with pytest.raises(ValueError, match=r"^copies: expected a tensor for every parameter"):
        ours.add_param_group({"params": [q]})
    ours.copies[q] = torch.zeros(3, dtype=torch.bfloat16)
    ours.add_param_group({"params": [q]})
    train(ours, [p, q], gradients([p, q], 1))
    assert torch.equal(ours.copies[q], q.bfloat16())


def sparse_gradient(p, ours):
    p.grad = torch.eye(3, device=p.device).to_sparse()


def gradient_of_another_shape(p, ours):
    p.grad = torch.ones_like(p)
    p.data = torch.ones(2, 2, device=p.device)


def cast_after_a_step(p, ours):
    p.data = p.data.bfloat16()
    p.grad = torch.ones_like(p)


def reshaped_after_a_step(p, ours):
    p.data = torch.ones(4, 4, device=p.device)
    p.grad = torch.ones_like(p)


def transposed_after_a_step(p, ours):
    p.data = p.data.t()


def wide_gradient(p, ours):
    p.grad = None
    p.grad_dtype = None
    p.grad = torch.ones(3, 3, dtype=torch.float64, device=p.device)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (sparse_gradient, "grad"),
        (gradient_of_another_shape, "grad"),
        (cast_after_a_step, "exp_avg"),
        (reshaped_after_a_step, "exp_avg"),
        (transposed_after_a_step, "params"),
        (wide_gradient, "grad"),
    ],
)
def test_what_does_not_fit_a_parameter_is_named_and_changes_nothing(device, backend, spoil, name):
    if spoil is wide_gradient and backend == "reference":
        pytest.skip("the reference takes every floating-point gradient")
    first, p = Parameter(torch.ones(5, device=device)), Parameter(torch.arange(9.0, device=device).view(3, 3))
    ours = FusedAdamW([first, p])
    train(ours, [first, p], gradients([first, p], 1))
    first.grad = torch.ones_like(first)
    spoil(p, ours)
    before, step = first.detach().clone(), int(ours.state[first]["step"])
    with pytest.raises((TypeError, RuntimeError), match=rf"^{name}: ") as error:
        ours.step()
    assert "\n" not in str(error.value)
    assert torch.equal(first, before)
    assert int(ours.state[first]["step"]) == step


@pytest.mark.parametrize("scale", ["1", None, math.nan, torch.ones(2)], ids=str)
def test_a_wrong_grad_scale_is_named(scale):
    p = one()
    p.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=r"^grad_scale: "):
        FusedAdamW([p]).step(grad_scale=scale)
