"""``python -m fastgpt.doctor``: what this machine has, what each kernel runs on, and why not something better."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.kernels import backends


def main(argv: Sequence[str] | None = None) -> None:
    """Print the findings."""
    parser = Parser(prog="python -m fastgpt.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(argv).json
    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=1))
        return
    console = Console(highlight=False)
    for title in ("software", "devices"):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in findings[title].items():
            table.add_row(name, str(value))
        console.print(table)
        console.print()
    for device, operators in findings["kernels"].items():
        choices = set(operators.values())
        if len(choices) == 1:
            console.print(f"kernels on {device}: all on {choices.pop()}")
            continue
        table = Table(title=f"kernels on {device}", title_justify="left", show_header=False, box=None)
        for name, choice in operators.items():
            table.add_row(name, choice)
        console.print(table)
    for line in findings["advice"]:
        console.print(f"\n{line}")


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` prints."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    software = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": _version("triton"),
        "C++ compiler": compiler if compiler and shutil.which(compiler) else "none found",
    }
    cpu = torch.device("cpu")
    devices = {
        "CPU": f"{hardware.device_name(cpu)}, {torch.get_num_threads()} threads, "
        + torch.backends.cpu.get_cpu_capability(),
        "CPU GEMM": ", ".join(
            f"{name} {hardware.measure_gemm_peak(cpu, dtype) / 1e9:.0f} GFLOP/s"
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        )
        + " measured",
        "CPU memory": f"{hardware.measure_bandwidth(cpu) / 1e9:.0f} GB/s measured (copy)",
        "GPU": _gpu(),
    }
    kernels = backends()
    return {
        "software": software,
        "devices": devices,
        "kernels": kernels,
        "advice": _advice(kernels, software),
    }


def _advice(kernels: dict[str, dict[str, str]], software: dict[str, str]) -> list[str]:
    """What would make the slow parts fast."""
    if "not built" not in kernels["cpu"]["layer_norm"]:
        return []
    if software["C++ compiler"] == "none found":
        mend = "no C++ compiler was found: install g++ or clang++, then reinstall fastgpt"
    else:
        mend = (
            "a compiler is here now: reinstall fastgpt with "
            "pip install --force-reinstall --no-cache-dir --no-deps -v and read the build's messages"
        )
    return [f"The C++ kernels are missing; {mend}."]


def _gpu() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return f"none: torch is built for CUDA {torch.version.cuda} but finds no device"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    run(main)
