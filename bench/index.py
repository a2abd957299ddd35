"""``python -m bench.index``: writes every table that is made from the records under bench/results.

- bench/results/README.md: all that was measured, a row for each comparison;
- bench/results/cpus.md: GPT-2 training speed by CPU, from the records of bench.cpu;
- the short form of cpus.md in README.md;
- the page of each record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contenders import OURS, agree
from bench.pages import Record, isa, markdown, page, sizes, summarise, threads_words
from bench.records import REPOSITORY, RESULTS, collect
from fastgpt.cli import Parser, run
from fastgpt.model.config import GPTConfig
from fastgpt.units import number

INDEX, CPUS, README = RESULTS / "README.md", RESULTS / "cpus.md", REPOSITORY / "README.md"


# ---- the index ----

INDEX_INTRODUCTION = """\
# What was measured

Every row is a comparison of fastgpt with its peers in one run, on the device named. *ours* is fastgpt's median.
*best peer* is the fastest contender that does the same work with the same result (for training steps: the same losses),
and *peer / ours* its time divided by ours. Devices without a record are not listed, and neither are predictions:
[ahead_of_time](ahead_of_time/sm_89.md) has those. Training speed by CPU is compared in [cpus.md](cpus.md).

`python -m bench.index` writes this page from the records.
"""
INDEX_COLUMNS = ["device", "measured", "ours", "best peer", "peer / ours", "date", "command", "record"]


def index(results: Path) -> str:
    """The index of all records under a folder."""
    found = list(collect(results))
    rows = [
        [device_of([r for p, r in found if p.parent == path.parent]), *cells]
        for path, record in found
        for cells in index_rows(record, path.relative_to(results))
    ]
    words = [i for i, title in enumerate(INDEX_COLUMNS) if title != "peer / ours"]
    return "\n".join([INDEX_INTRODUCTION, *markdown([INDEX_COLUMNS, *rows], words)]) + "\n"


def device_of(found: Sequence[Record]) -> str:
    """The full model name of a device, and its capability or its widest instruction set.

    The oldest of its records, ``found``, have only a part of the name and no instruction sets; others have all.
    """
    devices = [record["device"] for record in found]
    device = next((d for d in devices if d["cpu"] is not None), devices[0])
    if device["type"] == "cuda":
        return f"{device['name']}, capability {device['capability']}"
    isas = device["cpu"]["isas"] if device["cpu"] else []
    return ", ".join([device["name"], *isas[-1:]])


def index_rows(record: Record, path: Path) -> list[list[str]]:
    """A row for each comparison of a record, without the device."""
    conditions = [record["dtype"]]
    if record["device"]["type"] == "cpu":
        conditions += [isa(record), threads_words(record)]
    rows = []
    for comparison in record["comparisons"]:
        s = summarise(comparison, record["dtype"])
        tokens = comparison["contenders"].get(comparison["ours"], {}).get("tokens_per_s")
        ours = [] if s.ms is None else [f"{number(s.ms)} ms", *([f"{tokens:,.0f} tokens/s"] if tokens else [])]
        peer = "-" if s.peer is None or s.peer_ms is None else f"{s.peer}: {number(s.peer_ms)} ms"
        rows.append(
            [
                ", ".join([comparison["name"], sizes(comparison), *conditions]),
                ", ".join(ours) or "failed",
                peer,
                f"{s.ratio:.2f}" if s.ratio else "-",
                record["date"][:10],
                f"`{record['command']}`",
                f"[{path.stem}]({path.as_posix()})",
            ]
        )
    return rows


# ---- training speed by CPU ----

START, END = "<!-- from here on by python -m bench.index -->\n", "<!-- to here -->\n"  # of the short form
SHORT = "124m"  # the model in the short form
TUNED = ("eager, memory kept", "compile, memory kept")

COLUMNS = (
    "CPU", "cores / threads", "ISA", "dtype", "tokens/s", "ms a step", "eager", "compile", "best tuned",
    "torch", "date", "commit", "command",
)  # fmt: skip
SHORT_COLUMNS = ("CPU", "threads", "ISA", "dtype", "tokens/s", "ms a step", "eager", "compile", "best tuned")
WORDS = {"CPU", "ISA", "dtype", "torch", "date", "commit", "command"}  # columns without figures

CPUS_INTRODUCTION = """\
# GPT-2 training speed by CPU

*tokens/s* and *ms a step* are fastgpt's, for a whole training step: forward, backward, clipping and AdamW. The other
columns are times of the same model in plain PyTorch, measured in the same run, divided by fastgpt's: *eager*, *compile*
(torch.compile), and *best tuned* (the faster of the two with malloc kept from returning memory). *differs* means that
the losses differ from fastgpt's, `-` that the figure was not recorded.

*CPU* is the folder of the records: the model name; family, model and stepping if the name does not identify the
generation; the widest instruction set of the CPU. *cores* are the machine's, *threads* the run's. *ISA* is the widest
instruction set that products of the dtype could use. It is less than the CPU has if the run was limited.

