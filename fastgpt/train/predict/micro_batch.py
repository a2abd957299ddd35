"""Chooses the micro-batch and the recomputation for a device: the fastest combination that fits into its memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgpt.errors import RequestError
from fastgpt.limits import Bound
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict.roofline import Machine, Prediction, predict
from fastgpt.train.predict.trace import Recompute, Setup, reserve, trace_step

# Largest micro-batch to try, in sequences. At 1,024 tokens each its products fill any GPU many times over, so a larger
# one is not faster.
MOST_SEQUENCES = 128


def kinds_of_recompute(config: TrainConfig, device_type: str) -> tuple[Recompute, ...]:
    """Return the kinds of recomputation that ``--recompute`` allows, in ascending order of what they recompute."""
    if config.recompute != "auto":
        return (config.recompute,)
    if config.compile:  # torch.compile decides itself what to recompute, and needs no more memory than "none"
        return ("none",)
    # On a CPU "cheap" is as fast as "none": recomputing takes no longer than loading from its slow memory.
    return ("none", "cheap", "block") if device_type == "cuda" else ("cheap",)


def fits(setup: Setup, memory: int) -> bool:
    """Whether a step is predicted to fit into ``memory`` free bytes."""
    trace = trace_step(setup)
    return trace.peak + reserve(setup.device_type, trace) <= memory


def least_recompute(setup: Setup, memory: int, kinds: Sequence[Recompute]) -> Recompute | None:
    """Return the first of these kinds with which the step fits; ``None`` if there is none."""
    return next((kind for kind in kinds if fits(replace(setup, recompute=kind), memory)), None)


@dataclass(frozen=True)
class Choice:
    """A micro-batch and a kind of recomputation that fit, with their prediction.

    Attributes:
        batch_size: sequences in a micro-batch, B.
        recompute: ``none``, ``cheap`` or ``block``.
        accumulation: micro-batches per update.
        prediction: predicted time and memory.
    """

    batch_size: int
    recompute: Recompute
    accumulation: int
    prediction: Prediction


def choices(
    setup: Setup, machine: Machine, memory: int, total: int, kinds: Sequence[Recompute], least: int | None = None
) -> list[Choice]:
    """Return every micro-batch that fits and divides an update of ``total`` tokens, for each kind of recomputation.

    Args:
        setup: the step; its micro-batch and recomputation are ignored.
        machine: the device to predict for.
        memory: bytes available.
        total: tokens per update.
        kinds: kinds of recomputation to try.
        least: tokens of the smallest update, which divides ``total`` and has to be divided too; ``total`` if ``None``.
    """
    found = []
    sequences, rest = divmod(total, setup.gpt_config.block_size)
    to_divide = sequences if least is None else least // setup.gpt_config.block_size
    for kind in kinds:
        for batch_size in [] if rest else _sizes(to_divide):
            tried = replace(setup, batch_size=batch_size, recompute=kind)
            prediction = predict(tried, machine)
            if prediction.held > memory:
                break  # sizes ascend, so the next ones do not fit either
            found.append(Choice(batch_size, kind, sequences // batch_size, prediction))
    return found


def _sizes(sequences: int) -> list[int]:
    """Return the micro-batches to try, ascending: divisors of ``sequences``, above 8 only multiples of 8.

    Multiples of 8 give shapes that suit tensor cores.
    """
    divisors = [n for n in range(1, min(sequences, MOST_SEQUENCES) + 1) if sequences % n == 0]
    return [n for n in divisors if n <= 8 or n % 8 == 0]


def choose(found: Sequence[Choice]) -> Choice | None:
    """Return the choice with the least memory among those within 1 % of the fastest; ``None`` if there are none."""
    if not found:
        return None
    best = max(choice.prediction.tokens_per_second(choice.accumulation) for choice in found)
    near = [c for c in found if c.prediction.tokens_per_second(c.accumulation) >= 0.99 * best]
    return min(near, key=lambda choice: choice.prediction.memory)


def fill_in(config: TrainConfig, setup: Setup, memory: Bound, found: Sequence[Choice]) -> TrainConfig:
    """Return the config with micro-batch, accumulation and recomputation filled in where they are automatic.

    Args:
        config: the request; if it states a micro-batch, that is kept.
        setup: the model, device type, dtype and bits of the moments.
        memory: bytes available, and what limits them.
        found: the result of :func:`choices` for this memory; needed only with ``--batch_size auto``.

    Raises:
        RequestError: nothing fits, or no micro-batch divides the update.
    """
    if config.batch_size is not None:
        kinds = kinds_of_recompute(config, setup.device_type)
        requested = replace(setup, batch_size=config.batch_size)
        kind = kinds[0] if len(kinds) == 1 else least_recompute(requested, memory.amount, kinds)
        # If it fits with none, the prediction may still be too high: try the one that takes the least memory.
        return replace(config, recompute=kind or kinds[-1])
    choice = choose(found)
    if choice is not None:
        return replace(config.with_batch_size(choice.batch_size), recompute=choice.recompute)
    if config.total_batch_size % config.block_size:
        config.with_batch_size(1)  # raises the error that names a total_batch_size which can be reached
    raise RequestError(
        f"a micro-batch of one sequence of {config.block_size} tokens does not fit into {memory.amount / 2**30:.1f} "
        f"GiB ({memory.source}); use {'--state_bits 8, ' if config.state_bits == 32 else ''}--recompute block or a "
        "smaller model"
    )


def largest_batch(setup: Setup, memory: int, most: int = 512) -> int:
    """Return the largest micro-batch that fits; 0 if a single sequence does not fit."""
    low, high = 0, 1  # double until ``high`` does not fit, then bisect between the two
    while high <= most and fits(replace(setup, batch_size=high), memory):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(setup, batch_size=middle), memory):
            low = middle
        else:
            high = middle
    return low
