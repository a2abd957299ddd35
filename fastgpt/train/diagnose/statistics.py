"""Statistics of losses: standard errors, a robust usual value, a line through noise, a history that stays small."""

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

FEWEST_UPDATES = 32  # below this a median absolute deviation is itself too uncertain
GROUPS = 10  # whose means the slope is fitted to: noise that lasts shorter than one of them does no harm
FEWEST_IN_GROUP = 5  # updates


def standard_error(losses: Sequence[float]) -> float:
    """Of the mean of an evaluation's batches, as an estimate for the whole split.

    NaN for fewer than two, and where a loss is not finite: of such numbers Python 3.11 gives no deviation, but fails.
    """
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return math.nan
    return stdev(losses) / math.sqrt(len(losses))


def difference(earlier: Sequence[float], later: Sequence[float]) -> tuple[float, float]:
    """How much ``later`` lies above ``earlier``, and the standard error of that.

    Both are losses of the same batches, so what makes one batch harder than another falls out: the error is much
    smaller than those of the two means.
    """
    changes = [b - a for a, b in zip(earlier, later, strict=True)]
    return fmean(changes), standard_error(changes)


def usual_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for; NaN for too few values."""
    if len(values) < FEWEST_UPDATES:
        return math.nan, math.nan
    middle = median(values)
    return middle, 1.4826 * median(abs(value - middle) for value in values)


class Line(NamedTuple):
    """A least-squares line: its value and its place in the middle of the points, its slope, and standard errors."""

    mean: float
    mean_error: float
    middle: float
    slope: float
    slope_error: float


def fit(steps: np.ndarray, losses: np.ndarray) -> Line:
    n, middle, mean = len(steps), steps.mean(), losses.mean()
    away = steps - middle
    square = (away**2).sum()
    slope = (away * losses).sum() / square
    residual = math.sqrt(((losses - mean - slope * away) ** 2).sum() / (n - 2))
    return Line(float(mean), residual / math.sqrt(n), float(middle), float(slope), float(residual / math.sqrt(square)))


class History:
    """The means of blocks of consecutive losses: single losses at first, then ever longer blocks, never many."""

    MOST = 512  # blocks; a tenth of them, after two have become one, is still two dozen

    def __init__(self) -> None:
        self._size = 1  # losses in a block
        self._blocks: list[tuple[float, float]] = []  # mean step and mean loss
        self._open: list[tuple[float, float]] = []

    def add(self, step: int, loss: float) -> None:
        self._open.append((step, loss))
        if len(self._open) == self._size:
            self._blocks.append(_mean(self._open))
            self._open = []
        if len(self._blocks) == self.MOST:
            self._blocks = [_mean(pair) for pair in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
            self._size *= 2

    def since(self, start: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Steps and losses from ``start`` on; ``None`` if the history does not go back so far, or holds too little."""
        if not self._blocks or self._blocks[0][0] > start:
            return None
        recent = np.array([block for block in self._blocks if block[0] >= start])
        if len(recent) < GROUPS or len(recent) * self._size < FEWEST_UPDATES:
            return None
        return recent[:, 0], recent[:, 1]

    def groups(self, start: float) -> tuple[np.ndarray, np.ndarray] | None:
        """The same as means of ``GROUPS`` equal parts."""
        recent = self.since(start)
        if recent is None:
            return None
        size = len(recent[0]) // GROUPS
        if size * self._size < FEWEST_IN_GROUP:
            return None
        steps, losses = (values[-size * GROUPS :].reshape(GROUPS, size).mean(axis=1) for values in recent)
        return steps, losses


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(step for step, _ in points), fmean(loss for _, loss in points)
