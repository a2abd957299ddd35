"""The fit of the model's shares, and bounds on its error for steps that it was not fitted to."""

import math
from dataclasses import replace
from statistics import mean

import pytest

from fastgpt.gpus import GPUS
from fastgpt.train.predict import fit, points, roofline
from fastgpt.train.predict.roofline import Shares


def test_the_shares_in_use_are_those_that_the_fit_gives():
    found = fit.fit(points.halves()[0])
    assert found.keys() == roofline.GPU_SHARES.keys()
    for family, shares in found.items():
        for share in ("product", "attention", "elementwise", "reuse"):
            in_use = getattr(roofline.GPU_SHARES[family], share)
            assert in_use == pytest.approx(getattr(shares, share), abs=6e-4), family


def test_steps_that_were_not_fitted_to_are_predicted_within_a_tenth_in_the_mean_and_a_fifth_at_most():
    off = {c.point["id"]: abs(c.error) for c in fit.comparisons() if c.role == "judged"}
    assert len(off) >= 20
    assert mean(off.values()) <= 0.10
    assert max(off.values()) <= 0.20, max(off, key=off.get)


def test_mpts_many_steps_do_not_hide_the_other_programs():
    programs = {}
    for c in fit.comparisons():
        if c.role == "judged":
            programs.setdefault(c.point["modelled_as"], []).append(abs(c.error))
    del programs["llm-foundry"]
    assert len(programs) >= 5
    assert mean(off for of_program in programs.values() for off in of_program) <= 0.10
    assert max(map(mean, programs.values())) <= 0.15  # llm.c


def test_the_reference_card_is_predicted_within_a_tenth():
    off = [c.error for c in fit.comparisons() if c.role in ("fitted", "judged") and "4070" in c.point["card"]]
    assert len(off) == 2
    assert max(map(abs, off)) < 0.10


def test_no_halving_of_the_steps_is_off_by_more_than_a_tenth_in_the_mean():
    """The error does not depend on how the steps are split: with the halves swapped, and with every second step."""
    steps = [step for half in points.halves() for step in half]
    for fitted, judged in (points.halves()[::-1], (steps[::2], steps[1::2])):
        shares = fit.fit(fitted)
        of = [shares.get(GPUS[p["card"]].family, Shares()) for p in judged]
        assert mean(abs(fit.log_error(p, s)) for p, s in zip(judged, of, strict=True)) < 0.10


def test_the_fit_recovers_the_shares_that_speeds_were_computed_with(monkeypatch):
    steps = [p for p in points.halves()[0] if "sm_89 GeForce" in GPUS[p["card"]].family]
    true = Shares(0.9, 0.4, reuse=0.3)
    made = [{**p, "n_gpus": 1, "tokens_per_s": fit.predicted(p, true)} for p in steps]
    monkeypatch.setattr(fit, "NOISE", 1e-4)  # so small that the prior has no weight
    (found,) = fit.fit(made).values()
    assert (found.product, found.attention) == pytest.approx((0.9, 0.4), rel=1e-2)


def test_a_single_step_moves_a_share_little():
    one = points.halves()[0][:1]
    (found,) = fit.fit(one).values()
    assert abs(fit.log_error(one[0], found)) < abs(fit.log_error(one[0], Shares()))
    assert abs(math.log(found.product)) < 2 * fit.PRIOR_STD["product"]


def test_errors_are_relative_to_what_was_measured():
    c = fit.Comparison({}, "judged", 50.0, 60.0)
    assert c.error == pytest.approx(0.2)
    assert replace(c, predicted=None).error is None
    assert replace(c, measured=None).error is None


def test_the_interval_is_the_least_that_holds_nine_of_ten_pairs_of_a_program_and_a_card():
    by_pair = {}
    for c in fit.comparisons():
        if c.role == "judged":
            by_pair.setdefault((c.point["modelled_as"], c.point["card"]), []).append(c)

    def share_within(factor):
        held = [all(1 / factor <= c.measured / c.predicted <= factor for c in pair) for pair in by_pair.values()]
        return sum(held) / len(held)

    assert len(by_pair) >= 10
    assert share_within(fit.factor() * 1.0001) >= 0.9
    assert share_within(fit.factor() * 0.9999) < 0.9
    low, high = fit.interval(1000.0)
    assert (1000.0 / low, high / 1000.0) == pytest.approx((fit.factor(), fit.factor()))


def test_what_is_not_known_well_enough_is_not_predicted():
    by_id = {c.point["id"]: c for c in fit.comparisons()}
    assert by_id["gpjt-3090-fp32"].predicted is None
    assert by_id["titan-8B-8xH100-compile"].error is None
    assert by_id["mng-modern-8xH100"].role == "an H100 before PyTorch 2.5"
    assert by_id["mng-modern-8xH100"].error > 0.2
