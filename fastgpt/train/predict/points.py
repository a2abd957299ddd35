"""Public measurements on GPUs (``points.json``), and which of the training steps among them the model covers.

A point is one published figure with its source. Its ``kind`` is ``step`` (a training step), ``gemm`` (a large matrix
product), ``attention`` or ``copy``. ``card`` names the row of ``fastgpt/gpus.py`` that it was measured on; it is left
out where the card is not certain. (An H100 of unstated form factor counts as SXM if it is faster than the best product
of the PCIe card.) ``modelled_as`` names the program of ``programs.py``; it is left out where none fits.
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

# Fraction of the dense peak that a large product reaches, for cards of a family without a measurement. Cards whose
# power limit keeps the tensor cores below their peak were measured between 0.66 (H100 PCIe) and 0.79 (A100 PCIe).
UNKNOWN_PRODUCT = 0.75


@cache
def points(kind: str | None = None) -> tuple[Point, ...]:
    """Return all points, or those of one kind."""
    return tuple(p for p in json.loads(POINTS.read_text()) if kind in (None, p["kind"]))


def large_product(gpu: GPU) -> float:
    """Return the rate of a large bf16 product as a fraction of the dense peak at the table's clock.

    It is the median of the measurements on the card, or else on its family. It includes the clock under load: GeForce
    cards boost above the table's clock and reach 0.96 (RTX 4090) to 1.12 (RTX 5090), while SXM cards are limited by
    their power.
    """
    measured: dict[str, list[float]] = {}
    for point in points("gemm"):
        large = min(point.get("product", [4096])) >= 4096  # a point without a stated size counts as large
        if "card" in point and point["dtype"] == "bf16" and large:
            card = GPUS[point["card"]]
            share = point["tflops"] / (card.tflops(torch.bfloat16) or float("nan"))
            for key in (card.name, card.family):
                measured.setdefault(key, []).append(share)
    return median(measured.get(gpu.name) or measured.get(gpu.family) or [UNKNOWN_PRODUCT])


def tokens_per_second(point: Point) -> float | None:
    """Return the measured tokens per second of one GPU; ``None`` where the source's figures do not give it."""
    rate = point.get("tokens_per_s")
    if rate is None and "ms_per_iter" in point and "tokens_per_iter" in point:
        rate = 1e3 * point["tokens_per_iter"] / point["ms_per_iter"]
    return None if rate is None else rate / point.get("n_gpus", 1)


# ---- the steps that the model covers ----


def _contradicts_a_longer_context(point: Point) -> bool:
    """Whether the source gives a higher speed for the same run with a longer context.

    No kernel does less work per token for a longer context, so one of the two figures is wrong.
    """
    alike = ("program", "gpu", "n_gpus", "n_layer", "n_embd", "recompute")
    rate = tokens_per_second(point) or 0.0
    return any(
        other["context"] > point["context"]
        and (tokens_per_second(other) or 0.0) > rate
        and all(other.get(key) == point.get(key) for key in alike)
        for other in points("step")
    )


# Causes to leave a step out of the comparison. They depend on facts about the step, never on the model's error, because
# otherwise the error would be selected to be small. The first cause that holds is the one that is reported.
CAUSES: dict[str, Callable[[Point], Any]] = {
    "no speed, micro-batch or vocabulary stated": lambda p: (
        tokens_per_second(p) is None or not p.get("micro_batch") or not p.get("vocab")
    ),
    "of low confidence, or on an unknown card": lambda p: "low" in p["confidence"] or "card" not in p,
    "a program that is not modelled": lambda p: "modelled_as" not in p,
    "not bf16": lambda p: "bf16" not in p["dtype"] or "fp16" in p["dtype"],
    "attention without a flash kernel": lambda p: "materialised" in p["attention"],
    "attention with a sliding window": lambda p: "sliding" in p["attention"],
    "several GPUs without NVLink": lambda p: p["n_gpus"] > 1 and GPUS[p["card"]].halved,
    "heads smaller than 64": lambda p: p["n_embd"] // p["n_head"] < 64,
    "clock locked": lambda p: "locked" in p["gpu"],
    "a vocabulary that is not a multiple of 8": lambda p: p["vocab"] % 8,
    # PyTorch 2.5 brought cuBLAS and attention kernels for Hopper: the same model went from 179 to 142 ms
    # (modded-nanogpt)
    "an H100 before PyTorch 2.5": lambda p: (
        GPUS[p["card"]].capability == 90 and ("torch 2.4" in p["version"] or "2023" in p["version"])
    ),
    "moments offloaded to the host": lambda p: "offloaded" in str(p["recompute"]),
    "slower than the same run with a longer context": _contradicts_a_longer_context,
}


def cause(point: Point) -> str | None:
    """Return why the model does not cover a step; ``None`` if it does."""
    return next((name for name, holds in CAUSES.items() if holds(point)), None)


def is_for_fitting(point: Point) -> bool:
    """Whether a step belongs to the half that is fitted to.

    The hash of its id decides, so a step stays in its half when others are added.
    """
    return hashlib.sha256(point["id"].encode()).digest()[-1] % 2 == 0


def halves() -> tuple[list[Point], list[Point]]:
    """Return the steps that the shares are fitted to, and the held-out steps that judge the fit."""
    counted = [point for point in points("step") if cause(point) is None]
    fitted = [point for point in counted if is_for_fitting(point)]
    return fitted, [point for point in counted if not is_for_fitting(point)]


def excluded() -> Iterator[tuple[str, Point]]:
    """Yield the steps that are left out, each with its cause, in the order of :data:`CAUSES`."""
    for name in CAUSES:
        yield from ((name, point) for point in points("step") if cause(point) == name)
