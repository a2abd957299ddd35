"""Checks of a run before its first update."""

import math
import re

from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig, is_of_size
from fastgpt.train.diagnose.findings import Facts, Finding, joined
from fastgpt.train.predict.roofline import TILES
from fastgpt.train.presets import PRESETS
from fastgpt.units import count

NAMED_SIZE = "named-size"  # code of the finding that is reported first, before the lines that introduce the run

CHINCHILLA = 20  # tokens per parameter with the lowest loss for the compute (Hoffmann et al. 2022)
# The multiple of Chinchilla's ratio from which on a run is reported. The law as refitted by Besiroglu et al. (2024)
# compares a model with the best one for the same compute: the loss of 124M parameters is higher by 0.005 at 2 times, by
# 0.03 at 4 and by 0.04 at 5, that of 41M by 0.05 at 5 and by 0.1 at 10. GPT-2 124M on ten billion tokens, a common
# run, is at 4, and should not be reported.
PAST_CHINCHILLA = 5
# Chinchilla's law was fitted to larger models and to subword tokens. It is not known to hold below these sizes.
LAW_HOLDS_FROM, SMALLEST_SUBWORD_VOCABULARY = 10_000_000, 1000
RATE_LEFT = 0.02  # fraction of the way from the floor to the peak; a smaller rest has no visible effect on the loss
TIME_AT_FLOOR = 0.05  # fraction of the run; a shorter time at the floor costs almost nothing
WORTH_FILLING = 600.0  # seconds; in a shorter run, a GPU that is not filled costs minutes at most


def check(facts: Facts) -> list[Finding]:
    """Return the findings that are known before the first update."""
    checks = (named_size, dropout_on_fresh_data, past_chinchilla, schedule_end, tokens_per_step, small_products)
    return [finding for one in checks if (finding := one(facts)) is not None]


def named_size(facts: Facts) -> Finding | None:
    """Check whether a preset named after a size, such as gpt2-124m, was changed to another size by flags."""
    config, gpt_config = facts.config, facts.gpt_config
    stated = re.search(r"-(\d+(?:\.\d+)?)([mb])$", config.preset)
    if stated is None or config.expect_params:  # with --expect_params the size has been checked already
        return None
    size = float(stated[1]) * {"m": 1e6, "b": 1e9}[stated[2]]
    if is_of_size(gpt_config, size):
        return None
    preset = PRESETS.get(config.preset, {})
    changes = {}  # this run's value -> the preset's
    for name in ("n_layer", "n_embd", "positions", "mlp", "n_kv_head", "tied", "value_embeddings"):
        is_now, preset_has = getattr(config, name), preset.get(name, getattr(TrainConfig, name))
        if is_now != preset_has:
            changes[f"{name}={is_now}"] = f"{name}={preset_has}"
    if gpt_config.vocab_size != GPTConfig.vocab_size:
        changes[f"a vocabulary of {gpt_config.vocab_size:,}"] = f"a vocabulary of {GPTConfig.vocab_size:,}"
    n_params = gpt_config.n_params_without_positions
    text = (
        f"{config.preset} with {joined(list(changes))}: {count(n_params, 2)} parameters, not "
        f"{stated[1]}{stated[2].upper()} ({count(gpt_config.n_params, 2)} with position embeddings). The unchanged "
        f"preset has {joined(list(changes.values()))}. If this size is intended, add "
        f"--expect_params {n_params / 1e6:.1f}M"
    )
    return Finding(NAMED_SIZE, 0, text)


def dropout_on_fresh_data(facts: Facts) -> Finding | None:
    """Check for dropout in a run that sees no token twice."""
    dropout, epochs = facts.gpt_config.dropout, facts.epochs(facts.total_tokens)
    if dropout == 0 or facts.dataset_tokens is None or epochs >= 1:
        return None
    text = (
        f"dropout is {dropout:g}, but the run covers only {epochs:.2g} of an epoch ({count(facts.total_tokens)} of "
        f"{count(facts.dataset_tokens)} tokens). No token is seen twice, so dropout prevents no overfitting and only "
        "raises the loss: use --dropout 0"
    )
    return Finding("dropout-on-fresh-data", 0, text)


