"""What a record is called, where it lies and what it says of the machine."""

import pytest
import torch

from bench import timing
from fastgpt import hardware
from fastgpt.hardware import Processor

CPU = torch.device("cpu")
AMX = tuple(hardware.ISAS)
IDS = {"family": "6", "model": "167", "stepping": "1"}
XEON = Processor("Intel(R) Xeon(R) Processor", IDS, 2, AMX)


@pytest.fixture
def on_cpu(monkeypatch):
    """Puts this process on a CPU, on two threads, with nothing that holds it to less."""
    for variable in hardware.LIMITS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return lambda cpu: monkeypatch.setattr(hardware, "processor", lambda: cpu)


def test_a_gpus_results_lie_under_its_name(monkeypatch):
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert timing.results_folder("cuda").parts[-3:] == ("bench", "results", "nvidia-h100-80gb-hbm3")
    assert timing.conditions("cuda") == ""


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
def test_a_cpus_results_lie_under_its_name_its_generation_and_its_instructions(on_cpu, name, isas, folder):
    on_cpu(Processor(name, IDS, 2, isas))
    assert timing.results_folder("cpu").name == folder


def test_two_generations_of_one_name_share_no_folder(on_cpu):
    folders = set()
    for stepping in ("4", "7"):  # Skylake and Cascade Lake, both family 6, model 85
        on_cpu(
            Processor("Intel(R) Xeon(R) Processor", {"family": "6", "model": "85", "stepping": stepping}, 2, AMX[:2])
        )
        folders.add(timing.results_folder("cpu"))
    assert len(folders) == 2


def test_a_file_is_named_after_the_threads(on_cpu, monkeypatch):
    on_cpu(XEON)
    assert timing.conditions("cpu") == "-2-threads"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.conditions("cpu") == "-1-thread"


def test_a_file_is_named_after_the_instructions_where_the_run_was_held_to_less(on_cpu, monkeypatch):
    on_cpu(XEON)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert timing.conditions("cpu") == "-2-threads-avx512"
    on_cpu(Processor("X", {}, 2, AMX[:2]))  # has no more
    assert timing.conditions("cpu") == "-2-threads"


def test_a_record_tells_the_cpu_and_what_held_it(on_cpu, monkeypatch):
    on_cpu(XEON)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    record = timing.provenance("bench.cpu", ["--threads", "2"], CPU)
    e = record["environment"]
    assert e["device"] == "Intel(R) Xeon(R) Processor (family 6, model 167, stepping 1)"
    assert e["cpu"] == {"name": "Intel(R) Xeon(R) Processor", **IDS, "cores": 2, "isas": AMX}
    assert (e["isa"], e["held_to"], e["threads"]) == ("avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 2)
    assert record["command"] == "ONEDNN_MAX_CPU_ISA=AVX2 python -m bench.cpu --threads 2"
