"""How Triton kernels are launched: configurations by device, tuning, and addresses beyond 2**31."""

import dataclasses
import json
import mmap

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastgpt.kernels.triton import (
    IMPLEMENTATIONS,
    attention,
    autotune,
    embedding,
    gelu,
    glu,
    launch,
    layer_norm,
    relu2,
    rotary,
)
from fastgpt.kernels.triton.launch import Device

RTX_4070 = Device("NVIDIA GeForce RTX 4070", 89, 46, 101_376)


@pytest.mark.parametrize(
    ("capability", "shared_memory", "expected"),
    [
        (80, 166_912, 80),
        (86, 101_376, 86),
        (87, 166_912, 86),  # Orin
        (89, 101_376, 89),
        (90, 232_448, 90),
        (100, 232_448, 90),  # B200
        (120, 101_376, 120),
        (121, 101_376, 120),
    ],
)
def test_a_device_gets_the_newest_configurations_that_fit_it(capability, shared_memory, expected):
    assert launch.architecture(Device("some GPU", capability, 1, shared_memory)) == expected


def test_a_device_with_little_shared_memory_does_not_get_those_that_need_much():
    assert launch.architecture(Device("some GPU", 90, 1, 101_376)) == 89


@pytest.mark.parametrize(("capability", "shared_memory"), [(75, 65_536), (89, 49_152)])
def test_a_device_that_none_fits_is_refused_with_the_reason(capability, shared_memory):
    with pytest.raises(RuntimeError, match=r"^old has compute capability .* need 8.0 .*FASTGPT_BACKEND=reference"):
        launch.architecture(Device("old", capability, 1, shared_memory))


def test_every_architecture_configures_the_same_kernels_for_the_same_inputs():
    tables = launch.shipped()
    kinds = {
        arch: {name: set(table) for name, table in kernels.items() if name != "shared_memory"}
        for arch, kernels in tables.items()
        if arch
    }
    assert set(kinds) == {80, 86, 89, 90, 120}
    kinds[120]["attention_single_pass"].add("fp32 D128 dropout")  # two passes there: a single one would spill
    assert all(kind == kinds[89] for kind in kinds.values())


def test_a_configuration_handed_out_is_the_callers_own():
    launch.configuration(RTX_4070, "adamw", "any").clear()
    assert launch.configuration(RTX_4070, "adamw", "any")


def test_the_forward_of_an_activation_made_again_in_the_backward_costs_no_launch_of_its_own():
    x, bias = torch.empty(8, 16, device="meta"), torch.empty(16, device="meta")
    launched = []
    with launch.ahead_of_time(RTX_4070, lambda kernel, *_: launched.append(launch.name_of(kernel.fn))):
        gelu.gelu_backward_recompute_(x, x, None, True)
        gelu.gelu_backward_recompute_(x, x, bias, True)
        relu2.relu2_backward_recompute_(x, x)
        glu.glu_backward_(*torch.empty(8, 32, device="meta").split(16, -1), x, x, x, 0, x)
    assert launched == ["gelu_backward", "gelu_bias_backward", "columns_sum", "relu2_backward", "glu_backward"]


def test_packed_heads_are_normed_and_turned_in_one_launch_forward_and_one_backward():
    qkv, (cos, sin) = torch.empty(2, 8, 3 * 16, device="meta"), (torch.empty(8, 4, device="meta") for _ in range(2))
    launched = []
    with launch.ahead_of_time(RTX_4070, lambda kernel, *_: launched.append(launch.name_of(kernel.fn))):
        out, rstd = rotary.rotary_qkv(qkv, 2, 2, cos, sin, True, 1e-6, False)
        rotary.rotary_qkv_backward(out, out, rstd, 2, 2, cos, sin, False)
    assert launched == ["rotary_forward", "rotary_backward_from_result"]