def past_chinchilla(facts: Facts) -> Finding | None:
    """Check for far more tokens than are worth it for a model of this size."""
    N, tokens = facts.gpt_config.n_params_without_positions, facts.total_tokens
    times = facts.tokens_per_parameter(tokens) / CHINCHILLA
    # For the same compute 6 N D at Chinchilla's ratio, N grows and the tokens D shrink by sqrt(times).
    if times < PAST_CHINCHILLA or N < LAW_HOLDS_FROM or facts.gpt_config.vocab_size < SMALLEST_SUBWORD_VOCABULARY:
        return None
    text = (
        f"this run trains on {count(tokens)} tokens, {times * CHINCHILLA:.0f} per parameter, {times:.1f} times "
        f"Chinchilla's {CHINCHILLA}. For the same compute, a model of about {count(N * math.sqrt(times))} parameters "
        f"on {count(tokens / math.sqrt(times))} tokens should reach a lower loss. Ignore this if the model has to be "
        "this small for its later use"
    )
    return Finding("past-chinchilla", 0, text)


def schedule_end(facts: Facts) -> Finding | None:
    """Check whether the decay of the learning rate ends before or after the run."""
    c = facts.config
    if c.min_lr >= c.learning_rate or not c.decay_lr:  # a constant rate does not decay
        return None
    last = c.learning_rate_at(c.max_iters - 1)
    at_floor = 1 - c.lr_decay_iters / c.max_iters
    remedy = f"use --lr_decay_iters {c.max_iters} to end the decay with the run"
    if c.lr_decay_iters > c.max_iters and last - c.min_lr > RATE_LEFT * (c.learning_rate - c.min_lr):
        text = (
            f"the learning rate is still at {last / c.learning_rate:.0%} of its peak when the run ends at step "
            f"{c.max_iters:,}, because its decay ends at step {c.lr_decay_iters:,}. Most of the gain of a decay comes "
            f"near its end: {remedy}"
        )
    elif at_floor > TIME_AT_FLOOR:
        text = (
            f"the learning rate is at its floor of {c.min_lr:g} from step {c.lr_decay_iters:,} on, for the last "
            f"{at_floor:.0%} of the run. Little is learnt there: {remedy}"
        )
    else:
        return None
    return Finding("schedule-end", 0, text)


def tokens_per_step(facts: Facts) -> Finding | None:
    """Check whether an update has the requested number of tokens."""
    c, wanted = facts.config, facts.wanted_tokens_per_step
    if wanted is None or c.tokens_per_step == wanted:
        return None
    sequences = max(1, round(wanted / c.block_size))
    # not larger than the requested micro-batch, because a larger one may not fit into memory
    batch_size = max(b for b in range(1, min(c.micro_batch_size, sequences) + 1) if sequences % b == 0)
    reached = sequences * c.block_size
    aim = "for exactly that number" if reached == wanted else f"for the nearest possible number, {reached:,}"
    text = (
        f"an update has {c.tokens_per_step:,} tokens (batch_size {c.micro_batch_size} x block_size {c.block_size} x "
        f"gradient_accumulation_steps {c.gradient_accumulation_steps}), not the requested {wanted:,}. Use "
        f"--batch_size {batch_size} --gradient_accumulation_steps {sequences // batch_size} {aim}"
    )
    return Finding("tokens-per-step", 0, text)


def small_products(facts: Facts) -> Finding | None:
    """Check for matrix products with fewer tiles than the GPU has multiprocessors.

    A multiprocessor computes one tile at a time, so with fewer tiles some multiprocessors are idle.
    """
    c = facts.config
    if facts.n_sm is None or _seconds(facts) < WORTH_FILLING:
        return None
    tiles = _most_tiles(c.micro_batch_size * c.block_size, c.n_embd)
    if tiles >= facts.n_sm:
        return None
    factor = 2  # of the micro-batch
    while _most_tiles(factor * c.micro_batch_size * c.block_size, c.n_embd) < facts.n_sm:
        factor *= 2
    remedy = f"Use --batch_size {factor * c.micro_batch_size} to fill the GPU, if it fits into memory"
    if c.accumulation_at(0) % factor == 0:
        accumulation = c.gradient_accumulation_steps // factor
        remedy += f". Add --gradient_accumulation_steps {accumulation} to keep the tokens per update"
    text = (
        f"the smallest matrix products ({c.micro_batch_size * c.block_size:,} tokens x width {c.n_embd}) have only "
        f"{tiles} {'tile' if tiles == 1 else 'tiles'} for the GPU's {facts.n_sm} multiprocessors: at most "
        f"{tiles / facts.n_sm:.0%} of them work at a time. {remedy}"
    )
    return Finding("small-products", 0, text)


def _seconds(facts: Facts) -> float:
    """Return the predicted seconds of the run; infinity without a prediction."""
    return (facts.predicted_seconds or math.inf) * facts.total_tokens / facts.config.tokens_per_step


def _most_tiles(M: int, N: int) -> int:
    """Return the number of tiles of an M x N product with the smallest tile size."""
    return max(math.ceil(M / rows) * math.ceil(N / columns) for rows, columns in TILES)
