"""Records as tables, pages of Markdown and pictures: one writer for all kinds of records (see records.py)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import agree
from fastgpt.units import GIB, count_of, gib, number, rate, size

Record = dict[str, Any]


# ---- figures ----


def timed(comparison: Record) -> dict[str, Record]:
    """The contenders that have a time."""
    return {name: c for name, c in comparison["contenders"].items() if c.get("ms") is not None}


@dataclass(frozen=True)
class Summary:
    """A comparison in one line.

    Attributes:
        ms: of the contender that the others are compared with.
        peer: the fastest contender that is not ours, does all of the work, has not failed, and has the same losses.
        ratio: time of the peer divided by ``ms``.
        share: of the ceiling, by ours.
    """

    ms: float | None
    peer: str | None
    peer_ms: float | None
    ratio: float | None
    share: float | None


def summarise(comparison: Record, dtype: str) -> Summary:
    """Our time and the best peer's."""
    ours = comparison["contenders"].get(comparison["ours"], {})
    ms = ours.get("ms")
    peers = {
        name: c["ms"]
        for name, c in timed(comparison).items()
        if c["whole"] and not c["ours"] and not c["failure"] and agrees(c, ours, dtype)
    }
    peer = min(peers, key=lambda name: peers[name], default=None)
    peer_ms = None if peer is None else peers[peer]
    return Summary(ms, peer, peer_ms, peer_ms / ms if peer_ms and ms else None, ours.get("share_of_ceiling"))


def agrees(contender: Record, ours: Record, dtype: str) -> bool:
    """Whether two contenders have the same losses, if both have any."""
    theirs, own = contender.get("losses"), ours.get("losses")
    return not theirs or not own or agree(own, theirs, dtype)


# ---- tables ----

Cell = Callable[[Record, float | None], str]  # a contender that was timed, and our time


def _optional(key: str, form: Callable[[Any], str]) -> Cell:
    return lambda c, ours_ms: "" if c.get(key) is None else form(c[key])


# A column appears in a table if any contender has a value for it.
COLUMNS: dict[str, Cell] = {
    "ms": lambda c, ours_ms: number(c["ms"]),
    "quartiles": _optional("quartiles_ms", lambda quartiles: " to ".join(map(number, quartiles))),
    "/ ours": lambda c, ours_ms: f"{c['ms'] / ours_ms:.2f}" if ours_ms else "",
    "tokens/s": _optional("tokens_per_s", lambda tokens: f"{tokens:,.0f}"),
    "rate": lambda c, ours_ms: rate(c["rate"], c["unit"]) if c.get("rate") else "",
    "MFU": _optional("mfu", lambda share: f"{share:.1%}"),
    "of ceiling": _optional("share_of_ceiling", lambda share: f"{share:.1%}"),
    "launch ms": _optional("host_ms", number),
    "peak memory": _optional("peak_bytes", size),
    "error": _optional("errors", lambda errors: f"{max(errors):.1e}"),
    "last loss": _optional("losses", lambda losses: f"{losses[-1]:.5f}"),
}


def table(comparisons: Sequence[Record], vram: float | None = None) -> list[list[str]]:
    """Titles, then a row for each contender. ``vram`` adds the largest micro-batch in so many GiB."""
    rows = []
    for comparison in comparisons:
        ours_ms = comparison["contenders"].get(comparison["ours"], {}).get("ms")
        for name, c in comparison["contenders"].items():
            cells = [cell(c, ours_ms) if c.get("ms") is not None else "" for cell in COLUMNS.values()]
            if c.get("ms") is None:
                cells[0] = (c["failure"] or "not timed").replace("|", "/")
            largest = comparison.get("largest", {}).get(name)
            if vram is not None:
                speed = f"{largest['batch_size']}: {largest.get('tokens_per_s', 0):,.0f} tokens/s" if largest else ""
                cells.append(speed)
            rows.append([comparison["name"], name + ("" if c["whole"] else " (part of the work)"), *cells])
    titles = ["", "contender", *COLUMNS, *([f"largest micro-batch in {gib(vram * GIB)}"] if vram is not None else [])]
    return columns_with_values([titles, *rows], first=3)


