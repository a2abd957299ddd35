"""Launch configurations measured on this device, instead of the shipped ones. Opt-in: ``FASTGPT_AUTOTUNE=1``.

The first call of an attention kernel on a new shape then compiles and times every candidate, which takes minutes, and
keeps the fastest in ``~/.cache/fastgpt`` (or under ``XDG_CACHE_HOME``), one file for each device and Triton version.
Another configuration may add numbers in another order: results are deterministic only as long as the cache stays.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from fastgpt.kernels.triton.launch import Device

CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    if m * n * 32 // warps <= 128 * 128 * 8  # more than 128 scores a thread never fit its registers
]


def enabled() -> bool:
    """Whether ``FASTGPT_AUTOTUNE`` is set."""
    return os.environ.get("FASTGPT_AUTOTUNE", "0") not in ("", "0")


def _time(run: Callable[[], None]) -> float:
    """The median time of ``run``, in milliseconds."""
    return triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")


def path(device: Device) -> Path:
    """The file that keeps the fastest configurations of a device."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return folder / f"{name}-triton-{triton.__version__}.json"


@cache
def fastest(device: Device) -> dict[str, dict[str, int]]:
    """The fastest configurations found on a device so far, by the kind of launch; read from its file once."""
    try:
        return json.loads(path(device).read_text())
    except (OSError, ValueError):  # no file yet, or a damaged one: measure again
        return {}


def best(
    device: Device, key: str, shipped: dict[str, int], run: Callable[[dict[str, int]], None], time: Any = _time
) -> dict[str, int]:
    """Return the fastest configuration for launches of the kind ``key``: from the cache, or measured now.

    While a CUDA graph is captured, no time can be measured and no kernel loaded. The configuration is then the cached
    one, or else the shipped one.

    Args:
        device: what ``run`` runs on.
        key: kernel, dtype and shape.
        shipped: the shipped configuration, one of the candidates.
        run: launches the kernel in a configuration; called many times.
        time: returns the milliseconds that a callable takes.
    """
    winners = fastest(device)
    if torch.cuda.is_current_stream_capturing():
        return winners.get(key, shipped)
    if key not in winners:
        timings, failed = [], None
        for candidate in [shipped, *CANDIDATES]:
            try:
                timings.append((time(lambda candidate=candidate: run(candidate)), candidate))
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # not the candidate's fault: others would fail too
                raise
            except (TritonError, RuntimeError) as error:  # it needs more than the device has, or a compiler pass failed
                failed = error
        if failed is not None and not timings:
            raise failed
        winners[key] = min(timings, key=lambda timing: timing[0])[1]
        _save(path(device), winners)
    return winners[key]


def _save(target: Path, winners: dict[str, dict[str, int]]) -> None:
    """Write the file under another name and rename it, because another process may be reading it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        json.dump(winners, file, indent=1)
    os.replace(file.name, target)
