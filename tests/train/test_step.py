"""One update: what it leaves behind, and that a GPU would never have to wait for the host."""

import copy
import gc
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fastgpt.kernels import FusedMuon
from fastgpt.kernels.dry_run import dry_run
from fastgpt.model import GPT, GPTConfig
from fastgpt.train import spikes
from fastgpt.train import step as step_module
from fastgpt.train.memory import ran_out
from fastgpt.train.predict.trace import Recorder, Setup
from fastgpt.train.step import (
    FIRST_LOSS_SCALE,
    GROWTH_INTERVAL,
    RecordingOutOfMemory,
    TrainStep,
    leave_default_stream,
)

TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# fp16 has no C++ kernels
pytestmark = pytest.mark.filterwarnings("ignore:fastgpt runs on plain PyTorch")


def batches(n, config=TINY, B=3, device="cpu"):
    """So many micro-batches, always the same ones."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(config.vocab_size, (n, B, config.block_size + 1), generator=generator).to(device)
    return iter([(crop[:, :-1].contiguous(), crop[:, 1:].contiguous()) for crop in drawn])


def make(config=TINY, device="cpu", recompute="cheap", **options):
    torch.manual_seed(1)
    return TrainStep(GPT(config, recompute).to(device), **options)


def train(step, n_updates, rate=1e-2, config=TINY):
    """Losses of so many updates."""
    source = batches(n_updates * step.accumulation, config, device=step.loss.device)
    losses = []
    for _ in range(n_updates):
        step(source.__next__, rate)
        losses.append(step.loss.item())
    return losses


# ---- what an update leaves behind ----


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_after_an_update_gradients_are_zero_and_the_working_weights_are_the_masters_rounded(dtype, muon):
    step = make(dtype=dtype, muon=muon)
    before = step.store.master.clone()
    train(step, 2)
    assert step.store.grad.count_nonzero() == 0
    assert not torch.equal(step.store.master, before)
    assert torch.equal(step.store.working, step.store.master.to(dtype))


def test_the_loss_is_the_mean_over_the_micro_batches():
    step = make(accumulation=3)
    step(batches(3).__next__, 0.0)
    with torch.no_grad():
        expected = [step.forward(x, y) for x, y in batches(3)]
    assert step.loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_the_gradient_norm_is_that_of_the_mean_loss():
    step = make(accumulation=2)
    step(batches(2).__next__, 0.0)
    torch.manual_seed(1)
    model = GPT(TINY)
    (sum(model(x, y) for x, y in batches(2)) / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert step.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_without_clipping_the_gradient_norm_is_known_too():
    """It tells whether the update has to be skipped."""
    clipped, free = make(max_grad_norm=1e9), make(max_grad_norm=None)
    assert train(clipped, 2) == train(free, 2)
    assert torch.equal(clipped.grad_norm, free.grad_norm)


OPTIMIZERS = [{"state_bits": 32}, {"state_bits": 8}, {"muon": True}, {"muon": True, "state_bits": 8}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_an_update_whose_gradient_is_not_finite_is_skipped_and_counted(options):
    step, undisturbed = make(**options), make(**options)
    source = list(batches(5))
    for i, batch in enumerate(source):
        if i in (1, 2, 4):
            step.store.grad[5] = float("nan")  # as a micro-batch before this one would leave it
        else:
            undisturbed([batch].__iter__().__next__, 1e-2)
        step([batch].__iter__().__next__, 1e-2)
        expected = {0: (0, 0), 1: (1, 1), 2: (2, 2), 3: (2, 0), 4: (3, 1)}[i]
        assert (step.skipped.item(), step.skipped_in_a_row.item()) == expected
        assert step.store.grad.count_nonzero() == 0
    assert torch.equal(step.store.master, undisturbed.store.master)
    assert torch.equal(step.store.working, undisturbed.store.working)


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest():
    """As FusedMuon does with the model's own parameters; q, k and v are three matrices."""
    step = make(muon=True, muon_lr_ratio=3.0, momentum=0.9, max_grad_norm=1.0)
    torch.manual_seed(1)
    model = GPT(TINY)
    named = dict(model.named_parameters())
    of_blocks = {name: p for name, p in named.items() if ".h." in name and p.dim() == 2}
    pieces = []
    for name, p in of_blocks.items():
        rows = p.data.split(TINY.n_embd) if name.endswith("c_attn.weight") else [p.data]
        pieces.append((p, [torch.nn.Parameter(part) for part in rows]))
    rest = [p for name, p in named.items() if name not in of_blocks]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "use_muon": False, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        {"params": [p for p in rest if p.dim() < 2], "use_muon": False, "weight_decay": 0.0, "betas": (0.9, 0.95)},
        {"params": [part for _, parts in pieces for part in parts], "lr": 3e-2},
    ]
    optimizer = FusedMuon(groups, 1e-2, momentum=0.9, adjust_lr_fn="match_rms_adamw", max_grad_norm=1.0)
    source = batches(3)
    for x, y in batches(3):
        step(source.__next__, 1e-2)
        model(x, y).backward()
        for p, parts in pieces:
            for part, grad in zip(parts, p.grad.split([len(part) for part in parts]), strict=True):
                part.grad = grad.contiguous()
        optimizer.step()
        model.zero_grad()
    found = step.store.named(step.store.master)
    for name, p in named.items():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_a_learning_rate_of_zero_changes_nothing():
    step = make()
    before = step.store.master.clone()
    train(step, 2, rate=0.0)
    assert torch.equal(step.store.master, before)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_recomputing_more_or_less_gives_the_same_losses_to_the_bit(recompute):
    config = replace(TINY, dropout=0.1)
    assert train(make(config, recompute=recompute), 5) == train(make(config), 5)


