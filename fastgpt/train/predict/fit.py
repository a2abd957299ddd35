"""The model of the step against public steps: its shares fitted to one half, its error told on the other.

``python -m fastgpt.plan --points`` prints both halves, and the steps that the model does not answer for;
``python -m fastgpt.train.predict.fit`` the shares, as ``roofline.py`` has them.

The fit is least squares of log errors by Gauss-Newton, with each share held to what it starts from: products to the
rate of a large one, attention to a usual share of that, within a tenth and three tenths; so the steps of a family that
has few move its shares little.
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

NOISE = 0.08  # of a step's log speed: what two runs of one program on two machines of one kind may differ by
HELD = {"product": 0.1, "attention": 0.3, "reuse": 0.5}  # standard deviations of log shares about where they start

UPDATE_TOKENS = 2**19  # of an update, where its micro-batches are not stated

COVERED = 0.9  # of the judged pairs of a program and a card lie in the interval


def workload(point: Point) -> Workload:
    """What a step's program trained on one GPU."""
    kind, width = point["mlp"].split("-")
    again = str(point["recompute"])
    sharded = any(word in point["optimizer"] for word in ("shard", "ZeRO", "distributed"))
    return Workload(
        point["n_layer"], point["n_embd"], point["n_head"], point["n_kv_head"],
        4 * point["n_embd"] if width == "4x" else int(width), kind == "swiglu", point["vocab"], point["context"],
        point["micro_batch"],
        point.get("accumulation") or max(1, UPDATE_TOKENS // (point["micro_batch"] * point["context"])),
        "block" if again == "True" else "inputs" if again.startswith("recompute-ffn") else "none",
        "Muon" in point["optimizer"], point["n_gpus"] if sharded else 1,
    )  # fmt: skip


def predicted(point: Point, shares: Shares | None = None) -> float:
    """Tokens a second of one GPU, with the card's shares or others."""
    machine = roofline.machine(GPUS[point["card"]])
    machine = machine if shares is None else replace(machine, shares=shares)
    return tokens_per_second(PROGRAMS[point["modelled_as"]], workload(point), machine)


# ---- the fit ----


def fit(fitted: Sequence[Point]) -> dict[str, Shares]:
    """Shares by family of cards; the cache's is one for all."""
    families = sorted({GPUS[point["card"]].family for point in fitted})
    names = [(family, share) for family in families for share in ("product", "attention")] + [("", "reuse")]
    start = np.log([getattr(Shares(), share) for _, share in names])
    held = np.array([HELD[share] for _, share in names])

    def shares(x: np.ndarray) -> dict[str, Shares]:
        value = dict(zip(names, map(float, np.exp(x)), strict=True))
        reuse = value["", "reuse"]
        return {f: Shares(value[f, "product"], value[f, "attention"], reuse=reuse) for f in families}

    def residuals(x: np.ndarray) -> np.ndarray:
        by_family = shares(x)
        errors = [log_error(point, by_family[GPUS[point["card"]].family]) / NOISE for point in fitted]
        return np.array([*errors, *((x - start) / held)])

    return shares(_least_squares(residuals, start))


def _least_squares(residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Where the sum of squares is least, by Gauss-Newton: the model is nearly linear in logs, so a few steps do."""
    for _ in range(6):
        at_x, nudge = residuals(x), 1e-4
        jacobian = np.stack([(residuals(x + nudge * e) - at_x) / nudge for e in np.eye(len(x))], axis=1)
        x = x - np.linalg.lstsq(jacobian, at_x, rcond=None)[0]
    return x


def log_error(point: Point, shares: Shares | None = None) -> float:
    """Log of predicted over measured speed."""
    return math.log(predicted(point, shares) / (points.tokens_per_second(point) or math.nan))


# ---- its error ----


@dataclass(frozen=True)
class Comparison:
    """A public step, and what the model says of it.

    Attributes:
        point: the step.
        role: ``fitted``, ``judged``, or the cause why it is neither.
        measured: tokens a second of one GPU; ``None`` where the source gives none.
        predicted: likewise; ``None`` where its program, card or shape is not known well enough to predict.
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
    """All public steps: fitted, judged, and the others by cause."""
    fitted, judged = points.halves()
    roles = [("fitted", p) for p in fitted] + [("judged", p) for p in judged] + list(points.excluded())
    return tuple(Comparison(p, role, points.tokens_per_second(p), _predicted_if_known(p)) for role, p in roles)


def _predicted_if_known(point: Point) -> float | None:
    known = "card" in point and "modelled_as" in point and point.get("micro_batch") and "bf16" in point["dtype"]
    return predicted(point) if known else None


def errors(role: str) -> list[float]:
    """Relative errors of the ``fitted`` or the ``judged`` half."""
    return [c.error for c in comparisons() if c.role == role and c.error is not None]


def summary(role: str) -> str:
    """The size of a half, and its mean and largest error."""
    off = [abs(error) for error in errors(role)]
    return f"{len(off)} steps {role}, off by {sum(off) / len(off):.1%} in the mean and {max(off):.1%} at most"


@cache
def factor() -> float:
    """How far off nine of ten judged pairs of a program and a card stay, either way, in all their steps.

    By pairs, because one program's runs on one kind of machine are off together: half of the judged steps are MPT's.
    """
    worst: dict[tuple[str, str], float] = {}
    for c in comparisons():
        if c.role == "judged" and c.error is not None:
            pair = c.point["modelled_as"], c.point["card"]
            worst[pair] = max(worst.get(pair, 0.0), abs(math.log1p(c.error)))
    return math.exp(sorted(worst.values())[math.ceil(COVERED * len(worst)) - 1])


def interval(rate: float) -> tuple[float, float]:
    """The span about a predicted speed that :func:`factor` leaves."""
    return rate / factor(), rate * factor()


if __name__ == "__main__":
    for family, found in fit(points.halves()[0]).items():
        print(f'"{family}": Shares({found.product:.3f}, {found.attention:.3f}, reuse={found.reuse:.3f}),')
