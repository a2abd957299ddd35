import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import kernels, report, timing
from bench.kernels import Contender, Op, Setting
from bench.timing import CPUTimer, CUDATimer, Unit, interleave
from fastgpt import cli

CPU = torch.device("cpu")
TINY = {"C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}
FIGURES = {
    "median_ms", "quartiles_ms", "rate", "unit", "host_ms", "peak_mib", "calls_per_round",
    "rounds_ms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_one_thread():
    torch.set_num_threads(1)  # the conftest puts it back; shapes this small run no faster on more


class ScriptedTimer:
    """Reads off a unit's time from its ``run``, which returns it, and moves its own clock by it."""

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
    """torch.compile takes everything and then fails at the first call, as without a C compiler."""

    def compile(function, **options):
        def compiled(*inputs):
            raise RuntimeError("no compiler\nand a long story")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)


@pytest.fixture
def quick(monkeypatch, no_compiler):
    """``main`` on tiny shapes, with ceilings that are given."""
    monkeypatch.setattr(kernels, "CPUTimer", lambda: CPUTimer(flush_bytes=1))
    monkeypatch.setattr(kernels, "Setting", lambda *args, **sizes: Setting(*args, **(sizes | TINY)))
    gemm, copy = iter([1e12, 2e12]), iter([50e9, 40e9])  # before and after
    monkeypatch.setattr(kernels, "measure_gemm_peak", lambda *args: next(gemm))
    monkeypatch.setattr(kernels, "measure_bandwidth", lambda *args: next(copy))


def op_of(*contenders, inputs=None, **fields):
    inputs = [torch.linspace(-1, 1, 8).requires_grad_()] if inputs is None else inputs
    contenders = [Contender(name, function) for name, function in contenders]
    fields = {"eager": "eager", "work": {"fwd": 4e6, "fwd+bwd": 8e6}, "unit": "GB/s"} | fields
    return Op(inputs, [torch.ones_like(inputs[0])], contenders, **fields)


def measured(op, timer=None):
    rows = kernels.measure(op, timer or CPUTimer(flush_bytes=1), torch.float32, (2, 2), 0.0)
    return {(row["pass"], row["contender"]): row for row in rows}


# ---- timing ----


def test_contenders_take_turns():
    timer = ScriptedTimer()
    times = interleave({"a": Unit(lambda: 1.0), "b": Unit(lambda: 2.0)}, timer, 1.0, (3, 3), timer.clock)
    assert timer.order == [1.0, 2.0] * 3
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize(("seconds", "rounds", "n"), [(0.0, (3, 9), 3), (0.05, (3, 9), 5), (9.0, (3, 9), 9)])
def test_rounds_go_on_until_the_time_is_up_within_bounds(seconds, rounds, n):
    timer = ScriptedTimer()
    assert len(interleave({"a": Unit(lambda: 10.0)}, timer, seconds, rounds, timer.clock)["a"]) == n


def test_a_time_is_that_of_a_call():
    timer = ScriptedTimer()
    assert interleave({"a": Unit(lambda: 6.0, calls=3)}, timer, 0.0, (1, 1), timer.clock) == {"a": [2.0]}


def test_a_contender_that_fails_while_timed_ends_only_its_own_part():
    calls = iter([1.0])
    timer = ScriptedTimer()
    units = {"a": Unit(lambda: next(calls)), "b": Unit(lambda: 2.0)}
    times = interleave(units, timer, 0.0, (3, 3), timer.clock)
    assert isinstance(times["a"], StopIteration)
    assert times["b"] == [2.0] * 3


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for torch.cuda that writes down what it is asked for."""
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


def test_warming_up_on_a_gpu_tells_memory_beyond_the_inputs_and_the_time_to_launch(gpu):
    unit = Unit(lambda: gpu.append("run"), before=lambda: gpu.append("before"))
    CUDATimer(CPU).warm_up(unit)
    assert gpu == ["before", "run", "synchronize", "reset", "run", "synchronize", "run", "synchronize"]
    assert unit.peak_bytes == 500
    assert unit.host_ms >= 0.0


def test_on_a_gpu_a_row_tells_memory_and_launch_time_of_a_call(gpu, no_compiler):
    op = op_of(("fastgpt", lambda x: x * 2), ("eager", lambda x: x * 2))  # an input has 32 bytes, the cache twice 100
    row = measured(op, CUDATimer(CPU))["fwd+bwd", "fastgpt"]
    assert row["calls_per_round"] == 7
    assert row["rounds_ms"] == [1.0, 1.0]
    assert row["peak_mib"] == 500 / 2**20
    assert row["host_ms"] >= 0.0


# ---- the check ----


def test_a_contender_that_computes_something_else_is_wrong_and_not_timed():
    op = op_of(("fastgpt", lambda x: x * 2.001), ("eager", lambda x: x * 2), ("other", lambda x: x + x))
    rows = measured(op)
    assert rows["fwd", "fastgpt"]["status"].startswith("wrong: error 5.0e-04")
    assert rows["fwd", "fastgpt"]["errors"] == pytest.approx([5e-4], rel=1e-3)
    assert "median_ms" not in rows["fwd", "fastgpt"]
    assert {rows["fwd", name]["status"] for name in ("eager", "other")} == {"timed"}


def test_a_wrong_gradient_is_found_where_the_output_is_right():
    op = op_of(("fastgpt", lambda x: x * 2 + (x - x.detach())), ("eager", lambda x: x * 2))
    rows = measured(op)
    assert rows["fwd", "fastgpt"]["status"] == "timed"
    assert rows["fwd+bwd", "fastgpt"]["status"].startswith("wrong")


def test_nan_is_wrong():
    rows = measured(op_of(("fastgpt", lambda x: x * math.nan), ("eager", lambda x: x * 2)))
    assert rows["fwd", "fastgpt"]["status"].startswith("wrong: error nan")


def test_a_contender_that_raises_is_skipped_and_says_why_in_a_line():
    def raises(x):
        raise RuntimeError("no kernel image\nsecond line")

    rows = measured(op_of(("fastgpt", lambda x: x * 2), ("eager", lambda x: x * 2), ("broken", raises)))
    assert rows["fwd", "broken"]["status"] == "skipped: RuntimeError: no kernel image"
    assert rows["fwd", "fastgpt"]["status"] == "timed"


def test_what_draws_at_random_is_timed_and_not_compared():
    op = op_of(("fastgpt", lambda x: x * torch.rand(())), ("eager", lambda x: x * torch.rand(())), random=True)
    rows = measured(op)
    assert {(row["status"], row["errors"]) for row in rows.values()} == {("timed", None)}


def test_a_gradient_left_in_main_grad_is_checked_there(no_compiler):
    op = kernels.linear_cross_entropy(Setting(CPU, torch.bfloat16, 1, 16, **TINY))
    function = op.contenders[0].function
    forgetful = Contender("forgetful", lambda x, weight: function(x, weight.detach()), main_grad=torch.zeros(61, 128))
    found = kernels.check(
        replace(op, contenders=[*op.contenders, forgetful]), True, kernels.true_results(op, torch.bfloat16)
    )
    assert len(found["fastgpt main_grad"]["errors"]) == 3
    assert found["fastgpt main_grad"]["status"] == "right"
    assert found["forgetful"]["status"].startswith("wrong: error 1.0e+00")


# ---- the ops ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(kernels.OPS))
def test_every_op_is_right_and_timed_in_every_pass(name, dtype, no_compiler):
    setting = Setting(CPU, dtype, 2, 16, **TINY)
    rows = kernels.benchmark([name], setting, CPUTimer(flush_bytes=1), 0.0, note=len)
    passes = {"step"} if name.startswith("adamw") else {"fwd", "fwd+bwd"}
    assert {(row["op"], row["pass"]) for row in rows} == {(name, p) for p in passes}
    assert {row["status"] for row in rows if row["ours"]} == {"timed"}
    for row in rows:
        if row["status"] == "timed":
            assert row.keys() >= FIGURES
            assert len(row["rounds_ms"]) == 3
            assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
        if row["contender"] == "torch.compile":
            assert row["status"] == "skipped: RuntimeError: no compiler"
    assert any(row["status"] == "timed" and row["whole"] and not row["ours"] for row in rows)


def test_the_optimizers_model_is_gpt2_124m():
    shapes = kernels.gpt2_shapes(12, 50304, 1024, 768)
    assert len(shapes) == 148
    assert sum(map(math.prod, shapes)) == 124_475_904
    assert [len(shape) for shape in shapes] == sorted(map(len, shapes), reverse=True)


def test_work_is_counted_as_stated():
    s = Setting(CPU, torch.bfloat16, 2, 16, **TINY)
    B, T, H, D, N, C, V = 2, 16, 2, 64, 32, 128, 61
    product = 2 * B * H * T * T * D
    assert kernels.attention_work(s) == {"fwd": 2 * product / 2, "fwd+bwd": 2 * product / 2 * 3.5}
    assert kernels.layer_norm(s).work == {"fwd": 2 * N * C * 2, "fwd+bwd": 5 * N * C * 2}
    assert kernels.add_layer_norm(s).work == {"fwd": 4 * N * C * 2, "fwd+bwd": 8 * N * C * 2}
    assert kernels.gelu(s).work == {"fwd": 2 * N * 4 * C * 2, "fwd+bwd": 5 * N * 4 * C * 2}
    assert kernels.cross_entropy(s).work == {"fwd": N * V * 2, "fwd+bwd": 3 * N * V * 2}
    assert kernels.linear(s).work == {"fwd": 2 * N * C * 4 * C, "fwd+bwd": 6 * N * C * 4 * C}
    assert kernels.linear_cross_entropy(s).work == {"fwd": 2 * N * C * V, "fwd+bwd": 6 * N * C * V}
    n_params = sum(map(math.prod, kernels.gpt2_shapes(1, V, T, C)))
    assert kernels.adamw(s).work == {"step": 38 * n_params}
    assert kernels.adamw(s, dtype=torch.bfloat16).work == {"step": 18 * n_params}


def test_a_rate_is_work_by_the_median_time():
    row = kernels.figures([3.0, 1.0, 2.0], Unit(lambda: None), 5e7, "GB/s")
    assert row["median_ms"] == 2.0
    assert row["rate"] == pytest.approx(25.0)
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


def test_an_op_that_cannot_be_set_up_is_a_row(monkeypatch):
    def build(setting):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(kernels.OPS, "gelu", (build, 1))
    rows = kernels.benchmark(["gelu"], Setting(CPU, torch.float32, 1), CPUTimer(1), 0.0, note=len)
    assert [row["status"] for row in rows] == ["skipped: OutOfMemoryError: out of memory"]
    assert "out of memory" in report.table(report.summarise(rows))


# ---- the report ----


def row(contender, ms, ours=False, whole=True, status="timed", op="gelu"):
    figures = {"median_ms": ms, "share_of_ceiling": 0.5} if status == "timed" else {}
    return {"op": op, "pass": "fwd", "contender": contender, "ours": ours, "whole": whole, "status": status} | figures


def test_the_ratio_is_the_best_peers_time_over_the_kernels():
    rows = [
        row("fastgpt", 2.0, ours=True),
        row("fastgpt, another", 1.0, ours=True),
        row("slow", 5.0),
        row("best", 3.0),
        row("does less", 0.1, whole=False),
        row("broken", None, status="skipped: why"),
    ]
    (entry,) = report.summarise(rows)
    assert (entry["ours_ms"], entry["best_peer"], entry["best_peer_ms"], entry["ratio"]) == (2.0, "best", 3.0, 1.5)


@pytest.mark.parametrize(
    ("ours", "peer"), [("timed", "skipped: why"), ("wrong: error", "timed"), ("skipped: why", "skipped: why")]
)
def test_there_is_no_ratio_without_both_times(ours, peer):
    (entry,) = report.summarise([row("fastgpt", 2.0, ours=True, status=ours), row("peer", 3.0, status=peer)])
    assert entry["ratio"] is None
    assert entry["status"] == ours


def test_the_table_fits_100_columns():
    rows = [
        row("fastgpt", 123456.789, ours=True, op="an_op_with_a_very_long_name_indeed"),
        row("a peer with a very long name indeed, chunks", 123456.789, op="an_op_with_a_very_long_name_indeed"),
        row("fastgpt", None, ours=True, status="skipped: " + "x" * 200, op="other"),
        row("fastgpt", 1e-3, ours=True, op="alone"),
    ]
    lines = report.table(report.summarise(rows)).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100


# ---- the command ----


def test_the_record_names_what_it_was_measured_on(quick, tmp_path, capsys):
    argv = ["--device", "cpu", "--block_size", "16", "--ops", "gelu", "adamw_list", "--out", str(tmp_path)]
    assert kernels.main(argv) == 0
    record = json.loads((tmp_path / f"kernels-float32{timing.conditions(CPU)}.json").read_text())
    assert record.keys() == {
        "environment", "command", "date", "shapes", "dtype", "ceilings", "rows", "summary", "seconds",
    }  # fmt: skip
    assert record["environment"].keys() >= {
        "device", "capability", "driver", "torch", "triton", "python", "commit", "backend",
    }  # fmt: skip
    assert record["shapes"] == {"B": 1, "T": 16} | TINY
    assert record["ceilings"] == {"TFLOP/s": 2.0, "GB/s": 50.0}
    shares = [r["share_of_ceiling"] for r in record["rows"] if r["status"] == "timed"]
    assert shares == [r["rate"] / 50.0 for r in record["rows"] if r["status"] == "timed"]
    assert "python -m bench.kernels --device cpu --block_size 16 --ops gelu adamw_list" in record["command"]
    page = (tmp_path / f"kernels-float32{timing.conditions(CPU)}.md").read_text()
    assert page.count("\n|---") == 1
    assert page.count("\n| ") == 1 + len(record["rows"])
    out = capsys.readouterr().out
    assert report.table(record["summary"]) in out
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["gelu", "fwd"], ["gelu", "fwd+bwd"], ["adamw_list", "step"],
    ]  # fmt: skip


def test_a_gpu_that_is_lost_on_the_way_leaves_a_record(quick, tmp_path, monkeypatch):
    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gemm = iter([lambda: 2e12, lost])
    monkeypatch.setattr(kernels, "measure_gemm_peak", lambda *args: next(gemm)())
    kernels.main(["--device", "cpu", "--block_size", "16", "--ops", "gelu", "--out", str(tmp_path)])
    assert (
        json.loads((tmp_path / f"kernels-float32{timing.conditions(CPU)}.json").read_text())["ceilings"]["TFLOP/s"]
        == 2.0
    )


def test_a_kernel_that_does_not_run_is_a_failure(quick, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(kernels.ours, "gelu", broken)
    assert kernels.main(["--device", "cpu", "--block_size", "16", "--ops", "gelu", "--out", str(tmp_path)]) == 1
    assert "skipped: RuntimeError: broken" in (tmp_path / f"kernels-float32{timing.conditions(CPU)}.md").read_text()


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
def test_a_wrong_flag_is_a_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.run(kernels.main, argv)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