# ---- graphs ----


class Graph:
    """Stands in for a CUDA graph: recording runs nothing, replaying runs what was recorded."""

    made = 0

    def __init__(self, function):
        Graph.made += 1
        self.replay = function

    def pool(self):
        return None


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_graphs_change_nothing_in_the_course_of_training(monkeypatch, accumulation, optimizer):
    options = {"accumulation": accumulation, "dtype": torch.bfloat16, **optimizer}
    expected = make(**options)
    losses = train(expected, 5)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(step_module, "record_graph", lambda function, pool: Graph(function))
    recorded = make(**options)
    recorded.cuda_graphs = True
    assert train(recorded, 5) == losses
    assert Graph.made == 2
    assert torch.equal(recorded.store.master, expected.store.master)


def test_the_first_update_runs_without_graphs_and_the_second_records_them(monkeypatch):
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(step_module, "record_graph", lambda function, pool: Graph(function))
    step = make(accumulation=2)
    step.cuda_graphs = True
    made = []
    source = batches(6)
    for _ in range(3):
        step(source.__next__, 1e-3)
        made.append(Graph.made)
    assert made == [0, 2, 2]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_recorded_graphs_serve_any_number_of_micro_batches(monkeypatch, options):
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(step_module, "record_graph", lambda function, pool: Graph(function))
    recorded, expected = make(dtype=torch.bfloat16, **options), make(dtype=torch.bfloat16, **options)
    recorded.cuda_graphs = True
    for accumulation in (1, 1, 2, 4, 3):
        for step in (recorded, expected):
            step.set_accumulation(accumulation)
        assert train(recorded, 1) == train(expected, 1)
        assert torch.equal(recorded.store.master, expected.store.master)
    assert Graph.made == 2


class CapturedGraph:
    """A CUDA graph as the optimizer sees it: captured once, and its replays are not counted on the host."""

    def __init__(self, function, step, capturing):
        with capturing():
            function()
        self.function, self.step, self.fresh = function, step, True

    def replay(self):
        if not self.fresh:  # what was captured has run once already
            optimizer = self.step.optimizer
            self.step.optimizer = copy.copy(optimizer)  # shares the state; what it counts, the other does not know
            self.function()
            self.step.optimizer = optimizer
        self.fresh = False

    def pool(self):
        return None


@pytest.mark.parametrize("unfinished", [False, True])
def test_after_its_graphs_are_freed_a_run_records_them_again_and_goes_on_as_before(monkeypatch, capturing, unfinished):
    expected = train(make(), 6)
    step, source, losses = make(), batches(6), []
    monkeypatch.setattr(step_module, "record_graph", lambda function, pool: CapturedGraph(function, step, capturing))
    step.cuda_graphs = True
    for update in range(6):
        if update == 3:
            if unfinished:  # memory ran out between two micro-batches
                step.micro_step(next(batches(1)))
            step.free_graphs()
            assert not step.has_graphs
        step(source.__next__, 1e-2)
        losses.append(step.loss.item())
    assert losses == expected
    assert step.has_graphs


