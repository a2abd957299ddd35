"""What is missing for Triton and torch.compile is told in one line, before a run begins."""

import importlib.util
import sys
import sysconfig

import pytest
import torch

from fastgpt import hardware
from fastgpt.compilers import missing_for_compile, missing_for_triton
from fastgpt.errors import RequestError
from fastgpt.kernels import dispatch
from fastgpt.train.config import resolve
from fastgpt.train.presets import PRESETS
from fastgpt.train.settle import settle

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A Linux machine with Triton and the headers of Python, whose programs are those in ``bin``."""
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "include" / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path / name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def install(*names):
        for name in names:
            path = tmp_path / "bin" / name
            path.touch()
            path.chmod(0o755)

    return install


@pytest.mark.parametrize(
    ("programs", "cxx", "expected"),
    [
        (["g++"], None, None),
        ([], None, "torch.compile needs a C++ compiler: install g++, or set CXX"),
        (["clang++", "gcc"], None, "torch.compile needs a C++ compiler: install g++, or set CXX"),
        (["clang++"], "clang++", None),
        (
            ["g++"],
            "clang++",
            "torch.compile needs a C++ compiler, and CXX=clang++ is not a program: unset CXX or correct it",
        ),
    ],
)
def test_compiling_for_a_cpu_needs_a_cpp_compiler(machine, monkeypatch, programs, cxx, expected):
    machine(*programs)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    assert missing_for_compile(CPU) == expected


@pytest.mark.parametrize(
    ("programs", "cc", "expected"),
    [
        (["gcc"], None, None),
        (["clang"], None, None),
        (["cc"], None, "Triton needs a C compiler: install gcc or clang, or set CC"),
        (["cc"], "cc", None),
        (["gcc"], "icc", "Triton needs a C compiler, and CC=icc is not a program: unset CC or correct it"),
    ],
)
def test_triton_needs_a_c_compiler(machine, monkeypatch, programs, cc, expected):
    machine(*programs)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    assert missing_for_triton() == missing_for_compile(CUDA) == expected


def test_both_need_the_headers_of_python(machine, tmp_path):
    machine("gcc", "g++")
    (tmp_path / "include" / "Python.h").unlink()
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    assert missing_for_triton() == f"Triton needs Python.h: install {package}"
    assert missing_for_compile(CPU) == f"torch.compile needs Python.h: install {package}"


def test_compiling_for_a_gpu_needs_triton(machine, monkeypatch):
    machine("gcc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_for_compile(CUDA) == "torch.compile needs Triton on a GPU: pip install triton"


def test_a_run_that_could_not_compile_is_refused_before_it_begins(tmp_path):
    config = resolve({"compile": True, "device": "cpu", "data_dir": str(tmp_path)}, PRESETS)
    with pytest.raises(RequestError, match=r"^--compile: torch.compile needs a C\+\+ compiler: install g\+\+"):
        settle(config)


def test_a_run_on_triton_without_a_c_compiler_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setattr(hardware, "find_device", lambda name: CUDA)
    monkeypatch.setattr(hardware, "training_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(dispatch, "backend_of", lambda device, dtype: ("triton", "NVIDIA GPU"))
    with pytest.raises(RequestError, match=r"Triton needs a C compiler: .*; --backend reference works without"):
        settle(resolve({}, PRESETS))
