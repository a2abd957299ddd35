"""Tables and a picture of what bench.loss has measured.

A run here is the entry ``run`` of its record (bench/loss.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench import significance
from bench.pages import Record, markdown
from bench.significance import LEVEL
from fastgpt.units import count, duration, number

COLOURS = ("#7f8c8d", "#c0392b")  # of the baseline and of modern


@dataclass(frozen=True)
class Facts:
    """The runs of a study, all on one dataset.

    Attributes:
        baseline: the name of the recipe that is compared with.
        modern: of the other.
        updates: of the baseline.
        digest: of the dataset.
        options: of each recipe.
        grids: for each recipe, the runs by learning rate.
        tuned: whether the grids are complete; without that there is nothing below.
        compared: for each recipe, the runs of all seeds at its best rate.
        ablated: for each recipe, the runs by the option that they have less or more; "" for the recipe itself.
        seeds: that are to be compared.
    """

    baseline: str
    modern: str
    updates: int
    digest: str
    options: Mapping[str, Sequence[str]]
    grids: Mapping[str, Mapping[float, Record]]
    tuned: bool
    compared: Mapping[str, Sequence[Record]]
    ablated: Mapping[str, Mapping[str, Sequence[Record]]]
    seeds: int

    @property
    def pair(self) -> tuple[str, str]:
        """Both recipes."""
        return self.baseline, self.modern


# ---- figures ----


def summarise(facts: Facts) -> dict[str, Any]:
    """All figures, ready for JSON; those for which runs are missing are absent."""
    grids = {
        recipe: [{"rate": rate, "final_loss": run["final_loss"]} for rate, run in grid.items()]
        for recipe, grid in facts.grids.items()
    }  # fmt: skip
    found: dict[str, Any] = {"updates": facts.updates, "dataset": facts.digest, "tuned": facts.tuned, "rates": grids}
    recipes = {recipe: _of_recipe(runs) for recipe, runs in facts.compared.items() if runs}
    found["recipes"] = recipes
    ours, theirs = (_losses(facts.compared[recipe]) for recipe in (facts.modern, facts.baseline))
    diverged = any(run["diverged"] for recipe in facts.pair for run in facts.compared[recipe])
    if ours and theirs and not diverged:
        found["loss_difference"] = asdict(significance.difference(ours, theirs))
        found["p"] = significance.permutation_p(ours, theirs)
        found["updates_to_baselines_loss"] = _updates_to_target(facts)
    found["times"] = _times(facts)
    found["ablation"] = _ablation(facts)
    if len(ours) > 1:
        found["deviation_of_a_seed"] = stdev(ours)
    return found


def _losses(runs: Sequence[Record]) -> list[float]:
    return [run["final_loss"] for run in runs if not run["diverged"]]


def _of_recipe(runs: Sequence[Record]) -> dict[str, Any]:
    first, losses = runs[0], _losses(runs)
    return {
        "options": first["options"],
        "rate": first["flags"]["learning_rate"],
        "updates": first["updates"],
        "tokens": max(run["tokens"] for run in runs),
        "parameters": first["parameters"],
        "seeds": [run["seed"] for run in runs],
        "diverged": sum(run["diverged"] for run in runs),
        "final_losses": losses,
        "final_loss": asdict(significance.mean(losses)) if losses else None,
    }


def _updates_to_target(facts: Facts) -> dict[str, Any]:
    """Where modern's curves reach the baseline's last mean loss; both are of the same part of the validation split."""
    target = fmean(run["curve"][-1][1] for run in facts.compared[facts.baseline])
    steps = [significance.crossing(run["curve"], target) for run in facts.compared[facts.modern]]
    return {"target": target, "updates": steps}


def _times(facts: Facts) -> dict[str, Any]:
    """For each device that has timed both recipes: seconds of training of each, and their ratio."""
    found: dict[str, Any] = {}
    timed = {recipe: [run for run in facts.compared[recipe] if run["seconds"]] for recipe in facts.pair}
    for device in sorted({run["device"] for runs in timed.values() for run in runs}):
        here = {recipe: [run for run in runs if run["device"] == device] for recipe, runs in timed.items()}
        if all(here.values()):
            seconds = {recipe: [run["seconds"] for run in runs] for recipe, runs in here.items()}
            found[device] = {
                "runs": {recipe: len(runs) for recipe, runs in here.items()},
                "seconds": {recipe: asdict(significance.mean(values)) for recipe, values in seconds.items()},
                "ms": {recipe: fmean(run["ms"] for run in runs) for recipe, runs in here.items()},
                "ratio": asdict(significance.ratio(seconds[facts.modern], seconds[facts.baseline])),
            }
    return found


def _ablation(facts: Facts) -> list[dict[str, Any]]:
    """What each option is worth: the loss without it less that with it, and what it does to the time of an update."""
    options = [option for option in facts.ablated.get(facts.modern, {}) if option]
    found = []
    for option in options:
        entry: dict[str, Any] = {"option": option, "in_modern": option in facts.options[facts.modern]}
        for recipe in facts.pair:
            table = facts.ablated[recipe]
            has, changed = table[""], table[option]
            without, having = (changed, has) if option in facts.options[recipe] else (has, changed)
            entry[recipe] = _worth(without, having)
        if any(entry[recipe] for recipe in facts.pair):
            found.append(entry)
    return found


def _worth(without: Sequence[Record], having: Sequence[Record]) -> dict[str, Any] | None:
    """``None`` if there are no two runs of one seed."""
    by_seed = {run["seed"]: run for run in without}
    pairs = [(by_seed[run["seed"]], run) for run in having if run["seed"] in by_seed]
    if not pairs:
        return None
    whole = [(a, b) for a, b in pairs if not a["diverged"] and not b["diverged"]]
    timed = [(a, b) for a, b in pairs if a["device"] == b["device"] and a["ms"] and b["ms"]]
    return {
        "seeds": len(whole),
        "diverged": sum(b["diverged"] for _, b in pairs),
        "diverged_without": sum(a["diverged"] for a, _ in pairs),
        "loss": fmean(a["final_loss"] - b["final_loss"] for a, b in whole) if whole else None,
        "time": fmean(b["ms"] / a["ms"] for a, b in timed) if timed else None,
    }


# ---- words ----


def _interval(x: Mapping[str, float | None], digits: int) -> str:
    """``3.210 (3.201 to 3.219)``."""
    ends = "" if x["low"] is None else f" ({x['low']:.{digits}f} to {x['high']:.{digits}f})"
    return f"{x['value']:.{digits}f}{ends}"


def page(facts: Facts, summary: Mapping[str, Any], picture: str) -> str:
    """The page, in Markdown. ``picture`` is its file's name."""
    grids = [run for grid in facts.grids.values() for run in grid.values()]
    first = grids[0]
    shape = first["flags"]
    lines = [
        f"# Two recipes by loss: {shape['n_layer']} layers of {shape['n_embd']}, dataset {shape['dataset']}",
        "",
        f"`python -m bench.loss show --updates {facts.updates}` writes this page from the runs in `runs`, which have "
        "device, versions and commit. Losses are in nats a token, of the last weights on the whole validation split "
        f"({first['dataset']['val_tokens']:,} tokens; digest of the data {facts.digest[:12]}). Intervals are of "
        f"{LEVEL:.0%}. An update has {shape['batch_size']} x {shape['block_size']} tokens.",
        "",
        f"![loss]({picture})",
        "",
    ]
    lines += _comparison_words(facts, summary)
    lines += _ablation_words(facts, summary)
    rates = sorted({rate for grid in facts.grids.values() for rate in grid})
    rows = [["learning rate", *facts.grids]]
    rows += [[number(rate, 2), *(_rate_cell(grid, rate) for grid in facts.grids.values())] for rate in rates]
    lines += ["## Learning rates", ""]
    lines += ["The best one of each recipe is in bold; one seed, not one of those above.", ""]
    lines += ["" if facts.tuned else "The grids are not complete.\n", *markdown(rows, words=())]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _rate_cell(grid: Mapping[float, Record], rate: float) -> str:
    if rate not in grid:
        return ""
    loss = grid[rate]["final_loss"]
    if loss is None:
        return "diverges"
    return f"**{loss:.4f}**" if loss == min(_losses(list(grid.values()))) else f"{loss:.4f}"


