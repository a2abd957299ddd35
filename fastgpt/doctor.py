"""``python -m fastgpt.doctor``: what this machine has, what each kernel runs on, and how to make it faster.

Exit status 1 if the device or the backend that ``--device`` and ``FASTGPT_BACKEND`` request cannot work here.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastgpt import __version__, compilers, hardware, limits
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.kernels import backends, dispatch
from fastgpt.limits import Bound
from fastgpt.units import dtype_name, gib

CPU = torch.device("cpu")
RUNS = Path("runs")  # where fastgpt.train puts its runs

SECONDS = 0.2  # for each measurement

LITTLE_DISK = 5e9  # bytes: three checkpoints of GPT-2 124M (the best, the newest, and the one being written)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings."""
    parser = Parser(prog="python -m fastgpt.doctor", description=__doc__)
    parser.add_argument("--device", default="auto", help="as in training: cpu, cuda, cuda:N or auto")
    parser.add_argument("--quick", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    findings = examine(args.device, args.quick)
    if args.json:
        print(json.dumps(findings, indent=1))
    else:
        show(findings, _Console(highlight=False, markup=False))
    for problem in findings["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if findings["problems"] else 0


def examine(device_name: str = "auto", quick: bool = False) -> dict[str, Any]:
    """Everything that ``doctor`` prints.

    Args:
        device_name: the value of ``--device``.
        quick: do not measure the ceilings, which takes seconds.

    Raises:
        RequestError: ``device_name`` is not the name of a device.
    """
    device, problems = _device(device_name)
    gpu = device if device.type == "cuda" else torch.device("cuda", 0) if torch.cuda.is_available() else None
    problems += _backend_problems(None if problems else device)
    threads, (free, total) = hardware.use_threads(), hardware.memory(CPU)
    seen_by_driver = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    software = {
        "fastgpt": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": _triton(gpu),
        "C++ compiler": _compiler() or "none found",
        "C++ kernels": ("" if dispatch.EXTENSION.library else "none: ") + dispatch.EXTENSION.reason,
    }
    devices = {
        "CPU": f"{hardware.device_name(CPU)}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{threads.amount}, limited by {threads.source}",
        "RAM": _free(free, total),
        **(_gpu(gpu, seen_by_driver) if gpu else {"GPU": _why_no_gpu()}),
    }
    a_run = {  # what fastgpt.train would choose
        "--device": str(device),
        "--dtype auto": _training_dtype(device),
        "disk": f"{shutil.disk_usage(_existing(RUNS)).free / 1e9:.0f} GB free for {RUNS.absolute()}",
    }
    measured = {"cpu": CPU, **({"gpu": gpu} if gpu else {})}
    return {
        "software": software,
        "devices": devices,
        "limits": {  # bytes and threads, and where each limit comes from
            name: bound._asdict() for name, bound in (("free", free), ("total", total), ("threads", threads))
        },
        "run": a_run,
        "ceilings": {} if quick else {name: _ceilings(at) for name, at in measured.items()},
        "kernels": backends(),
        "advice": _advice(gpu, seen_by_driver, threads),
        "problems": problems,
    }


# ---- the requested device and backend ----


def _device(name: str) -> tuple[torch.device, list[str]]:
    """The device that ``--device`` names; or the CPU, and why the device cannot be used."""
    try:
        return hardware.find_device(name), []
    except RequestError as error:
        if not name.startswith("cuda"):
            raise
        return CPU, [str(error)]


def _backend_problems(device: torch.device | None) -> list[str]:
    """Why the backend that ``FASTGPT_BACKEND`` names cannot be used on ``device``."""
    name = os.environ.get("FASTGPT_BACKEND", "auto")
    if name not in dispatch.BACKENDS:
        known = ", ".join(dispatch.BACKENDS)
        return [f"FASTGPT_BACKEND={name} is not a backend{did_you_mean(name, dispatch.BACKENDS)} (there are {known})"]
    if device is None:
        return []
    try:
        dispatch.backend_of(device, hardware.training_dtype(device))
    except RuntimeError as error:
        return [f"{error}; unset FASTGPT_BACKEND to use the best one"]
    return []


def _training_dtype(device: torch.device) -> str:
    dtype = hardware.training_dtype(device)
    why = {
        ("cuda", torch.bfloat16): "this GPU has it in hardware",
        ("cuda", torch.float16): "this GPU has no bfloat16",
        ("cpu", torch.bfloat16): "this CPU is faster in it",
        ("cpu", torch.float32): "this CPU is not faster in bfloat16",
    }
    return f"{dtype_name(dtype)}: {why[device.type, dtype]}"


# ---- the machine ----


def _triton(gpu: torch.device | None) -> str:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        there = platform.system() == "Linux" and platform.machine() == "x86_64"
        return "not installed" if there else "not installed: fastgpt requires it only on Linux on x86-64"
    return installed if gpu else f"{installed}, unused without a GPU"


def _compiler() -> str | None:
    """Path and version of the compiler for the C++ kernels: ``CXX``, or the first of the usual names."""
    command = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "")]
    path = shutil.which(command[0])
    return path and ", ".join([path, *_output(*command, "--version").splitlines()[:1]])


def _free(free: Bound, total: Bound) -> str:
    amounts = f"{gib(free.amount).removesuffix(' GiB')} of {gib(total.amount)} free"
    if free.source == total.source:
        return f"{amounts}, limited by {free.source}"
    return f"{amounts}; free memory is limited by {free.source}, the total by {total.source}"


