"""What is wrong with a run, in plain sentences: from numbers that the trainer has anyway, each said once.

The failure to catch is a run that takes days and was never the run that was meant: a model of another size than its
name says, dropout on data seen once, ten times the tokens that the model can use, a schedule that ends elsewhere.
A finding must hold against the noise of the numbers that it rests on. What cannot be told from noise is not said.

    diagnosis = Diagnosis(Facts(config, model_config, dataset_tokens))
    for finding in diagnosis.findings:  # what is known before the run
        print(finding.text)
    ...
    for finding in diagnosis.update(step, loss, grad_norm, lr, seconds):  # of every logged update
        print(finding.text)
    for finding in diagnosis.evaluation(step, train_losses, val_losses):  # of every evaluation, batch by batch
        print(finding.text)
"""

import math
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

import torch

from fastgpt.model.config import GPTConfig
from fastgpt.train.account import SHORT_NAMES
from fastgpt.train.config import TrainConfig
from fastgpt.train.plan import TILES
from fastgpt.train.presets import PRESETS
from fastgpt.train.schedule import learning_rate
from fastgpt.train.statistics import History, difference, fit, standard_error, usual_and_spread

# ---- thresholds of what is known before the run ----

CHINCHILLA = 20  # tokens a parameter that give the lowest loss for the compute (Hoffmann et al. 2022)
# Times Chinchilla's. By the law as refitted by Besiroglu et al. (2024) a model of 124M parameters gives away 0.005 in
# loss at 2 times, 0.03 at 4 and 0.04 at 5, one of 41M 0.05 at 5 and 0.1 at 10, against the best model for the same
# compute. GPT-2 124M on ten billion tokens, a much-trodden run, is at 4.
PAST_CHINCHILLA = 5
# Chinchilla's law was fitted to larger models and to subword tokens; below this it is not known to hold.
LAW_HOLDS_FROM, SMALLEST_SUBWORD_VOCABULARY = 10_000_000, 1000
SAME_SIZE = 0.02  # as --expect_params has it
RATE_LEFT = 0.02  # of the way from the floor to the peak; less than that changes no loss that one could see
TIME_AT_FLOOR = 0.05  # of the run; a short tail at the floor costs next to nothing
WORTH_FILLING = 600.0  # seconds; a shorter run on a device that is not filled loses nothing worth the trouble

# ---- thresholds of what shows on the way ----

SURE = 3.0  # standard errors; many comparisons are made in a run, of which none should be chance
SPIKE = 10.0  # robust standard deviations; single updates of text reach 5 (quickstart's gradient norms)
SPIKE_AT_LEAST = {"loss": 0.05, "grad_norm": math.log(3.0)}  # relative; keeps a series without noise from alarming
USUAL = 101  # updates that make the usual
FEWEST_BATCHES = 4  # below this a standard error is itself too uncertain for three of it to mean anything
VISIBLE = 0.01  # in loss, nats a token; smaller differences are nobody's worry
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
NAMED_SIZE = "named-size"
WITHIN_UPDATES = (DATA, LOGGING)  # their time is part of an update's