def _comparison_words(facts: Facts, summary: Mapping[str, Any]) -> list[str]:
    recipes = summary["recipes"]
    if not recipes:
        return ["No seeds have been compared yet.", ""]
    rows = [["recipe", "options", "learning rate", "updates", "tokens", "parameters", "runs", "final loss"]]
    for recipe, r in recipes.items():
        loss = _interval(r["final_loss"], 4) if r["final_loss"] else ""
        loss += f", {r['diverged']} diverged" if r["diverged"] else ""
        rows.append([
            recipe, ", ".join(r["options"]) or "none", number(r["rate"], 2), f"{r['updates']:,}", count(r["tokens"]),
            count(r["parameters"], 2), f"{len(r['seeds'])} of {facts.seeds}", loss.strip(", "),
        ])  # fmt: skip
    lines = [*markdown(rows, words=(0, 1)), ""]
    if "p" in summary:
        share = recipes[facts.modern]["updates"] / recipes[facts.baseline]["updates"]
        lines += [
            f"After {share:.2f} of the updates, {facts.modern}'s final loss is {facts.baseline}'s "
            f"{_signed(summary['loss_difference'])}; exact permutation test of the means, two-sided: "
            f"p = {summary['p']:.4f}.",
        ]
        reached = summary["updates_to_baselines_loss"]
        steps = [step for step in reached["updates"] if step is not None]
        if steps:
            total, part = recipes[facts.baseline]["updates"], f"{len(steps)} of {len(reached['updates'])} runs reach"
            lines += [
                f"Between the points of the curves, {part} {facts.baseline}'s last loss, after {fmean(steps):,.0f} "
                f"updates in the mean ({fmean(steps) / total:.2f} of {facts.baseline}'s).",
            ]
    lines.append("")
    times = summary["times"]
    if times:
        rows = [["device", "recipe", "runs", "training", "ms an update", "time / baseline's"]]
        for device, t in times.items():
            for recipe in facts.pair:
                ratio = _interval(t["ratio"], 3) if recipe == facts.modern else ""
                seconds = t["seconds"][recipe]["value"]
                rows.append([
                    device, recipe, str(t["runs"][recipe]), duration(seconds), number(t["ms"][recipe]), ratio
                ])  # fmt: skip
        lines += ["Training without evaluations and checkpoints, by device:", "", *markdown(rows), ""]
    else:
        lines += ["No device has timed both recipes, so their times cannot be compared.", ""]
    return lines


