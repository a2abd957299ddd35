"""The engine of every benchmark: contenders take turns, and what each turn took is kept.

Taking turns means that a drift of the machine (clock, temperature, other processes) affects all contenders alike.
Medians and quartiles are reported, because a single interruption would dominate a mean.

A turn returns one or more times in milliseconds. Three clocks make turns:

- :func:`wall_ms` for a whole training step, which is long enough to include launching and waiting;
- :class:`CPUTimer` and :class:`CUDATimer` for a single kernel, with cold caches.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
Turn = Callable[[], Sequence[float]]

# An upper bound on the cycles that a GPU spins in a millisecond; Ada boosts to 2.8 GHz.
CYCLES_PER_MS = 3_000_000

# The longest head start of the host. A contender that waits for the GPU would otherwise ask for more each time.
LONGEST_LEAD_MS = 20.0


# ---- the engine ----


@dataclass
class Readings:
    """The times of one contender.

    Attributes:
        ms: in the order of the turns.
        failure: the exception that ended its part, if any.
    """

    ms: list[float] = field(default_factory=list)
    failure: Exception | None = None


def interleave(
    turns: Mapping[str, Turn],
    seconds: float,
    rounds: tuple[float, float],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Readings]:
    """Run contenders in turns, one turn of each per round.

    A contender that raises takes no further turns; the others continue.

    Args:
        turns: by name; each returns its times in milliseconds.
        seconds: no round starts later than this, unless ``rounds`` requires it.
        rounds: the least and the largest number of rounds.
        clock: measures ``seconds``.
    """
    readings = {name: Readings() for name in turns}
    start, n = clock(), 0
    while n < rounds[0] or (n < rounds[1] and clock() - start < seconds):
        n += 1
        for name, turn in turns.items():
            if readings[name].failure is None:
                try:
                    readings[name].ms += turn()
                except Exception as error:
                    readings[name].failure = error.with_traceback(None)  # the traceback holds tensors
    return readings


def contenders(turns: Mapping[str, Turn], rounds: int, ours: str) -> dict[str, dict[str, Any]]:
    """Run ``rounds`` rounds of contenders that all do the whole work, and return them as a record has them.

    A contender that raises ends the measurement with its exception.
    """
    found = {}
    for name, readings in interleave(turns, 0.0, (rounds, rounds)).items():
        if readings.failure is not None:
            raise readings.failure
        found[name] = {"ours": name == ours, "whole": True, "failure": None} | figures(readings.ms)
    return found


def figures(ms: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of at least two readings, as a record has them."""
    return {"ms": median(ms), "quartiles_ms": quantiles(ms, n=4)[::2], "readings": len(ms)}


def error_in_a_line(error: Exception) -> str:
    """An exception in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


# ---- the clock for a whole step ----


def synchronise(device: torch.device) -> None:
    """Wait for all work queued on a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_ms(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Milliseconds from an idle device to an idle device, and what ``run`` returned."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start), result


# ---- the clocks for a kernel ----


@dataclass
class Unit:
    """What one reading of a kernel's clock covers.

    On a CPU that is one call. On a GPU it is as many calls, each on its own copy of the inputs, as it takes for the
    inputs together to exceed the L2 cache. A reading is divided by the number of calls. Before every unit, a buffer
    larger than the caches is written, so that no inputs are in the caches already.

    Attributes:
        run: makes ``calls`` calls.
        calls: their number.
        before: restores the operands; not timed.
        host_ms: milliseconds until ``run`` returns on an idle GPU: the cost of launching, and of waiting where a call
            waits for the GPU. Set by ``warm_up``.
        peak_bytes: the peak of the memory that ``run`` allocates. Set by ``warm_up``.
    """

    run: Callable[[], object]
    calls: int = 1
    before: Callable[[], object] = lambda: None
    host_ms: float | None = None
    peak_bytes: int | None = None


class CPUTimer:
    """Wall clock. One call is long enough to be read, so flushing is enough to keep the cache cold."""

    cache_bytes = 0  # inputs of this size together do not fit the cache

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
    """CUDA events around work that is queued while the GPU spins, so that gaps between launches are not timed.

    Kernels run without gaps in a CUDA graph, and in an eager step where each kernel is long enough. The cost of
    launching is reported separately, as ``host_ms``.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.cache_bytes = 2 * l2_bytes
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def warm_up(self, unit: Unit) -> None:
        """Run three times: to compile, to measure the peak of memory, and to measure the host's time."""
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
        # spin for half as long again as launching takes, so that all kernels are queued before the first one starts
        lead = min(1.5 * (unit.host_ms or 0.0) + 0.1, LONGEST_LEAD_MS)
        torch.cuda._sleep(int(lead * CYCLES_PER_MS))
        self._start.record()
        unit.run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


Timer = CPUTimer | CUDATimer


def turn_of(unit: Unit, timer: Timer) -> Turn:
    """A turn of one unit: milliseconds of a call."""
    return lambda: [timer.ms(unit) / unit.calls]
