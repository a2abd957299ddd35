import math
import re

import numpy as np
import pytest
import torch

from fastgpt.train.config import resolve
from fastgpt.train.diagnose import (
    CHECKPOINTS,
    DATA,
    EVALUATION,
    LOGGING,
    Facts,
    Monitor,
    preflight,
    wanted_tokens_per_step,
)
from fastgpt.train.diagnose.statistics import difference, standard_error
from fastgpt.train.log import mfu_sentence
from fastgpt.train.presets import PRESETS
from fastgpt.train.schedule import learning_rate

TRAINING_TOKENS = {
    "stdlib": 8_999_893, "shakespeare-char": 1_003_854, "openwebtext": 9_035_582_198, "fineweb10b": 9_853_989_344,
}  # fmt: skip
VOCABULARY = {"stdlib": 256, "shakespeare-char": 65}


def facts(preset="gpt2-124m", *, vocab_size=None, known=None, **flags):
    """Facts of a preset with flags; ``known`` are further fields of ``Facts``."""
    config = resolve({"preset": preset, "learning_rate": PRESETS[preset]["learning_rate"], **flags}, PRESETS)
    if config.batch_size is None:
        config = config.with_batch_size(16)
    gpt_config = config.gpt_config(vocab_size or VOCABULARY.get(config.dataset, 50304))
    return Facts(config, gpt_config, **{"dataset_tokens": TRAINING_TOKENS[config.dataset], **(known or {})})


