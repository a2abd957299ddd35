"""The record of a measurement: its format, its writer and its reader. ``pages.py`` shows it.

A record is a JSON object. It is kept under ``bench/results/DEVICE``, where DEVICE is the full model name and the
capability (a GPU's) or the widest instruction set (a CPU's).

    version      of this format
    kind         steps, kernels, integrations or stages
    device       name, type, capability, n_sm, driver, cpu (name, ids, cores, isas), isa, held_to, cpu_capability,
                 threads; null where a value is not known or does not apply
    versions     torch, triton, cuda, python and others
    commit, uncommitted_changes, command, date, dtype
    comparisons  a list of
        name        a model, or an operator and a pass
        shapes      sizes by name
        ceilings    measured in the same run: gemm_flops in FLOP/s, bandwidth in B/s; peak_flops from the table of GPUs
        ours        the contender that the others are compared with
        contenders  by name; each has
            ours, whole (false: does only part of the work), failure (null: none)
            ms, quartiles_ms, readings, and what else was measured: rate and unit (FLOP/s or B/s), tokens_per_s, mfu,
            share_of_ceiling, peak_bytes, host_ms, errors, losses, time_budget_ms

A comparison of whole steps may also have: accumulation, recompute, state_bits, predicted, loss_steps, loss_curves,
vram_gib, vram_tensors_gib and largest (bench/mfu.py).
"""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.pages import Record, page
from fastgpt import hardware

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench" / "results"
VERSION = 1

# Removed from the name of a CPU: trademarks, its kind, its number of cores and its clock.
NOISE = r"\((?:R|TM)\)|\b(?:CPU|Processor|\d+-Core)\b|@\s*[\d.]+\s*GHz"


# ---- what a record is keyed by ----


def results_folder(device: torch.device | str) -> Path:
    """The folder of a device's records: its key in lower case and hyphens, under ``bench/results``.

    A GPU's key is its full name and its capability. A CPU's is its full name, without the words that say nothing, and
    its widest instruction set, which a hypervisor may hide on one machine and not on another.
    """
    device = torch.device(device)
    name = hardware.device_name(device)
    if device.type == "cpu":
        name = " ".join([re.sub(NOISE, " ", name), *hardware.processor().isas[-1:]])
    else:
        name += " sm " + "".join(map(str, torch.cuda.get_device_capability(device)))
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conditions(device: torch.device | str) -> str:
    """The end of the file names of a CPU's records: ``-2-threads``, or ``-2-threads-avx2`` if limited to AVX2.

    The number of threads is always included, because the usual number depends on the machine. Empty for a GPU.
    """
    if torch.device(device).type != "cpu":
        return ""
    threads, isa, has = torch.get_num_threads(), hardware.isa(), hardware.processor().isas
    held = f"-{isa}" if has and isa != has[-1] else ""
    return f"-{threads}-thread{'s'[: threads != 1]}{held}"


def describe_device(device: torch.device) -> Record:
    """What a record says of the device. ``cpu`` is the host's if the device is a GPU."""
    cuda, cpu = device.type == "cuda", hardware.processor()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "name": hardware.device_name(device),
        "type": device.type,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "n_sm": torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cpu": {"name": cpu.name, **cpu.ids, "cores": cpu.cores, "isas": list(cpu.isas)},
        "isa": hardware.isa(),  # the widest instruction set that the run could use
        "held_to": hardware.held_to(),  # the environment variables that limited it
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def begin(kind: str, module: str, argv: Sequence[str] | None, device: torch.device, dtype: str | None = None) -> Record:
    """A record without comparisons: where, when and how ``module`` was run."""
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "version": VERSION,
        "kind": kind,
        "device": describe_device(device),
        "versions": {
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "command": " ".join([*(f"{name}={value}" for name, value in hardware.held_to().items()), command]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtype": dtype,
        "comparisons": [],
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- files ----


def write(record: Record, stem: Path) -> None:
    """Write a record as STEM.json, and its page as STEM.md if it has comparisons."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    # not with_suffix: a name may contain a dot
    Path(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    if record["comparisons"]:
        Path(f"{stem}.md").write_text(page(record))


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: the file is cut off, or is not a record of this version.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise ValueError(f"{path}: not a record of version {VERSION}")
    return record


def collect(results: Path, kind: str | None = None) -> Iterator[tuple[Path, Record]]:
    """All records of devices under a folder, or those of one kind, in the order of their paths."""
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name not in ("ahead_of_time", "robustness", "loss"):  # predictions; what was survived; recipes
            record = read(path)
            if kind in (None, record["kind"]):
                yield path, record
