"""Launch configurations measured on the device at hand, instead of those shipped. Opt-in: ``FASTGPT_AUTOTUNE=1``.

The first call of an attention kernel on a new shape then compiles and times every candidate, which takes minutes, and
keeps the fastest in ``~/.cache/fastgpt`` (``XDG_CACHE_HOME`` is honoured), one file a device and Triton version.
Another configuration may add numbers up in another order: results stay deterministic, but for one cache only.
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
    if m * n * 32 // warps <= 128 * 128 * 8  # more scores a thread than this never fit its registers
]


def enabled() -> bool:
    """Whether the user asked for it."""
    return os.environ.get("FASTGPT_AUTOTUNE", "0") not in ("", "0")


def _time(run: Callable[[], None]) -> float:
    """Median milliseconds."""
    return triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")


def path(device: Device) -> Path:
    """Where the winners of a device are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return folder / f"{name}-triton-{triton.__version__}.json"


@cache
def _winners(device: Device) -> dict[str, dict[str, int]]:
    try:
        return json.loads(path(device).read_text())
    except (OSError, ValueError):  # none yet, or spoilt: measured anew
        return {}


def best(
    device: Device, key: str, shipped: dict[str, int], run: Callable[[dict[str, int]], None], time: Any = _time
) -> dict[str, int]:
    """The fastest configuration for launches of the kind ``key``: from the cache, or measured now.

    While a CUDA graph is captured nothing can be measured, nor a kernel loaded: it is the one that ran before.

    Args:
        device: what ``run`` runs on.
        key: kernel, dtype and shape.
        shipped: the configuration that the others have to beat.
        run: launches the kernel in a configuration; called many times.
        time: milliseconds that a callable takes.
    """
    winners = _winners(device)
    if torch.cuda.is_current_stream_capturing():
        return winners.get(key, shipped)
    if key not in winners:
        timings = []
        for candidate in [shipped, *CANDIDATES]:
            try:
                timings.append((time(lambda candidate=candidate: run(candidate)), candidate))
            except TritonError:  # it needs more than the device has, or does not compile
                continue
        winners[key] = min(timings, key=lambda timing: timing[0])[1]
        _save(path(device), winners)
    return winners[key]


def _save(target: Path, winners: dict[str, dict[str, int]]) -> None:
    """Whole or not at all: another process may be reading."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        json.dump(winners, file, indent=1)
    os.replace(file.name, target)
