"""Checks of a run before its first update."""

import math
import re

from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.train.diagnose.findings import Facts, Finding, joined
from fastgpt.train.predict.roofline import TILES
from fastgpt.train.presets import PRESETS
from fastgpt.train.schedule import learning_rate
from fastgpt.units import count

NAMED_SIZE = "named-size"  # the finding that comes first, before the run introduces itself

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


def check(facts: Facts) -> list[Finding]:
    """The findings before the first update."""
    checks = (named_size, dropout_on_fresh_data, past_chinchilla, schedule_end, tokens_per_step, small_products)
    return [finding for one in checks if (finding := one(facts)) is not None]


def named_size(facts: Facts) -> Finding | None:
    """A preset whose name states a size, overridden to another one."""
    config, model = facts.config, facts.gpt_config
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
        f"{config.preset} with {joined(list(changes))}: {count(model.n_params_without_positions, 2)} parameters, not "
        f"{stated[1]}{stated[2].upper()} ({count(model.n_params, 2)} with position embeddings). "
        f"The model of that name has {joined(list(changes.values()))}; "
        f"--expect_params {model.n_params_without_positions / 1e6:.1f}M says that this one is meant"
    )
    return Finding(NAMED_SIZE, 0, text)


def dropout_on_fresh_data(facts: Facts) -> Finding | None:
    """Dropout in a run that sees nothing twice."""
    dropout, epochs = facts.gpt_config.dropout, facts.epochs(facts.planned_tokens)
    if dropout == 0 or facts.dataset_tokens is None or epochs >= 1:
        return None
    text = (
        f"dropout {dropout:g} in a run of {count(facts.planned_tokens)} tokens on {count(facts.dataset_tokens)}, "
        f"{epochs:.2g} of an epoch: what is seen once cannot be learnt by heart, so dropout only costs loss here; "
        "--dropout 0 is better"
    )
    return Finding("dropout-on-fresh-data", 0, text)


def past_chinchilla(facts: Facts) -> Finding | None:
    """Far more tokens than the model makes good use of."""
    N, tokens = facts.gpt_config.n_params_without_positions, facts.planned_tokens
    times = facts.tokens_per_parameter(tokens) / CHINCHILLA
    if times < PAST_CHINCHILLA or N < LAW_HOLDS_FROM or facts.gpt_config.vocab_size < SMALLEST_SUBWORD_VOCABULARY:
        return None
    text = (
        f"this run plans {count(tokens)} tokens, {times * CHINCHILLA:.0f} a parameter, {times:.1f} times "
        f"Chinchilla's {CHINCHILLA}: for the same compute a model of about {count(N * math.sqrt(times))} parameters "
        f"on {count(tokens / math.sqrt(times))} tokens should reach a lower loss. Ignore this if the model must be "
        "this small to run where it will be used"
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
    batch_size = max(b for b in range(1, min(c.micro_batch_size, sequences) + 1) if sequences % b == 0)
    reached = sequences * c.block_size
    closeness = "hold exactly that" if reached == wanted else f"come nearest, with {reached:,}"
    text = (
        f"an update holds {c.tokens_per_step:,} tokens (batch_size {c.micro_batch_size} x block_size {c.block_size} x "
        f"gradient_accumulation_steps {c.gradient_accumulation_steps}), not the {wanted:,} asked for: "
        f"--batch_size {batch_size} --gradient_accumulation_steps {sequences // batch_size} {closeness}"
    )
    return Finding("tokens-per-step", 0, text)


def small_products(facts: Facts) -> Finding | None:
    """Matrix products with fewer tiles than the GPU has multiprocessors."""
    c = facts.config
    if facts.n_sm is None or (facts.predicted_seconds or math.inf) * c.max_iters < WORTH_FILLING:
        return None
    tiles = _most_tiles(c.micro_batch_size * c.block_size, c.n_embd)
    if tiles >= facts.n_sm:
        return None
    factor = 2
    while _most_tiles(factor * c.micro_batch_size * c.block_size, c.n_embd) < facts.n_sm:
        factor *= 2
    cure = f"--batch_size {factor * c.micro_batch_size} fills it, if it fits the memory"
    if c.gradient_accumulation_steps % factor == 0:
        accumulation = c.gradient_accumulation_steps // factor
        cure += f"; with --gradient_accumulation_steps {accumulation} an update stays as it is"
    text = (
        f"the smallest matrix products, {c.micro_batch_size * c.block_size:,} tokens x width {c.n_embd}, come to "
        f"{tiles} {'tile' if tiles == 1 else 'tiles'}, and the GPU has {facts.n_sm} multiprocessors: at most "
        f"{tiles / facts.n_sm:.0%} of it work at a time. {cure}"
    )
    return Finding("small-products", 0, text)


def _most_tiles(M: int, N: int) -> int:
    """Tiles that a product of M x N has if they are as small as they get."""
    return max(math.ceil(M / rows) * math.ceil(N / columns) for rows, columns in TILES)


def _rate(config: TrainConfig, step: int) -> float:
    return learning_rate(
        step, peak=config.learning_rate, floor=config.min_lr, warmup_iters=config.warmup_iters,
        decay_iters=config.lr_decay_iters,
    )  # fmt: skip
