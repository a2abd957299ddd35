import math

import pytest

from fastgpt.train.schedule import learning_rate


def nanogpt_learning_rate(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """As nanoGPT's train.py has it."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize(
    ("peak", "floor", "warmup_iters", "decay_iters"),
    [(6e-4, 6e-5, 2000, 600_000), (1e-3, 1e-4, 100, 5000), (1.0, 0.0, 0, 10), (3e-4, 3e-4, 7, 8), (0.5, 0.1, 9, 1000)],
)
def test_every_step_has_nanogpts_rate(peak, floor, warmup_iters, decay_iters):
    edges = {0, 1, warmup_iters - 1, warmup_iters, warmup_iters + 1, decay_iters - 1, decay_iters, decay_iters + 1}
    steps = {step for step in edges if step >= 0} | set(range(0, 2 * decay_iters, max(1, decay_iters // 997)))
    for step in steps:
        got = learning_rate(step, peak=peak, floor=floor, warmup_iters=warmup_iters, decay_iters=decay_iters)
        expected = nanogpt_learning_rate(step, peak, floor, warmup_iters, decay_iters)
        assert math.isclose(got, expected, rel_tol=1e-12, abs_tol=1e-15), step


def test_the_rate_stays_at_its_peak_and_falls_linearly_during_the_cooldown():
    rates = [learning_rate(i, peak=1.0, floor=0.1, warmup_iters=10, decay_iters=100, cooldown=0.4) for i in range(120)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.55)  # halfway
    assert rates[99] == pytest.approx(0.1 + 0.9 / 40)
    assert rates[100:] == [0.1] * 20


def test_a_cooldown_of_the_whole_run_begins_with_the_end_of_the_warm_up():
    rates = [learning_rate(i, peak=1.0, floor=0.0, warmup_iters=4, decay_iters=8, cooldown=1.0) for i in range(9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_the_first_update_already_learns():
    assert learning_rate(0, peak=1.0, floor=0.1, warmup_iters=4, decay_iters=100) == 0.2


def test_the_warm_up_rises_to_the_peak_and_the_cosine_falls_to_the_floor():
    rates = [learning_rate(i, peak=1.0, floor=0.1, warmup_iters=10, decay_iters=100) for i in range(150)]
    assert rates.index(max(rates)) == 10
    assert rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)  # halfway
    assert rates[100:] == [0.1] * 50


def test_a_decay_that_ends_with_the_warm_up_goes_straight_to_the_floor():
    rates = [learning_rate(i, peak=1.0, floor=0.1, warmup_iters=4, decay_iters=4) for i in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.1, 0.1])