def short(steps=3000, **flags):
    """Facts of GPT-2 124M for ``steps`` updates."""
    return facts(**{"max_iters": steps, "lr_decay_iters": steps, "warmup_iters": steps // 20, **flags})


def rate_of(run, step):
    c = run.config
    return learning_rate(
        step - 1, peak=c.learning_rate, floor=c.min_lr, warmup_iters=c.warmup_iters, decay_iters=c.lr_decay_iters
    )


def law(run, steps):
    """The loss of a healthy run: Chinchilla's law, plus a term for the learning rate, and at most ln V."""
    c, N = run.config, run.gpt_config.n_params_without_positions
    rates = np.array([rate_of(run, step) for step in steps]) / c.learning_rate
    tokens = np.asarray(steps) * c.tokens_per_step
    return np.minimum(10.82, 1.82 + 482 / N**0.348 + 2085 / tokens**0.366 + 0.15 * rates)


def series(run, seed, noise=0.04, last=None):
    """Steps, losses, gradient norms and learning rates as a healthy run logs them. The noise is partly correlated."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, (last or run.config.max_iters) + 1)
    wander = np.convolve(rng.normal(0, noise / 3, len(steps) + 19), np.ones(20) / math.sqrt(20), "valid")
    losses = law(run, steps) + wander + noise * rng.standard_t(8, len(steps))
    norms = (0.3 + 3 * np.exp(-steps / 50)) * np.exp(rng.normal(0, 0.2, len(steps)))
    return steps, losses, norms, [rate_of(run, step) for step in steps]


def feed(diagnosis, steps, losses, norms, rates, seconds=None):
    """All findings of these updates."""
    found = []
    for step, loss, norm, rate in zip(steps, losses, norms, rates, strict=True):
        found += diagnosis.update(int(step), float(loss), float(norm), rate, seconds)
    return found


def batches(seed, level, n=20, spread=0.1, paired=0.008, start=0):
    """Losses of an evaluation's batches around ``level``.

    ``spread`` is the deviation between batches, the same for every ``start``; ``paired`` the one that changes with it.
    """
    hardness = np.random.default_rng((seed, 1)).normal(0, spread, n)
    return list(level + hardness - hardness.mean() + np.random.default_rng((seed, 2, start)).normal(0, paired, n))


def only(findings, code):
    """The only finding, which must have this code."""
    assert [finding.code for finding in findings] == [code]
    return findings[0]


# ---- clean runs ----


# nanoGPT's own defaults are 295 billion tokens, of which the diagnosis rightly says that they are many.
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "nanogpt"])
@pytest.mark.parametrize("n_sm", [None, 46, 132])
def test_no_preset_as_it_is_has_a_finding_before_it_starts(preset, n_sm):
    assert preflight.check(facts(preset, known={"n_sm": n_sm, "predicted_seconds": 0.005 if n_sm else None})) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_finding(seed):
    run = short(3000, known={"predicted_seconds": 1.0})
    diagnosis = Monitor(run)
    steps, losses, norms, rates = series(run, seed)
    timings = 1.1 * np.exp(np.random.default_rng(seed).normal(0, 0.05, len(steps)))
    for i, step in enumerate(steps):
        diagnosis.update(int(step), float(losses[i]), float(norms[i]), rates[i], float(timings[i]))
        if step % 250 == 0:
            level = law(run, [step])[0]
            diagnosis.evaluation(
                int(step), batches(seed, level, start=step), batches(seed + 100, level + 0.02, start=step)
            )
    assert diagnosis.findings == []


@pytest.mark.parametrize("seed", range(5))
def test_a_short_run_of_noisy_batches_has_no_finding(seed):
    run = facts("quickstart")
    rng = np.random.default_rng(seed)
    steps = np.arange(10, 801, 10)
    losses = 1.5 + 4 * (steps / 10.0) ** -0.5 + rng.normal(0, 0.12, len(steps))
    norms = np.exp(rng.normal(0, 0.25, len(steps)))
    assert feed(Monitor(run), steps, losses, norms, [rate_of(run, step) for step in steps]) == []


def test_a_finding_of_a_kind_is_reported_once_and_kept():
    run = short(1000, dropout=0.1)
    diagnosis = Monitor(run)
    steps, losses, norms, rates = series(run, 0)
    losses[[500, 600]] += 3
    norms[700] *= 100
    found = feed(diagnosis, steps, losses, norms, rates)
    assert [(finding.code, finding.step) for finding in found] == [("loss-spike", 501), ("gradient-spike", 701)]
    assert [finding.code for finding in diagnosis.findings] == [
        "dropout-on-fresh-data", "loss-spike", "gradient-spike",
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_run():
    run = short(20_000)
    diagnosis = Monitor(run)
    feed(diagnosis, *series(run, 0, last=12_000))
    held = list(vars(diagnosis).values())
    held += [value for part in held if hasattr(part, "__dict__") for value in vars(part).values()]
    assert max(len(value) for value in held if hasattr(value, "__len__")) <= 512


def test_numbers_that_are_not_finite_are_ignored():
    diagnosis = Monitor(short(1000))
    for step in range(1, 200):
        assert diagnosis.update(step, math.nan, math.inf, 1e-3, 0.0) == []
        assert diagnosis.update(step, math.inf, None, 1e-3, None) == []
    assert diagnosis.evaluation(100, [math.nan] * 5, [1.0] * 5) == []
    assert diagnosis.evaluation(200, [1.0], [1.0]) == []


# ---- a run with another size than its name states ----


def test_a_124m_of_another_size_is_found_before_it_starts():
    found = preflight.check(facts(n_embd=384, n_head=6, dropout=0.1, max_iters=14_500, lr_decay_iters=14_500))
    texts = {finding.code: finding.text for finding in found}
    assert texts.keys() == {"named-size", "dropout-on-fresh-data", "past-chinchilla"}
    assert all(finding.step == 0 for finding in found)
    assert "gpt2-124m with n_embd=384: 40.56M parameters, not 124M" in texts["named-size"]
    assert (
        "The unchanged preset has n_embd=768. If this size is intended, add --expect_params 40.6M"
        in texts["named-size"]
    )
    assert "7.6B tokens, 187 per parameter, 9.4 times Chinchilla's 20" in texts["past-chinchilla"]
    assert "124M parameters on 2.5B tokens" in texts["past-chinchilla"]
    assert (
        "dropout is 0.1, but the run covers only 0.77 of an epoch (7.6B of 9.9B tokens)"
        in texts["dropout-on-fresh-data"]
    )


def test_the_same_run_without_these_faults_has_no_finding():
    assert preflight.check(facts(max_iters=14_500, lr_decay_iters=14_500)) == []


# ---- before the run ----


@pytest.mark.parametrize(
    ("preset", "flags", "words"),
    [
        ("gpt2-124m", {"n_layer": 6}, "n_layer=6: 81.11M parameters, not 124M"),
        ("gpt2-124m", {"n_layer": 6, "n_embd": 384}, "n_layer=6 and n_embd=384: 29.94M parameters, not 124M"),
        ("gpt2-350m", {"vocab_size": 65}, "a vocabulary of 65: 302.11M parameters, not 350M"),
        ("gpt2-1558m", {"n_embd": 3200}, "n_embd=3200: 6.06B parameters, not 1558M"),
    ],
)
def test_a_preset_that_is_no_longer_what_its_name_says_is_found(preset, flags, words):
    found = only([f for f in preflight.check(facts(preset, **flags)) if f.code == "named-size"], "named-size")
    assert words in found.text


@pytest.mark.parametrize(
    "flags",
    [{}, {"bias": True}, {"block_size": 256, "batch_size": 64}, {"block_size": 4096, "batch_size": 4}, {"n_head": 6}],
)
def test_changes_that_leave_the_size_alone_are_not_named(flags):
    assert preflight.check(facts("gpt2-124m", **flags)) == []


def test_a_size_that_was_expected_is_not_named():
    assert preflight.check(facts(n_embd=384, expect_params="40.6M", max_iters=2000, lr_decay_iters=2000)) == []


def test_dropout_is_found_below_one_epoch_alone():
    epoch = {"max_iters": 1000, "lr_decay_iters": 1000, "warmup_iters": 100, "dropout": 0.1}
    tokens = 1000 * facts(**epoch).config.tokens_per_step
    assert only(preflight.check(facts(**epoch, known={"dataset_tokens": tokens + 1})), "dropout-on-fresh-data")
    assert preflight.check(facts(**epoch, known={"dataset_tokens": tokens})) == []


def test_a_run_far_past_chinchilla_is_found_and_one_at_four_times_is_not():
    assert preflight.check(facts(max_iters=19_073)) == []  # 81 a parameter
    found = only(preflight.check(facts(max_iters=30_000, lr_decay_iters=30_000)), "past-chinchilla")
    assert "15.7B tokens, 127 per parameter, 6.4 times Chinchilla's 20" in found.text


def test_chinchillas_law_is_not_applied_to_toys():
    forever = {"max_iters": 1_000_000, "lr_decay_iters": 1_000_000}
    assert preflight.check(facts("quickstart", **forever)) == []
    assert preflight.check(facts("shakespeare-char", **forever)) == []  # 10.6M parameters, 65 characters
    assert preflight.check(facts("quickstart", vocab_size=50304, **forever)) == []  # 7.3M parameters


def test_a_decay_that_ends_after_the_run_is_found_with_the_rate_that_is_left():
    found = only(preflight.check(facts(max_iters=5000, lr_decay_iters=10_000)), "schedule-end")
    left = rate_of(facts(max_iters=5000, lr_decay_iters=10_000), 5000) / 6e-4
    assert 0.3 < left < 0.9
    assert f"still at {left:.0%} of its peak when the run ends at step 5,000" in found.text
    assert "--lr_decay_iters 5000" in found.text


def test_a_decay_that_ends_before_the_run_is_found_with_the_time_at_the_floor():
    found = only(preflight.check(facts(max_iters=10_000, lr_decay_iters=6000)), "schedule-end")
    assert "floor of 6e-05 from step 6,000 on, for the last 40% of the run" in found.text


@pytest.mark.parametrize(
    "flags",
    [
        {"max_iters": 5000, "lr_decay_iters": 5000},
        {"max_iters": 5000, "lr_decay_iters": 5001},
        {"max_iters": 5000, "lr_decay_iters": 4900},
        {"max_iters": 5000, "lr_decay_iters": 10_000, "min_lr": 6e-4},
        {"max_iters": 5000, "lr_decay_iters": 2000, "min_lr": 6e-4},
    ],
)
def test_a_schedule_that_ends_with_the_run_or_never_is_not_found(flags):
    assert preflight.check(facts(**flags)) == []


@pytest.mark.parametrize(
    ("batch_size", "block_size", "wanted", "words"),
    [
        (12, 1024, 524_288, "--batch_size 8 --gradient_accumulation_steps 64 for exactly that number"),
        (16, 1024, 100_000, "--batch_size 14 --gradient_accumulation_steps 7 for the nearest possible number, 100,352"),
        (64, 1024, 1000, "--batch_size 1 --gradient_accumulation_steps 1 for the nearest possible number, 1,024"),
    ],
)
def test_tokens_that_the_accumulation_misses_are_found_with_the_choice_that_reaches_them(
    batch_size, block_size, wanted, words
):
    flags = {"batch_size": batch_size, "block_size": block_size, "gradient_accumulation_steps": 5}
    short_run = {"max_iters": 2000, "lr_decay_iters": 2000}
    found = only(
        preflight.check(facts(**flags, **short_run, known={"wanted_tokens_per_step": wanted})), "tokens-per-step"
    )
    assert words in found.text
    assert f"{5 * batch_size * block_size:,} tokens" in found.text
    assert f"not the requested {wanted:,}" in found.text


@pytest.mark.parametrize("wanted", [None, 16 * 32 * 1024])
def test_tokens_that_are_reached_or_were_not_requested_are_not_found(wanted):
    assert preflight.check(facts(known={"wanted_tokens_per_step": wanted})) == []


def test_the_requested_tokens_are_the_flags_or_the_presets():
    assert wanted_tokens_per_step(facts().config) == 2**19
    assert wanted_tokens_per_step(facts(total_batch_size=4096, block_size=64).config) == 4096
    assert wanted_tokens_per_step(facts(batch_size=12, gradient_accumulation_steps=40).config) == 2**19
    assert wanted_tokens_per_step(facts("quickstart").config) is None


def test_products_that_cannot_fill_the_gpu_are_found():
    run = facts("quickstart", batch_size=2, gradient_accumulation_steps=8, known={"n_sm": 46})
    found = only(preflight.check(run), "small-products")
    assert "(256 tokens x width 128) have only 8 tiles for the GPU's 46 multiprocessors: at most 17%" in found.text
    assert "Use --batch_size 16 to fill the GPU" in found.text
    assert "--gradient_accumulation_steps 1 to keep the tokens per update" in found.text


def test_products_that_fill_the_gpu_or_run_on_a_cpu_or_for_minutes_are_not_found():
    small = {"preset": "quickstart", "batch_size": 2}
    assert preflight.check(facts("quickstart", known={"n_sm": 46})) == []
    assert preflight.check(facts(**small)) == []
    assert preflight.check(facts(**small, known={"n_sm": 46, "predicted_seconds": 0.1})) == []
    assert only(preflight.check(facts(**small, known={"n_sm": 46, "predicted_seconds": 1.0})), "small-products")


# ---- spikes ----


def test_a_loss_spike_is_found_with_its_step_its_value_and_the_usual_one():
    run = short(1000)
    steps, losses, norms, rates = series(run, 0)
    losses[799] += 1.0
    found = only(feed(Monitor(run), steps, losses, norms, rates), "loss-spike")
    assert found.step == 800
    assert "--grad_clip" not in found.text  # the preset clips
    spread = np.std(losses[698:799])
    assert int(re.search(r"(\d+) standard deviations", found.text)[1]) == pytest.approx(1.0 / spread, rel=0.25)
    median = np.median(losses[698:799])
    assert f"step 800: the loss jumped to {losses[799]:.2f} from a median of {median:.2f}" in found.text


def test_a_gradient_spike_is_found_and_says_whether_it_was_clipped():
    for clip, words in ((1.0, "It was clipped to 1"), (0.0, "It was not clipped: --grad_clip 1")):
        run = short(1000, grad_clip=clip)
        steps, losses, norms, rates = series(run, 1)
        norms[599] = 12.0
        found = only(feed(Monitor(run), steps, losses, norms, rates), "gradient-spike")
        assert found.step == 600
        assert "the gradient norm jumped to 12 from a median of 0.29" in found.text
        assert words in found.text


def test_a_fall_is_no_spike_and_neither_is_a_small_rise_where_there_was_no_noise():
    run = short(1000)
    steps = np.arange(1, 101)
    losses = 3.0 + 1e-9 * (steps % 2) + 0.05 * (steps == 50) - 2.0 * (steps > 60)
    norms = 1.0 + 1e-6 * (steps % 2) + (steps == 50)
    assert feed(Monitor(run), steps, losses, norms, np.full(100, 6e-4)) == []


# ---- the plateau ----


def stuck(run, seed, since, noise=0.02):
    """A run that learns nothing after step ``since``."""
    steps, losses, norms, rates = series(run, seed, noise=noise)
    healthy = law(run, steps)
    return steps, losses - healthy + np.where(steps > since, healthy[since - 1], healthy), norms, rates


LONG = {"max_iters": 20_000, "lr_decay_iters": 20_000}


def test_a_plateau_is_found_and_its_likeliest_cause_is_the_rate():
    run = short(20_000, **LONG, warmup_iters=500)
    steps, losses, norms, rates = (values[:8000] for values in stuck(run, 0, since=4000))
    found = only(feed(Monitor(run), steps, losses, norms, rates), "plateau")
    assert 4000 < found.step < 8000
    level = law(run, [4000])[0]
    assert re.search(rf"stopped falling at {level:.2f}", found.text)
    share = rate_of(run, found.step) / 6e-4
    assert f"most likely first: the learning rate is still at {share:.0%} of its peak" in found.text


def test_a_plateaus_causes_come_in_order():
    run = short(
        20_000, **LONG, warmup_iters=500, n_embd=384, expect_params="40.6M", known={"dataset_tokens": 100_000_000}
    )
    steps, losses, norms, rates = (values[:9000] for values in stuck(run, 0, since=4000))
    diagnosis = Monitor(run)
    feed(diagnosis, steps, losses, norms, rates)
    text = next(finding.text for finding in diagnosis.findings if finding.code == "plateau")
    step = next(finding.step for finding in diagnosis.findings if finding.code == "plateau")
    tokens = step * run.config.tokens_per_step
    causes = [
        "the learning rate is still at",
        f"{tokens / run.gpt_config.n_params_without_positions:.0f} per parameter",
        f"{tokens / 1e8:.1f} epochs",
    ]
    places = [text.index(cause) for cause in causes]
    assert "most likely first" in text
    assert places == sorted(places)


def test_a_run_that_has_learnt_nothing_is_reported_as_that_first():
    run = short(2000)
    steps, _, norms, rates = series(run, 0, last=1500)
    losses = 10.8 + np.random.default_rng(0).normal(0, 0.01, 1500)
    found = only(feed(Monitor(run), steps, losses, norms, rates), "plateau")
    assert "almost nothing has been learnt (a uniform guess has a loss of 10.83)" in found.text
    assert "of its peak" not in found.text


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_still_learns_at_a_constant_rate_is_on_no_plateau(seed):
    run = short(6000, min_lr=6e-4)
    assert feed(Monitor(run), *series(run, seed, noise=0.02)) == []


def test_a_flat_loss_says_nothing_in_the_warm_up():
    run = short(6000, warmup_iters=4000)
    steps, _, norms, rates = series(run, 0, last=4000)
    losses = 7.5 + np.random.default_rng(0).normal(0, 0.01, 4000)
    assert feed(Monitor(run), steps, losses, norms, rates) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_flat_loss_says_nothing_where_noise_could_hide_a_fall(seed):
    run = short(1500)
    steps, _, norms, rates = series(run, seed, last=1000)
    losses = 3.3 + np.random.default_rng(seed).normal(0, 0.1, 1000)
    assert feed(Monitor(run), steps, losses, norms, rates) == []


def test_a_plateau_at_the_floor_long_after_the_decay_is_the_end_of_the_run():
    run = short(10_000, lr_decay_iters=2000)
    found = only(feed(Monitor(run), *stuck(run, 0, since=2000)), "plateau")
    assert found.step > 2500
    assert "at its floor of 6e-05, so the run has effectively ended" in found.text


def test_a_loss_that_is_flat_because_the_rate_has_decayed_is_on_no_plateau():
    run = short(6000, min_lr=0.0)
    steps, losses, norms, rates = stuck(run, 0, since=4800, noise=0.01)
    assert feed(Monitor(run), steps, losses, norms, rates) == []


# ---- evaluations ----


def dropped_out(seed, gap, val, dropout=0.1):
    """The findings of an evaluation of a run with a logged loss that is ``gap`` higher than in eval mode."""
    run = short(2000, dropout=dropout, known={"dataset_tokens": 200_000_000})
    diagnosis = Monitor(run)
    steps, losses, norms, rates = series(run, seed, last=1500)
    feed(diagnosis, steps, losses + gap, norms, rates)
    level = law(run, [1500])[0]
    return level, diagnosis.evaluation(1500, batches(seed, level), batches(seed + 1, level + val))


def test_a_validation_loss_below_the_training_loss_is_explained_by_dropout():
    level, found = dropped_out(0, gap=0.15, val=0.03)
    text = only(found, "dropout-gap").text
    logged, in_eval_mode, val = (float(number) for number in re.findall(r"\d\.\d{3}", text)[:3])
    assert logged == pytest.approx(level + 0.15, abs=0.02)
    assert in_eval_mode == pytest.approx(level, abs=0.01)
    assert val == pytest.approx(level + 0.03, abs=0.01)
    assert "dropout 0.1" in text
    assert f"Dropout adds {logged - in_eval_mode:.2f} to the logged loss" in text
    assert f"so validation loss is {logged - val:.2f} below it" in text


def test_the_gap_that_dropout_hides_is_reported_too():
    _, found = dropped_out(0, gap=0.15, val=0.4)
    text = only(found, "dropout-gap").text
    assert "Dropout adds 0.1" in text
    assert re.search(r"so the gap between validation and training is 0\.40, not 0\.2\d\b", text)


@pytest.mark.parametrize("seed", range(10))
def test_a_gap_within_the_noise_or_without_dropout_is_not_explained_by_it(seed):
    assert dropped_out(seed, gap=0.0, val=-0.02)[1] == []
    assert dropped_out(seed, gap=0.15, val=0.03, dropout=0.0)[1] == []


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_falls_fast_is_not_taken_for_dropouts(seed):
    run = short(2000, dropout=0.1, warmup_iters=20, known={"dataset_tokens": 200_000_000})
    diagnosis = Monitor(run)
    steps = np.arange(1, 201)
    falling = 9 - 5 * steps / 200
    noise = np.random.default_rng(seed).normal(0, 0.04, 200)
    feed(diagnosis, steps, falling + noise, np.ones(200), [6e-4] * 200)
    assert diagnosis.evaluation(200, batches(seed, falling[-1]), batches(seed, falling[-1])) == []


def evaluate(run, trains, vals, seed=0, n=20, paired=0.008, val_paired=None):
    """Findings of evaluations every 250 steps with these mean losses."""
    diagnosis = Monitor(run)
    val_paired = paired if val_paired is None else val_paired
    found = []
    for i, (train, val) in enumerate(zip(trains, vals, strict=True), 1):
        train_losses = batches(seed, train, n, paired=paired, start=i)
        val_losses = batches(seed + 50, val, n, paired=val_paired, start=i)
        found += diagnosis.evaluation(250 * i, train_losses, val_losses)
    return found


SHAKESPEARE_TRAIN = [2.0, 1.5, 1.3, 1.2, 1.1, 1.0, 0.9]
SHAKESPEARE_VAL = [2.05, 1.65, 1.5, 1.47, 1.48, 1.52, 1.6]


def test_overfitting_is_found_with_the_step_of_the_best_validation_loss():
    found = only(evaluate(facts("shakespeare-char"), SHAKESPEARE_TRAIN, SHAKESPEARE_VAL), "overfitting")
    assert found.step == 1500
    assert "Validation loss was lowest at step 1,000 (1.47" in found.text
    assert "risen by 0.05" in found.text
    assert "training loss fell by 0.20 to 0.998" in found.text
    assert "24.5 epochs" in found.text


def test_a_validation_loss_that_stands_while_training_falls_is_overfitting_too():
    found = only(evaluate(short(), [3.5, 3.4, 3.3, 3.2], [3.52, 3.45, 3.452, 3.451]), "overfitting")
    assert found.step == 1000
    assert "lowest at step 500" in found.text


@pytest.mark.parametrize(
    ("trains", "vals"),
    [
        ([3.5, 3.4, 3.3, 3.25, 3.2], [3.52, 3.45, 3.4, 3.38, 3.37]),  # the gap grows, and validation still gains
        ([3.5, 3.4, 3.45, 3.44, 3.43], [3.52, 3.42, 3.47, 3.46, 3.45]),  # both get worse: no overfitting
        ([3.5, 3.4, 3.3, 3.29, 3.2], [3.52, 3.45, 3.4, 3.41, 3.3]),  # one evaluation worse
        ([3.5, 3.4, 3.4, 3.4, 3.4], [3.52, 3.42, 3.42, 3.42, 3.42]),  # both stand
        ([3.5, 3.4, 3.41, 3.41, 3.41], [3.52, 3.42, 3.47, 3.48, 3.49]),  # validation gets worse, training not better
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_validation_loss_that_follows_the_training_loss_is_no_overfitting(trains, vals, seed):
    assert evaluate(short(), trains, vals, seed) == []


def test_a_gap_that_grows_by_next_to_nothing_is_no_overfitting():
    assert evaluate(short(), [3.5, 3.4, 3.397, 3.394], [3.52, 3.42, 3.421, 3.421], paired=0.001) == []


@pytest.mark.parametrize("seed", range(5))
def test_overfitting_is_not_reported_where_evaluations_are_too_noisy(seed):
    falling, standing = [3.5, 3.4, 3.35, 3.3], [3.52, 3.42, 3.45, 3.43]
    for how in ({"paired": 0.3}, {"val_paired": 0.3}, {"n": 2, "paired": 0.0}):
        found = evaluate(short(), falling, standing, seed, **how)
        assert "overfitting" not in {finding.code for finding in found}, how


def test_evaluations_too_small_for_their_difference_are_found_with_the_batches_that_would_do():
    run = short(eval_iters=4)
    levels = [3.5, 3.498, 3.497, 3.496, 3.495]
    found = only(evaluate(run, levels, levels, n=4, paired=0.05), "coarse-evaluation")
    first, second = (
        batches(50, levels[i - 1], 4, start=i, paired=0.05) for i in (found.step // 250 - 1, found.step // 250)
    )
    change, error = difference(first, second)
    assert f"{'-' if change < 0 else '+'}{abs(change):.3f} ± {error:.3f}" in found.text
    needed = int(re.search(r"--eval_iters (\d+) instead of 4", found.text)[1])
    assert error * math.sqrt(4 / needed) == pytest.approx(0.003 * 3.495, rel=0.05)
    assert "On 66K tokens" in found.text


@pytest.mark.parametrize("seed", range(5))
def test_evaluations_that_resolve_their_difference_or_finer_ones_than_matter_are_not_found(seed):
    assert evaluate(short(), [3.9, 3.6, 3.4, 3.2], [3.9, 3.6, 3.4, 3.2], seed, n=4, paired=0.05) == []
    assert evaluate(short(), [3.5] * 6, [3.5] * 6, seed, n=20, paired=0.01) == []
    assert evaluate(short(), [3.5] * 2, [3.5] * 2, seed, n=4, paired=0.05) == []  # once may be chance


def test_the_standard_error_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    means = [np.mean(rng.normal(3, 0.2, 25)) for _ in range(2000)]
    errors = [standard_error(list(rng.normal(3, 0.2, 25))) for _ in range(2000)]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert math.isnan(standard_error([3.0]))
    assert math.isnan(standard_error([3.0, math.inf]))
    assert math.isnan(standard_error([math.nan, math.nan]))


def test_the_error_of_a_difference_leaves_out_what_the_batches_share():
    earlier, later = batches(0, 3.5, start=1), batches(0, 3.45, start=2)
    change, error = difference(earlier, later)
    assert change == pytest.approx(-0.05, abs=0.01)
    assert error < 0.2 * math.hypot(standard_error(earlier), standard_error(later))


# ---- time ----


def timed(run, seconds, spent=None, n=100):
    """Findings of ``n`` updates that take ``seconds`` on average."""
    diagnosis = Monitor(run)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.05, n))
    found = []
    for i in range(n):
        for kind, each in (spent or {}).items():
            diagnosis.time_spent(kind, each)
        found += diagnosis.update(i + 1, 5 - 0.01 * i, 0.3, 1e-3, float(seconds * noise[i]))
    return found


def predicted(seconds, **flags):
    return short(known={"predicted_seconds": seconds, "peak_flops": 58.3e12}, **flags)


def test_updates_slower_than_predicted_are_found_with_both_times_and_both_mfus():
    run = predicted(10.0)
    found = only(timed(run, 14.0), "slow")
    ratio = float(re.search(r"(\d\.\d\d) times the predicted", found.text)[1])
    assert ratio == pytest.approx(1.4, abs=0.03)
    flops = run.gpt_config.flops_per_token * run.config.tokens_per_step
    assert "the predicted 10 s" in found.text
    assert f"MFU {flops / 58.3e12 / (10 * ratio):.0%} instead of {flops / 58.3e12 / 10:.0%}" in found.text
    assert "The device itself is slower" in found.text


@pytest.mark.parametrize(
    ("kind", "each", "words"),
    [
        (DATA, 4.5, "Data loading is too slow"),
        (DATA, 1.5, "The device itself is slower"),
        (LOGGING, 4.5, "larger --log_interval"),
        (EVALUATION, 4.5, "The device itself is slower"),
        (CHECKPOINTS, 4.5, "raise --eval_interval"),
    ],
)
def test_slowness_is_explained_by_what_took_the_time(kind, each, words):
    found = only(timed(predicted(10.0), 15.0, {kind: each}), "slow")
    assert words in found.text
    assert re.search(rf"Time so far: {kind} \d\d%", found.text)


def test_small_updates_of_a_ramp_are_compared_as_if_they_were_whole():
    run = predicted(8.0, batch_ramp=3000)
    assert timed(run, 1.0) == []  # an eighth of the predicted time for an eighth of the tokens
    assert "an update takes 11" in only(timed(run, 1.4), "slow").text


def test_updates_as_fast_as_predicted_or_slow_at_the_start_alone_are_not_found():
    assert timed(predicted(10.0), 11.5) == []
    assert timed(short(), 99.0) == []  # no prediction
    diagnosis = Monitor(predicted(10.0))
    for step in range(1, 100):
        assert diagnosis.update(step, 3.0, 0.3, 1e-3, 60.0 if step <= 5 else 10.0) == []


def test_mfu_names_the_peak_that_it_is_a_share_of():
    text = mfu_sentence(35.6e12, 58.3e12, "RTX 4070", torch.bfloat16)
    assert text.startswith("MFU 61.1%: 35.6 TFLOP/s of the RTX 4070's 58.3 TFLOP/s, dense bf16")
    assert "A100's 312" in text
    assert "11.4%" in text
    assert "nanoGPT" not in mfu_sentence(150e12, 312e12, "A100", torch.bfloat16)
    unknown = mfu_sentence(0.15e12, None, "a CPU", torch.float32)
    assert unknown == "0.15 TFLOP/s on a CPU in fp32, whose peak is unknown: no MFU"
