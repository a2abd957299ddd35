"""The trace of a step: its calls and its memory are those of the step with data."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastgpt.kernels import use_backend
from fastgpt.kernels.ops import OPERATORS
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict.trace import PERSISTENT, Recorder, Setup, trace_step
from fastgpt.train.presets import PRESETS
from fastgpt.train.step import TrainStep

GPT2 = GPTConfig(bias=False)  # 124M
SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
TINY = GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64)


def flops(calls, kind):
    return sum(call.flops for call in calls if call.kind == kind)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_calls_of_our_operators_have_their_kind_and_products_have_flops(device_type, backend):
    calls = []
    with use_backend(backend):
        for recompute in ("none", "cheap", "block"):
            for state_bits, deterministic in ((32, True), (8, False)):
                setup = Setup(
                    TINY, 2, device_type, recompute=recompute, state_bits=state_bits, deterministic=deterministic
                )
                trace = trace_step(setup)
                calls += trace.micro_step + trace.update
    ours = [call for call in calls if call.operator in OPERATORS]
    assert ours
    for call in ours:
        assert call.kind == ("GEMM" if call.operator == "matmul_" else OPERATORS[call.operator].kind)
        assert (call.flops > 0) == (call.kind in ("GEMM", "attention")), call


def test_the_products_of_gpt2_take_six_flops_a_parameter_and_token():
    setup = Setup(GPT2, 4)
    matrices = GPT2.n_params_without_positions - (2 * GPT2.n_layer + 1) * GPT2.n_embd  # norms multiply no matrix
    assert flops(trace_step(setup).micro_step, "GEMM") == 6 * matrices * setup.tokens


def test_attention_takes_nine_products_of_which_causality_halves_each():
    setup = Setup(GPT2, 4)
    T, C, L = GPT2.block_size, GPT2.n_embd, GPT2.n_layer
    assert flops(trace_step(setup).micro_step, "attention") == 4 * L * 9 * (2 * T * T * C) / 2


@pytest.mark.parametrize(("device_type", "products"), [("cuda", 2 + 5), ("cpu", 2 + 7)])
def test_in_a_single_pass_attention_saves_two_products_of_nine_on_a_gpu(device_type, products):
    setup = Setup(GPT2, 4, device_type, deterministic=False)
    T, C, L = GPT2.block_size, GPT2.n_embd, GPT2.n_layer
    assert flops(trace_step(setup).micro_step, "attention") == 4 * L * products * (2 * T * T * C) / 2


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_a_single_pass_moves_sixteen_bytes_more_an_element_on_a_gpu(device_type):
    setup = Setup(GPT2, 4, device_type)
    two_passes, one_pass = (trace_step(replace(setup, deterministic=value)) for value in (True, False))
    elements = setup.tokens * GPT2.n_embd if device_type == "cuda" else 0
    assert one_pass.peak == two_passes.peak

    def traffic(trace):
        return sum(call.bytes for call in trace.micro_step if call.operator == "attention_qkv_backward")

    assert traffic(one_pass) - traffic(two_passes) == GPT2.n_layer * 16 * elements


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_a_window_leaves_the_keys_that_a_query_sees(device_type):
    T, w = 256, 48
    config = GPTConfig(n_layer=5, n_head=2, n_embd=64, vocab_size=512, block_size=T, window=w)
    calls = [call for call in trace_step(Setup(config, 3, device_type)).micro_step if call.kind == "attention"]
    full, local = (sum(min(t + 1, seen) for t in range(T)) for seen in (T, w))
    products = 9 * 3 * 2 * config.n_embd
    # Layers 0 to 2 have a window, 3 and the last have none. The sum leaves out half a key of each query that sees all.
    expected = products * ((full - T / 2) * 2 + (local - w / 2) * 3)
    assert flops(calls, "attention") == expected
    assert {call.length for call in calls} == {T, 2 * w - w * w / T}


def test_a_window_as_long_as_the_context_changes_nothing():
    traces = [trace_step(Setup(replace(TINY, window=window), 2)) for window in (0, TINY.block_size)]
    assert traces[0] == traces[1]


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_muons_products_are_those_of_five_newton_schulz_steps(device_type):
    """Each takes the smaller Gram matrix G of a (m, n) matrix X, m <= n, then G G and a product with X."""
    trace = trace_step(Setup(GPT2, 1, device_type, optimizer="muon"))
    C = GPT2.n_embd

    def step(m, n):
        return 2 * m * m * n + 2 * m**3 + 2 * m * m * n

    of_a_layer = 4 * step(C, C) + 2 * step(C, 4 * C)  # q, k, v, proj; the MLP's two
    assert flops(trace.update, "GEMM") == 5 * GPT2.n_layer * of_a_layer
    assert not flops(trace_step(Setup(GPT2, 1, device_type)).update, "GEMM")


def test_muons_matrices_have_one_moment_and_the_update_holds_a_batch_of_each_shape():
    trace = trace_step(Setup(GPT2, 1, optimizer="muon", recompute="block"))
    of_muon = GPT2.n_params_of_blocks
    assert trace.memory["moments, 32 bits"] == pytest.approx(4 * (2 * GPT2.n_params - of_muon), rel=1e-3)
    # Matrices of one shape are iterated together: in fp32, then two operands in bf16, then the update in fp32. That is
    # more than what the backward of one sequence holds: the peak is in the update.
    of_one_shape = GPT2.n_layer * 4 * GPT2.n_embd**2
    assert trace.transient == pytest.approx((4 + 2 + 2 + 4) * of_one_shape, rel=0.01)


def test_recomputing_blocks_repeats_the_forward_but_for_its_last_product():
    setup = Setup(GPT2, 4)
    none, block = (flops(trace_step(replace(setup, recompute=kind)).micro_step, "GEMM") for kind in ("none", "block"))
    C = GPT2.n_embd
    assert block - none == 2 * setup.tokens * GPT2.n_layer * 8 * C * C


def test_a_layer_more_calls_its_products_and_kernels_and_nothing_besides():
    """Gradients of biases and norms are computed inside other calls, except that of q, k and v's bias on a GPU."""

    def calls(n_layer):
        setup = Setup(GPTConfig(n_layer=n_layer), 2, recompute="none")
        return Counter(call.operator for call in trace_step(setup).micro_step)

    assert calls(3) - calls(2) == {
        "add_layer_norm": 2, "layer_norm_backward": 2, "attention_qkv": 1, "attention_qkv_backward": 1,
        "gelu": 1, "gelu_backward": 1, "addmm": 3 + 4, "mm": 1 + 4, "add_column_sums_": 1,
    }  # fmt: skip


