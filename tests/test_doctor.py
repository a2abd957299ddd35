import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastgpt import compilers, doctor, hardware, limits
from fastgpt.errors import RequestError
from fastgpt.gpus import GPUS
from fastgpt.kernels import dispatch, ops
from fastgpt.kernels.cpp import Extension
from fastgpt.limits import Bound

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
ADA = "NVIDIA GeForce RTX 4070"


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Ceilings without waiting for them, and nothing of the environment that asks for anything."""
    for name in ("FASTGPT_BACKEND", "ATEN_CPU_CAPABILITY", *hardware.THREADS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "measure_gemm_peak", lambda device, dtype, size, seconds: 1e99)
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device, seconds: 45e9)
    monkeypatch.setattr(hardware, "median_seconds", lambda run, device, seconds: 1.0)


def program(path, says):
    """Make a program that prints a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {shlex.quote(says)}\n")
    path.chmod(0o755)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Puts a GPU into this machine."""
    monkeypatch.setattr(dispatch, "_too_old", dispatch._too_old.__wrapped__)  # what is asked here is not remembered

    def insert(name, free=11 << 30, driver="550.54", count=1):
        card = GPUS.get(name, GPUS[ADA])
        capability = divmod(card.capability, 10)
        properties = SimpleNamespace(
            multi_processor_count=card.n_sm, major=capability[0], minor=capability[1], name=name
        )
        cpu_name = hardware.device_name(torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 12 << 30))
        monkeypatch.setattr(hardware, "device_name", lambda device: name if device.type == "cuda" else cpu_name)
        nvidia_smi(f"{name}, {driver}")

    def nvidia_smi(line):
        program(tmp_path / "driver" / "nvidia-smi", line)
        monkeypatch.setenv("PATH", str(tmp_path / "driver"), prepend=os.pathsep)

    insert.nvidia_smi = nvidia_smi
    return insert


def words(capsys, *argv):
    """What is printed, its lines joined as a wide terminal would show them, and the status."""
    status = doctor.main(argv)
    return " ".join(capsys.readouterr().out.split()), status


# ---- what it shows ----


def test_as_json_it_is_one_object_of_all_findings(capsys):
    assert doctor.main(["--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings.keys() == {"software", "devices", "limits", "run", "ceilings", "kernels", "advice", "problems"}
    assert findings["software"].keys() == {"fastgpt", "Python", "torch", "Triton", "C++ compiler", "C++ kernels"}
    assert {"CPU", "threads", "RAM", "GPU"} <= findings["devices"].keys()
    assert findings["limits"].keys() == {"free", "total", "threads"}
    assert all(bound["amount"] > 0 and bound["source"] for bound in findings["limits"].values())
    assert findings["run"].keys() == {"--device", "--dtype auto", "disk"}
    assert findings["kernels"]["cpu"].keys() == ops.OPERATORS.keys()
    assert all(choice.split(" ")[0] in ("cpp", "reference") for choice in findings["kernels"]["cpu"].values())
    assert findings["problems"] == []


@pytest.mark.parametrize("width", [60, 40, 200])
def test_no_terminal_is_too_narrow(monkeypatch, width):
    monkeypatch.setattr(
        doctor, "backends", lambda: {"cpu": dict.fromkeys(ops.OPERATORS, "cpp (a)") | {"gelu": "reference (slower)"}}
    )
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    findings = doctor.examine()
    doctor.show({**findings, "advice": ["install fastgpt[transformers] and then some words more " * 3]}, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(f"\n{name} " in text for name in ops.OPERATORS)
    joined = "".join(text.split())
    for title in ("software", "devices", "run"):
        for name, value in findings[title].items():
            assert name in text
            if width == 200:
                assert value in text
    assert "fastgpt[transformers]" in joined


def test_operators_that_all_run_on_one_backend_take_one_line(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "backends", lambda: {"cpu": dict.fromkeys(ops.OPERATORS, "cpp (avx2)")})
    assert "kernels on cpu all cpp (avx2)" in words(capsys, "--quick")[0]


@CPU_ONLY
def test_ceilings_are_of_fp32_and_of_the_dtype_that_auto_chooses(capsys, monkeypatch):
    for dtype, expected in (
        (torch.float32, {"float32 TFLOP/s", "copy GB/s"}),
        (torch.bfloat16, {"float32 TFLOP/s", "bfloat16 TFLOP/s", "copy GB/s"}),
    ):
        monkeypatch.setattr(hardware, "training_dtype", lambda device, dtype=dtype: dtype)
        ceilings = doctor.examine()["ceilings"]
        assert ceilings.keys() == {"cpu"}
        assert ceilings["cpu"].keys() == expected
    assert "CPU copy 45 GB/s" in words(capsys)[0]


def test_quick_measures_nothing(capsys, monkeypatch):
    for name in ("measure_gemm_peak", "measure_bandwidth", "median_seconds"):
        monkeypatch.setattr(hardware, name, None)
    text, status = words(capsys, "--quick")
    assert status == 0
    assert "ceilings" not in text


def test_memory_too_full_to_measure_is_said_and_no_failure(capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hardware, "measure_gemm_peak", full)
    text, status = words(capsys)
    assert "CPU float32 not measured: too little memory is free" in text
    assert status == 0


def test_the_compiler_is_told_with_its_path_and_version(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    program(compiler, "my-c++ 1.2.3\nmore")
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert doctor.examine(quick=True)["software"]["C++ compiler"] == f"{compiler}, my-c++ 1.2.3"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.examine(quick=True)["software"]["C++ compiler"] == "none found"


def test_triton_is_told_with_its_version_or_why_it_is_missing(monkeypatch, gpu):
    def told():
        return doctor.examine(quick=True)["software"]["Triton"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "version", lambda package: "3.6.0")
    assert told() == "3.6.0, unused without a GPU"
    with monkeypatch.context() as other:
        other.setattr(doctor, "version", missing)
        other.setattr(platform, "machine", lambda: "arm64")
        assert told() == "not installed: fastgpt requires it only on Linux on x86-64"
    gpu(ADA)
    assert told() == "3.6.0"


def missing(package):
    raise doctor.PackageNotFoundError


def test_free_disk_is_that_of_the_folder_that_runs_go_to(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=7.4e9))
    monkeypatch.chdir(tmp_path)
    assert doctor.examine(quick=True)["run"]["disk"] == f"7 GB free for {tmp_path / 'runs'}"
    (tmp_path / "runs").mkdir()
    doctor.examine(quick=True)
    assert set(asked) == {tmp_path, tmp_path / "runs"}


def test_what_dtype_auto_means_comes_with_the_reason(monkeypatch, gpu):
    def told(device):
        return doctor.examine(device, quick=True)["run"]["--dtype auto"]

    monkeypatch.setattr(hardware, "training_dtype", lambda device: torch.float32)
    assert told("cpu") == "float32: this CPU is not faster in bfloat16"
    gpu("Tesla T4")
    monkeypatch.setattr(hardware, "training_dtype", lambda device: torch.float16)
    assert told("cuda") == "float16: this GPU has no bfloat16"


# ---- a GPU ----


def test_a_gpu_of_the_table_is_told_with_its_peak_memory_and_driver(gpu):
    gpu(ADA)
    findings = doctor.examine(quick=True)
    assert findings["devices"]["GPU"] == f"{ADA}, 46 SMs, compute capability 8.9"
    assert findings["devices"]["GPU memory"] == "11.0 of 12.0 GiB free, limited by GPU"
    assert findings["devices"]["GPU driver"].startswith("550.54; torch is built for CUDA")
    assert findings["devices"]["GPU peak"].startswith("dense bfloat16 58.3 TFLOP/s, 504 GB/s (NVIDIA Ada whitepaper")
    assert findings["run"]["--device"] == "cuda:0"
    assert findings["run"]["--dtype auto"] == "bfloat16: this GPU has it in hardware"
    assert findings["kernels"].keys() == {"cpu", "cuda"}
    assert findings["problems"] == []


def test_a_gpu_that_is_not_in_the_table_is_said_to_have_no_mfu(gpu):
    gpu("NVIDIA Unheard Of")
    assert (
        doctor.examine(quick=True)["devices"]["GPU peak"]
        == "unknown: this GPU is not in the table, so MFU is not shown"
    )


def test_a_gpu_without_bf16_shows_its_peak_in_fp16(gpu):
    gpu("Tesla T4")
    findings = doctor.examine(quick=True)
    assert findings["devices"]["GPU peak"].startswith("dense float16 65.1 TFLOP/s, 320 GB/s")
    assert "compute capability 8.0" in findings["kernels"]["cuda"]["attention"]


def test_of_several_gpus_it_is_the_one_asked_for(gpu):
    gpu(ADA, count=2)
    findings = doctor.examine("cuda:1", quick=True)
    assert findings["devices"]["GPU"].endswith("; cuda:1, one of 2")
    assert findings["run"]["--device"] == "cuda:1"


def test_the_gpu_is_shown_to_one_who_asks_for_the_cpu(gpu):
    gpu(ADA)
    findings = doctor.examine("cpu", quick=True)
    assert findings["devices"]["GPU"].startswith(ADA)
    assert findings["run"]["--device"] == "cpu"


def test_a_gpu_is_measured_too(gpu, capsys):
    gpu(ADA)
    assert doctor.examine()["ceilings"]["gpu"].keys() == {"float32 TFLOP/s", "bfloat16 TFLOP/s", "copy GB/s"}
    assert "GPU copy 45 GB/s" in words(capsys)[0]


# ---- advice ----


def advice(monkeypatch, **extension):
    if extension:
        monkeypatch.setattr(dispatch, "EXTENSION", Extension(**extension))
    return doctor.examine(quick=True)["advice"]


@CPU_ONLY
def test_a_machine_on_which_all_is_well_gets_no_advice(gpu, monkeypatch):
    gpu.nvidia_smi("")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    assert advice(monkeypatch, library=Path("_cpu_avx2.so"), reason="avx2") == []


@CPU_ONLY
def test_missing_cpp_kernels_come_with_how_to_get_them(gpu, monkeypatch, tmp_path):
    gpu.nvidia_smi("")
    absent = {"library": None, "reason": "the C++ kernels are not built"}
    program(tmp_path / "bin" / "c++", "c++ 12")
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "c++"))
    (line,) = advice(monkeypatch, **absent)
    assert "(the C++ kernels are not built). There is a compiler: reinstall fastgpt with pip install" in line
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    (line,) = advice(monkeypatch, **absent)
    assert "Install g++ or clang++, then reinstall fastgpt" in line
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    (line,) = advice(monkeypatch, library=None, reason="this CPU has default, the build has _cpu_avx2.so")
    assert line.endswith("unset ATEN_CPU_CAPABILITY.")


@CPU_ONLY
def test_cpp_kernels_that_were_not_asked_for_are_not_missing(gpu, monkeypatch):
    gpu.nvidia_smi("")
    assert advice(monkeypatch, library=None, reason="FASTGPT_BACKEND=reference") == []


@CPU_ONLY
@pytest.mark.parametrize(
    ("cuda", "hidden", "said"),
    [
        (None, None, "this torch is built without CUDA: install one with CUDA"),
        ("12.8", None, "torch for CUDA 12.8 cannot use it with driver 470.1"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES= hides it: unset it"),
    ],
)
def test_a_gpu_that_torch_does_not_see_comes_with_the_reason(gpu, monkeypatch, cuda, hidden, said):
    gpu.nvidia_smi(f"{ADA}, 470.1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    line = next(line for line in advice(monkeypatch) if "GPU" in line)
    assert line.startswith(f"There is a GPU, {ADA}, but {said}")


def test_a_gpu_without_triton_or_with_little_memory_gets_advice(gpu, monkeypatch):
    gpu(ADA, free=3 << 30)
    monkeypatch.setattr(doctor, "version", missing)
    text = "\n".join(advice(monkeypatch))
    assert "Triton is missing, so the GPU runs plain PyTorch: pip install triton" in text
    assert "9.0 GiB of the GPU's memory are in use" in text


def test_a_gpu_whose_kernels_cannot_be_compiled_gets_advice(gpu, monkeypatch):
    gpu(ADA)
    monkeypatch.setattr(doctor, "version", lambda package: "3.6.0")
    monkeypatch.setenv("CC", "no-compiler")
    assert f"{compilers.missing_for_triton()}, or set FASTGPT_BACKEND=reference." in advice(monkeypatch)
    monkeypatch.setattr(compilers, "missing_for_triton", lambda: None)
    assert not any("Triton" in line or "FASTGPT_BACKEND" in line for line in advice(monkeypatch))


def test_a_full_disk_and_idle_cores_get_advice(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    monkeypatch.setattr(limits, "threads", lambda: Bound(64, "cores"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = "\n".join(advice(monkeypatch))
    assert "The disk is nearly full" in text
    assert "OMP_NUM_THREADS=1 leaves most of the 64 cores unused" in text


def test_the_limits_that_count_are_told(monkeypatch, capsys):
    quota, box = "cgroup limit /sys/fs/cgroup/cpu.max", "cgroup limit /sys/fs/cgroup/memory.max"
    monkeypatch.setattr(limits, "threads", lambda: Bound(1, quota))
    monkeypatch.setattr(limits, "memory", lambda: (Bound(3 << 29, box), Bound(2 << 30, box)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        text, _ = words(capsys, "--quick")
        torch.set_num_threads(2)
        found = doctor.examine(quick=True)["limits"]
    finally:
        torch.set_num_threads(threads)
    assert f"threads 1, limited by {quota}" in text
    assert f"RAM 1.5 of 2.0 GiB free, limited by {box}" in text
    assert found == {
        "free": {"amount": 3 << 29, "source": box}, "total": {"amount": 2 << 30, "source": box},
        "threads": {"amount": 1, "source": quota},
    }  # fmt: skip
    monkeypatch.setattr(limits, "memory", lambda: (Bound(1 << 30, "RAM"), Bound(2 << 30, box)))
    text, _ = words(capsys, "--quick")
    assert f"1.0 of 2.0 GiB free; free memory is limited by RAM, the total by {box}" in text


def test_more_threads_than_the_quota_gives_get_advice(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(limits, "threads", lambda: Bound(2, "a quota"))
    assert "OMP_NUM_THREADS=8 is more than the 2 that can run at once (a quota)" in "\n".join(advice(monkeypatch))


# ---- what cannot work ----


def test_a_device_that_is_none_anywhere_is_a_wrong_request():
    with pytest.raises(RequestError, match="--device takes cpu, cuda"):
        doctor.main(["--quick", "--device", "tpu"])


def test_a_problem_stands_in_the_json_too(capsys, monkeypatch):
    monkeypatch.setenv("FASTGPT_BACKEND", "cuda")
    assert doctor.main(["--quick", "--json"]) == 1
    out, err = capsys.readouterr()
    (problem,) = json.loads(out)["problems"]
    assert err == f"error: {problem}\n"


def test_the_cpus_backend_cannot_run_on_the_gpu_that_auto_takes(gpu, monkeypatch):
    gpu(ADA)
    monkeypatch.setenv("FASTGPT_BACKEND", "cpp")
    with dispatch.use_backend("cpp"):
        (problem,) = doctor.examine(quick=True)["problems"]
        assert problem.startswith("backend 'cpp' cannot run torch.bfloat16 on cuda")
        if dispatch.EXTENSION.library is not None:
            assert doctor.examine("cpu", quick=True)["problems"] == []


@pytest.mark.parametrize(
    ("argv", "environment", "status", "said"),
    [
        ([], {}, 0, None),
        ([], {"FASTGPT_BACKEND": "reference"}, 0, None),
        (["--device", "cpu"], {}, 0, None),
        pytest.param([], {"FASTGPT_BACKEND": "triton"}, 1,
                     "backend 'triton' cannot run .* on cpu: it needs an NVIDIA GPU; unset FASTGPT_BACKEND",
                     marks=CPU_ONLY),
        (["--device", "cpu"], {"FASTGPT_BACKEND": "cpp", "ATEN_CPU_CAPABILITY": "default"}, 0, None),
        ([], {"FASTGPT_BACKEND": "trition"}, 1,
         r"FASTGPT_BACKEND=trition is not a backend; did you mean triton\? \(there are auto, triton, cpp, reference\)"),
        pytest.param(["--device", "cuda"], {}, 1,
                     "--device cuda: PyTorch sees 0 CUDA devices here; --device cpu works", marks=CPU_ONLY),
        (["--device", "tpu"], {}, 2, "--device takes cpu, cuda, cuda:N or auto, not 'tpu'"),
        (["--jsn"], {}, 2, "unknown flag --jsn; did you mean --json[?]"),
    ],
)  # fmt: skip
def test_the_status_is_one_where_what_was_asked_for_cannot_work(argv, environment, status, said):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastgpt.doctor", "--quick", *argv],
        capture_output=True, text=True, check=False,
        env={**{k: v for k, v in os.environ.items() if k != "FASTGPT_BACKEND"}, **environment},
    )  # fmt: skip
    assert process.returncode == status, process.stderr
    if said is None:
        assert process.stderr == ""
    else:
        assert re.match(f"error: {said}", process.stderr)
        assert process.stderr.count("\n") == 1
    assert ("kernels on cpu" in process.stdout) == (status < 2)
