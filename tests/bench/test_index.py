"""``python -m bench.index``: the pages say what the records say."""

import json

import pytest

from bench import index
from bench.records import RESULTS, collect

CONFIG = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 10, "vocab_size": 5}


def contender(ms, losses=(2.0, 1.0)):
    return {"ours": False, "whole": True, "failure": None, "ms": ms, "losses": list(losses)}


def record(dtype="float32", model="124m", batch_size=3, config=CONFIG, **contenders):
    """A record as ``bench.cpu`` writes it, of one model."""
    names = {"memory_kept": "eager, memory kept", "compile_kept": "compile, memory kept"}
    found = {names.get(name, name): c for name, c in contenders.items()}
    found["fastgpt"] |= {"ours": True, "tokens_per_s": 1e3 * batch_size * 10 / found["fastgpt"]["ms"]}
    isas = ["avx2", "avx512", "avx512_bf16", "amx"]
    return {
        "version": 1, "kind": "steps",
        "device": {
            "name": "X", "type": "cpu", "cpu": {"name": "X", "cores": 8, "isas": isas}, "isa": "amx",
            "cpu_capability": "AVX512", "threads": 4, "driver": None,
        },
        "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "uncommitted_changes": False,
        "command": "python -m bench.cpu", "date": "2026-11-26T10:00:00+00:00", "dtype": dtype,
        "comparisons": [{
            "name": model, "shapes": {"batch_size": batch_size, "accumulation": 1, **config}, "ceilings": {},
            "ours": "fastgpt", "contenders": found,
        }],
    }  # fmt: skip


def cells(a_record):
    (row,) = index.rows(a_record, "a-cpu/step-4-threads.md")
    return row.cells


def test_the_page_and_the_readme_are_those_of_the_records():
    found = index.cpu_rows(RESULTS)
    assert index.CPUS.read_text() == index.cpus(found)
    assert index.INDEX.read_text() == index.index(RESULTS)
    readme = index.README.read_text()
    assert readme == index.readme(readme, found)


def test_every_record_of_a_step_is_on_the_page():
    page = index.CPUS.read_text()
    records = sorted(RESULTS.glob("*/step*.json"))
    assert records
    for path in records:
        models = len(json.loads(path.read_text())["comparisons"])
        assert page.count(f"({path.parent.name}/{path.stem}.md)") == models
        assert path.with_suffix(".md").exists()


def test_a_row_has_the_speed_of_fastgpt_and_the_times_of_others_divided_by_its():
    ours = {"fastgpt": contender(50.0), "eager": contender(100.0), "compile": contender(75.0)}
    assert cells(record(**ours, memory_kept=contender(70.0), compile_kept=contender(60.0))) == {
        "CPU": "[a-cpu](a-cpu/step-4-threads.md)",
        "cores / threads": "8 / 4",
        "threads": "4",
        "ISA": "amx",  # products of fp32 also run on AMX
        "dtype": "float32",
        "tokens/s": "600",  # 3 x 10 tokens in 50 ms
        "ms a step": "50.0",
        "eager": "2.00",
        "compile": "1.50",
        "best tuned": "1.20",
        "torch": "2.13.0",
        "date": "2026-11-26",
        "commit": "0123456789",
        "command": "`python -m bench.cpu`",
    }


@pytest.mark.parametrize("losses", [(2.0, float("nan")), (2.0, 1.1)])
def test_a_contender_with_other_losses_is_not_compared(losses):
    wrong = contender(40.0, losses)
    row = cells(record(fastgpt=contender(50.0), compile=wrong, memory_kept=contender(70.0), compile_kept=wrong))
    assert row["compile"] == "differs"
    assert row["best tuned"] == "1.40"
    assert row["eager"] == "-"  # took no part


def test_every_comparison_is_a_row_of_the_index(results):
    other = contender(75.0, (2.0, 1.5))
    for name, compiled in (("agrees", contender(75.0)), ("differs", other)):
        made = record(fastgpt=contender(50.0), eager=contender(100.0), compile=compiled)
        (results / "fast" / f"step-{name}.json").write_text(json.dumps(made))
    lines = index.index(results).splitlines()
    assert sum(line.startswith("| X, amx |") for line in lines) == 6
    for name, peer in (("agrees", "compile: 75.00 ms | 1.50"), ("differs", "eager: 100.0 ms | 2.00")):
        assert (
            "| X, amx | 124m, 3 x 10, float32, amx, 4 threads | 50.00 ms, 600 tokens/s "
            f"| {peer} | 2026-11-26 | `python -m bench.cpu` | [step-{name}](fast/step-{name}.json) |"
        ) in lines