def test_the_gradients_of_the_embeddings_are_one_call_each():
    calls = Counter(call.operator for call in trace_step(Setup(GPTConfig(n_layer=1, bias=False), 2)).micro_step)
    assert calls["embedding_backward_"] == calls["add_column_sums_"] == 1
    assert calls["add"] == 1  # of tokens and positions, forward
    assert not calls.keys() & {"slice_backward", "index_put_", "index_add_", "embedding_dense_backward"}


def test_adamw_moves_34_bytes_per_parameter():
    """Parameter, gradient and both moments are read and written, 4 bytes each, and the bf16 copy is written."""
    moved = sum(call.bytes for call in trace_step(Setup(GPT2, 1)).update if call.operator == "adamw_")
    assert moved == pytest.approx(34 * GPT2.n_params, rel=1e-3)


def test_a_gated_units_gradients_are_written_and_not_read():
    packed, dy, y = (torch.empty(4, n, device="meta") for n in (16, 8, 8))
    dpacked = torch.empty_like(packed)
    with Recorder(Setup(GPT2, 1)) as recorder:
        arguments = *dpacked.split(8, -1), dy, *packed.split(8, -1), 0
        torch.ops.fastgpt.glu_backward_(*arguments)
        torch.ops.fastgpt.glu_backward_(*arguments, y)
    calls = [call for call in recorder.calls if call.operator == "glu_backward_"]
    assert [call.bytes for call in calls] == [4 * 5 * 32, 4 * 6 * 32]
    assert {call.kind for call in calls} == {"activation"}


def test_weights_gradients_and_moments_take_their_bytes_a_parameter():
    for state_bits, expected in ((32, 8.0), (8, 2 + 2 * 4 / 256)):
        memory = trace_step(Setup(GPT2, 1, state_bits=state_bits)).memory
        assert memory["weights, bf16"] == pytest.approx(2 * GPT2.n_params, rel=1e-3)
        assert memory["weights, fp32"] == pytest.approx(4 * GPT2.n_params, rel=1e-3)
        assert memory["gradients, fp32"] == pytest.approx(4 * GPT2.n_params, rel=1e-3)
        assert memory[f"moments, {state_bits} bits"] == pytest.approx(expected * GPT2.n_params, rel=1e-3)


@pytest.mark.parametrize(("recompute", "kept"), [("none", 16), ("cheap", 10), ("block", 1)])
def test_a_layer_more_costs_what_it_keeps(recompute, kept):
    """``kept`` counts bf16 elements per token and channel. The difference of two depths leaves out temporaries."""

    def activations(n_layer):
        setup = Setup(replace(GPT2, n_layer=n_layer), 8, recompute=recompute)
        return sum(size for label, size in trace_step(setup).memory.items() if label.startswith("activations"))

    per_layer = (activations(14) - activations(12)) / 2
    assert per_layer / (2 * 8 * GPT2.block_size * GPT2.n_embd) == pytest.approx(kept, rel=0.01)


