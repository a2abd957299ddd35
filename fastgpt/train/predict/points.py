"""What others have measured on GPUs (``points.json``), and which of it the model of the step answers for.

A point is a row of public text with its source: a training ``step``, a large product (``gemm``), ``attention`` or a
``copy``. ``card`` names the row of ``fastgpt/gpus.py`` that it was measured on, where that is stated or beyond doubt:
an H100 of unstated form that sustains more than the PCIe card's best product is the socket's. ``modelled_as`` names
the program of ``programs.py``.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastgpt.gpus import GPU, GPUS

POINTS = Path(__file__).parent / "points.json"

Point = dict[str, Any]

# What large products get to on cards with less power than their tensor cores could use: between 0.66 of the dense peak
# on an H100 PCIe and 0.79 on an A100 PCIe. For cards whose family nobody has measured.
UNKNOWN_PRODUCT = 0.75


@cache
def points(kind: str | None = None) -> tuple[Point, ...]:
    """All points, or those of a kind."""
    return tuple(p for p in json.loads(POINTS.read_text()) if kind in (None, p["kind"]))


def large_product(gpu: GPU) -> float:
    """What a large bf16 product gets to, as a share of the dense peak at the table's clock.

    The median of what was measured on the card, else on its family. It holds the clock under load: GeForce cards boost
    beyond the table's and get to 0.96 (RTX 4090) to 1.12 (RTX 5090); cards for the socket are held back by their power.
    """
    measured: dict[str, list[float]] = {}
    for point in points("gemm"):
        large = min(point.get("product", [4096])) >= 4096
        if "card" in point and point["dtype"] == "bf16" and large:
            on = GPUS[point["card"]]
            share = point["tflops"] / (on.tflops(torch.bfloat16) or float("nan"))
            for key in (on.name, on.family):
                measured.setdefault(key, []).append(share)
    return median(measured.get(gpu.name) or measured.get(gpu.family) or [UNKNOWN_PRODUCT])


def tokens_per_second(point: Point) -> float | None:
    """Of one GPU; ``None`` where the source gives no figure that it follows from."""
    rate = point.get("tokens_per_s")
    if rate is None and "ms_per_iter" in point and "tokens_per_iter" in point:
        rate = 1e3 * point["tokens_per_iter"] / point["ms_per_iter"]
    return None if rate is None else rate / point.get("n_gpus", 1)


# ---- which steps count ----


def _is_slower_than_itself(point: Point) -> bool:
    """Whether the same run with a longer context was faster, though no kernel takes less for it: the source errs."""
    alike = ("program", "gpu", "n_gpus", "n_layer", "n_embd", "recompute")
    rate = tokens_per_second(point) or 0.0
    return any(
        other["context"] > point["context"]
        and (tokens_per_second(other) or 0.0) > rate
        and all(other.get(key) == point.get(key) for key in alike)
        for other in points("step")
    )


# Why a step is none that the model answers for: by what is known of it, never by how far off the model is. The first
# that holds is the cause.
CAUSES: dict[str, Callable[[Point], Any]] = {
    "no speed, micro-batch or vocabulary stated": lambda p: (
        tokens_per_second(p) is None or not p.get("micro_batch") or not p.get("vocab")
    ),
    "of low confidence, or its card unknown": lambda p: "low" in p["confidence"] or "card" not in p,
    "a program that is not modelled": lambda p: "modelled_as" not in p,
    "not bf16": lambda p: "bf16" not in p["dtype"] or "fp16" in p["dtype"],
    "attention not by a flash kernel": lambda p: "materialised" in p["attention"],
    "attention in a sliding window": lambda p: "sliding" in p["attention"],
    "several GPUs without NVLink": lambda p: p["n_gpus"] > 1 and GPUS[p["card"]].halved,
    "heads of less than 64": lambda p: p["n_embd"] // p["n_head"] < 64,
    "clock held down": lambda p: "locked" in p["gpu"],
    "a vocabulary that is no multiple of 8": lambda p: p["vocab"] % 8,
    # its cuBLAS and attention were made for Hopper only then: the same model went from 179 to 142 ms (modded-nanogpt)
    "an H100 before PyTorch 2.5": lambda p: (
        GPUS[p["card"]].capability == 90 and ("torch 2.4" in p["version"] or "2023" in p["version"])
    ),
    "moments kept by the host": lambda p: "offloaded" in str(p["recompute"]),
    "slower than itself with a longer context": _is_slower_than_itself,
}


def cause(point: Point) -> str | None:
    """Why the model does not answer for a step; ``None`` if it does."""
    return next((name for name, holds in CAUSES.items() if holds(point)), None)


def is_for_fitting(point: Point) -> bool:
    """Which half a step belongs to: a coin that its name tosses, so that none changes sides as others come."""
    return hashlib.sha256(point["id"].encode()).digest()[-1] % 2 == 0


def halves() -> tuple[list[Point], list[Point]]:
    """The steps that shares are fitted to, and those that they are judged by."""
    counted = [point for point in points("step") if cause(point) is None]
    fitted = [point for point in counted if is_for_fitting(point)]
    return fitted, [point for point in counted if not is_for_fitting(point)]


def excluded() -> Iterator[tuple[str, Point]]:
    """The other steps, each with its cause, in the order of causes."""
    for name in CAUSES:
        yield from ((name, point) for point in points("step") if cause(point) == name)
