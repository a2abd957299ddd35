"""What a few runs say of all: intervals, an exact test, and where a curve reaches a value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, variance

import numpy as np

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval of ``LEVEL``; the ends are ``None`` if too few values were given."""

    value: float
    low: float | None = None
    high: float | None = None


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t for which Student's T of so many degrees of freedom lies between -t and t with probability ``level``.

    With T = sqrt(degrees) tan(a), the density of the angle a is proportional to cos(a) ** (degrees - 1).
    """
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(np.interp(level, mass / mass[-1], angles))


def mean(values: Sequence[float]) -> Interval:
    """The mean, by Student's t."""
    n, value = len(values), fmean(values)
    if n < 2:
        return Interval(value)
    half = t_quantile(n - 1) * math.sqrt(variance(values) / n)
    return Interval(value, value - half, value + half)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The mean of ``a`` less that of ``b``, by Student's t with one variance for both."""
    value, degrees = fmean(a) - fmean(b), len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return Interval(value)
    pooled = ((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / degrees
    half = t_quantile(degrees) * math.sqrt(pooled * (1 / len(a) + 1 / len(b)))
    return Interval(value, value - half, value + half)


def ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    """The geometric mean of ``a`` divided by that of ``b``: the difference of their logarithms."""
    logs = difference([math.log(x) for x in a], [math.log(x) for x in b])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.value), low, high)


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """The exact two-sided p-value of the difference of means: the share of all divisions of the values into two groups
    of these sizes whose means are as far apart as those of ``a`` and ``b``.
    """
    values = np.array([*a, *b])
    sums = values[list(combinations(range(len(values)), len(a)))].sum(axis=1)
    apart = np.abs(sums / len(a) - (values.sum() - sums) / len(b))
    rounding = 1e-12 * np.abs(values).max()
    return float(np.mean(apart >= abs(fmean(a) - fmean(b)) - rounding))


def crossing(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """The step at which a curve of (step, value) first comes down to ``target``, between its points on a straight line.

    ``None`` if it never does.
    """
    before: Sequence[float] | None = None
    for step, value in curve:
        if value <= target:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = step, value
    return None
