"""The name and folder of a record, what it says of the machine, and how it is written and shown."""

import json

import pytest
import torch

from bench import pages, records
from fastgpt import hardware, units
from fastgpt.hardware import Processor

CPU = torch.device("cpu")
AMX = tuple(hardware.ISAS)
IDS = {"family": "6", "model": "167", "stepping": "1"}
XEON = Processor("Intel(R) Xeon(R) Processor", IDS, 2, AMX)


@pytest.fixture
def on_cpu(monkeypatch):
    """Simulate a CPU, with two threads and no limit on its instruction set."""
    for variable in hardware.LIMITS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return lambda cpu: monkeypatch.setattr(hardware, "processor", lambda: cpu)


def test_a_gpus_results_are_under_its_name_and_its_capability(monkeypatch):
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert records.results_folder("cuda").parts[-3:] == ("bench", "results", "nvidia-h100-80gb-hbm3-sm-90")
    assert records.conditions("cuda") == ""


@pytest.mark.parametrize(
    ("name", "isas", "folder"),
    [
        ("Intel(R) Xeon(R) Processor", AMX, "intel-xeon-family-6-model-167-stepping-1-amx"),
        ("Intel(R) Xeon(R) Processor", AMX[:2], "intel-xeon-family-6-model-167-stepping-1-avx512"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", AMX[:1], "intel-xeon-family-6-model-167-stepping-1-avx2"),
        ("AMD EPYC", AMX[:3], "amd-epyc-family-6-model-167-stepping-1-avx512-bf16"),
        ("AMD Ryzen 9 7950X 16-Core Processor", AMX[:3], "amd-ryzen-9-7950x-avx512-bf16"),
        ("Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", AMX[:1], "intel-core-i7-9750h-avx2"),
        ("aarch64", (), "aarch64-family-6-model-167-stepping-1"),
    ],
)
def test_a_cpus_results_are_under_its_name_its_generation_and_its_instructions(on_cpu, name, isas, folder):
    on_cpu(Processor(name, IDS, 2, isas))
    assert records.results_folder("cpu").name == folder


def test_two_generations_of_one_name_share_no_folder(on_cpu):
    folders = set()
    for stepping in ("4", "7"):  # Skylake and Cascade Lake, both family 6, model 85
        on_cpu(
            Processor("Intel(R) Xeon(R) Processor", {"family": "6", "model": "85", "stepping": stepping}, 2, AMX[:2])
        )
        folders.add(records.results_folder("cpu"))
    assert len(folders) == 2


def test_a_file_is_named_after_the_threads(on_cpu, monkeypatch):
    on_cpu(XEON)
    assert records.conditions("cpu") == "-2-threads"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert records.conditions("cpu") == "-1-thread"


def test_a_file_is_named_after_the_instructions_if_the_run_was_limited(on_cpu, monkeypatch):
    on_cpu(XEON)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert records.conditions("cpu") == "-2-threads-avx512"
    on_cpu(Processor("X", {}, 2, AMX[:2]))  # has no more
    assert records.conditions("cpu") == "-2-threads"


def test_a_record_has_the_cpu_and_the_limits_of_the_run(on_cpu, monkeypatch):
    on_cpu(XEON)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    record = records.begin("steps", "bench.cpu", ["--threads", "2"], CPU, "float32")
    device = record["device"]
    assert device["name"] == "Intel(R) Xeon(R) Processor (family 6, model 167, stepping 1)"
    assert device["cpu"] == {"name": "Intel(R) Xeon(R) Processor", **IDS, "cores": 2, "isas": list(AMX)}
    assert (device["isa"], device["held_to"], device["threads"]) == ("avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 2)
    assert record["command"] == "ONEDNN_MAX_CPU_ISA=AVX2 python -m bench.cpu --threads 2"


# ---- reading, writing, showing ----


def test_every_record_has_this_format_and_its_page_is_what_it_says():
    found = list(records.collect(records.RESULTS))
    assert len(found) >= 18
    for path, record in found:
        assert pages.title(record) in pages.TITLES.values()
        assert {"name", "type", "capability", "isa", "threads"} <= record["device"].keys()
        assert path.with_suffix(".md").read_text() == pages.page(record)


def test_a_record_that_is_read_is_the_one_that_was_written(tmp_path):
    record = records.begin("steps", "bench.mfu", [], CPU, "float32")
    assert {"version", "device", "versions", "commit", "command", "date", "dtype"} <= record.keys()
    records.write(record, tmp_path / "a-device" / "step-1.5b")
    assert [path.name for path in tmp_path.glob("*/*")] == ["step-1.5b.json"]  # nothing to show without comparisons
    assert [*records.collect(tmp_path, "steps")] == [(tmp_path / "a-device" / "step-1.5b.json", record)]
    assert [*records.collect(tmp_path, "kernels")] == []


@pytest.mark.parametrize("text", ['{"version": 0}', '{"cut', "[]"])
def test_a_file_that_is_not_a_record_of_this_version_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        records.read(path)


def test_a_record_is_plain_json():
    record = records.begin("stages", "bench.gpu", [], CPU)
    assert json.loads(json.dumps(record)) == record


def contender(ms=None, ours=False, **fields):
    return {"ours": ours, "whole": True, "failure": None} | ({} if ms is None else {"ms": ms}) | fields


def comparison(**contenders):
    return {"name": "gelu", "shapes": {"B": 1}, "ceilings": {}, "ours": "fastgpt", "contenders": contenders}


def test_the_best_peer_does_all_of_the_work_with_the_same_result():
    c = comparison(
        fastgpt=contender(2.0, ours=True, losses=[4.0, 3.0]),
        another=contender(1.0, ours=True, losses=[4.0, 3.0]),
        slow=contender(5.0, losses=[4.0, 3.0]),
        best=contender(3.0, losses=[4.0, 3.0]),
        wrong=contender(0.1, losses=[4.0, 3.5]),
        less=contender(0.1, whole=False),
        broken=contender(0.1, failure="RuntimeError: no"),
    )
    s = pages.summarise(c, "float32")
    assert (s.ms, s.peer, s.peer_ms, s.ratio) == (2.0, "best", 3.0, 1.5)


@pytest.mark.parametrize(
    "contenders",
    [
        {"fastgpt": contender(2.0, ours=True), "peer": contender(failure="skipped: why")},
        {"fastgpt": contender(ours=True, failure="wrong: error"), "peer": contender(3.0)},
        {"fastgpt": contender(ours=True, failure="skipped"), "peer": contender(failure="skipped")},
        {"peer": contender(3.0)},
    ],
)
def test_there_is_no_ratio_without_both_times(contenders):
    assert pages.summarise(comparison(**contenders), "float32").ratio is None


def test_a_table_has_the_columns_that_have_values():
    c = comparison(fastgpt=contender(2.0, ours=True), peer=contender(3.0), broken=contender(failure="a | b"))
    assert pages.table([c]) == [
        ["", "contender", "ms", "/ ours"],
        ["gelu", "fastgpt", "2.000", "1.00"],
        ["gelu", "peer", "3.000", "1.50"],
        ["gelu", "broken", "a / b", ""],
    ]
    assert pages.markdown([["a", "b"], ["1", "2"]], words=(0,)) == ["| a | b |", "|---|--:|", "| 1 | 2 |"]
    assert pages.aligned([["a", "bb"], ["ccc", "1"]], words=(0,)) == "a    bb\nccc   1"


def test_a_contender_without_quartiles_has_an_empty_cell():
    """The oldest records have none of some contenders."""
    c = comparison(fastgpt=contender(2.0, ours=True, quartiles_ms=None), peer=contender(3.0, quartiles_ms=[2.0, 4.0]))
    assert [row[3] for row in pages.table([c])] == ["quartiles", "", "2.000 to 4.000"]


def test_the_page_of_a_gpu_has_its_capability_memory_profile_and_largest_micro_batch():
    record = records.begin("steps", "bench.mfu", ["--vram", "12GB"], CPU, "bfloat16")
    record["device"] |= {"name": "NVIDIA GeForce RTX 4070", "type": "cuda", "capability": "8.9", "driver": "580.1"}
    ours = contender(100.0, ours=True, mfu=0.5, peak_bytes=3 << 30, time_budget_ms={"GEMM": 60.0, "idle": 40.0})
    c = comparison(fastgpt=ours, compile=contender(failure="OutOfMemoryError: no more"))
    c |= {
        "ceilings": {"gemm_flops": 55e12, "bandwidth": 450e9, "peak_flops": 58.3e12},
        "predicted": {"ms": 90.0, "peak_bytes": 3 << 30, "by_kind_ms": {"GEMM": 55.0}, "update_ms": 5.0},
        "vram_gib": 12.0, "vram_tensors_gib": 11.3, "largest": {"fastgpt": {"batch_size": 20, "tokens_per_s": 5e4}},
        "loss_steps": 20, "loss_curves": {"fastgpt": [2.0] * 20, "eager, fp32": [3.0] * 20},
    }  # fmt: skip
    record["comparisons"] = [c]
    page = pages.page(record)
    for words in (
        "NVIDIA GeForce RTX 4070, capability 8.9, bfloat16;", "driver 580.1",
        "Ceilings: a large matrix product 55.00 TFLOP/s, a copy 450.0 GB/s, dense peak 58.30 TFLOP/s.",
        "|  | contender | ms | / ours | MFU | peak memory | largest micro-batch in 12.0 GiB |",
        "| gelu | fastgpt | 100.0 | 1.00 | 50.0% | 3.00 GiB | 20: 50,000 tokens/s |",
        "| gelu | compile | OutOfMemoryError: no more |  |  |  |  |",
        "predicts 90.00 ms and 3.00 GiB; measured 100.0 ms (-10.0%) and 3.00 GiB (+0.0%).",
        "| fastgpt, predicted | 55.00 | 5.00 | 0.00 |",
        "Of 12.0 GiB, tensors may take 11.3 GiB; CUDA and its libraries take the rest.",
        "| eager, fp32 | 3.00000 |",
    ):  # fmt: skip
        assert words in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(1185.6, "1,186"), (18.3905, "18.39"), (0.0045211, "0.004521"), (0.0, "0.000"), (12345.6, "12,346")],
)
def test_a_number_has_four_digits_and_no_exponent(value, text):
    assert units.number(value) == text


def test_amounts_of_memory_and_rates_have_the_unit_that_fits():
    assert [units.size(n) for n in (3 << 20, 9 << 30, 1 << 19)] == ["3.00 MiB", "9.00 GiB", "0.500 MiB"]
    assert units.rate(159e9, "FLOP/s") == "159.0 GFLOP/s"
    assert units.rate(3.35e12, "B/s") == "3.350 TB/s"