`make bench-cpu` measures your CPU in under ten minutes and prints its rows. `python -m bench.index` writes this page
from the records: run it, and add the folder and the pages to a pull request.
"""


@dataclass(frozen=True)
class Row:
    """One model of one record.

    Attributes:
        model: its name in ``bench.cpu``.
        section: its name and shape. Rows of different shapes cannot be compared.
        flops: per token; sections are sorted by it.
        folder: of the CPU, under ``bench/results``.
        cells: by column.
        tokens_per_s: of fastgpt.
    """

    model: str
    section: str
    flops: float
    folder: str
    cells: dict[str, str]
    tokens_per_s: float


def rows(record: Record, page: str) -> list[Row]:
    """The models of a record of ``bench.cpu``.

    Args:
        record: the oldest ones have neither ``cpu`` nor ``isa``.
        page: path of its page, from ``bench/results``.
    """
    device = record["device"]
    folder = page.split("/")[0]
    commit = record["commit"]
    cells = {
        "CPU": f"[{folder}]({page})",
        "cores / threads": f"{device['cpu']['cores'] if device['cpu'] else '-'} / {device['threads']}",
        "threads": f"{device['threads']}",
        "ISA": isa(record),
        "dtype": record["dtype"],
        "torch": record["versions"]["torch"],
        "date": record["date"][:10],
        "commit": "-" if commit is None else commit[:10] + (", changed" if record["uncommitted_changes"] else ""),
        "command": f"`{record['command']}`",
    }
    return [row_of(comparison, record["dtype"], folder, cells) for comparison in record["comparisons"]]


def row_of(comparison: Record, dtype: str, folder: str, cells: dict[str, str]) -> Row:
    """One of a record's models; ``cells`` are those that all of them share."""
    shapes, contenders = comparison["shapes"], comparison["contenders"]
    config = GPTConfig(**{name: shapes[name] for name in shapes if name not in ("batch_size", "accumulation")})
    ours = contenders[OURS]

    def times(*names: str) -> str:
        """The fastest of these with the same losses, as a multiple of our time."""
        timed = [contenders[name] for name in names if name in contenders]
        agreeing = [c["ms"] for c in timed if agree(ours["losses"], c["losses"], dtype)]
        return f"{min(agreeing) / ours['ms']:.2f}" if agreeing else "differs" if timed else "-"

    return Row(
        comparison["name"],
        f"{comparison['name']}: {config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}, "
        f"{sizes(comparison)} tokens a step",
        config.flops_per_token,
        folder,
        {
            **cells,
            "tokens/s": f"{ours['tokens_per_s']:,.0f}",
            "ms a step": f"{ours['ms']:.1f}",
            "eager": times("eager"),
            "compile": times("compile"),
            "best tuned": times(*TUNED),
        },
        ours["tokens_per_s"],
    )


def cpu_rows(results: Path) -> list[Row]:
    """The rows of all records of ``bench.cpu``: largest model first, then by dtype, fastest first."""
    found = [
        row
        for path, record in collect(results, "steps")
        if path.name.startswith("step")
        for row in rows(record, path.with_suffix(".md").relative_to(results).as_posix())
    ]
    return sorted(found, key=lambda row: (-row.flops, row.section, row.cells["dtype"], -row.tokens_per_s))


def table(found: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[str]:
    """The lines of a Markdown table."""
    words = [i for i, column in enumerate(columns) if column in WORDS]
    return markdown([list(columns), *([row.cells[column] for column in columns] for row in found)], words)


def sections(found: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table for each model."""
    lines = []
    for section in dict.fromkeys(row.section for row in found):
        lines += [f"## {section}", "", *table([row for row in found if row.section == section]), ""]
    return lines


def cpus(found: Sequence[Row]) -> str:
    """The page of all CPUs."""
    return "\n".join([CPUS_INTRODUCTION, *sections(found)])


def readme(text: str, found: Sequence[Row]) -> str:
    """README.md with the short form: for one model, the fastest row of each CPU in each dtype."""
    fastest: dict[tuple[str, str], Row] = {}
    for row in found:
        if row.model == SHORT:
            fastest.setdefault((row.folder, row.cells["dtype"]), row)
    before, rest = text.split(START)
    lines = table(list(fastest.values()), SHORT_COLUMNS)
    short = "\n".join(lines).replace("](", "](bench/results/")  # links start at the page's folder
    return f"{before}{START}{short}\n{END}{rest.split(END)[1]}"


def addition(record: Record, stem: Path) -> str:
    """The rows that a record adds to the page of CPUs, and how to send them if it is under ``bench/results``."""
    lines = ["Rows for GPT-2 training speed by CPU (bench/results/cpus.md):", ""]
    lines += sections(rows(record, f"{stem.parent.name}/{stem.name}.md"))
    if stem.parent.parent == RESULTS:
        lines += [
            "To send them: run python -m bench.index,",
            f"then add bench/results/{stem.parent.name}, bench/results/*.md and README.md to a pull request.",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the index, the page of CPUs, its short form, and the page of each record."""
    Parser(prog="python -m bench.index", description=__doc__).parse_args(argv)
    found = cpu_rows(RESULTS)
    INDEX.write_text(index(RESULTS))
    CPUS.write_text(cpus(found))
    README.write_text(readme(README.read_text(), found))
    n = 0
    for path, record in collect(RESULTS):
        if record["comparisons"]:
            path.with_suffix(".md").write_text(page(record))
            n += 1
    print(f"{INDEX.relative_to(REPOSITORY)}, {CPUS.relative_to(REPOSITORY)}, README.md and the pages of {n} records")
    return 0


if __name__ == "__main__":
    run(main)