@pytest.mark.parametrize("name", ["gelu", "glu", "layer_norm", "rms_norm", "cross_entropy", "rotary"])
def test_a_million_rows_fit_the_grid(name):
    """Whose second and third axis end at 65535 programs."""
    rows = torch.empty(2**20, 64, device="meta", dtype=torch.bfloat16)
    vector, each = torch.empty(64, device="meta", dtype=torch.bfloat16), torch.empty(2**20, device="meta")
    targets = torch.empty(2**20, device="meta", dtype=torch.int64)
    heads, of_heads = rows.view(2**20, 1, 1, 64), each.view(2**20, 1, 1)
    calls = {
        "gelu": [("gelu", (rows, vector, True)), ("gelu_backward", (rows, rows, vector, True))],
        "glu": [
            ("glu", (rows, rows, 0)),
            ("glu_backward_", (rows, rows, rows, rows, rows, 0)),
            ("glu", (*torch.empty(2**20, 128, device="meta").split(64, -1), 0)),
        ],
        "rms_norm": [
            ("rms_norm", (rows, vector, 1e-6)),
            ("rms_norm_backward", (rows, rows, rows, vector, each)),
        ],
        "layer_norm": [
            ("layer_norm", (rows, vector, vector, 1e-5)),
            ("layer_norm_backward", (rows, rows, rows, vector, each, each, True)),
        ],
        "cross_entropy": [
            ("cross_entropy", (rows, targets, -1)),
            ("cross_entropy_", (rows, targets, each[0], -1)),
            ("cross_entropy_", (rows, targets, each, -1, 30.0, 0.1, 0.1)),
        ],
        "rotary": [
            ("rms_norm_rotary", (heads, vector, None, None, 1e-6, False)),
            ("rms_norm_rotary_backward", (heads, heads, vector, None, None, of_heads, False)),
            ("rms_norm_rotary_backward_", (heads, heads, None, None, of_heads, False)),
        ],
    }
    grids = []
    with launch.ahead_of_time(RTX_4070, lambda kernel, grid, *_: grids.append(grid)):
        for operator, arguments in calls[name]:
            IMPLEMENTATIONS[operator](*arguments)
    assert len(grids) >= 2
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) < 2**16 for grid in grids)


def test_all_that_the_backward_of_a_norm_sums_is_added_up_in_one_launch():
    x, weight, rows = (torch.empty(shape, device="meta") for shape in ((8, 16), (16,), (8,)))
    launched = []
    with launch.ahead_of_time(RTX_4070, lambda kernel, *_: launched.append(launch.name_of(kernel.fn))):
        layer_norm.layer_norm_backward(x, x, x, weight, rows, rows, True, weight, weight, weight)
    assert launched == ["layer_norm_backward", "columns_sum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attentions_backward_is_two_launches_or_three_around_a_single_pass(dtype):
    qkv, out = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 100, 3 * 64), (2, 100, 64)))
    lse, launched = torch.empty(2, 1, 100, device="meta"), []
    with launch.ahead_of_time(RTX_4070, lambda kernel, *_: launched.append(launch.name_of(kernel.fn))):
        attention.attention_qkv_backward(out, qkv, out, lse, 1, True, 0.125, 0.0, None)
        attention.attention_qkv_backward(out, qkv, out, lse, 1, True, 0.125, 0.0, None, False)
    two_passes = ["attention_dq", "attention_dk_dv"]
    assert launched == [
        *two_passes, "attention_delta", "attention_single_pass", "attention_round_dq",
    ]  # fmt: skip