def columns_with_values(rows: list[list[str]], first: int) -> list[list[str]]:
    """Rows without columns that are empty below their title. Columns before number ``first`` are kept."""
    kept = [i for i in range(len(rows[0])) if i < first or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def aligned(rows: Sequence[Sequence[str]], words: Collection[int] = (0, 1), widest: int = 60) -> str:
    """A table for a terminal; columns of ``words``, by number, are aligned left, the others right.

    Cells longer than ``widest``, which are messages, do not widen their column.
    """
    widths = [max(len(cell) for cell in column if len(cell) <= widest) for column in zip(*rows, strict=True)]
    sides = ["<" if i in words else ">" for i in range(len(widths))]
    lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]], words: Collection[int] = (0, 1)) -> list[str]:
    """The lines of a Markdown table; columns of ``words``, by number, are aligned left, the others right."""
    titles, *others = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "|".join("---" if i in words else "--:" for i in range(len(rows[0]))) + "|"
    return [titles, rule, *others]


# ---- words ----


def commit_words(record: Record) -> str:
    """The commit that was measured, and whether the tree differed from it."""
    changes = " with uncommitted changes" if record["uncommitted_changes"] else ""
    return f"commit {record['commit']}{changes}"


def isa(record: Record) -> str:
    """The widest instruction set that products of the record's dtype could use on the CPU.

    AVX512_BF16 multiplies only bf16. On AMX, fastgpt's products of fp32 run too, in parts of bf16.
    """
    device = record["device"]
    found = device["cpu_capability"].lower()  # by PyTorch, which has one name for AVX-512 and all that is wider
    if found == "avx512" and record["dtype"] == "bfloat16":
        return device["isa"] or "avx512 or wider"  # the oldest records do not have it
    could = device["isa"] or found
    return "avx512" if could == "avx512_bf16" else could


def device_words(record: Record) -> str:
    """The full model name, and the capability or the instruction set and threads."""
    device = record["device"]
    if device["type"] == "cuda":
        return f"{device['name']}, capability {device['capability']}"
    return f"{device['name']}, {isa(record)}, {threads_words(record)}"


def threads_words(record: Record) -> str:
    """``1 thread``, ``2 threads``."""
    return count_of(record["device"]["threads"], "thread")


def shape_words(comparison: Record) -> str:
    """``batch_size 1, block_size 512``: the sizes, without those that are off."""
    return ", ".join(f"{name} {value}" for name, value in comparison["shapes"].items() if value not in (0.0, None))


def sizes(comparison: Record) -> str:
    """``2 x 512``: sequences and tokens in each."""
    shapes = comparison["shapes"]
    batch_size, block_size = (shapes[key] for key in (("B", "T") if "B" in shapes else ("batch_size", "block_size")))
    return f"{batch_size} x {block_size}"


# What a page says of the columns that it has.
LEGEND = {
    "ms": "Contenders take turns. *ms* is the median of their times, */ ours* that time divided by ours.",
    "MFU": "*MFU* is the share of the device's dense peak.",
    "of ceiling": "*of ceiling* is the share of the rate of a large matrix product, or of a copy, in the same run.",
    "launch ms": "*launch ms* is the time that the host takes to launch a call.",
    "peak memory": "*peak memory* is what a kernel's call allocates; in training steps, it includes the weights.",
    "error": "*error* is the largest error, divided by the largest true value.",
}
TITLES = {
    "steps": "Training steps", "kernels": "Kernels", "generation": "Generating text",
    "gpt2": "GPT-2 of transformers", "llama": "Llama of transformers",  # of integrations
}  # fmt: skip


def title(record: Record) -> str:
    """What a record is about."""
    return TITLES[record["comparisons"][0]["name"] if record["kind"] == "integrations" else record["kind"]]


