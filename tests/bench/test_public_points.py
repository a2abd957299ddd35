"""What others have measured (``bench/public_points.json``), and the shares that the plan takes from it."""

import json
from statistics import median

import pytest
import torch

from bench.timing import REPOSITORY
from fastgpt.gpus import GPUS
from fastgpt.train import plan

POINTS = json.loads((REPOSITORY / "bench" / "public_points.json").read_text())


def card(point):
    """The table's row, where the point names a card of it at its usual power and clock."""
    names = {"A100-SXM4-40GB (Modal)": "NVIDIA A100-SXM4-40GB", "A100 SXM4 80GB": "NVIDIA A100-SXM4-80GB",
             "H100 80GB HBM3 (SXM)": "NVIDIA H100 80GB HBM3", "H100 SXM": "NVIDIA H100 80GB HBM3",
             "A100 SXM": "NVIDIA A100-SXM4-80GB", "A100 40GB": "NVIDIA A100-SXM4-40GB",
             "A100 80GB": "NVIDIA A100-SXM4-80GB"}  # fmt: skip
    for name in (names.get(point["gpu"]), f"NVIDIA GeForce {point['gpu']}", f"NVIDIA {point['gpu']}"):
        if name in GPUS:
            return GPUS[name]
    return None


def test_every_point_has_a_figure_and_a_source():
    assert len(POINTS) > 200
    for point in POINTS:
        assert point["source"].startswith(("github:", "https://"))
        figures = {"tokens_per_s", "ms_per_iter", "tflops", "gb_per_s"}
        assert (
            figures & point.keys()
            or point["id"] in ("tinyllama-A100-40", "nanogpt-124m-4090-mfu")
            or (point["id"].startswith("titan"))
        ), point["id"]


def shares(kind):
    """Measured over the table's, by compute capability."""
    found = {}
    for point in POINTS:
        gpu = card(point)
        if gpu is None or point["kind"] != kind:
            continue
        if kind == "copy":
            found.setdefault(gpu.capability, []).append(point["gb_per_s"] / gpu.bandwidth_gb_s)
        elif point["dtype"] == "bf16" and point.get("product", [4096])[0] >= 4096:
            fed = gpu.halved or (gpu.capability in (80, 90) and "PCIe" not in gpu.name)
            key = gpu.capability if fed else "with less power"
            found.setdefault(key, []).append(point["tflops"] / gpu.tflops(torch.bfloat16))
    return found


@pytest.mark.parametrize("capability", [*plan.GEMM_SHARE, "with less power"])
def test_large_products_run_at_the_share_that_was_measured(capability):
    share = plan.GEMM_SHARE.get(capability, plan.OTHER_GEMM_SHARE)
    assert share == pytest.approx(median(shares("gemm")[capability]), rel=0.1)


def test_copies_run_at_the_share_that_was_measured():
    measured = [share for of_one_capability in shares("copy").values() for share in of_one_capability]
    assert median(measured) == pytest.approx(plan.COPY_SHARE, rel=0.05)
