"""The learning rate over a run: linear warm-up, cosine decay, constant floor. Exactly nanoGPT's schedule."""

import math


def learning_rate(step: int, *, peak: float, floor: float, warmup_iters: int, decay_iters: int) -> float:
    """The learning rate of update number ``step``, counted from 0.

    Args:
        step: updates done so far.
        peak: rate at the end of the warm-up.
        floor: rate from ``decay_iters`` on.
        warmup_iters: updates of linear warm-up.
        decay_iters: update at which the cosine reaches ``floor``.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
