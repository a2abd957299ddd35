"""Checks of a run while it trains: spikes, plateaus, dropout, overfitting, too small evaluations, and speed."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from fastgpt import units
from fastgpt.train.diagnose import preflight
from fastgpt.train.diagnose.findings import Facts, Finding, joined
from fastgpt.train.diagnose.preflight import CHINCHILLA
from fastgpt.train.diagnose.statistics import History, difference, fit, robust_centre_and_spread, standard_error

SIGNIFICANT = 3.0  # standard errors (0.1 % by chance, one-sided): a run makes many comparisons, and none may be chance
VISIBLE = 0.01  # in loss, nats per token; a smaller difference does not matter

# Spikes: an update is compared with the last RECENT ones.
RECENT = 101
SPIKE = 10.0  # robust standard deviations; single updates of normal runs reach 5 (quickstart's gradient norms)
SPIKE_AT_LEAST = {"loss": 0.05, "grad_norm": math.log(3.0)}  # relative; for series that have almost no noise

# Plateaus: the slope of the loss over the last part of the run.
# The relative fall in the last tenth of the run so far that still counts as learning. Where Chinchilla's law holds,
# models of 41M to 124M parameters fall by 0.6 to 1.1 % in every tenth up to 5 times its tokens, and by 0.45 % at 10.
FALLING = 0.002
PLATEAU_WINDOWS = (0.1, 0.2, 0.3)  # fractions of the run so far; longer windows average over more noise
DECAYED = 0.2  # of the peak learning rate; below this a decaying rate flattens the loss, which is no plateau
HIGH_RATE = 0.5  # of the peak learning rate; above this most of the gain of the decay is still to come
NOTHING_LEARNT = 0.9  # of the loss ln V of a uniform guess; token frequencies alone reach 0.7 to 0.8 of it
REPEATED = 4  # epochs up to which repeated data is nearly as good as new data (Muennighoff et al. 2023)

# Evaluations
FEWEST_BATCHES = 4  # with fewer, a standard error is itself too uncertain to compare anything with
EVALUATIONS_WITHOUT_GAIN = 2  # after the best one, for overfitting; a single one may be chance
DROPOUT_WINDOW = 0.2  # of the run so far, for the logged loss at the time of an evaluation
RESOLUTION = 0.003  # relative; two evaluations late in a run differ by about this

# Speed
SLOW = 1.25  # times the predicted time; a smaller excess may be the prediction's error
FEWEST_TIMINGS = 30  # so that the first ones, with compilation and cold caches, do not affect the median
EXPLAINS = 0.5  # fraction of the excess time that a cause must account for to be named
MUCH_OUTSIDE_UPDATES = 0.1  # fraction of the run's time that evaluations and checkpoints may take

DATA, LOGGING, EVALUATION, CHECKPOINTS = "data loading", "logging", "evaluation", "checkpoints"
WITHIN_UPDATES = (DATA, LOGGING)  # the measured time of an update includes these


class _Evaluation(NamedTuple):
    step: int
    train: Sequence[float]  # losses by batch
    val: Sequence[float]


class Monitor:
    """Checks the numbers of one run from its first update to its last, in memory that does not grow with the run.

    Args:
        facts: what is known before the run.

    Attributes:
        findings: all findings so far, at most one of each code. Those known before the run come first.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.findings = preflight.check(facts)
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._log_norms: deque[float] = deque(maxlen=RECENT)
        self._history = History()  # losses after the warm-up
        self._next_slope_at = 0  # step of the next check for a plateau
        self._timings: deque[float] = deque(maxlen=RECENT)
        self._last_step = self._n_updates = 0
        self._update_seconds = 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)  # seconds by kind of work other than computing
        self._best: _Evaluation | None = None  # the one with the lowest validation loss
        self._without_gain = 0  # evaluations since the best one
        self._latest: _Evaluation | None = None
        self._unresolved = 0  # consecutive differences between evaluations that were within their noise

    def update(
        self, step: int, loss: float, grad_norm: float | None, lr: float, seconds: float | None = None
    ) -> list[Finding]:
        """Record a logged update and return the new findings.

        Args:
            step: number of updates done.
            loss: training loss of this update.
            grad_norm: gradient norm before clipping; ``None`` if it was not computed.
            lr: learning rate of this update.
            seconds: mean time of an update since the last call, without evaluations and checkpoints.
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
        """Record an evaluation and return the new findings.

        Args:
            step: number of updates done.
            train_losses: loss of each batch of the training split in eval mode, on the same batches every time.
            val_losses: loss of each batch of the validation split, on the same batches every time.
        """
        now = _Evaluation(step, train_losses, val_losses)
        if not all(map(math.isfinite, (*train_losses, *val_losses))):
            return []
        return self._new([self._dropout_gap(now), self._overfitting(now), self._coarse_evaluation(now)])

    def time_spent(self, kind: str, seconds: float) -> None:
        """Record seconds that were spent on ``DATA``, ``LOGGING``, ``EVALUATION`` or ``CHECKPOINTS``."""
        self._spent[kind] += seconds

    def _new(self, found: list[Finding | None]) -> list[Finding]:
        reported = {finding.code for finding in self.findings}
        new = [finding for finding in found if finding is not None and finding.code not in reported]
        self.findings += new
        return new

    # ---- single updates ----

    def _loss_spike(self, step: int, loss: float) -> Finding | None:
        centre, spread = robust_centre_and_spread(self._losses)  # before this loss is one of them
        self._losses.append(loss)
        # "not >", because centre and spread are NaN while there are too few losses
        if not loss - centre > max(SPIKE * spread, SPIKE_AT_LEAST["loss"] * centre):
            return None
        clip = "" if self.facts.config.grad_clip else " and --grad_clip 1"
        text = (
            f"step {step:,}: the loss jumped to {loss:.2f} from a median of {centre:.2f}, "
            f"{_deviations(loss - centre, spread)}. If it does not recover within a few hundred updates, resume from "
            f"an earlier checkpoint with a lower --learning_rate{clip}"
        )
        return Finding("loss-spike", step, text)

    def _gradient_spike(self, step: int, norm: float) -> Finding | None:
        log_norm = math.log(norm)  # norms vary by factors
        centre, spread = robust_centre_and_spread(self._log_norms)
        self._log_norms.append(log_norm)
        if not log_norm - centre > max(SPIKE * spread, SPIKE_AT_LEAST["grad_norm"]):
            return None
        clip = self.facts.config.grad_clip
        if clip:
            remedy = (
                f"It was clipped to {clip:g}, so a single spike does little harm; if there are many, use a lower "
                "--learning_rate"
            )
        else:
            remedy = "It was not clipped: --grad_clip 1 limits the damage of one bad batch"
        text = (
            f"step {step:,}: the gradient norm jumped to {norm:.2g} from a median of {math.exp(centre):.2g}, "
            f"{_deviations(log_norm - centre, spread)} on a log scale. {remedy}"
        )
        return Finding("gradient-spike", step, text)

    # ---- the loss over the run ----

    def _plateau(self, step: int, lr: float) -> Finding | None:
        if step < self._next_slope_at:
            return None
        self._next_slope_at = step + max(1, step // 50)  # often enough, and cheap in long runs
        c = self.facts.config
        for window in PLATEAU_WINDOWS:
            start = (1 - window) * step
            # Near the end of a decay the loss is flat because the rate is small, so the window must begin after it.
            if lr == 0 or (lr < DECAYED * c.learning_rate and start < c.lr_decay_iters):
                continue
            groups = self._history.groups(start)
            if groups is None:
                continue
            line = fit(*groups)
            # the fall in a tenth of the run so far, for a window of any length
            fall, error = -line.slope * 0.1 * step, line.slope_error * 0.1 * step
            still_learning = FALLING * line.mean
            # The error must be small enough to see such a fall, and the fall significantly smaller.
            if SIGNIFICANT * error < still_learning and fall + SIGNIFICANT * error < still_learning:
                return Finding("plateau", step, self._plateau_text(step, lr, window, line.mean, fall, error))
        return None

    def _plateau_text(self, step: int, lr: float, window: float, loss: float, fall: float, error: float) -> str:
        c, f = self.facts.config, self.facts
        tokens = c.tokens_before(step)
        ratio, epochs = f.tokens_per_parameter(tokens), f.epochs(tokens)
        causes = []  # most likely first; at most one of the first three holds
        guess = math.log(f.gpt_config.vocab_size)  # loss of a uniform distribution over the vocabulary
        if loss > NOTHING_LEARNT * guess:
            causes.append(
                f"almost nothing has been learnt (a uniform guess has a loss of {guess:.2f}), because --learning_rate "
                f"{c.learning_rate:g} is far too low or too high, or the data is noise"
            )
        elif c.decay_lr and lr > HIGH_RATE * c.learning_rate and c.min_lr < HIGH_RATE * c.learning_rate:
            causes.append(
                f"the learning rate is still at {lr / c.learning_rate:.0%} of its peak, and the loss will fall when it "
                f"decays (set by --lr_decay_iters, now {c.lr_decay_iters:,})"
            )
        elif lr <= c.min_lr < c.learning_rate:
            causes.append(f"the learning rate is at its floor of {c.min_lr:g}, so the run has effectively ended")
        if ratio > CHINCHILLA:
            causes.append(
                f"the model is too small: {units.count(tokens)} tokens so far are {ratio:.0f} per parameter, more than "
                f"Chinchilla's {CHINCHILLA} (a larger model would reach a lower loss)"
            )
        if epochs > REPEATED:
            causes.append(
                f"the data has been repeated too often: {epochs:.1f} epochs, and little is gained after {REPEATED} "
                "(more data helps)"
            )
        if not causes:
            causes.append(
                "an unsuitable --learning_rate, since neither the model's size nor repeated data explains the plateau"
            )
        # fall and error are for a tenth of the run so far; the text gives them for the window
        over, tenths = {0.1: "tenth", 0.2: "fifth", 0.3: "three tenths"}[window], window / 0.1
        moved = "rose" if fall < 0 else "fell"
        return (
            f"step {step:,}: the loss has stopped falling at {loss:.3f}. Over the last {over} of the run so far it "
            f"{moved} by {_difference(tenths * fall)} ± {_difference(tenths * error)}. "
            f"{'Likely causes, most likely first' if len(causes) > 1 else 'Likely cause'}: {'; '.join(causes)}"
        )

    # ---- evaluations ----

    def _dropout_gap(self, now: _Evaluation) -> Finding | None:
        """Check whether dropout makes the logged training loss look worse than the validation loss.

        The logged loss is computed with dropout, the losses of evaluations without.
        """
        dropout = self.facts.gpt_config.dropout
        recent = self._history.since((1 - DROPOUT_WINDOW) * now.step)
        if dropout == 0 or recent is None or len(now.train) < FEWEST_BATCHES:
            return None
        line = fit(*recent)
        # A fitted line gives the loss at the step of the evaluation. The window's mean would give that at its middle.
        logged = line.mean + line.slope * (now.step - line.middle)
        logged_error = math.hypot(line.mean_error, line.slope_error * (now.step - line.middle))
        train, val = fmean(now.train), fmean(now.val)
        gap = logged - train
        # the errors of the two means are independent, so their squares add
        if gap < max(SIGNIFICANT * math.hypot(logged_error, standard_error(now.train)), VISIBLE):
            return None
        if val < logged:
            meaning = (
                f"Dropout adds {_difference(gap)} to the logged loss, so validation loss is "
                f"{_difference(logged - val)} below it"
            )
        else:
            meaning = (
                f"Dropout adds {_difference(gap)} to the logged loss, so the gap between validation and training is "
                f"{_difference(val - train)}, not {_difference(val - logged)}"
            )
        text = (
            f"step {now.step:,}: training loss is {logged:.3f} as logged (with dropout {dropout:g}) and {train:.3f} "
            f"without dropout; validation loss is {val:.3f} (without dropout). {meaning}. Compare the two losses "
            "without dropout"
        )
        return Finding("dropout-gap", now.step, text)

    def _overfitting(self, now: _Evaluation) -> Finding | None:
        """Check whether training loss has fallen since the best evaluation while validation loss has not."""
        best = self._best
        if best is None or not _paired(best, now) or fmean(now.val) < fmean(best.val):
            self._best, self._without_gain = now, 0
            return None
        self._without_gain += 1
        if self._without_gain < EVALUATIONS_WITHOUT_GAIN or min(len(now.train), len(now.val)) < FEWEST_BATCHES:
            return None
        fall, fall_error = difference(now.train, best.train)
        rise, rise_error = difference(best.val, now.val)
        # The gap between validation and training grows by fall + rise.
        growth_error = math.hypot(fall_error, rise_error)
        if fall < SIGNIFICANT * fall_error or fall + rise < max(SIGNIFICANT * growth_error, VISIBLE):
            return None
        if rise > SIGNIFICANT * rise_error:
            moved = f"has since risen by {_difference(rise)} ± {_difference(rise_error)}, to {fmean(now.val):.3f}"
        else:
            moved = "has not improved since"
        epochs = self.facts.epochs(self.facts.config.tokens_before(now.step))
        remedies = ["more data", "a smaller model"]
        if self.facts.gpt_config.dropout == 0:
            remedies.append("--dropout 0.1 (or 0.2)")
        text = (
            f"step {now.step:,}: overfitting. Validation loss was lowest at step {best.step:,} ({fmean(best.val):.3f}) "
            f"and {moved}, while training loss fell by {_difference(fall)} to {fmean(now.train):.3f}. After "
            f"{epochs:.1f} epochs, {joined(remedies, 'or')} would help; the best checkpoint is kept"
        )
        return Finding("overfitting", now.step, text)

    def _coarse_evaluation(self, now: _Evaluation) -> Finding | None:
        """Check whether evaluations have enough batches to show differences as small as they are late in a run."""
        earlier, self._latest = self._latest, now
        if earlier is None or not _paired(earlier, now) or len(now.val) < 2:
            return None
        change, error = difference(earlier.val, now.val)
        smallest = RESOLUTION * fmean(now.val)
        if abs(change) >= 2 * error or error <= smallest:
            self._unresolved = 0
            return None
        self._unresolved += 1
        if self._unresolved < 2:  # once may be chance
            return None
        n_batches = math.ceil(len(now.val) * (error / smallest) ** 2)  # a standard error falls as 1 / sqrt(n)
        tokens = len(now.val) * self.facts.config.micro_batch_size * self.facts.config.block_size
        text = (
            f"step {now.step:,}: evaluations are too small to tell the validation losses of steps {earlier.step:,} and "
            f"{now.step:,} apart. On {units.count(tokens)} tokens, {fmean(earlier.val):.3f} and {fmean(now.val):.3f} "
            f"differ by {_signed(change)} ± {_difference(error)}. Use --eval_iters {n_batches} instead of "
            f"{len(now.val)} to reduce this error to ± {_difference(smallest)}"
        )
        return Finding("coarse-evaluation", now.step, text)

    # ---- time ----

    def _slow(self, step: int, seconds: float | None) -> Finding | None:
        since, self._last_step = step - self._last_step, step
        if seconds is None or not seconds > 0:
            return None
        if since == step:
            return None  # first call: after a resume, the number of updates that the time is a mean of is unknown
        self._update_seconds += seconds * since
        self._n_updates += since
        c = self.facts.config
        tokens = c.tokens_before(step) - c.tokens_before(step - since)
        self._timings.append(seconds * (c.tokens_per_step * since / tokens))  # as if an update had all its tokens
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
        outside = sum(seconds for kind, seconds in self._spent.items() if kind not in WITHIN_UPDATES)
        total = self._update_seconds + outside
        shares = {kind: seconds / total for kind, seconds in self._spent.items()}
        parts = [f"{kind} {_share(share)}" for kind, share in sorted(shares.items(), key=lambda item: -item[1])]
        excess = (measured - predicted) * self._n_updates
        remedies = []
        if self._spent[DATA] > EXPLAINS * excess:
            remedies.append("Data loading is too slow: use a local disk, or stop other programs that read from it")
        if self._spent[LOGGING] > EXPLAINS * excess:
            remedies.append(f"Logging is too slow: use a larger --log_interval than {self.facts.config.log_interval}")
        if not remedies:
            remedies.append(
                "The device itself is slower than predicted: check for other programs that use it, for heat and for "
                "power limits; python -m fastgpt.doctor measures what it reaches"
            )
        if outside > MUCH_OUTSIDE_UPDATES * total:
            remedies.append(f"{_share(outside / total)} of the time is spent outside updates: raise --eval_interval")
        spent = f" Time so far: {', '.join(parts)}." if parts else ""
        return (
            f"step {step:,}: an update takes {units.seconds(measured)}, {measured / predicted:.2f} times the predicted "
            f"{units.seconds(predicted)}{mfu}.{spent} {'. '.join(remedies)}"
        )


def _paired(a: _Evaluation, b: _Evaluation) -> bool:
    """Whether two evaluations used the same batches; they did not if a resumed run changed ``eval_iters``."""
    return len(a.train) == len(b.train) and len(a.val) == len(b.val)


# ---- formatting ----


def _difference(x: float) -> str:
    """Format the size of a difference of losses: three decimals, two for large ones, four for small ones."""
    x = abs(x)
    return f"{x:.2f}" if x >= 0.0995 else f"{x:.3f}" if x >= 0.00095 else f"{x:.4f}"


def _signed(x: float) -> str:
    return ("-" if x < 0 else "+") + _difference(x)


def _share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.01 else "under 1%"


def _deviations(away: float, spread: float) -> str:
    return f"{away / spread:.0f} standard deviations" if spread > 0 else "after no variation at all"