def _signed(x: Mapping[str, float]) -> str:
    """``- 0.0120 (-0.0150 to -0.0090)``."""
    return f"{'-' if x['value'] < 0 else '+'} {abs(x['value']):.4f}" + (
        "" if x["low"] is None else f" ({x['low']:+.4f} to {x['high']:+.4f})"
    )


def _ablation_words(facts: Facts, summary: Mapping[str, Any]) -> list[str]:
    entries = summary["ablation"]
    if not entries:
        return []
    updates = next(run["updates"] for run in facts.ablated[facts.modern][""])
    rows = [["option", f"in {facts.modern}"]]
    rows[0] += [f"{what}, {recipe}" for recipe in facts.pair for what in ("loss saved", "time of an update")]
    for entry in entries:
        rows.append([entry["option"], "yes" if entry["in_modern"] else "no"])
        rows[-1] += [cell for recipe in facts.pair for cell in _worth_cells(entry[recipe])]
    lines = [
        "## What each option is worth",
        "",
        f"Loss without the option less loss with it, after {updates:,} updates: of {facts.baseline} with nothing else "
        f"added, and of {facts.modern} with all else that it has. Each recipe keeps its own best learning rate, which "
        "an option may not suit.",
    ]
    if "deviation_of_a_seed" in summary:
        deviation = f"{summary['deviation_of_a_seed']:.4f} (one standard deviation)"
        lines[-1] += f" Final losses of {facts.modern} differ from seed to seed by {deviation}."
    return [*lines, "", *markdown(rows), ""]


