"""One HTML page about a run, or comparing several, that needs nothing else."""

import html
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt import json_files
from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.train import checkpoint, run_folder
from fastgpt.train.log import read_metrics
from fastgpt.train.run_folder import RunConfig
from fastgpt.units import count, duration, size

MOST_POINTS = 1500  # of a line in a plot
MOST_SAMPLES = 8  # of a run's text
TIME_UNITS = (("hours", 1), ("minutes", 60), ("seconds", 3600))  # and how many an hour has
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#b8860b",
    "#56b4e9",
    "#7a5195",
)  # told apart by colour-blind eyes
INK, FAINT = "#010203", "#040506"  # stand for the page's colours, which differ in the dark


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    Attributes:
        name: of its folder.
        config: as it was settled.
        records: of ``metrics.jsonl`` by kind.
        sha256: of the files of its newest checkpoint.
    """

    name: str
    config: RunConfig
    records: dict[str, list[dict[str, Any]]]
    sha256: dict[str, str]

    @property
    def start(self) -> dict[str, Any]:
        """What the last process wrote about itself; empty for a run of a version that wrote nothing."""
        return self.records["start"][-1] if self.records["start"] else {}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Those with a finite loss."""
        return [e for e in self.records["eval"] if e["val_loss"] is not None]

    @property
    def diverged(self) -> bool:
        """Whether the loss of its last evaluation is not finite."""
        return bool(self.records["eval"]) and self.records["eval"][-1]["val_loss"] is None

    @property
    def seconds(self) -> float | None:
        """All its processes took, as far as they ended by themselves."""
        return sum(end.get("seconds", 0.0) for end in self.records["end"]) if self.records["end"] else None

    def tokens_at(self, step: int) -> float:
        """Tokens trained on before ``step``, between logged updates by interpolation."""
        logged = [(0, 0), *((update["step"], update["tokens"]) for update in self.records["train"])]
        steps, tokens = zip(*logged, strict=True)
        return float(np.interp(step, steps, tokens))

    def hours_at(self, step: int) -> float:
        """Hours of training up to a step, without evaluations."""
        total, before = 0.0, 0
        for update in self.records["train"]:
            if update["step"] > step:
                break
            total += (update["step"] - before) * update["ms"]  # the mean since the last logged one
            before = update["step"]
        return total / 3.6e6


def write(runs: Sequence[Path], out: Path) -> None:
    """Write the page about some runs.

    Raises:
        RequestError: one of ``runs`` is not a run, or has logged nothing yet.
        OSError: the page cannot be written.
    """
    text = page([replace(read(path), name=name) for path, name in zip(runs, _names(runs), strict=True)])
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as partial:
        partial.write_text(text, encoding="utf-8")


