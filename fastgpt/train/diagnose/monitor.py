"""Checks of a run while it trains."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from fastgpt import units
from fastgpt.train.diagnose import preflight
from fastgpt.train.diagnose.findings import Facts, Finding, joined
from fastgpt.train.diagnose.preflight import CHINCHILLA
from fastgpt.train.diagnose.statistics import History, difference, fit, standard_error, usual_and_spread

SURE = 3.0  # standard errors; many comparisons are made in a run, of which none should be chance
SPIKE = 10.0  # robust standard deviations; single updates of text reach 5 (quickstart's gradient norms)
SPIKE_AT_LEAST = {"loss": 0.05, "grad_norm": math.log(3.0)}  # relative; keeps a series without noise from alarming
USUAL = 101  # updates that make the usual
FEWEST_BATCHES = 4  # below this a standard error is itself too uncertain for three of it to mean anything
VISIBLE = 0.01  # in loss, nats a token; a smaller difference does not matter
EVALUATIONS_WITHOUT_GAIN = 2  # after the best one; a single one may be chance
# Relative fall in the last tenth of the run that still counts as learning. Where the law above holds, models of 41M to
# 124M parameters fall by 0.6 to 1.1 % in every tenth up to 5 times Chinchilla's tokens, and by 0.45 % at 10 times.
FALLING = 0.002
PLATEAU_WINDOWS = (0.1, 0.2, 0.3)  # of the run so far: the longer ones see through more noise
DECAYED = 0.2  # of the peak; below this a falling rate flattens the loss by itself
HIGH_RATE = 0.5  # of the peak; above this most of what the decay gives is still to come
NOTHING_LEARNT = 0.9  # of a blind guess's loss; the tokens' frequencies alone give 0.7 to 0.8
REPEATED = 4  # epochs; up to there repeated data is nearly as good as new (Muennighoff et al. 2023)
DROPOUT_WINDOW = 0.2  # of the run so far; its trend is fitted, so that the loss at its end is not that of its middle
RESOLUTION = 0.003  # relative; about what two evaluations late in a run differ by
SLOW = 1.25  # times the predicted time; the prediction rests on assumed shares, and less may be its own error
FEWEST_TIMINGS = 30  # so that the first few, with their compilation and cold caches, do not move the median
EXPLAINS = 0.5  # of the excess that one cause must account for to be named as the cause
MUCH_BESIDE = 0.1  # of the run's time spent on evaluations and checkpoints

DATA, LOGGING, EVALUATION, CHECKPOINTS = "data loading", "logging", "evaluation", "checkpoints"
WITHIN_UPDATES = (DATA, LOGGING)  # their time is part of an update's


class _Evaluation(NamedTuple):
    step: int
    train: Sequence[float]
    val: Sequence[float]


class Monitor:
    """What one run has been found to do, from its first update to its last. Its memory does not grow with the run.

    Args:
        facts: what is known before.

    Attributes:
        findings: all so far, those known before the run first. At most one of each code.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.findings = preflight.check(facts)
        self._losses: deque[float] = deque(maxlen=USUAL)
        self._log_norms: deque[float] = deque(maxlen=USUAL)
        self._history = History()  # of losses since the warm-up
        self._next_slope_at = 0  # step
        self._timings: deque[float] = deque(maxlen=USUAL)
        self._last_step = self._n_updates = 0
        self._update_seconds = 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)  # seconds
        self._best: _Evaluation | None = None  # by validation loss
        self._without_gain = 0  # evaluations since then
        self._latest: _Evaluation | None = None
        self._unresolved = 0  # differences of evaluations in a row

    def update(
        self, step: int, loss: float, grad_norm: float | None, lr: float, seconds: float | None = None
    ) -> list[Finding]:
        """Take in a logged update; returns what it has brought to light.

        Args:
            step: updates done.
            loss: of this update.
            grad_norm: before clipping; ``None`` if it was not computed.
            lr: learning rate of this update.
            seconds: of an update, the mean since the last call; evaluations and checkpoints not counted.
        """
        found = [self._slow(step, seconds)]
        if grad_norm is not None and math.isfinite(grad_norm) and grad_norm > 0:
            found.append(self._gradient_spike(step, grad_norm))
        if math.isfinite(loss):
            found.append(self._loss_spike(step, loss))
            if step > self.facts.config.warmup_iters:
                self._history.add(step, loss)
                found.append(self._plateau(step, lr))
        return self._new(found)

    def evaluation(self, step: int, train_losses: Sequence[float], val_losses: Sequence[float]) -> list[Finding]:
        """Take in an evaluation; returns what it has brought to light.

        Args:
            step: updates done.
            train_losses: of batches of the training split in eval mode, the same batches at every evaluation.
            val_losses: of batches of the validation split, the same ones too.
        """
        now = _Evaluation(step, train_losses, val_losses)
        if not all(map(math.isfinite, (*train_losses, *val_losses))):
            return []
        return self._new([self._dropout_gap(now), self._overfitting(now), self._coarse_evaluation(now)])

    def time_spent(self, kind: str, seconds: float) -> None:
        """Take in seconds that went to ``DATA``, ``LOGGING``, ``EVALUATION`` or ``CHECKPOINTS``."""
        self._spent[kind] += seconds

    def _new(self, found: list[Finding | None]) -> list[Finding]:
        said = {finding.code for finding in self.findings}
        new = [finding for finding in found if finding is not None and finding.code not in said]
        self.findings += new
        return new

    # ---- single updates ----

    def _loss_spike(self, step: int, loss: float) -> Finding | None:
        usual, spread = usual_and_spread(self._losses)
        self._losses.append(loss)
        if not loss - usual > max(SPIKE * spread, SPIKE_AT_LEAST["loss"] * usual):
            return None
        clip = "" if self.facts.config.grad_clip else " and --grad_clip 1"
        text = (
            f"step {step:,}: the loss jumped to {loss:.2f} from a usual {usual:.2f}, {_z(loss - usual, spread)}. If "
            "it is back within some hundred updates, no harm is done; if not, go on from an earlier checkpoint with a "
            f"lower --learning_rate{clip}"
        )
        return Finding("loss-spike", step, text)

    def _gradient_spike(self, step: int, norm: float) -> Finding | None:
        usual, spread = usual_and_spread(self._log_norms)  # norms vary by factors
        log_norm = math.log(norm)
        self._log_norms.append(log_norm)
        if not log_norm - usual > max(SPIKE * spread, SPIKE_AT_LEAST["grad_norm"]):
            return None
        clip = self.facts.config.grad_clip
        if clip:
            cure = (
                f"it was clipped to {clip:g}, so a single one does little harm; many call for a lower --learning_rate"
            )
        else:
            cure = "nothing clips it: --grad_clip 1 keeps one bad batch from undoing many good ones"
        text = (
            f"step {step:,}: the gradient's norm was {norm:.2g}, usually {math.exp(usual):.2g}, "
            f"{_z(log_norm - usual, spread)} on a log scale; {cure}"
        )
        return Finding("gradient-spike", step, text)

    # ---- the loss over the run ----

    def _plateau(self, step: int, lr: float) -> Finding | None:
        if step < self._next_slope_at:
            return None
        self._next_slope_at = step + max(1, step // 50)
        c = self.facts.config
        for window in PLATEAU_WINDOWS:
            start = (1 - window) * step
            # at the end of a decay the loss is flat because the rate is
            if lr == 0 or (lr < DECAYED * c.learning_rate and start < c.lr_decay_iters):
                continue
            groups = self._history.groups(start)
            if groups is None:
                continue
            line = fit(*groups)
            fall, error = -line.slope * 0.1 * step, line.slope_error * 0.1 * step
            still_learning = FALLING * line.mean
            if SURE * error < still_learning and fall + SURE * error < still_learning:
                return Finding("plateau", step, self._plateau_text(step, lr, window, line.mean, fall, error))
        return None

    def _plateau_text(self, step: int, lr: float, window: float, loss: float, fall: float, error: float) -> str:
        c, f = self.facts.config, self.facts
        tokens = step * c.tokens_per_step
        ratio, epochs = f.tokens_per_parameter(tokens), f.epochs(tokens)
        causes = []
        guess = math.log(f.gpt_config.vocab_size)
        if loss > NOTHING_LEARNT * guess:
            causes.append(
                f"next to nothing has been learnt, since a blind guess has a loss of {guess:.2f}: a --learning_rate "
                f"far too low or too high (now {c.learning_rate:g}), or data that is noise"
            )
        elif lr > HIGH_RATE * c.learning_rate and c.min_lr < HIGH_RATE * c.learning_rate:
            causes.append(
                f"the learning rate is still at {lr / c.learning_rate:.0%} of its peak, and the loss falls once it "
                f"decays (--lr_decay_iters, now {c.lr_decay_iters:,}, sets when)"
            )
        elif lr <= c.min_lr < c.learning_rate:
            causes.append(f"the learning rate is at its floor of {c.min_lr:g}, so the run is as good as over")
        if ratio > CHINCHILLA:
            causes.append(
                f"the model may be full: {units.count(tokens)} tokens so far are {ratio:.0f} a parameter, past "
                f"Chinchilla's {CHINCHILLA} (a larger one would go lower)"
            )
        if epochs > REPEATED:
            causes.append(
                f"the data is used up: {epochs:.1f} epochs, and little is gained after {REPEATED} (more data helps)"
            )
        if not causes:
            causes.append(
                "a learning rate that does not suit, since neither the model's size nor repeated data explains it"
            )
        over, tenths = {0.1: "tenth", 0.2: "fifth", 0.3: "three tenths"}[window], window / 0.1
        moved = "rose" if fall < 0 else "fell"
        return (
            f"step {step:,}: the loss has stopped falling at {loss:.3f}: over the last {over} of the run so far it "
            f"{moved} by {_difference(tenths * fall)} ± {_difference(tenths * error)}. "
            f"{'Likely causes, the likeliest first' if len(causes) > 1 else 'Likely cause'}: {'; '.join(causes)}"
        )

    # ---- evaluations ----

    def _dropout_gap(self, now: _Evaluation) -> Finding | None:
        dropout = self.facts.gpt_config.dropout
        recent = self._history.since((1 - DROPOUT_WINDOW) * now.step)
        if dropout == 0 or recent is None or len(now.train) < FEWEST_BATCHES:
            return None
        line = fit(*recent)
        logged = line.mean + line.slope * (now.step - line.middle)
        logged_error = math.hypot(line.mean_error, line.slope_error * (now.step - line.middle))
        train, val = fmean(now.train), fmean(now.val)
        gap = logged - train
        if gap < max(SURE * math.hypot(logged_error, standard_error(now.train)), VISIBLE):
            return None
        if val < logged:
            meaning = (
                f"That validation is {_difference(logged - val)} below the logged loss is no riddle: dropout adds "
                f"{_difference(gap)} to the latter"
            )
        else:
            meaning = (
                f"Validation is {_difference(val - logged)} above the logged loss, but dropout adds "
                f"{_difference(gap)} to the latter: the gap between validation and training is "
                f"{_difference(val - train)}"
            )
        text = (
            f"step {now.step:,}: training loss {logged:.3f} as logged, with dropout {dropout:g} on; {train:.3f} on "
            f"training data with dropout off; validation loss {val:.3f}, with dropout off. {meaning}. Compare the "
            "two that have dropout off"
        )
        return Finding("dropout-gap", now.step, text)

    def _overfitting(self, now: _Evaluation) -> Finding | None:
        best = self._best
        if best is None or not _paired(best, now) or fmean(now.val) < fmean(best.val):
            self._best, self._without_gain = now, 0
            return None
        self._without_gain += 1
        if self._without_gain < EVALUATIONS_WITHOUT_GAIN or min(len(now.train), len(now.val)) < FEWEST_BATCHES:
            return None
        fall, fall_error = difference(now.train, best.train)
        rise, rise_error = difference(best.val, now.val)
        growth_error = math.hypot(fall_error, rise_error)
        if fall < SURE * fall_error or fall + rise < max(SURE * growth_error, VISIBLE):
            return None
        if rise > SURE * rise_error:
            moved = f"risen by {_difference(rise)} ± {_difference(rise_error)}, to {fmean(now.val):.3f}"
        else:
            moved = "not been lower"
        text = (
            f"step {now.step:,}: overfitting. Validation loss was best at step {best.step:,}, {fmean(best.val):.3f}, "
            f"and has since {moved}, while training loss fell by {_difference(fall)} to {fmean(now.train):.3f}. "
            f"{self._against_overfitting(now.step)}"
        )
        return Finding("overfitting", now.step, text)

    def _against_overfitting(self, step: int) -> str:
        epochs = self.facts.epochs(step * self.facts.config.tokens_per_step)
        cures = ["more data", "a smaller model"] + (
            ["--dropout 0.1 or 0.2"] if self.facts.gpt_config.dropout == 0 else []
        )
        return f"After {epochs:.1f} epochs, {joined(cures, 'or')} would help; the best checkpoint is kept"

    def _coarse_evaluation(self, now: _Evaluation) -> Finding | None:
        earlier, self._latest = self._latest, now
        if earlier is None or not _paired(earlier, now) or len(now.val) < 2:
            return None
        change, error = difference(earlier.val, now.val)
        smallest = RESOLUTION * fmean(now.val)
        if abs(change) >= 2 * error or error <= smallest:
            self._unresolved = 0
            return None
        self._unresolved += 1
        if self._unresolved < 2:
            return None
        n_batches = math.ceil(len(now.val) * (error / smallest) ** 2)
        tokens = len(now.val) * self.facts.config.micro_batch_size * self.facts.config.block_size
        text = (
            f"step {now.step:,}: the validation losses of steps {earlier.step:,} and {now.step:,}, "
            f"{fmean(earlier.val):.3f} and {fmean(now.val):.3f}, cannot be told apart: evaluated on "
            f"{units.count(tokens)} tokens their difference is {_signed(change)} ± {_difference(error)}. "
            f"--eval_iters {n_batches} instead of {len(now.val)} would bring that to ± {_difference(smallest)}"
        )
        return Finding("coarse-evaluation", now.step, text)

    # ---- time ----

    def _slow(self, step: int, seconds: float | None) -> Finding | None:
        since, self._last_step = step - self._last_step, step
        if seconds is None or not seconds > 0:
            return None
        if since == step:
            return None  # the first call: how many updates its time stands for is not known after a resume
        self._update_seconds += seconds * since
        self._n_updates += since
        self._timings.append(seconds)
        predicted = self.facts.predicted_seconds
        if predicted is None or len(self._timings) < FEWEST_TIMINGS:
            return None
        measured = median(self._timings)
        if measured <= SLOW * predicted:
            return None
        return Finding("slow", step, self._slow_text(step, measured, predicted))

    def _slow_text(self, step: int, measured: float, predicted: float) -> str:
        peak = self.facts.peak_flops
        flops = self.facts.gpt_config.flops_per_token * self.facts.config.tokens_per_step
        mfu = f", MFU {flops / measured / peak:.0%} instead of {flops / predicted / peak:.0%}" if peak else ""
        beside = sum(seconds for kind, seconds in self._spent.items() if kind not in WITHIN_UPDATES)
        total = self._update_seconds + beside
        shares = {kind: seconds / total for kind, seconds in self._spent.items()}
        told = [f"{kind} {_share(share)}" for kind, share in sorted(shares.items(), key=lambda item: -item[1])]
        excess = (measured - predicted) * self._n_updates
        cures = []
        if self._spent[DATA] > EXPLAINS * excess:
            cures.append("the data comes too slowly: a local disk, or nothing else that reads from it, helps")
        if self._spent[LOGGING] > EXPLAINS * excess:
            cures.append(f"a larger --log_interval than {self.facts.config.log_interval} helps")
        if not cures:
            cures.append(
                "the device itself is slower than predicted: see whether other programs use it, or heat or a power "
                "limit holds it back; python -m fastgpt.doctor measures what it reaches"
            )
        if beside > MUCH_BESIDE * total:
            cures.append(f"{_share(beside / total)} of the time goes beside the updates: raise --eval_interval")
        spent = f" Of the run's time so far: {', '.join(told)}." if told else ""
        return (
            f"step {step:,}: an update takes {units.seconds(measured)}, {measured / predicted:.2f} times the predicted "
            f"{units.seconds(predicted)}{mfu}.{spent} {_capital('; '.join(cures))}"
        )


def _paired(a: _Evaluation, b: _Evaluation) -> bool:
    """Whether two evaluations can have used the same batches; not if a resumed run has other ``eval_iters``."""
    return len(a.train) == len(b.train) and len(a.val) == len(b.val)


# ---- words ----


def _difference(x: float) -> str:
    """A difference of losses to what can be read off it: three decimals, fewer for large ones."""
    x = abs(x)
    return f"{x:.2f}" if x >= 0.0995 else f"{x:.3f}" if x >= 0.00095 else f"{x:.4f}"


def _signed(x: float) -> str:
    return ("-" if x < 0 else "+") + _difference(x)


def _share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.01 else "under 1%"


def _z(away: float, spread: float) -> str:
    return f"{away / spread:.0f} times the usual spread" if spread > 0 else "where there was no spread at all"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