def test_a_trace_is_the_same_each_time():
    setup = Setup(TINY, 2)
    assert trace_step(setup) == trace_step(setup)


def test_memory_grows_with_the_batch_and_the_parts_are_the_peak():
    small, large = (trace_step(Setup(GPT2, B)) for B in (4, 8))
    assert small.peak < large.peak < 2 * small.peak
    assert sum(small.memory.values()) == small.peak
    assert all(size > 0 for size in small.memory.values())


def test_a_step_in_fp16_is_traced_too():
    """It has another update: the host reads the gradient norm."""
    trace = trace_step(Setup(GPT2, 1, dtype=torch.float16))
    assert [call.operator for call in trace.update].count("adamw_") == 2  # with and without weight decay


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_data_calls_and_holds_what_the_dry_run_counted(backend, dtype, recompute):
    setup = Setup(TINY, 3, "cpu", dtype, recompute=recompute)
    with use_backend(backend):
        expected = trace_step(setup)
        step = TrainStep(GPT(TINY, recompute), dtype=dtype)
        batch = torch.randint(65, (2, 3, TINY.block_size))
        recorder = Recorder(setup)
        recorder.hold("weights", step.store.master, step.store.working, step.store.grad, *step.moments.values(), batch)
        with recorder:
            step.micro_step((batch[0], batch[1]))
            micro_step, recorder.calls = recorder.calls, []
            step.update()

    def weighty(calls):  # without the small calls that check the targets, which need data
        return [(call.operator, call.flops, call.bytes) for call in calls if call.bytes > 1024]

    assert sum(call.flops for call in micro_step) == sum(call.flops for call in expected.micro_step) > 0
    if backend == "auto":
        assert weighty(micro_step) == weighty(expected.micro_step)
        assert weighty(recorder.calls) == weighty(expected.update)
        assert sum(recorder.at_peak.values()) == expected.peak
    else:  # PyTorch computes one-hot vectors differently on meta tensors
        assert sum(recorder.at_peak.values()) == pytest.approx(expected.peak, rel=0.02)


def allocated_at_most(work):
    """Peak of the bytes that PyTorch's allocator hands out during ``work``, as its profiler reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("preset", "vocab_size"), [("quickstart", 256), ("shakespeare-char-cpu", 65), ("gpt2-30m", 50304)]
)
def test_on_a_cpu_the_trace_of_a_preset_is_the_peak_that_the_allocator_reports(preset, vocab_size, backend):
    batch_size = {"gpt2-30m": 1}.get(preset) or PRESETS[preset]["batch_size"]
    shape = {name: PRESETS[preset].get(name, getattr(TrainConfig, name)) for name in SHAPE}
    setup = Setup(GPTConfig(vocab_size=vocab_size, **shape, bias=False), batch_size, "cpu", torch.float32)
    if preset == "gpt2-30m":  # shorter sequences: a sixteenth of the memory tests the same
        setup = replace(setup, gpt_config=replace(setup.gpt_config, block_size=64))
    with use_backend(backend):
        predicted = trace_step(setup)
        step = TrainStep(GPT(setup.gpt_config))
        x, y = torch.randint(vocab_size, (2, batch_size, setup.gpt_config.block_size))
        step(lambda: (x, y), 1e-3)  # allocates what is allocated only once
        measured = allocated_at_most(lambda: step(lambda: (x, y), 1e-3))
    held = sum(size for part, size in predicted.memory.items() if part.startswith(PERSISTENT))
    assert held + measured == pytest.approx(predicted.peak, rel=0.01)
    assert measured > 0.02 * predicted.peak


@pytest.mark.needs_gpu
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
@pytest.mark.parametrize(("state_bits", "deterministic"), [(32, True), (8, True), (32, False)])
def test_on_a_gpu_the_trace_is_within_five_percent_of_the_measured_peak(recompute, state_bits, deterministic):
    setup = Setup(replace(GPT2, n_layer=4), 8, state_bits=state_bits, recompute=recompute, deterministic=deterministic)
    first = TrainStep(GPT(TINY).cuda(), dtype=setup.dtype, cuda_graphs=False)
    tokens = torch.zeros(2, 1, TINY.block_size, dtype=torch.int64, device="cuda")
    first(lambda: (tokens[0], tokens[1]), 0.0)  # cuBLAS keeps workspaces for each of its threads
    del first
    before = torch.cuda.memory_allocated()
    model = GPT(setup.gpt_config, recompute, deterministic).cuda()
    step = TrainStep(model, dtype=setup.dtype, state_bits=state_bits, cuda_graphs=False)
    x, y = torch.randint(GPT2.vocab_size, (2, 8, GPT2.block_size), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(lambda: (x, y), 1e-4)
    assert trace_step(setup).peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)