@dataclass(frozen=True)
class Finding:
    """One thing that the run's owner should know.

    Attributes:
        code: names the kind; a run has at most one of each.
        step: updates done when it became true; 0 for what is known before the run.
        text: one or two plain sentences with the numbers and what to do.
    """

    code: str
    step: int
    text: str


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts.

    Attributes:
        config: the request.
        model: the shape that it came to.
        dataset_tokens: in the training split; ``None`` if it is not here.
        predicted_seconds: of an update; ``None`` if nobody predicted it.
        peak_flops: the device's dense peak in FLOP/s; ``None`` where it is not known.
        n_sm: the GPU's streaming multiprocessors; ``None`` for a CPU.
        wanted_tokens_per_step: what an update should hold; ``None`` if that was not asked for.
    """

    config: TrainConfig
    model: GPTConfig
    dataset_tokens: int | None
    predicted_seconds: float | None = None
    peak_flops: float | None = None
    n_sm: int | None = None
    wanted_tokens_per_step: int | None = None

    @property
    def planned_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.max_iters * self.config.tokens_per_step

    def tokens_per_parameter(self, tokens: int) -> float:
        """With N as in 6 N FLOPs a token: without position embeddings."""
        return tokens / self.model.n_params_without_positions

    def epochs(self, tokens: int) -> float:
        """How often so many tokens go through the training split; NaN if nobody knows."""
        return tokens / self.dataset_tokens if self.dataset_tokens else math.nan


def wanted_tokens_per_step(config: TrainConfig) -> int | None:
    """What an update should hold, by the request or else by its preset; ``None`` if neither says."""
    return config.total_batch_size or PRESETS.get(config.preset, {}).get("total_batch_size")


def before(facts: Facts) -> list[Finding]:
    """What can be said before the first update."""
    checks = (named_size, dropout_on_fresh_data, past_chinchilla, schedule_end, tokens_per_step, small_products)
    return [finding for check in checks if (finding := check(facts)) is not None]


# ---- what is known before the run ----


def named_size(facts: Facts) -> Finding | None:
    """A preset whose name states a size, overridden to another one."""
    config, model = facts.config, facts.model
    stated = re.search(r"-(\d+(?:\.\d+)?)([mb])$", config.preset)
    if stated is None or config.expect_params:  # whoever said what to expect has been answered already
        return None
    size = float(stated[1]) * {"m": 1e6, "b": 1e9}[stated[2]]
    if any(abs(n / size - 1) <= SAME_SIZE for n in (model.n_params, model.n_params_without_positions)):
        return None
    usual = PRESETS.get(config.preset, {})
    changes = {}  # what is, and what the preset has
    for name in ("n_layer", "n_embd"):
        is_now, preset_has = getattr(config, name), usual.get(name, getattr(TrainConfig, name))
        if is_now != preset_has:
            changes[f"{name}={is_now}"] = f"{name}={preset_has}"
    if model.vocab_size != GPTConfig.vocab_size:
        changes[f"a vocabulary of {model.vocab_size:,}"] = f"a vocabulary of {GPTConfig.vocab_size:,}"
    text = (
        f"{config.preset} with {_list(list(changes))}: {_params(model.n_params_without_positions)} parameters, not "
        f"{stated[1]}{stated[2].upper()} ({_params(model.n_params)} with position embeddings). "
        f"The model of that name has {_list(list(changes.values()))}; "
        f"--expect_params {model.n_params_without_positions / 1e6:.1f}M says that this one is meant"
    )
    return Finding(NAMED_SIZE, 0, text)


def dropout_on_fresh_data(facts: Facts) -> Finding | None:
    """Dropout in a run that sees nothing twice."""
    dropout, epochs = facts.model.dropout, facts.epochs(facts.planned_tokens)
    if dropout == 0 or facts.dataset_tokens is None or epochs >= 1:
        return None
    text = (
        f"dropout {dropout:g} in a run of {_tokens(facts.planned_tokens)} tokens on {_tokens(facts.dataset_tokens)}, "
        f"{epochs:.2g} of an epoch: what is seen once cannot be learnt by heart, so dropout only costs loss here; "
        "--dropout 0 is better"
    )
    return Finding("dropout-on-fresh-data", 0, text)


def past_chinchilla(facts: Facts) -> Finding | None:
    """Far more tokens than the model makes good use of."""
    N, tokens = facts.model.n_params_without_positions, facts.planned_tokens
    times = facts.tokens_per_parameter(tokens) / CHINCHILLA
    if times < PAST_CHINCHILLA or N < LAW_HOLDS_FROM or facts.model.vocab_size < SMALLEST_SUBWORD_VOCABULARY:
        return None
    text = (
        f"this run plans {_tokens(tokens)} tokens, {times * CHINCHILLA:.0f} a parameter, {times:.1f} times "
        f"Chinchilla's {CHINCHILLA}: for the same compute a model of about {_size(N * math.sqrt(times))} parameters "
        f"on {_tokens(tokens / math.sqrt(times))} tokens should reach a lower loss. If the model must be this small, "
        "because it is to run on little, all is well"
    )
    return Finding("past-chinchilla", 0, text)


def schedule_end(facts: Facts) -> Finding | None:
    """A learning rate whose decay ends before or after the run."""
    c = facts.config
    if c.min_lr >= c.learning_rate:  # a constant rate has no end to meet
        return None
    last = _rate(c, c.max_iters - 1)
    at_floor = 1 - c.lr_decay_iters / c.max_iters
    cure = f"--lr_decay_iters {c.max_iters} ends it with the run"
    if c.lr_decay_iters > c.max_iters and last - c.min_lr > RATE_LEFT * (c.learning_rate - c.min_lr):
        text = (
            f"the learning rate will still be at {last / c.learning_rate:.0%} of its peak when the run ends at step "
            f"{c.max_iters:,}, because its decay ends at step {c.lr_decay_iters:,}: much of what a decay gains comes "
            f"with its end; {cure}"
        )
    elif at_floor > TIME_AT_FLOOR:
        text = (
            f"the learning rate is at its floor of {c.min_lr:g} from step {c.lr_decay_iters:,} on, for the last "
            f"{at_floor:.0%} of the run, in which little is learnt; {cure}"
        )
    else:
        return None
    return Finding("schedule-end", 0, text)


def tokens_per_step(facts: Facts) -> Finding | None:
    """An update that does not hold the tokens that were asked for."""
    c, wanted = facts.config, facts.wanted_tokens_per_step
    if wanted is None or c.tokens_per_step == wanted:
        return None
    sequences = max(1, round(wanted / c.block_size))
    # no larger micro-batch than was asked for: it may not fit the memory
    batch_size = max(b for b in range(1, min(c.batch_size, sequences) + 1) if sequences % b == 0)
    reached = sequences * c.block_size
    closeness = "hold exactly that" if reached == wanted else f"come nearest, with {reached:,}"
    text = (
        f"an update holds {c.tokens_per_step:,} tokens (batch_size {c.batch_size} x block_size {c.block_size} x "
        f"gradient_accumulation_steps {c.gradient_accumulation_steps}), not the {wanted:,} asked for: "
        f"--batch_size {batch_size} --gradient_accumulation_steps {sequences // batch_size} {closeness}"
    )
    return Finding("tokens-per-step", 0, text)


def small_products(facts: Facts) -> Finding | None:
    """Matrix products with fewer tiles than the GPU has multiprocessors."""
    c = facts.config
    if facts.n_sm is None or (facts.predicted_seconds or math.inf) * c.max_iters < WORTH_FILLING:
        return None
    tiles = _most_tiles(c.batch_size * c.block_size, c.n_embd)
    if tiles >= facts.n_sm:
        return None
    factor = 2
    while _most_tiles(factor * c.batch_size * c.block_size, c.n_embd) < facts.n_sm:
        factor *= 2
    cure = f"--batch_size {factor * c.batch_size} fills it, if it fits the memory"
    if c.gradient_accumulation_steps % factor == 0:
        accumulation = c.gradient_accumulation_steps // factor
        cure += f"; with --gradient_accumulation_steps {accumulation} an update stays as it is"
    text = (
        f"the smallest matrix products, {c.batch_size * c.block_size:,} tokens x width {c.n_embd}, come to "
        f"{tiles} {'tile' if tiles == 1 else 'tiles'}, and the GPU has {facts.n_sm} multiprocessors: at most "
        f"{tiles / facts.n_sm:.0%} of it work at a time. {cure}"
    )
    return Finding("small-products", 0, text)


def _most_tiles(M: int, N: int) -> int:
    """Tiles that a product of M x N has if they are as small as they get."""
    return max(math.ceil(M / rows) * math.ceil(N / columns) for rows, columns in TILES)


# ---- what shows on the way ----


class _Evaluation(NamedTuple):
    step: int
    train: Sequence[float]
    val: Sequence[float]


class Diagnosis:
    """What one run has been found to do, from its first update to its last. Its memory does not grow with the run.

    Args:
        facts: what is known before.

    Attributes:
        findings: all so far, those known before the run first. At most one of each code.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.findings = before(facts)
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
        guess = math.log(f.model.vocab_size)
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
                f"the model may be full: {_tokens(tokens)} tokens so far are {ratio:.0f} a parameter, past "
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
        dropout = self.facts.model.dropout
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
        cures = ["more data", "a smaller model"] + (["--dropout 0.1 or 0.2"] if self.facts.model.dropout == 0 else [])
        return f"After {epochs:.1f} epochs, {_list(cures, 'or')} would help; the best checkpoint is kept"

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
        tokens = len(now.val) * self.facts.config.batch_size * self.facts.config.block_size
        text = (
            f"step {now.step:,}: the validation losses of steps {earlier.step:,} and {now.step:,}, "
            f"{fmean(earlier.val):.3f} and {fmean(now.val):.3f}, cannot be told apart: evaluated on {_tokens(tokens)} "
            f"tokens their difference is {_signed(change)} ± {_difference(error)}. --eval_iters {n_batches} instead of "
            f"{len(now.val)} would bring that to ± {_difference(smallest)}"
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
        flops = self.facts.model.flops_per_token * self.facts.config.tokens_per_step
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
            f"step {step:,}: an update takes {_seconds(measured)} where {_seconds(predicted)} were predicted, "
            f"{measured / predicted:.2f} times as long{mfu}.{spent} {_capital('; '.join(cures))}"
        )


