"""Timing side by side, and what a record of it must say about the machine.

A *unit* is what one reading of the clock covers: on a CPU one call, on a GPU as many calls as it takes for
their inputs, of which each call has its own copy, to exceed the L2 cache; a time is a unit's divided by its
calls. Before every unit a buffer larger than the caches is written, so nobody's inputs lie in them already.
"""

import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastgpt import hardware

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench" / "results"

# In the name of a CPU: trademarks, its kind, its cores and its clock.
NOISE = r"\((?:R|TM)\)|\b(?:CPU|Processor|\d+-Core)\b|@\s*[\d.]+\s*GHz"

# A GPU spins this many cycles a millisecond at most, whatever its clock (Ada boosts to 2.8 GHz).
CYCLES_PER_MS = 3_000_000

# Longest head start given to the host: one that waits for the GPU itself would ask for more each time.
LONGEST_LEAD_MS = 20.0


@dataclass
class Unit:
    """What one reading of the clock covers.

    Attributes:
        run: ``calls`` calls.
        calls: how many.
        before: puts the operands back as they were; not timed.
        host_ms: milliseconds until ``run`` returns on an idle GPU: what launching costs, and waiting where a
            call waits for the GPU. Set by ``warm_up``.
        peak_bytes: memory that ``run`` takes beyond what was there before, at its peak. Set by ``warm_up``.
    """

    run: Callable[[], object]
    calls: int = 1
    before: Callable[[], object] = lambda: None
    host_ms: float | None = None
    peak_bytes: int | None = None


class CPUTimer:
    """Wall clock. One call is long enough to be read, so the flush alone keeps the cache cold."""

    cache_bytes = 0  # inputs of this size together defeat the cache

    def __init__(self, flush_bytes: int = 128 << 20) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8)

    def warm_up(self, unit: Unit) -> None:
        """Run once, to compile."""
        unit.before()
        unit.run()

    def ms(self, unit: Unit) -> float:
        """Milliseconds of one unit."""
        unit.before()
        self._flush.zero_()
        start = time.perf_counter()
        unit.run()
        return (time.perf_counter() - start) * 1e3


class CUDATimer:
    """CUDA events around work that was queued while the GPU was still spinning: launch gaps are not timed.

    That is how kernels run in a captured graph, and in an eager step whose kernels are long enough; what
    launching costs is told apart, as ``host_ms``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.cache_bytes = 2 * l2_bytes
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def warm_up(self, unit: Unit) -> None:
        """Run three times: to compile, for the peak of memory, and for the host's time."""
        unit.before()
        unit.run()
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        unit.run()
        torch.cuda.synchronize(self._device)
        unit.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before
        start = time.perf_counter()
        unit.run()
        unit.host_ms = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize(self._device)

    def ms(self, unit: Unit) -> float:
        """Milliseconds of one unit on the GPU."""
        unit.before()
        self._flush.zero_()
        lead = min(1.5 * (unit.host_ms or 0.0) + 0.1, LONGEST_LEAD_MS)
        torch.cuda._sleep(int(lead * CYCLES_PER_MS))
        self._start.record()
        unit.run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


Timer = CPUTimer | CUDATimer


def interleave(
    units: Mapping[str, Unit],
    timer: Timer,
    seconds: float,
    rounds: tuple[int, int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float] | Exception]:
    """Milliseconds a call of every unit, once a round in turn, so that a drift of the machine meets all alike.

    Args:
        units: by name.
        timer: reads the clock of the device.
        seconds: no round starts later than this, but
        rounds: at least the first and at most the second number of them are run.
        clock: tells ``seconds``.

    Returns:
        The times by name, in the order of the rounds; or what was raised, which ends that unit's part.
    """
    times: dict[str, list[float] | Exception] = {name: [] for name in units}
    start = clock()
    for n in range(rounds[1]):
        if n >= rounds[0] and clock() - start >= seconds:
            break
        for name, unit in units.items():
            readings = times[name]
            if isinstance(readings, Exception):
                continue
            try:
                readings.append(timer.ms(unit) / unit.calls)
            except Exception as error:
                times[name] = error.with_traceback(None)  # which holds its tensors
    return times


def results_folder(device: torch.device | str) -> Path:
    """Where the records of this device lie: its full name in lower case and hyphens, under ``bench/results``.

    A CPU's goes without the words that say nothing, and ends with the widest instruction set that the CPU has, which a
    hypervisor may hide from one machine and not from another.
    """
    name = hardware.device_name(torch.device(device))
    if torch.device(device).type == "cpu":
        name = " ".join([re.sub(NOISE, " ", name), *hardware.processor().isas[-1:]])
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conditions(device: torch.device | str) -> str:
    """What the names of a CPU's records end with: ``-2-threads``, and ``-avx2`` where the run was held to that.

    The number of threads is always included, because the usual number depends on the machine. Empty for a GPU.
    """
    if torch.device(device).type != "cpu":
        return ""
    threads, isa, has = torch.get_num_threads(), hardware.isa(), hardware.processor().isas
    held = f"-{isa}" if has and isa != has[-1] else ""
    return f"-{threads}-thread{'s'[: threads != 1]}{held}"


def environment(device: torch.device) -> dict[str, Any]:
    """What a record must name: device, versions, commit. A figure that cannot be had is ``None``.

    ``cpu`` is the host's where the device is a GPU; ``isa`` is the widest instruction set that the run could use, and
    ``held_to`` what held it.
    """
    cuda, cpu = device.type == "cuda", hardware.processor()
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "device": hardware.device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu": {"name": cpu.name, **cpu.ids, "cores": cpu.cores, "isas": cpu.isas},
        "isa": hardware.isa(),
        "held_to": hardware.held_to(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
    }


def provenance(module: str, argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """What every record begins with: environment, command and date."""
    command = shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
    return {
        "environment": environment(device),
        "command": " ".join([*(f"{name}={value}" for name, value in hardware.held_to().items()), command]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(environment: Mapping[str, Any]) -> str:
    """The commit that was measured, and whether the tree was that commit's."""
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return f"commit {environment['commit']}{changes}"


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