@pytest.fixture
def recording(monkeypatch):
    """Stands in for CUDA where a graph is recorded; gives a list of what is done there, in order."""
    done = []

    @contextmanager
    def graph(graph, pool, stream):
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: done.append("clear"), raising=False)
    return done


def test_memory_that_runs_out_while_recording_is_told_as_that(recording):
    alive = []

    def full():
        activations = torch.empty(1000)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("no more")

    gc.disable()
    try:
        with pytest.raises(RecordingOutOfMemory, match=r"^no more$") as found:
            step_module.record_graph(full, pool=None)
        assert ran_out(found.value)
        del found
        assert [activations() for activations in alive] == [None]  # or a smaller step would find no more memory
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_recording_that_cannot_even_be_ended_is_no_mere_lack_of_memory(recording, monkeypatch):
    """PyTorch's allocator then believes that it goes on, and gives no memory back."""

    @contextmanager
    def graph(graph, pool, stream):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def full():
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="--cuda_graphs False works without: no more") as found:
        step_module.record_graph(full, pool=None)
    assert not ran_out(found.value)


def test_pythons_collector_rests_while_a_graph_is_recorded(recording):
    """It may come upon a graph that nobody holds any more; to destroy one ends the recording."""
    seen = []
    step_module.record_graph(lambda: seen.append(gc.isenabled()), pool=None)
    assert seen == [False]
    assert gc.isenabled()


def test_cublas_has_a_workspace_in_the_graphs_own_memory_and_keeps_it_for_nothing_else(recording):
    step_module.record_graph(lambda: recording.append("work"), pool=None)
    assert recording == ["clear", "begin", "work", "end", "clear"]


def test_a_graph_that_cannot_be_recorded_is_told_with_the_flag_that_helps(recording):
    def broken():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="--cuda_graphs False works without: operation not permitted"):
        step_module.record_graph(broken, pool=None)


@pytest.mark.needs_gpu
def test_making_a_step_takes_no_more_of_a_gpu_than_it_keeps():
    """A model that were there too would count once more: a card that the plan says is enough would not be."""
    model = GPT(replace(TINY, n_embd=256, n_layer=8))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = TrainStep(model, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    kept = [step.store.master, step.store.grad, step.store.working, *step.moments.values()]
    assert torch.cuda.max_memory_allocated() - before < 1.05 * sum(t.nbytes for t in kept)


def test_once_its_graphs_are_gone_an_update_asks_no_more_how_many_there_have_been(monkeypatch, capturing):
    asked = []
    real = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: asked.append(tensor) or real(tensor))
    step = make()
    train(step, 1)
    with capturing():
        step.optimizer.step()
    for expected in (2, 4):  # of two groups
        train(step, 1)
        assert len(asked) == expected
    step.do_without_graphs()
    train(step, 1)
    assert len(asked) == 6  # once more, for what the graphs did
    train(step, 2)
    assert len(asked) == 6


class Waiting(GPT):
    """Looks at its loss, as a careless model might."""

    def forward(self, *args, **kwargs):
        loss = super().forward(*args, **kwargs)
        return loss if loss.item() > 0 else -loss


def dry_run_updates(model, **options):
    """Two updates of a model for a GPU, on tensors without data."""
    with (
        dry_run("cuda"),
        torch.device("meta"),
        Recorder(Setup(TINY, 3)),
    ):  # which knows a shape that torch 2.11 does not
        step = TrainStep(model(), **options)
        batch = torch.zeros(3, TINY.block_size, dtype=torch.int64)
        for _ in range(2):
            step(lambda: (batch, batch), 1e-3)
    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_an_update_on_a_gpu_asks_for_no_value_and_no_shape_that_depends_on_one(dtype, state_bits, max_grad_norm):
    """On tensors without data it could not: there is nothing to ask for."""
    options = {"dtype": dtype, "state_bits": state_bits, "max_grad_norm": max_grad_norm, "accumulation": 2}
    step = dry_run_updates(lambda: GPT(TINY), **options)
    assert step.loss.is_meta
    assert step.loss.shape == ()


def test_a_model_that_looks_at_a_value_is_found_out():
    with pytest.raises(RuntimeError, match="meta tensors"):
        dry_run_updates(lambda: Waiting(TINY))


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_dropout_can_be_recorded_too(recompute):
    step = dry_run_updates(lambda: GPT(replace(TINY, dropout=0.1), recompute), dtype=torch.bfloat16)
    assert step.grad_norm.is_meta