def _rate(config: TrainConfig, step: int) -> float:
    return learning_rate(
        step, peak=config.learning_rate, floor=config.min_lr, warmup_iters=config.warmup_iters,
        decay_iters=config.lr_decay_iters,
    )  # fmt: skip


def _paired(a: _Evaluation, b: _Evaluation) -> bool:
    """Whether two evaluations can have used the same batches; not if a resumed run has other ``eval_iters``."""
    return len(a.train) == len(b.train) and len(a.val) == len(b.val)


# ---- words ----

A100 = 312e12  # FLOP/s, dense bf16: what nanoGPT divides by


def mfu_sentence(flops_per_second: float, peak: float | None, device: str, dtype: torch.dtype) -> str:
    """The share of the peak, whose peak that is, and what nanoGPT would have called it.

    Args:
        flops_per_second: reached.
        peak: the device's dense peak in FLOP/s; ``None`` where it is not known.
        device: its name.
        dtype: of the products.
    """
    reached = f"{flops_per_second / 1e12:.3g} TFLOP/s"
    kind = SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
    if peak is None:
        return f"{reached} on {device} in {kind}, whose peak is not known: no MFU"
    text = f"MFU {flops_per_second / peak:.1%}: {reached} of the {device}'s {peak / 1e12:.4g} TFLOP/s, dense {kind}"
    if abs(peak / A100 - 1) > SAME_SIZE:
        text += f" (nanoGPT, which divides by an A100's 312 on any device, would say {flops_per_second / A100:.1%})"
    return text


def _params(n: float) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def _size(n: float) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"


def _tokens(n: float) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.1f}B"
    if n >= 1e6:
        return f"{n / 1e6:.0f}M" if n >= 1e7 else f"{n / 1e6:.1f}M"
    return f"{n / 1e3:.0f}K" if n >= 1e4 else f"{n:,.0f}"


def _difference(x: float) -> str:
    """A difference of losses to what can be read off it: three decimals, fewer for large ones."""
    x = abs(x)
    return f"{x:.2f}" if x >= 0.0995 else f"{x:.3f}" if x >= 0.00095 else f"{x:.4f}"


def _signed(x: float) -> str:
    return ("-" if x < 0 else "+") + _difference(x)


def _share(x: float) -> str:
    return f"{x:.0%}" if x >= 0.01 else "under 1%"


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{x * 1e3:.3g} ms"


def _z(away: float, spread: float) -> str:
    return f"{away / spread:.0f} times the usual spread" if spread > 0 else "where there was no spread at all"


def _list(items: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
