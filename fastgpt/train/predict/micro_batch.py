"""The micro-batch and the recomputation that a device takes: what fits its memory, and the fastest of that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgpt.errors import RequestError
from fastgpt.limits import Bound
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict.roofline import Machine, Prediction, predict
from fastgpt.train.predict.trace import Recompute, Setup, reserve, trace_step

MOST_SEQUENCES = 128  # of a micro-batch: beyond it nothing is won


def kinds_of_recompute(config: TrainConfig, device_type: str) -> tuple[Recompute, ...]:
    """What ``--recompute`` leaves open, least first. On a CPU ``cheap`` costs no time, as memory is slow there."""
    if config.recompute != "auto":
        return (config.recompute,)
    if config.compile:  # chooses itself, and keeps no more than this
        return ("none",)
    return ("none", "cheap", "block") if device_type == "cuda" else ("cheap",)


def fits(setup: Setup, memory: int) -> bool:
    """Whether a step should fit so many bytes that are free."""
    trace = trace_step(setup)
    return trace.peak + reserve(setup.device_type, trace) <= memory


def least_recompute(setup: Setup, memory: int, kinds: Sequence[Recompute]) -> Recompute | None:
    """The first of these kinds with which the step fits; ``None`` if it does with none."""
    return next((kind for kind in kinds if fits(replace(setup, recompute=kind), memory)), None)


@dataclass(frozen=True)
class Choice:
    """A micro-batch for a device, with what is recomputed to make it fit.

    Attributes:
        batch_size: sequences, B.
        recompute: ``none``, ``cheap`` or ``block``.
        accumulation: micro-batches in an update.
        prediction: of its time and memory.
    """

    batch_size: int
    recompute: Recompute
    accumulation: int
    prediction: Prediction


def choices(setup: Setup, machine: Machine, memory: int, total: int, kinds: Sequence[Recompute]) -> list[Choice]:
    """Every micro-batch that fits and divides an update of ``total`` tokens, each with every kind of recomputation.

    Args:
        setup: its micro-batch and recomputation are ignored.
        machine: predicts by it.
        memory: bytes that there are.
        total: tokens of an update.
        kinds: of recomputation.
    """
    found = []
    sequences, rest = divmod(total, setup.gpt_config.block_size)
    for kind in kinds:
        for batch_size in [] if rest else _sizes(sequences):
            tried = replace(setup, batch_size=batch_size, recompute=kind)
            prediction = predict(tried, machine)
            if prediction.held > memory:
                break
            found.append(Choice(batch_size, kind, sequences // batch_size, prediction))
    return found


def _sizes(sequences: int) -> list[int]:
    """Micro-batches to try, ascending: every divisor up to 8, and of the others those that suit the tensor cores."""
    divisors = [n for n in range(1, min(sequences, MOST_SEQUENCES) + 1) if sequences % n == 0]
    return [n for n in divisors if n <= 8 or n % 8 == 0]


def choose(found: Sequence[Choice]) -> Choice | None:
    """The one that takes least memory among those within a hundredth of the fastest; ``None`` of none."""
    if not found:
        return None
    best = max(choice.prediction.tokens_per_second(choice.accumulation) for choice in found)
    near = [c for c in found if c.prediction.tokens_per_second(c.accumulation) >= 0.99 * best]
    return min(near, key=lambda choice: choice.prediction.memory)


def fill_in(config: TrainConfig, setup: Setup, memory: Bound, found: Sequence[Choice]) -> TrainConfig:
    """The request with micro-batch, accumulation and recomputation filled in where it left them to the device.

    Args:
        config: its micro-batch is kept if it states one.
        setup: the model, device type, dtype and bits of the moments.
        memory: bytes available, and what limits them.
        found: the result of :func:`choices` for this memory; needed only with ``--batch_size auto``.

    Raises:
        RequestError: nothing fits, or no micro-batch divides the update.
    """
    if config.batch_size is not None:
        kinds = kinds_of_recompute(config, setup.device_type)
        asked = replace(setup, batch_size=config.batch_size)
        kind = kinds[0] if len(kinds) == 1 else least_recompute(asked, memory.amount, kinds)
        return replace(config, recompute=kind or kinds[-1])
    choice = choose(found)
    if choice is not None:
        return replace(config.with_batch_size(choice.batch_size), recompute=choice.recompute)
    if config.total_batch_size % config.block_size:
        config.with_batch_size(1)  # says what would be exact
    raise RequestError(
        f"not one sequence of {config.block_size} fits {memory.amount / 2**30:.1f} GiB ({memory.source}): "
        "--state_bits 8, --recompute block or a smaller model take less"
    )


def largest_batch(setup: Setup, memory: int, most: int = 512) -> int:
    """The largest micro-batch that fits; 0 if not even one sequence does."""
    low, high = 0, 1
    while high <= most and fits(replace(setup, batch_size=high), memory):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(setup, batch_size=middle), memory):
            low = middle
        else:
            high = middle
    return low
