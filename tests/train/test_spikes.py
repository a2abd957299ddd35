import json
import math

import pytest
import torch

from fastgpt.train.spikes import WINDOW, SpikeDetector


def drawn(n, seed=0):
    """So many losses and norms."""
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).abs() + 1


def filled(sigmas, values):
    detector = SpikeDetector(sigmas, torch.device("cpu"))
    for loss, norm in values:
        detector.add(loss, norm)
    return detector


def test_the_limit_is_so_many_standard_deviations_above_the_mean_of_the_last_updates():
    values = drawn(WINDOW + 50)
    norms = values[-WINDOW:, 1].double()
    expected = norms.mean() + 3.0 * norms.std()
    assert filled(3.0, values).norm_limit(torch.tensor(0.0)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_that_stands_out_lets_no_norm_pass():
    values = drawn(WINDOW)
    losses = values[:, 0].double()
    limit = (losses.mean() + 3.0 * losses.std()).item()
    detector = filled(3.0, values)
    assert detector.norm_limit(torch.tensor(limit * 1.001)).item() == -1.0
    assert detector.norm_limit(torch.tensor(limit * 0.999)).item() > 0.0


def test_nothing_stands_out_before_the_window_is_full_nor_without_any_spread():
    assert filled(3.0, drawn(WINDOW - 1)).norm_limit(torch.tensor(1e9)).item() == math.inf
    assert filled(3.0, torch.ones(WINDOW, 2)).norm_limit(torch.tensor(1.0000001)).item() == math.inf


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (1.0, math.inf)])
def test_an_update_that_is_not_finite_leaves_the_window_as_it_is(bad):
    values = drawn(WINDOW)
    detector = filled(3.0, values)
    before = detector.state_dict()
    detector.add(*torch.tensor(bad))
    assert detector.state_dict() == before


@pytest.mark.parametrize("n", [0, 5, WINDOW, WINDOW + 9])
def test_the_state_comes_back_to_the_bit(n):
    detector = filled(3.0, drawn(n))
    other = SpikeDetector(3.0, torch.device("cpu"))
    other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for loss, norm in drawn(WINDOW, seed=1):
        for one in (detector, other):
            one.add(loss, norm)
        assert torch.equal(detector.norm_limit(loss), other.norm_limit(loss))
    assert detector.state_dict() == other.state_dict()


@pytest.mark.parametrize("state", [[[1.0]], [[1.0], [1.0, 2.0]], [[1.0] * (WINDOW + 1)] * 2])
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match="up to 128 updates"):
        SpikeDetector(3.0, torch.device("cpu")).load_state_dict(state)