def page(record: Record) -> str:
    """A record as a page of Markdown: what was measured, on what, and every contender."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if value)
    driver = f", driver {record['device']['driver']}" if record["device"]["driver"] else ""
    comparisons = record["comparisons"]
    lines = [
        f"# {title(record)} on {record['device']['name']}",
        "",
        f"`{record['command']}`, {record['date']}, {commit_words(record)};",
        f"{device_words(record)}, {record['dtype']}; {versions}{driver}.",
        "",
    ]
    rows = table(comparisons, _vram(comparisons))
    lines += [words for column, words in LEGEND.items() if column in rows[0]] + [""]
    conditions = dict.fromkeys(f"{shape_words(c)}. {ceiling_words(c)}".rstrip() for c in comparisons)
    if len(conditions) == 1:
        lines += conditions
    else:
        lines += [f"- {c['name']}: {shape_words(c)}. {ceiling_words(c)}".rstrip() for c in comparisons]
    lines += ["", *markdown(rows)]
    for comparison in comparisons:
        lines += more_about(comparison)
    return "\n".join(lines) + "\n"


def _vram(comparisons: Sequence[Record]) -> float | None:
    return next((c["vram_gib"] for c in comparisons if c.get("vram_gib")), None)


def ceiling_words(comparison: Record) -> str:
    """The ceilings of a comparison as a sentence; empty if it has none."""
    c = comparison["ceilings"]
    named = {
        "a large matrix product": ("gemm_flops", "FLOP/s"),
        "a copy": ("bandwidth", "B/s"),
        "dense peak": ("peak_flops", "FLOP/s"),
    }
    found = [f"{name} {rate(c[key], unit)}" for name, (key, unit) in named.items() if c.get(key)]
    return f"Ceilings: {', '.join(found)}." if found else ""


def prediction(comparison: Record) -> str:
    """The step time and memory that the plan predicts for fastgpt, next to the measured ones."""
    p, c = comparison["predicted"], comparison["contenders"].get("fastgpt", {})
    text = f"The plan predicts {number(p['ms'])} ms and {size(p['peak_bytes'])}"
    if c.get("ms") is not None:
        text += f"; measured {number(c['ms'])} ms ({p['ms'] / c['ms'] - 1:+.1%})"
        if c["peak_bytes"] is not None:
            text += f" and {size(c['peak_bytes'])} ({p['peak_bytes'] / c['peak_bytes'] - 1:+.1%})"
    return text + "."


def more_about(comparison: Record) -> list[str]:
    """The parts of a comparison of steps that are not in the table: prediction, profile, memory limit, losses."""
    lines: list[str] = []
    if "predicted" in comparison:
        lines += ["", prediction(comparison)]
    budgets = {name: c["time_budget_ms"] for name, c in comparison["contenders"].items() if c.get("time_budget_ms")}
    if budgets:
        predicted = comparison["predicted"]
        budgets["fastgpt, predicted"] = {**predicted["by_kind_ms"], "optimizer": predicted["update_ms"]}
        kinds = list(dict.fromkeys(kind for budget in budgets.values() for kind in budget))
        kinds.sort(key=lambda kind: kind in ("other", "idle"))  # these last, the others as they are
        rows = [[name, *(f"{budget.get(kind, 0.0):.2f}" for kind in kinds)] for name, budget in budgets.items()]
        lines += ["", "Milliseconds of one update by kind of kernel, under the profiler:", ""]
        lines += markdown([["contender", *kinds], *rows], words=(0,))
    if "vram_gib" in comparison:
        whole, tensors = (GIB * comparison[key] for key in ("vram_gib", "vram_tensors_gib"))
        lines += ["", f"Of {gib(whole)}, tensors may take {gib(tensors)}; CUDA and its libraries take the rest."]
    if "loss_curves" in comparison:
        n = comparison["loss_steps"]
        losses = [[name, f"{tail(curve):.5f}"] for name, curve in comparison["loss_curves"].items() if curve]
        lines += ["", f"Mean loss of the last {min(n, 10)} of {n} updates:", ""]
        lines += markdown([["contender", "loss"], *losses], words=(0,))
    return lines


def tail(losses: Sequence[float]) -> float:
    """Mean of the last ten losses."""
    last = losses[-10:]
    return sum(last) / len(last)


# ---- a picture ----


def draw(record: Record, stem: Path) -> None:
    """Write STEM.png: the time of each contender of whole steps, divided by that of ours."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:  # a machine with a GPU may have PyTorch and little else
        print(f"no picture: {error}")
        return
    comparisons = [c for c in record["comparisons"] if summarise(c, record["dtype"]).ms]
    if not comparisons:
        return
    n_bars = sum(len(timed(c)) for c in comparisons)
    figure = Figure(figsize=(7.5, 0.9 + 0.3 * n_bars + 0.4 * len(comparisons)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [len(timed(c)) for c in comparisons]
    each = figure.subplots(len(comparisons), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axes, c in zip(each, comparisons, strict=True):
        ours = summarise(c, record["dtype"]).ms
        for y, (name, contender) in enumerate(timed(c).items()):
            colour = "#c0392b" if name == c["ours"] else "#e6b0aa" if contender["ours"] else "#7f8c8d"
            axes.barh(y, contender["ms"] / ours, 0.75, color=colour)
            words = f"{contender['ms'] / ours:.2f} ({number(contender['ms'])} ms)"
            axes.annotate(words, (contender["ms"] / ours, y), xytext=(4, 0), textcoords="offset points", va="center",
                          size=7)  # fmt: skip
        axes.set_yticks(range(len(timed(c))), list(timed(c)), size=7)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(f"{c['name']}, {sizes(c)} tokens", size=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    each[-1].set_xlabel(f"time of a training step, {comparisons[-1]['ours']} = 1", size=8)
    figure.suptitle(f"{device_words(record)}, {record['dtype']}", size=9)
    figure.savefig(f"{stem}.png")
