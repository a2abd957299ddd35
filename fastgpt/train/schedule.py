"""The learning rate over a run: linear warm-up, a decay, constant floor.

The decay is a cosine, exactly nanoGPT's schedule; or the rate stays at its peak and then falls linearly, as in
Hu et al., "MiniCPM", 2024, and Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", 2024.
"""

import math


def learning_rate(
    step: int, *, peak: float, floor: float, warmup_iters: int, decay_iters: int, cooldown: float | None = None
) -> float:
    """The learning rate of update number ``step``, counted from 0.

    Args:
        step: updates done so far.
        peak: rate at the end of the warm-up.
        floor: rate from ``decay_iters`` on.
        warmup_iters: updates of linear warm-up.
        decay_iters: update at which the decay reaches ``floor``.
        cooldown: the share of ``decay_iters`` during which the rate falls linearly; ``None`` for a cosine from the
            warm-up on.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if step >= decay_iters:
        return floor
    if cooldown is not None:
        begin = max(warmup_iters, decay_iters * (1.0 - cooldown))
        return floor + min(1.0, (decay_iters - step) / (decay_iters - begin)) * (peak - floor)
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