def test_where_a_single_pass_would_spill_two_passes_run():
    """Heads of 128 in fp32 with dropout on consumers' Blackwell: each block shape that was tried spills 32 bytes."""
    shapes = (2, 100, 3 * 128), (2, 100, 128)
    launched = []
    for gpu in (RTX_4070, launch.Device("RTX 5070", 120, 48, 99 << 10)):
        qkv, out = (torch.empty(shape, device="meta") for shape in shapes)
        lse, seed = torch.empty(2, 1, 100, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        with launch.ahead_of_time(gpu, lambda kernel, *_: launched.append(launch.name_of(kernel.fn))):
            attention.attention_qkv_backward(out, qkv, out, lse, 1, True, 0.125, 0.1, seed, False)
    single_pass = ["attention_delta", "attention_single_pass", "attention_round_dq"]
    assert launched == [*single_pass, "attention_dq", "attention_dk_dv"]


# ---- tuning ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune.fastest.cache_clear()
    yield tmp_path
    autotune.fastest.cache_clear()


SHIPPED = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
FASTEST = autotune.CANDIDATES[5]


def tune(key="attention T=64", fails=(), error=None):
    """The winner where FASTEST takes 1 ms and everything else 2; and what was tried."""
    tried = []

    def run(config):
        tried.append(config)
        if config in fails:
            raise error or OutOfResources(2, 1, "shared memory")

    def time(call):
        call()
        return 1.0 if tried[-1] == FASTEST else 2.0

    return autotune.best(RTX_4070, key, SHIPPED, run, time), tried


def test_tuning_tries_the_shipped_configuration_and_every_candidate_and_takes_the_fastest(cache):
    best, tried = tune()
    assert best == FASTEST
    assert tried == [SHIPPED, *autotune.CANDIDATES]


def test_a_candidate_that_asks_for_too_much_is_passed_over(cache):
    best, _ = tune(fails=[FASTEST])
    assert best == SHIPPED  # the first of equals


def test_a_candidate_that_does_not_compile_is_passed_over(cache):
    best, _ = tune(fails=[FASTEST], error=RuntimeError("PassManager::run failed"))
    assert best == SHIPPED


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("CUDA error")])
def test_a_device_that_fails_ends_the_tuning_and_no_winner_is_kept(cache, error):
    with pytest.raises(type(error)):
        tune(fails=[FASTEST], error=error)
    assert list(cache.rglob("*.json")) == []


def test_where_no_candidate_runs_the_reason_is_raised(cache):
    with pytest.raises(RuntimeError, match="PassManager"):
        tune(fails=[SHIPPED, *autotune.CANDIDATES], error=RuntimeError("PassManager::run failed"))


def test_a_shape_is_tuned_once_and_remembered_on_disk(cache):
    tune()
    assert tune() == (FASTEST, [])
    autotune.fastest.cache_clear()  # another process
    assert tune() == (FASTEST, [])
    assert tune(key="attention T=65")[1]
    (file,) = cache.rglob("*.json")
    assert file.name.startswith("nvidia-geforce-rtx-4070-triton-")
    assert set(json.loads(file.read_text())) == {"attention T=64", "attention T=65"}


def test_a_spoilt_cache_is_measured_anew(cache):
    tune()
    next(cache.rglob("*.json")).write_text("{")
    autotune.fastest.cache_clear()
    assert tune()[1]


def test_another_device_has_a_cache_of_its_own(cache):
    assert autotune.path(RTX_4070) != autotune.path(dataclasses.replace(RTX_4070, name="NVIDIA H100"))


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_tuning_is_off_unless_asked_for(monkeypatch, value, expected):
    monkeypatch.delenv("FASTGPT_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTGPT_AUTOTUNE", value)
    assert autotune.enabled() is expected


def test_while_a_graph_is_captured_it_is_the_configuration_that_ran_before(monkeypatch, cache):
    tune(key="known")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tune(key="known") == (FASTEST, [])
    assert tune(key="new") == (SHIPPED, [])


# ---- addresses ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this takes memory that exists")
def test_heads_that_lie_more_than_2_to_the_31_elements_apart_are_found():
    """The memory between them is reserved and never touched, so it costs nothing."""
    apart = 2**31 + 7
    room = torch.frombuffer(mmap.mmap(-1, 4 * apart), dtype=torch.bfloat16)
    q = room.as_strided((2, 1, 40, 16), (apart, 1, 16, 1))
    q.copy_(torch.randn(2, 1, 40, 16))
    here = q.clone()
    ours = attention.attention(q, q, q, True, 0.25, 0.0, None)
    expected = attention.attention(here, here, here, True, 0.25, 0.0, None)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this takes memory that exists")
def test_rows_of_an_embedding_beyond_2_to_the_31_elements_are_found():
    V, C = 2**25 + 5, 64
    main_grad = torch.frombuffer(mmap.mmap(-1, 4 * V * C), dtype=torch.float32).view(V, C)
    index = torch.tensor([V - 1, 0] * 20 + [V - 2])
    dy = torch.randn(41, C)
    embedding.embedding_backward_(main_grad, dy, index)
    for token in (0, V - 1, V - 2):
        torch.testing.assert_close(main_grad[token], dy[index == token].sum(0))