def _worth_cells(worth: Mapping[str, Any] | None) -> list[str]:
    if worth is None:
        return ["", ""]
    loss = "" if worth["loss"] is None else f"{worth['loss']:+.4f}"
    if worth["diverged"]:
        loss = "diverges with it"
    elif worth["diverged_without"]:
        loss = "diverges without it"
    return [loss, "" if worth["time"] is None else f"{worth['time'] - 1:+.1%}"]


# ---- a picture ----


def draw(facts: Facts, image: Path) -> None:
    """Draw the curves over tokens, what each option is worth, and the grids of learning rates."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:  # a machine with a GPU may have PyTorch and little else
        print(f"no picture: {error}")
        return
    figure = Figure(figsize=(13, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    curves, worth, rates = figure.subplots(1, 3)
    for recipe, colour in zip(facts.pair, COLOURS, strict=True):
        _draw_curves(curves, facts, recipe, colour)
        _draw_grid(rates, facts.grids[recipe], recipe, colour)
    curves.set(xlabel="million tokens", ylabel="validation loss (nats a token)")
    rates.set(xlabel="peak learning rate", ylabel="final validation loss", xscale="log")
    _draw_worth(worth, facts)
    for axes in (curves, worth, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured yet", transform=axes.transAxes, ha="center", color="#7f8c8d")
    figure.savefig(image)


def _draw_curves(axes: Any, facts: Facts, recipe: str, colour: str) -> None:
    """Losses over tokens of all seeds, without the first tenth, which would flatten the rest."""
    for i, run in enumerate(facts.compared[recipe]):
        a_step = run["flags"]["batch_size"] * run["flags"]["block_size"] / 1e6
        points = [(step * a_step, loss) for step, loss in run["curve"] if step >= run["updates"] / 10]
        label = f"{recipe}, {run['updates']:,} updates" if i == 0 else None
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.2, alpha=0.8, label=label)
    ends = [run["curve"][-1][1] for run in facts.compared[recipe] if not run["diverged"]]
    if recipe == facts.baseline and ends:
        axes.axhline(fmean(ends), color=colour, lw=0.8, ls="--")


def _draw_grid(axes: Any, grid: Mapping[float, Record], recipe: str, colour: str) -> None:
    """Final losses over learning rates; the best one is filled."""
    points = [(rate, run["final_loss"]) for rate, run in sorted(grid.items()) if not run["diverged"]]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", mfc="white", label=recipe)
        axes.plot(*min(points, key=lambda point: point[1]), color=colour, marker="o")


def _draw_worth(axes: Any, facts: Facts) -> None:
    """What each option saves, in both recipes, with the spread of two runs that differ by their seeds."""
    entries = _ablation(facts)
    names = [entry["option"] for entry in entries]
    for recipe, colour in zip(facts.pair, COLOURS, strict=True):
        found = [(entry[recipe]["loss"], y) for y, entry in enumerate(entries) if (entry[recipe] or {}).get("loss")]
        if found:
            axes.plot(*zip(*found, strict=True), color=colour, marker="o", ls="", label=f"in {recipe}")
    losses = _losses(facts.compared[facts.modern])
    if names:
        axes.axvline(0.0, color="black", lw=0.8)
        if len(losses) > 1:
            spread = 2**0.5 * stdev(losses)
            axes.axvspan(-spread, spread, color="black", alpha=0.08, lw=0, label="one deviation of two seeds")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
    axes.set(xlabel="loss that an option saves (nats a token)")