def _gpu(gpu: torch.device, seen_by_driver: list[str]) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(gpu)
    driver = seen_by_driver[0].rpartition(", ")[2] if seen_by_driver else "unknown"
    known = hardware.known_gpu(gpu)
    ceiling = "unknown: this GPU is not in the table, so MFU is not shown"
    if known is not None:
        dtype = hardware.training_dtype(gpu)
        peak = f"dense {dtype_name(dtype)} {known.tflops(dtype):.1f} TFLOP/s"
        ceiling = f"{peak}, {known.bandwidth_gb_s:g} GB/s ({known.source})"
    n = torch.cuda.device_count()
    return {
        "GPU": f"{hardware.device_name(gpu)}, {properties.multi_processor_count} SMs, compute capability "
        f"{properties.major}.{properties.minor}" + (f"; {gpu}, one of {n}" if n > 1 else ""),
        "GPU memory": _free(*hardware.memory(gpu)),
        "GPU driver": f"{driver}; torch is built for CUDA {torch.version.cuda}",
        "GPU peak": ceiling,
    }


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return f"none: torch is built for CUDA {torch.version.cuda} but finds no device"


def _ceilings(device: torch.device) -> dict[str, float | None]:
    """GEMM rates and bandwidth of a copy; ``None`` if the device has too little free memory to measure."""
    ceilings: dict[str, float | None] = {}
    try:
        for dtype in dict.fromkeys((torch.float32, hardware.training_dtype(device))):
            name = f"{dtype_name(dtype)} TFLOP/s"
            ceilings[name] = None
            ceilings[name] = hardware.gemm_ceiling(device, dtype, SECONDS) / 1e12
        ceilings["copy GB/s"] = None
        ceilings["copy GB/s"] = hardware.measure_bandwidth(device, seconds=SECONDS) / 1e9
    except torch.OutOfMemoryError:
        pass
    return ceilings


def _advice(gpu: torch.device | None, seen_by_driver: list[str], threads: Bound) -> list[str]:
    """How to make the slow parts faster."""
    advice = [_about_cpp(), _about_gpu(seen_by_driver) if gpu is None else _about_triton()]
    if threads.source in hardware.THREADS:
        asked, possible = f"{threads.source}={os.environ[threads.source]}", limits.threads()
        if 2 * threads.amount < possible.amount:  # PyTorch's own choice may be half
            advice.append(f"{asked} leaves most of the {possible.amount} cores unused: unset it.")
        if threads.amount > possible.amount:
            advice.append(
                f"{asked} is more than the {possible.amount} that can run at once ({possible.source}): unset it."
            )
    if gpu is not None:
        free, total = (bound.amount for bound in hardware.memory(gpu))
        if free < 0.8 * total:
            advice.append(
                f"{gib(total - free)} of the GPU's memory are in use. Other programs there (see nvidia-smi) take "
                "memory and time from training."
            )
    if shutil.disk_usage(_existing(RUNS)).free < LITTLE_DISK:
        advice.append(
            "The disk is nearly full. GPT-2 124M's checkpoints take 4.5 GB; --out_dir puts a run on another disk."
        )
    return [line for line in advice if line]


def _about_cpp() -> str:
    reason = dispatch.EXTENSION.reason
    if dispatch.EXTENSION.library is not None or reason.startswith("FASTGPT_BACKEND"):
        return ""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        return f"The C++ kernels are not used ({reason}): unset ATEN_CPU_CAPABILITY."
    if _compiler() is None:
        remedy = "Install g++ or clang++, then reinstall fastgpt."
    else:
        remedy = (
            "There is a compiler: reinstall fastgpt with pip install --force-reinstall --no-cache-dir --no-deps "
            "--no-build-isolation -v and read the build's messages."
        )
    return f"The C++ kernels are missing ({reason}). {remedy}"


def _about_gpu(seen_by_driver: list[str]) -> str:
    if not seen_by_driver:
        return ""
    name, _, driver = seen_by_driver[0].rpartition(", ")
    if torch.version.cuda is None:
        problem = "this torch is built without CUDA: install one with CUDA, https://pytorch.org/get-started/locally"
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        problem = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides it: unset it"
    else:
        problem = f"torch for CUDA {torch.version.cuda} cannot use it with driver {driver}: try a newer driver"
    return f"There is a GPU, {name}, but {problem}."


def _about_triton() -> str:
    try:
        version("triton")
    except PackageNotFoundError:
        return "Triton is missing, so the GPU runs plain PyTorch: pip install triton."
    missing = compilers.missing_for_triton()
    return f"{missing}, or set FASTGPT_BACKEND=reference." if missing else ""


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def _output(*command: str) -> str:
    """What a command prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- output ----


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # as print does; rich would exit with status 1, which means a problem here


def show(findings: dict[str, Any], console: Console) -> None:
    """Print what :func:`examine` has found, as tables."""
    tables = {title: findings[title] for title in ("software", "devices", "run")}
    tables["measured ceilings"] = {
        f"{device.upper()} {what.rpartition(' ')[0]}": _measured(rate, unit=what.rpartition(" ")[2])
        for device, rates in findings["ceilings"].items()
        for what, rate in rates.items()
    }
    for device, operators in findings["kernels"].items():
        choices = set(operators.values())
        tables[f"kernels on {device}"] = {"all": choices.pop()} if len(choices) == 1 else operators
    for title, rows in tables.items():
        if rows:
            console.print(_table(title, rows))
            console.print()
    for line in findings["advice"]:
        console.print(f"{line}\n")


def _measured(rate: float | None, unit: str) -> str:
    return "not measured: too little memory is free" if rate is None else f"{rate:.3g} {unit}"


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    run(main)