def test_predictions_are_not_in_the_index():
    rows = [line for line in index.INDEX.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert not [row for row in rows if "ahead_of_time" in row]
    measured = {index.device_of([found]) for _, found in collect(RESULTS)}
    assert all(any(device in row for device in measured) for row in rows if "NVIDIA" in row)


def test_a_gpu_is_named_with_its_capability():
    measured = record(fastgpt=contender(50.0))
    measured["device"] |= {"name": "NVIDIA H100 80GB HBM3", "type": "cuda", "capability": "9.0"}
    assert index.device_of([measured]) == "NVIDIA H100 80GB HBM3, capability 9.0"


def test_an_old_record_gets_the_full_name_from_others_of_its_device():
    old, new = record(fastgpt=contender(50.0)), record(fastgpt=contender(50.0))
    old["device"] |= {"name": "AMD EPYC", "cpu": None}
    assert index.device_of([old, new]) == "X, amx"
    assert index.device_of([old]) == "AMD EPYC"


def test_bf16_may_use_all_that_the_cpu_has():
    assert cells(record("bfloat16", fastgpt=contender(50.0)))["ISA"] == "amx"


def test_fp32_runs_on_amx_and_not_on_avx512_bf16():
    for isa, used in (("amx", "amx"), ("avx512_bf16", "avx512"), ("avx512", "avx512")):
        run = record("float32", fastgpt=contender(50.0))
        run["device"]["isa"] = isa
        assert cells(run)["ISA"] == used


def test_a_run_that_was_limited_shows_the_limit():
    for dtype in ("bfloat16", "float32"):
        held = record(dtype, fastgpt=contender(50.0))
        held["device"]["isa"] = "avx2"
        assert cells(held)["ISA"] == "avx2"


def test_a_value_that_an_old_record_lacks_is_not_invented():
    for dtype, isa in (("float32", "avx512"), ("bfloat16", "avx512 or wider")):
        old = record(dtype, fastgpt=contender(50.0))
        old["device"]["cpu"] = old["device"]["isa"] = None
        assert cells(old)["cores / threads"] == "- / 4"
        assert cells(old)["ISA"] == isa


@pytest.mark.parametrize(("changed", "commit"), [(True, "0123456789, changed"), (False, "0123456789")])
def test_uncommitted_changes_are_shown(changed, commit):
    measured = record(fastgpt=contender(50.0))
    measured["uncommitted_changes"] = changed
    assert cells(measured)["commit"] == commit


@pytest.fixture
def results(tmp_path):
    """Two CPUs' records of a large model, and a small model's."""
    for path, written in {
        "slow/step-4-threads.json": record(fastgpt=contender(100.0)),
        "fast/step-4-threads.json": record(fastgpt=contender(20.0)),
        "fast/step-1-thread.json": record(fastgpt=contender(60.0)),
        "fast/step-small-4-threads.json": record(
            model="small", config={**CONFIG, "vocab_size": 2}, fastgpt=contender(1.0)
        ),
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(written))
    return tmp_path


def test_the_largest_model_comes_first_then_the_fastest_row(results):
    found = index.cpu_rows(results)
    assert [(row.model, row.cells["ms a step"]) for row in found] == [
        ("124m", "20.0"), ("124m", "60.0"), ("124m", "100.0"), ("small", "1.0"),
    ]  # fmt: skip
    page = index.cpus(found)
    assert page.index("## 124m: 1 layers of 8") < page.index("## small")


def test_the_short_form_has_each_cpus_best_and_changes_no_other_text(results):
    text = f"before\n{index.START}old\n{index.END}after\n"
    short = index.readme(text, index.cpu_rows(results))
    lines = short.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| [")] == [
        ["| [fast](bench/results/fast/step-4-threads.md)", "4"],
        ["| [slow](bench/results/slow/step-4-threads.md)", "4"],
    ]
    assert index.readme(short, index.cpu_rows(results)) == short
