"""Public measurements: every point has a source, and the constants that are read off them agree with them."""

from statistics import median

import numpy as np
import pytest

from fastgpt.gpus import GPUS
from fastgpt.train.predict import points, roofline
from fastgpt.train.predict.programs import PROGRAMS

WITHOUT_SPEED = {"tinyllama-A100-40", "nanogpt-124m-4090-mfu", "titan-8B-8xH100-eager", "titan-8B-8xH100-compile"}


def test_every_point_has_a_figure_and_a_source():
    assert len(points.points()) > 200
    for point in points.points():
        assert point["source"].startswith(("github:", "https://"))
        assert {"tokens_per_s", "ms_per_iter", "tflops", "gb_per_s"} & point.keys() or point["id"] in WITHOUT_SPEED


def test_names_are_unique_and_cards_and_programs_are_known():
    assert len({point["id"] for point in points.points()}) == len(points.points())
    for point in points.points():
        assert point.get("card", "NVIDIA L4") in GPUS, point["id"]
        assert point.get("modelled_as", "nanoGPT") in PROGRAMS, point["id"]


def test_a_card_that_is_overclocked_or_held_back_stands_for_no_row_of_the_table():
    for point in points.points():
        if any(word in point["gpu"] for word in ("OC", "mod", "400W", "248 W", "HBM2e")):
            assert "card" not in point, point["id"]


# ---- constants that are read off the points ----


@pytest.mark.parametrize(
    ("card", "share"),
    [
        ("NVIDIA GeForce RTX 4090", 158.54 / 165.15),  # measured on the card: the median of three sizes
        ("NVIDIA H100 80GB HBM3", 797.51 / 989.43),
        ("NVIDIA H200", 797.51 / 989.43),  # measured on its family
        ("NVIDIA B200", points.UNKNOWN_PRODUCT),
    ],
)
def test_a_large_product_runs_as_measured_on_the_card_or_its_family(card, share):
    assert points.large_product(GPUS[card]) == pytest.approx(share, rel=1e-3)


def test_a_card_without_a_measurement_boosts_like_its_family():
    measured = [points.large_product(GPUS[f"NVIDIA GeForce RTX {n}"]) for n in ("4060 Ti", "4070 SUPER", "4090")]
    assert min(measured) < points.large_product(GPUS["NVIDIA GeForce RTX 4070"]) < max(measured)
    assert points.large_product(GPUS["NVIDIA GeForce RTX 4070"]) == pytest.approx(1.04, abs=0.02)


def test_copies_run_at_the_share_that_was_measured():
    copies = [p for p in points.points("copy") if "card" in p]
    measured = [p["gb_per_s"] / GPUS[p["card"]].bandwidth_gb_s for p in copies]
    assert median(measured) == pytest.approx(roofline.COPY_SHARE, rel=0.05)


@pytest.mark.parametrize("card", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_reaches_half_its_rate_at_the_length_that_was_measured(card, head_dim):
    """The model 1 / rate = (1 + length / T) / rate of long sequences is a line in 1 / T: slope / intercept = length."""
    series = [
        (1 / p["seqlen"], 1 / p["tflops"])
        for p in points.points("attention")
        if (p["program"], p.get("card"), p["head_dim"]) == ("FlashAttention-2", card, head_dim) and p["causal"]
    ]
    assert len(series) == 6
    slope, at_infinity = np.polyfit(*np.array(series).T, 1)
    assert slope / at_infinity == pytest.approx(roofline.HALF_RATE_LENGTH, rel=0.15)


# ---- the steps that the model covers ----


def test_every_step_is_fitted_or_judged_or_has_a_cause():
    fitted, judged = points.halves()
    others = [point for _, point in points.excluded()]
    ids = [point["id"] for point in (*fitted, *judged, *others)]
    assert sorted(ids) == sorted(point["id"] for point in points.points("step"))
    assert len(judged) >= 20
    assert {cause for cause, _ in points.excluded()} == set(points.CAUSES)  # every cause applies to a step


def test_a_step_keeps_its_side_as_others_come(monkeypatch):
    fitted, _ = points.halves()
    fewer = points.points("step")[::2]
    monkeypatch.setattr(points, "points", lambda kind=None: fewer)
    assert points.halves()[0] == [point for point in fitted if point in fewer]


def test_no_cause_but_the_sources_own_contradiction_changes_with_the_speed():
    """So a step cannot be left out because of the model's error."""
    for point in points.points("step"):
        rate = points.tokens_per_second(point)
        if rate is not None and points.cause(point) != "slower than the same run with a longer context":
            faster = {**point, "tokens_per_s": 2 * rate * point["n_gpus"]}
            assert points.cause(faster) == points.cause(point), point["id"]


def test_speed_is_of_one_gpu_and_follows_from_the_time_where_it_is_not_stated():
    point = {"ms_per_iter": 500.0, "tokens_per_iter": 1000, "n_gpus": 4}
    assert points.tokens_per_second(point) == 500.0
    assert points.tokens_per_second({**point, "tokens_per_s": 8000}) == 2000.0
    assert points.tokens_per_second({"ms_per_iter": 500.0}) is None