# ---- fp16 ----


def test_an_fp16_run_learns_as_an_fp32_one_does():
    runs = []
    for dtype in (torch.float16, torch.float32):
        step, losses = make(dtype=dtype), []
        for _ in range(20):
            step(batches(1).__next__, 1e-2)
            losses.append(step.loss.item())
        runs.append(losses)
    ours, truth = runs
    assert ours == pytest.approx(truth, rel=5e-3)
    assert ours[-1] < ours[0] - 1.0


def test_loss_scaling_keeps_gradients_that_fp16_alone_would_lose():
    step = make(dtype=torch.float16)
    ((x, y),) = batches(1)
    lost = []
    for scale in (FIRST_LOSS_SCALE, 2.0**-10):
        step.set_loss_scale(scale)
        step.micro_step((x, y))
        lost.append((step.store.grad == 0).sum().item())
        step.store.grad.zero_()
    assert lost[0] < 0.8 * lost[1]


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out_and_halves_the_scale():
    step = make(dtype=torch.float16)
    train(step, 1)
    before = step.store.master.clone()
    step.set_loss_scale(2.0**40)
    train(step, 1)
    assert torch.equal(step.store.master, before)
    assert step.store.grad.count_nonzero() == 0
    assert step.loss_scale == 2.0**39
    assert step.updates_since_overflow == 0
    assert math.isfinite(step.loss.item())
    assert not math.isfinite(step.grad_norm.item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["norm", "loss"])
def test_an_update_that_stands_out_is_skipped_and_counted(monkeypatch, dtype, what):
    monkeypatch.setattr(spikes, "WINDOW", 12)
    step = make(dtype=dtype, skip_spikes=6.0)
    step.set_loss_scale(1024.0)
    source = batches(40)
    forward, micro_step = step.forward, step.micro_step

    def large_loss(*args, **options):
        loss = forward(*args, **options)
        return loss + 49.0 * loss.detach() if number == 20 and what == "loss" else loss  # the gradient stays

    def large_gradient(batch):
        micro_step(batch)
        if number == 20 and what == "norm":
            step.store.grad.mul_(50.0)

    step.forward, step.micro_step = large_loss, large_gradient
    changed = []
    for number in range(1, 31):
        before = step.store.master.clone()
        step(source.__next__, 1e-3, number)
        changed.append(not torch.equal(step.store.master, before))
    assert changed == [number != 20 for number in range(1, 31)]
    assert (step.skipped.item(), step.spikes.item(), step.last_skipped.item()) == (1, 1, 20)
    assert step.most_in_a_row.item() == 0
    assert step.store.grad.count_nonzero() == 0


def test_the_scale_doubles_after_so_many_updates_without_overflow():
    step = make(dtype=torch.float16)
    step.set_loss_scale(1024.0, GROWTH_INTERVAL - 1)
    train(step, 1)
    assert (step.loss_scale, step.updates_since_overflow) == (2048.0, 0)
    train(step, 1)
    assert (step.loss_scale, step.updates_since_overflow) == (2048.0, 1)


def test_the_loss_and_the_weights_do_not_depend_on_the_scale():
    runs = []
    for scale in (256.0, 4096.0):
        step = make(dtype=torch.float16, max_grad_norm=None)
        step.set_loss_scale(scale)
        runs.append(train(step, 3))
    assert runs[0] == pytest.approx(runs[1], rel=2e-3)


# ---- on a GPU ----


@pytest.fixture
def own_stream():
    previous = torch.cuda.current_stream()
    leave_default_stream(torch.device("cuda"))
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(previous)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_graphs_give_the_same_bits_as_none(own_stream, dtype, dropout):
    config = replace(TINY, dropout=dropout)
    runs = []
    for cuda_graphs in (True, False):
        step = make(config, "cuda", dtype=dtype, accumulation=2, cuda_graphs=cuda_graphs)
        runs.append((train(step, 6, config=config), step.store.master.clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.needs_gpu
def test_on_a_gpu_a_replayed_update_takes_a_few_launches(own_stream):
    step = make(device="cuda", dtype=torch.bfloat16)
    train(step, 3)
    source = batches(1, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step(source.__next__, 1e-3)
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiler.key_averages() if "Launch" in event.key)
    assert 2 <= launches <= 12  # the two graphs, and what lies between them