def _names(paths: Sequence[Path]) -> list[str]:
    """Of the folders; with as many of the folders above them as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts))
    for n in range(1, longest + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(map(str, paths))


def read(path: Path) -> Run:
    """What the files of a run say.

    Raises:
        RequestError: ``path`` is not a run, or nothing has been logged yet.
    """
    config = run_folder.read_config(path)
    metrics = path / run_folder.METRICS
    records = read_metrics(metrics) if metrics.exists() else {}
    if not records.get("eval") and not records.get("train"):
        raise RequestError(f"{path} has logged nothing yet")
    sha256: dict[str, str] = {}
    steps = checkpoint.steps(path)
    if steps:
        manifest = checkpoint.folder(path, steps[-1]) / checkpoint.MANIFEST
        if manifest.is_file():
            found = json_files.read(manifest).get("sha256", {})
            sha256 = {f"{manifest.parent.name}/{name}": str(digest) for name, digest in found.items()}
    return Run(path.resolve().name, config, records, sha256)


# ---- the page ----


def page(runs: Sequence[Run]) -> str:
    """The page about some runs."""
    title = runs[0].name if len(runs) == 1 else "Comparison of " + ", ".join(one.name for one in runs)
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="verdict">{_text(verdict(runs))}</p>',
        _table_of(runs),
        *_plots(runs),
    ]
    for one in runs:
        parts += [f"<h2>{_text(one.name)}</h2>"] if len(runs) > 1 else []
        parts += [_findings(one), _samples(one), _events(one), _provenance(one)]
    data = [{"name": one.name, "train": one.config.train, "records": one.records} for one in runs]
    embedded = json.dumps(data).replace("<", "\\u003c")  # no tag can begin in it
    return _PAGE.format(title=_text(title), body="\n".join(parts), data=embedded)


def verdict(runs: Sequence[Run]) -> str:
    """What came of it, in a sentence."""
    evaluated = [one for one in runs if one.evaluations]
    if not evaluated:
        return "Nothing has been evaluated yet."
    finite = [one for one in evaluated if not one.diverged]
    best = min(finite or evaluated, key=lambda one: one.evaluations[-1]["val_loss"])
    last = best.evaluations[-1]
    loss = _with_error(last["val_loss"], last.get("val_loss_error"))
    steps, tokens = f"{last['step']:,}", _tokens(best.tokens_at(last["step"]))
    took = f", {duration(best.seconds)}" if best.seconds is not None else ""
    if len(runs) > 1:
        found = f"{best.name} has the lowest last validation loss: {loss} after {steps} steps, {tokens} tokens{took}."
        if not finite:
            return "No run has a finite loss at its last evaluation."
        if len({(one.start.get("dataset") or {}).get("id") for one in runs}) > 1:
            return f"{found} The runs have different data, so their losses do not compare; python -m fastgpt.eval does."
        return found + _not_told_apart(best, [one for one in finite if one is not best])
    device = f" on {best.start['device']}" if "device" in best.start else ""
    perplexity = math.exp(min(last["val_loss"], 700.0))
    ends = best.records["end"]
    if best.diverged:
        last = best.records["eval"][-1]
        return (
            f"The loss is not finite at the last evaluation, step {last['step']:,}. "
            f"Before, it was {loss} at step {steps}."
        )
    state = "It is complete." if _is_complete(best) else f"It {ends[-1]['reason']}." if ends else "It has not ended."
    return (
        f"Validation loss {loss} nats a token (perplexity {perplexity:,.2f}) after {steps} steps, {tokens} tokens"
        f"{took}{device}. {state}"
    )


def _not_told_apart(best: Run, others: Sequence[Run]) -> str:
    """A sentence about the runs whose last losses may be higher than that of ``best`` by chance; empty for none.

    That is: by less than two standard errors of the difference. The evaluations are taken for independent. Those on the
    same batches are not, and then tell more apart.
    """
    close = []
    for one in others:
        (a, error_a), (b, error_b) = (
            (last["val_loss"], last.get("val_loss_error")) for last in (best.evaluations[-1], one.evaluations[-1])
        )
        if error_a is not None and error_b is not None and b - a < 2 * math.hypot(error_a, error_b):
            close.append(f"{one.name} ({b - a:.4f} ± {math.hypot(error_a, error_b):.4f} higher)")
    return f" That may be chance beside {' and '.join(close)}: a larger --eval_iters tells them apart." if close else ""


def _is_complete(one: Run) -> bool:
    return any(end["step"] >= one.config.train.get("max_iters", 0) and end["status"] == 0 for end in one.records["end"])


def _table_of(runs: Sequence[Run]) -> str:
    def median(one: Run, name: str) -> float | None:
        values = [u[name] for u in one.records["train"] if u.get(name) is not None]
        return statistics.median(values[len(values) // 10 :]) if values else None

    def last(one: Run, name: str) -> str:
        if not one.records["eval"]:
            return "-"
        evaluation = one.records["eval"][-1]
        return (
            _with_error(evaluation[name], evaluation.get(f"{name}_error"))
            if evaluation[name] is not None
            else "not finite"
        )

    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda one: one.name,
        "parameters": lambda one: count(one.config.model.n_params, 2),
        "steps": lambda one: f"{one.records['train'][-1]['step']:,}" if one.records["train"] else "0",
        "tokens": lambda one: _tokens(one.records["train"][-1]["tokens"]) if one.records["train"] else "0",
        "train loss": lambda one: last(one, "train_loss"),
        "validation loss": lambda one: last(one, "val_loss"),
        "best": lambda one: (
            "{val_loss:.4f} at {step:,}".format(**min(one.evaluations, key=lambda e: e["val_loss"]))
            if one.evaluations
            else "-"
        ),
        "tokens/s": lambda one: _shown(median(one, "tokens_per_s"), ",.0f"),
        "predicted": lambda one: _shown(one.start.get("predicted_tokens_per_s"), ",.0f"),
        "MFU": lambda one: _shown(median(one, "mfu"), ".1%"),
        "time": lambda one: duration(one.seconds) if one.seconds is not None else "-",
        "peak memory": lambda one: (
            size(max(peaks)) if (peaks := [e["peak_bytes"] for e in one.records["end"] if e.get("peak_bytes")]) else "-"
        ),
        "predicted memory": lambda one: size(held) if (held := one.start.get("predicted_bytes")) else "-",
        "predicted time by kind": _time_by_kind,
    }
    if len(runs) == 1:
        facts = "".join(
            f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
            for name, column in columns.items()
            if (value := column(runs[0])) != "-" and name != "run"
        )
        return f'<table class="facts"><tbody>{facts}</tbody></table>'
    rows = [[column(one) for column in columns.values()] for one in runs]
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    names = list(columns)
    head = "".join(f'<th scope="col">{_text(names[i])}</th>' for i in kept)
    body = "".join("<tr>" + "".join(f"<td>{_text(row[i])}</td>" for i in kept) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _time_by_kind(one: Run) -> str:
    ms = {kind: value for kind, value in (one.start.get("predicted_ms") or {}).items() if value}
    total = sum(ms.values())
    return ", ".join(f"{kind} {ms[kind] / total:.0%}" for kind in sorted(ms, key=lambda kind: -ms[kind])) or "-"


def _findings(one: Run) -> str:
    found = one.records["finding"]
    if not found:
        return ""
    items = "".join(f"<li>step {f['step']:,}: {_text(f['text'])}</li>" for f in found)
    return f"<h3>Findings</h3><ol>{items}</ol>"


def _samples(one: Run) -> str:
    """What the model wrote at its first evaluation, at its last, and at some between."""
    found = one.records["sample"]
    if not found:
        return ""
    places = sorted({round(i * (len(found) - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)})
    items = "".join(
        f"<details{' open' if place == places[-1] else ''}><summary>step {found[place]['step']:,}</summary>"
        f'<pre><span class="prompt">{_text(found[place]["prompt"])}</span>{_text(found[place]["text"])}</pre></details>'
        for place in places
    )
    return f"<h3>Samples</h3>{items}"


def _events(one: Run) -> str:
    events = [(start["time"], f"started at step {start['step']:,}") for start in one.records["start"]]
    events += [
        (end["time"], f"{end['reason']} at step {end['step']:,}, status {end['status']}") for end in one.records["end"]
    ]
    if not events:
        return ""
    items = "".join(f"<li><time>{_text(time)}</time> {_text(what)}</li>" for time, what in sorted(events))
    return f"<h3>Events</h3><ul>{items}</ul>"


def _provenance(one: Run) -> str:
    start = dict(one.start)
    for name in (
        "kind",
        "step",
        "time",
        "predicted_bytes",
        "predicted_ms",
        "predicted_tokens_per_s",
        "flops_per_token",
        "parameters",
    ):
        start.pop(name, None)
    dataset = start.pop("dataset", None) or {}
    rows = {**start, "dataset": dataset.get("path"), "dataset id": dataset.get("id")}
    rows |= {f"sha256 of {name}": digest for name, digest in one.sha256.items()}
    cells = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td><code>{_text(value)}</code></td></tr>'
        for name, value in rows.items()
        if value is not None
    )
    flags = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td><code>{_text(value)}</code></td></tr>'
        for name, value in one.config.train.items()
    )
    return (
        f'<h3>What ran</h3><div class="wide"><table class="facts"><tbody>{cells}</tbody></table></div>'
        f'<details><summary>All flags</summary><table class="facts"><tbody>{flags}</tbody></table></details>'
    )


def _tokens(n: float) -> str:
    return count(n, 1) if n >= 1e6 else f"{n:,.0f}"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---- the plots ----


def _plots(runs: Sequence[Run]) -> list[str]:
    colors = dict(zip((id(one) for one in runs), itertools.cycle(COLORS), strict=False))

    def losses(axes: Any, x_of: Callable[[Run], Callable[[int], float]]) -> None:
        for one in runs:
            x, color = x_of(one), colors[id(one)]
            updates = _thinned([(x(u["step"]), u["loss"]) for u in one.records["train"] if u["loss"] is not None])
            if len(runs) == 1 and updates:
                axes.plot(*zip(*updates, strict=True), color=FAINT, lw=0.8, label="training, each batch")
            points = [(x(e["step"]), e["val_loss"], e.get("val_loss_error") or 0.0) for e in one.evaluations]
            if points:
                xs, ys, errors = zip(*points, strict=True)
                label = "validation" if len(runs) == 1 else one.name
                axes.errorbar(xs, ys, yerr=errors, color=color, marker="o", ms=3.5, lw=1.4, capsize=2, label=label)
            if len(runs) == 1:
                for number, finding in enumerate(one.records["finding"], start=1):
                    place = x(finding["step"])
                    axes.axvline(place, color=FAINT, lw=0.8, ls=":")
                    axes.annotate(str(number), (place, 1.0), xycoords=("data", "axes fraction"), color=INK, fontsize=8)
        axes.set_ylabel("loss (nats a token)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=INK)

    def lines(axes: Any, name: str, predicted: str | None = None) -> None:
        for one in runs:
            points = _thinned([(u["step"], u[name]) for u in one.records["train"] if u.get(name) is not None])
            if points:
                axes.plot(*zip(*points, strict=True), color=colors[id(one)], lw=1.0, label=one.name)
            if predicted is not None and one.start.get(predicted):
                axes.axhline(one.start[predicted], color=colors[id(one)], lw=1.0, ls="--")
        if len(runs) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        axes.set_xlabel("step")

    def by_tokens(axes: Any) -> None:
        losses(axes, lambda one: one.tokens_at)
        axes.set_xlabel("tokens")

    longest = max((one.hours_at(u[-1]["step"]) for one in runs if (u := one.records["train"])), default=0.0)
    unit, per_hour = next(unit for unit in TIME_UNITS if longest * unit[1] >= 2 or unit is TIME_UNITS[-1])

    def by_time(axes: Any) -> None:
        losses(axes, lambda one: lambda step: one.hours_at(step) * per_hour)
        axes.set_xlabel(f"{unit} of training, without evaluations")

    numbers = "Numbers mark the findings below." if len(runs) == 1 and runs[0].records["finding"] else ""
    return [
        _figure("Loss over tokens", numbers, by_tokens),
        _figure("Loss over time", "", by_time),
        _figure("Learning rate", "", lambda axes: lines(axes, "lr")),
        _figure("Gradient norm, before clipping", "", lambda axes: lines(axes, "grad_norm")),
        _figure(
            "Tokens a second", "Dashed: predicted before the run." if any(
                one.start.get("predicted_tokens_per_s") for one in runs
            ) else "", lambda axes: lines(axes, "tokens_per_s", "predicted_tokens_per_s"),
        ),
    ]  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MOST_POINTS`` of the points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = -(-len(points) * 2 // MOST_POINTS)
    kept = []
    for i in range(0, len(points), stretch):
        part = points[i : i + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _figure(title: str, caption: str, draw: Callable[[Any], None]) -> str:
    """A plot as part of the page, in its colours and as wide as the screen."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colored: Any = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    # text stays text, and names of parts differ between the plots of a page
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9} | colored):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = FigureCanvasSVG(figure).figure.subplots()
        draw(axes)
        axes.grid(color=FAINT, alpha=0.3, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", drawn))
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.S)
    drawn = drawn.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)
    said = f"<figcaption>{_text(title)}{'. ' + _text(caption) if caption else ''}</figcaption>"
    return f"<figure>{said}{drawn}</figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1a1a1a; --faint: #8a8f98; --page: #ffffff; --line: #d8dbe0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e8; --faint: #8a8f98; --page: #14161a; --line: #33373d; }}
}}
body {{ margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
.verdict {{ font-size: 1.1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th:first-child, td:first-child, .facts th, .facts td {{ text-align: left; }}
.facts td {{ white-space: normal; overflow-wrap: anywhere; }}
figure {{ display: inline-block; vertical-align: top; width: min(100%, 34rem); margin: 1rem .25rem; }}
figure svg {{ width: 100%; height: auto; }}
figcaption {{ font-weight: 600; }}
summary {{ cursor: pointer; padding: .25rem 0; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 1rem; }}
.prompt {{ color: var(--faint); }}
</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
</body>
</html>
"""
