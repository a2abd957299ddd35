import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import kernels, ops, timing
from bench.ops import Contender, Op, Setting
from bench.records import conditions
from bench.timing import CPUTimer, CUDATimer, Readings, Unit, interleave, turn_of
from fastgpt import cli

CPU = torch.device("cpu")
TINY = {"C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}
FIGURES = {
    "ms", "quartiles_ms", "readings", "rate", "unit", "host_ms", "peak_bytes", "calls_per_round", "rounds_ms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_one_thread():
    torch.set_num_threads(1)  # the conftest puts it back; shapes this small run no faster on more


class ScriptedTimer:
    """Takes the time of a unit from the return value of ``run``, and advances its own clock by it."""

    def __init__(self, cache_bytes=0):
        self.cache_bytes = cache_bytes
        self.now = 0.0
        self.order = []

    def warm_up(self, unit):
        pass

    def ms(self, unit):
        ms = unit.run() or 1.0
        self.order.append(ms)
        self.now += ms / 1e3
        return ms

    def clock(self):
        return self.now


@pytest.fixture
def no_compiler(monkeypatch):
    """Make compiled functions fail at the first call, as without a C compiler."""

    def compile(function, **options):
        def compiled(*inputs):
            raise RuntimeError("no compiler\nand a long story")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def quick(monkeypatch, no_compiler):
    """``main`` on tiny shapes, with fixed ceilings."""
    monkeypatch.setattr(kernels, "CPUTimer", lambda: CPUTimer(flush_bytes=1))
    monkeypatch.setattr(kernels, "Setting", lambda *args, **sizes: Setting(*args, **(sizes | TINY)))
    gemm, copy = iter([1e12, 2e12]), iter([50e9, 40e9])  # before and after
    monkeypatch.setattr(kernels, "measure_gemm_peak", lambda *args: next(gemm))
    monkeypatch.setattr(kernels, "measure_bandwidth", lambda *args: next(copy))


def is_timed(contender):
    return contender["failure"] is None and "ms" in contender


def op_of(*contenders, inputs=None, **fields):
    inputs = [torch.linspace(-1, 1, 8).requires_grad_()] if inputs is None else inputs
    contenders = [Contender(name, function) for name, function in contenders]
    fields = {"eager": "eager", "work": {"fwd": 4e6, "fwd+bwd": 8e6}, "unit": "B/s"} | fields
    return Op(inputs, [torch.ones_like(inputs[0])], contenders, **fields)


def measured(op, timer=None):
    """The contenders, by pass and name."""
    passes = kernels.measure(op, timer or CPUTimer(flush_bytes=1), torch.float32, (2, 2), 0.0)
    return {(each, name): contender for each, found in passes.items() for name, contender in found.items()}


def turns(timer, **units):
    return {name: turn_of(unit, timer) for name, unit in units.items()}


# ---- timing ----


def test_contenders_take_turns():
    timer = ScriptedTimer()
    times = interleave(turns(timer, a=Unit(lambda: 1.0), b=Unit(lambda: 2.0)), 1.0, (3, 3), timer.clock)
    assert timer.order == [1.0, 2.0] * 3
    assert times == {"a": Readings([1.0] * 3), "b": Readings([2.0] * 3)}


@pytest.mark.parametrize(("seconds", "rounds", "n"), [(0.0, (3, 9), 3), (0.05, (3, 9), 5), (9.0, (3, 9), 9)])
def test_rounds_go_on_until_the_time_is_up_within_bounds(seconds, rounds, n):
    timer = ScriptedTimer()
    assert len(interleave(turns(timer, a=Unit(lambda: 10.0)), seconds, rounds, timer.clock)["a"].ms) == n


def test_a_turn_may_have_several_times():
    """As a turn of a few steps has in a process of its own."""
    assert interleave({"a": lambda: [1.0, 2.0]}, 0.0, (2, math.inf)) == {"a": Readings([1.0, 2.0, 1.0, 2.0])}


def test_a_time_is_that_of_a_call():
    timer = ScriptedTimer()
    assert interleave(turns(timer, a=Unit(lambda: 6.0, calls=3)), 0.0, (1, 1)) == {"a": Readings([2.0])}


def test_a_contender_that_fails_while_timed_ends_only_its_own_part():
    calls = iter([1.0])
    timer = ScriptedTimer()
    times = interleave(turns(timer, a=Unit(lambda: next(calls)), b=Unit(lambda: 2.0)), 0.0, (3, 3), timer.clock)
    assert isinstance(times["a"].failure, StopIteration)
    assert times["a"].ms == [1.0]
    assert times["b"] == Readings([2.0] * 3)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for torch.cuda that records its calls."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 7.0

    fakes = {
        "Event": Event,
        "_sleep": lambda cycles: log.append(cycles),
        "synchronize": lambda device: log.append("synchronize"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=100),
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 1500,
        "reset_peak_memory_stats": lambda device: log.append("reset"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_a_gpu_spins_while_its_work_is_queued_between_two_events(gpu):
    timer = CUDATimer(CPU)
    unit = Unit(lambda: gpu.append("run"), before=lambda: gpu.append("before"), host_ms=2.0)
    assert timer.ms(unit) == 7.0
    assert [entry for entry in gpu if isinstance(entry, str)] == ["before", "event", "run", "event", "wait"]
    assert gpu.index("before") < gpu.index(int(3.1 * timing.CYCLES_PER_MS)) < gpu.index("event")
    assert timer.cache_bytes == 200


def test_a_gpu_does_not_spin_forever_for_a_contender_that_waits_for_it(gpu):
    CUDATimer(CPU).ms(Unit(lambda: None, host_ms=1e9))
    assert gpu[0] == timing.LONGEST_LEAD_MS * timing.CYCLES_PER_MS


def test_warming_up_on_a_gpu_measures_memory_beyond_the_inputs_and_the_time_to_launch(gpu):
    unit = Unit(lambda: gpu.append("run"), before=lambda: gpu.append("before"))
    CUDATimer(CPU).warm_up(unit)
    assert gpu == ["before", "run", "synchronize", "reset", "run", "synchronize", "run", "synchronize"]
    assert unit.peak_bytes == 500
    assert unit.host_ms >= 0.0


def test_on_a_gpu_a_contender_has_memory_and_launch_time_of_a_call(gpu, no_compiler):
    op = op_of(("fastgpt", lambda x: x * 2), ("eager", lambda x: x * 2))  # an input has 32 bytes, the cache twice 100
    row = measured(op, CUDATimer(CPU))["fwd+bwd", "fastgpt"]
    assert row["calls_per_round"] == 7
    assert row["rounds_ms"] == [1.0, 1.0]
    assert row["peak_bytes"] == 500
    assert row["host_ms"] >= 0.0


# ---- the check ----


def test_a_contender_that_computes_something_else_is_wrong_and_not_timed():
    op = op_of(("fastgpt", lambda x: x * 2.001), ("eager", lambda x: x * 2), ("other", lambda x: x + x))
    rows = measured(op)
    assert rows["fwd", "fastgpt"]["failure"].startswith("wrong: error 5.0e-04")
    assert rows["fwd", "fastgpt"]["errors"] == pytest.approx([5e-4], rel=1e-3)
    assert "ms" not in rows["fwd", "fastgpt"]
    assert all(is_timed(rows["fwd", name]) for name in ("eager", "other"))


def test_a_wrong_gradient_is_found_if_the_output_is_right():
    op = op_of(("fastgpt", lambda x: x * 2 + (x - x.detach())), ("eager", lambda x: x * 2))
    rows = measured(op)
    assert is_timed(rows["fwd", "fastgpt"])
    assert rows["fwd+bwd", "fastgpt"]["failure"].startswith("wrong")


def test_nan_is_wrong():
    rows = measured(op_of(("fastgpt", lambda x: x * math.nan), ("eager", lambda x: x * 2)))
    assert rows["fwd", "fastgpt"]["failure"].startswith("wrong: error nan")


def test_a_contender_that_raises_is_skipped_and_says_why_in_a_line():
    def raises(x):
        raise RuntimeError("no kernel image\nsecond line")

    rows = measured(op_of(("fastgpt", lambda x: x * 2), ("eager", lambda x: x * 2), ("broken", raises)))
    assert rows["fwd", "broken"]["failure"] == "skipped: RuntimeError: no kernel image"
    assert is_timed(rows["fwd", "fastgpt"])


def test_a_random_op_is_timed_and_not_compared():
    op = op_of(("fastgpt", lambda x: x * torch.rand(())), ("eager", lambda x: x * torch.rand(())), random=True)
    rows = measured(op)
    assert all(is_timed(row) and row["errors"] is None for row in rows.values())


def test_a_gradient_left_in_main_grad_is_checked_there(no_compiler):
    op = ops.linear_cross_entropy(Setting(CPU, torch.bfloat16, 1, 16, **TINY))
    function = op.contenders[0].function
    forgetful = Contender("forgetful", lambda x, weight: function(x, weight.detach()), main_grad=torch.zeros(61, 128))
    found = kernels.check(
        replace(op, contenders=[*op.contenders, forgetful]), True, kernels.true_results(op, torch.bfloat16)
    )
    assert len(found["fastgpt main_grad"]["errors"]) == 3
    assert found["fastgpt main_grad"]["failure"] is None
    assert found["forgetful"]["failure"].startswith("wrong: error 1.0e+00")


# ---- the ops ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(ops.OPS))
def test_every_op_is_right_and_timed_in_every_pass(name, dtype, no_compiler):
    setting = Setting(CPU, dtype, 2, 16, **TINY)
    comparisons = kernels.benchmark([name], setting, CPUTimer(flush_bytes=1), 0.0, note=len)
    passes = ["step"] if name.startswith("adamw") else ["fwd", "fwd+bwd"]
    assert [c["name"] for c in comparisons] == [f"{name} {each}" for each in passes]
    for comparison in comparisons:
        contenders = comparison["contenders"]
        assert is_timed(contenders[comparison["ours"]])
        assert all(is_timed(c) for c in contenders.values() if c["ours"])
        for contender in filter(is_timed, contenders.values()):
            assert contender.keys() >= FIGURES
            assert len(contender["rounds_ms"]) == 3
            assert contender["quartiles_ms"][0] <= contender["ms"] <= contender["quartiles_ms"][1]
        if "torch.compile" in contenders:
            assert contenders["torch.compile"]["failure"] == "skipped: RuntimeError: no compiler"
        assert any(is_timed(c) and c["whole"] and not c["ours"] for c in contenders.values())


def test_a_rate_is_work_by_the_median_time():
    row = kernels.describe([3.0, 1.0, 2.0], Unit(lambda: None), 5e7, "B/s")
    assert row["ms"] == 2.0
    assert row["rate"] == pytest.approx(25e9)
    assert row["rounds_ms"] == [3.0, 1.0, 2.0]


def test_each_call_of_a_unit_has_inputs_of_its_own_until_they_exceed_the_cache():
    seen = []

    def fastgpt(x):
        seen.append(x.data_ptr())
        return x * 2

    op = op_of(("fastgpt", fastgpt), ("eager", lambda x: x * 2), work={"fwd": 1.0})
    row = measured(op, ScriptedTimer(cache_bytes=70))["fwd", "fastgpt"]  # an input has 32 bytes
    assert row["calls_per_round"] == 3
    assert len(set(seen)) == 3


def test_an_op_that_cannot_be_set_up_is_a_comparison_with_its_failure(monkeypatch):
    def build(setting):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(ops.OPS, "gelu", (build, 1))
    found = kernels.benchmark(["gelu"], Setting(CPU, torch.float32, 1), CPUTimer(1), 0.0, note=len)
    assert [c["contenders"]["all"]["failure"] for c in found] == ["skipped: OutOfMemoryError: out of memory"]
    assert "out of memory" in kernels.overview({"dtype": "float32", "comparisons": found})


# ---- the overview ----


def contender(ms, ours=False, failure=None):
    figures = {} if failure else {"ms": ms, "share_of_ceiling": 0.5}
    return {"ours": ours, "whole": True, "failure": failure} | figures


def test_the_overview_fits_100_columns():
    long_name = "an_op_with_a_very_long_name_indeed fwd+bwd"
    peer = "a peer with a very long name indeed, chunks"
    groups = {
        long_name: {"fastgpt": contender(123456.789, ours=True), peer: contender(123456.789)},
        "other": {"fastgpt": contender(None, ours=True, failure="skipped: " + "x" * 200)},
        "alone": {"fastgpt": contender(1e-3, ours=True)},
    }
    comparisons = [{"name": name, "ours": "fastgpt", "contenders": group} for name, group in groups.items()]
    lines = kernels.overview({"dtype": "float32", "comparisons": comparisons}).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100


# ---- the command ----


def test_the_record_has_device_versions_shapes_and_ceilings(quick, tmp_path, capsys):
    argv = ["--device", "cpu", "--block_size", "16", "--ops", "gelu", "adamw_list", "--out", str(tmp_path)]
    assert kernels.main(argv) == 0
    record = json.loads((tmp_path / f"kernels-float32{conditions(CPU)}.json").read_text())
    assert record.keys() == {
        "version", "kind", "device", "versions", "commit", "uncommitted_changes", "command", "date", "dtype", "backend",
        "comparisons", "seconds",
    }  # fmt: skip
    assert record["device"].keys() >= {"name", "type", "capability", "driver", "isa", "threads"}
    assert record["versions"].keys() >= {"torch", "triton", "python"}
    for comparison in record["comparisons"]:
        assert comparison["shapes"] == {"B": 1, "T": 16} | TINY
        assert comparison["ceilings"] == {"gemm_flops": 2e12, "bandwidth": 50e9}
        for contender in comparison["contenders"].values():
            if is_timed(contender):
                assert contender["share_of_ceiling"] == contender["rate"] / 50e9
    assert "python -m bench.kernels --device cpu --block_size 16 --ops gelu adamw_list" in record["command"]
    page = (tmp_path / f"kernels-float32{conditions(CPU)}.md").read_text()
    assert page.count("\n|---") == 1
    assert page.count("\n| ") == 1 + sum(len(c["contenders"]) for c in record["comparisons"])
    out = capsys.readouterr().out
    assert kernels.overview(record) in out
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["gelu", "fwd"], ["gelu", "fwd+bwd"], ["adamw_list", "step"],
    ]  # fmt: skip


def test_a_gpu_that_is_lost_during_the_run_leaves_a_record(quick, tmp_path, monkeypatch):
    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gemm = iter([lambda: 2e12, lost])
    monkeypatch.setattr(kernels, "measure_gemm_peak", lambda *args: next(gemm)())
    kernels.main(["--device", "cpu", "--block_size", "16", "--ops", "gelu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / f"kernels-float32{conditions(CPU)}.json").read_text())
    assert {c["ceilings"]["gemm_flops"] for c in record["comparisons"]} == {2e12}


def test_a_kernel_that_does_not_run_is_a_failure(quick, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(ops.ours, "gelu", broken)
    assert kernels.main(["--device", "cpu", "--block_size", "16", "--ops", "gelu", "--out", str(tmp_path)]) == 1
    assert "skipped: RuntimeError: broken" in (tmp_path / f"kernels-float32{conditions(CPU)}.md").read_text()


@pytest.mark.parametrize(
    "argv",
    [
        ["--opps", "gelu"],
        ["--ops", "geluu"],
        ["--device", "gpu"],
        ["--dtype", "int8"],
        ["--device", "cpu", "--batch_size", "0"],
    ],
)
def test_a_wrong_flag_gives_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(kernels.main, argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
