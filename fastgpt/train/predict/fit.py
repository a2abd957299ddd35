"""Fits the GPU shares of the roofline model to one half of the public steps, and measures its error on the other.

``python -m fastgpt.plan --points`` prints both halves, and the steps that the model does not cover.
``python -m fastgpt.train.predict.fit`` prints the fitted shares as ``roofline.py`` has them.

The fit is a maximum a posteriori estimate. The unknowns are logs of shares. The errors of log speeds have a standard
deviation of ``NOISE``. Each log share has a normal prior around the default of :class:`~roofline.Shares`, with the
standard deviation ``PRIOR_STD``; so a family with few steps stays close to the defaults. That makes a least-squares
problem, which Gauss-Newton solves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fastgpt.gpus import GPUS
from fastgpt.train.predict import points, roofline
from fastgpt.train.predict.points import Point
from fastgpt.train.predict.programs import PROGRAMS, Workload, tokens_per_second
from fastgpt.train.predict.roofline import Shares

# Standard deviation of a step's log speed: the same program on two machines with the same card may differ by this much.
# Assumed.
NOISE = 0.08
# Standard deviations of the prior of log shares. The rate of large products is known within a tenth, attention's share
# of it within three tenths. Assumed.
PRIOR_STD = {"product": 0.1, "attention": 0.3, "reuse": 0.5}

UPDATE_TOKENS = 2**19  # of an update whose number of micro-batches is not stated; near nanoGPT's default

COVERED = 0.9  # fraction of the judged (program, card) pairs whose steps all lie in the interval


def workload(point: Point) -> Workload:
    """Return what one GPU trained in a public step."""
    kind, width = point["mlp"].split("-")  # such as "gelu-4x" or "swiglu-4864"
    recompute = str(point["recompute"])
    sharded = any(word in point["optimizer"] for word in ("shard", "ZeRO", "distributed"))
    return Workload(
        point["n_layer"], point["n_embd"], point["n_head"], point["n_kv_head"],
        4 * point["n_embd"] if width == "4x" else int(width), kind == "swiglu", point["vocab"], point["context"],
        point["micro_batch"],
        point.get("accumulation") or max(1, UPDATE_TOKENS // (point["micro_batch"] * point["context"])),
        "block" if recompute == "True" else "inputs" if recompute.startswith("recompute-ffn") else "none",
        "Muon" in point["optimizer"], point["n_gpus"] if sharded else 1,
    )  # fmt: skip


def predicted(point: Point, shares: Shares | None = None) -> float:
    """Return the predicted tokens per second of one GPU, with the card's shares or with ``shares``."""
    machine = roofline.machine(GPUS[point["card"]])
    machine = machine if shares is None else replace(machine, shares=shares)
    return tokens_per_second(PROGRAMS[point["modelled_as"]], workload(point), machine)


# ---- the fit ----


def fit(fitted: Sequence[Point]) -> dict[str, Shares]:
    """Return the fitted shares by family of cards. ``reuse`` is common to all families."""
    families = sorted({GPUS[point["card"]].family for point in fitted})
    names = [(family, share) for family in families for share in ("product", "attention")] + [("", "reuse")]
    start = np.log([getattr(Shares(), share) for _, share in names])
    prior_std = np.array([PRIOR_STD[share] for _, share in names])

    def shares(x: np.ndarray) -> dict[str, Shares]:
        value = dict(zip(names, map(float, np.exp(x)), strict=True))
        reuse = value["", "reuse"]
        return {f: Shares(value[f, "product"], value[f, "attention"], reuse=reuse) for f in families}

    def residuals(x: np.ndarray) -> np.ndarray:
        # Each in units of its standard deviation, first the data's and then the prior's: half the sum of their squares
        # is the negative log posterior.
        by_family = shares(x)
        errors = [log_error(point, by_family[GPUS[point["card"]].family]) / NOISE for point in fitted]
        return np.array([*errors, *((x - start) / prior_std)])

    return shares(_least_squares(residuals, start))


def _least_squares(residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the ``x`` that minimises the sum of squared residuals, by Gauss-Newton from the given one.

    Log speeds are nearly linear in log shares, so six steps are enough without a line search.
    """
    for _ in range(6):
        at_x, step = residuals(x), 1e-4
        # forward differences, a column per unknown: (residuals, unknowns)
        jacobian = np.stack([(residuals(x + step * e) - at_x) / step for e in np.eye(len(x))], axis=1)
        x = x - np.linalg.lstsq(jacobian, at_x, rcond=None)[0]
    return x


def log_error(point: Point, shares: Shares | None = None) -> float:
    """Return log(predicted speed / measured speed)."""
    return math.log(predicted(point, shares) / (points.tokens_per_second(point) or math.nan))


# ---- the model's error ----


@dataclass(frozen=True)
class Comparison:
    """A public step with its measured and its predicted speed.

    Attributes:
        point: the step.
        role: ``fitted`` (the shares were fitted to it), ``judged`` (held out from the fit, to measure the model's
            error), or the cause why it is neither.
        measured: tokens per second of one GPU; ``None`` where the source gives none.
        predicted: likewise; ``None`` where too little is known about the program, the card or the shape.
    """

    point: Point
    role: str
    measured: float | None
    predicted: float | None

    @property
    def error(self) -> float | None:
        """Relative error of the speed; positive where the step was slower than predicted."""
        return None if self.measured is None or self.predicted is None else self.predicted / self.measured - 1.0


@cache
def comparisons() -> tuple[Comparison, ...]:
    """Return all public steps: the fitted ones, the judged ones, and those left out in the order of causes."""
    fitted, judged = points.halves()
    roles = [("fitted", p) for p in fitted] + [("judged", p) for p in judged] + list(points.excluded())
    return tuple(Comparison(p, role, points.tokens_per_second(p), _predicted_if_known(p)) for role, p in roles)


def _predicted_if_known(point: Point) -> float | None:
    known = "card" in point and "modelled_as" in point and point.get("micro_batch") and "bf16" in point["dtype"]
    return predicted(point) if known else None


def errors(role: str) -> list[float]:
    """Return the relative errors of the ``fitted`` or of the ``judged`` half."""
    return [c.error for c in comparisons() if c.role == role and c.error is not None]


def summary(role: str) -> str:
    """Describe the size of a half, and its mean and largest absolute error."""
    off = [abs(error) for error in errors(role)]
    return f"{len(off)} steps {role}: mean error {sum(off) / len(off):.1%}, largest {max(off):.1%}"


@cache
def factor() -> float:
    """Return the factor that bounds the error of nine in ten judged (program, card) pairs, in both directions.

    A pair counts with the largest error of its steps. Pairs are counted rather than steps, because the errors of one
    program on one card are correlated, and half of the judged steps are MPT's.
    """
    worst: dict[tuple[str, str], float] = {}
    for c in comparisons():
        if c.role == "judged" and c.error is not None:
            pair = c.point["modelled_as"], c.point["card"]
            worst[pair] = max(worst.get(pair, 0.0), abs(math.log1p(c.error)))
    # the smallest error that at least COVERED of the pairs do not exceed
    return math.exp(sorted(worst.values())[math.ceil(COVERED * len(worst)) - 1])


def interval(rate: float) -> tuple[float, float]:
    """Return the lower and upper end of a predicted speed, by :func:`factor`."""
    return rate / factor(), rate * factor()


if __name__ == "__main__":
    for family, found in fit(points.halves()[0]).items():
        print(f'"{family}": Shares({found.product:.3f}, {found.attention:.3f}, reuse={found.reuse:.3f}),')
