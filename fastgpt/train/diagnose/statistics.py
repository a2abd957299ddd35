"""Statistics of losses: standard errors, a robust centre and spread, a fitted line, and a history of bounded size."""

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np

FEWEST_UPDATES = 32  # with fewer values, a median absolute deviation is itself too uncertain
# A slope is fitted to the means of this many consecutive groups of losses. Consecutive losses are correlated, so the
# standard errors of a fit to single losses would be too small. Means over more than the correlation length are nearly
# independent.
GROUPS = 10
FEWEST_IN_GROUP = 5  # updates


def standard_error(losses: Sequence[float]) -> float:
    """Return the standard error of the mean of an evaluation's batches, as an estimate for the whole split.

    It is NaN for fewer than two batches and for losses that are not finite (Python 3.11's ``stdev`` raises on those).
    """
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return math.nan
    return stdev(losses) / math.sqrt(len(losses))


def difference(earlier: Sequence[float], later: Sequence[float]) -> tuple[float, float]:
    """Return the mean of ``later - earlier`` and its standard error, as in a paired t-test.

    Both are losses of the same batches. Some batches are harder than others, which makes up most of the variance of a
    mean. It cancels in the differences, so their standard error is much smaller than that of either mean.
    """
    changes = [b - a for a, b in zip(earlier, later, strict=True)]
    return fmean(changes), standard_error(changes)


def robust_centre_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and a robust standard deviation; NaN for both if there are too few values.

    The median absolute deviation of a normal distribution is 0.6745 of its standard deviation (the 75 % quantile), so
    it is multiplied by 1 / 0.6745 = 1.4826. Unlike the mean and the standard deviation, neither is moved by the few
    spikes that it is there to detect.
    """
    if len(values) < FEWEST_UPDATES:
        return math.nan, math.nan
    middle = median(values)
    return middle, 1.4826 * median(abs(value - middle) for value in values)


class Line(NamedTuple):
    """A least-squares line and its standard errors.

    Attributes:
        mean: its value at ``middle``, the mean of the losses.
        mean_error: standard error of ``mean``.
        middle: the mean of the steps.
        slope: loss per step.
        slope_error: standard error of ``slope``; the two errors are uncorrelated.
    """

    mean: float
    mean_error: float
    middle: float
    slope: float
    slope_error: float


def fit(steps: np.ndarray, losses: np.ndarray) -> Line:
    """Fit a line to losses over steps by ordinary least squares, with independent errors of equal variance."""
    n, middle, mean = len(steps), steps.mean(), losses.mean()
    away = steps - middle
    square = (away**2).sum()
    slope = (away * losses).sum() / square
    # standard deviation of the residuals; the two parameters take two degrees of freedom
    residual = math.sqrt(((losses - mean - slope * away) ** 2).sum() / (n - 2))
    return Line(float(mean), residual / math.sqrt(n), float(middle), float(slope), float(residual / math.sqrt(square)))


class History:
    """The losses of a run as means of blocks of consecutive losses, in bounded memory.

    A block is a single loss at first. Whenever there are ``MOST`` blocks, neighbours are merged in pairs, which makes
    blocks twice as long.
    """

    MOST = 512  # blocks; after a merge there are 256, and the last tenth of the run still has two dozen

    def __init__(self) -> None:
        self._size = 1  # losses in a block
        self._blocks: list[tuple[float, float]] = []  # mean step and mean loss
        self._open: list[tuple[float, float]] = []  # steps and losses of the block that is not full yet

    def add(self, step: int, loss: float) -> None:
        """Append the loss of an update."""
        self._open.append((step, loss))
        if len(self._open) == self._size:
            self._blocks.append(_mean(self._open))
            self._open = []
        if len(self._blocks) == self.MOST:
            self._blocks = [_mean(pair) for pair in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
            self._size *= 2

    def since(self, start: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the steps and losses of the blocks from ``start`` on.

        ``None`` if the history starts later than ``start``, or has too few losses since then.
        """
        if not self._blocks or self._blocks[0][0] > start:
            return None
        recent = np.array([block for block in self._blocks if block[0] >= start])
        if len(recent) < GROUPS or len(recent) * self._size < FEWEST_UPDATES:
            return None
        return recent[:, 0], recent[:, 1]

    def groups(self, start: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Return :meth:`since` averaged over ``GROUPS`` groups of equal size; ``None`` if there are too few losses."""
        recent = self.since(start)
        if recent is None:
            return None
        size = len(recent[0]) // GROUPS
        if size * self._size < FEWEST_IN_GROUP:
            return None
        # the oldest blocks are dropped where GROUPS does not divide their number
        steps, losses = (values[-size * GROUPS :].reshape(GROUPS, size).mean(axis=1) for values in recent)
        return steps, losses


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(step for step, _ in points), fmean(loss for _, loss in points)
