"""``python -m bench.cpu_table``: GPT-2 training speed by CPU, one page of all that ``bench.cpu`` has recorded.

Writes bench/results/cpus.md from every bench/results/*/step*.json, and its short form into README.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contenders import AGREE, difference
from bench.timing import REPOSITORY, RESULTS
from fastgpt.cli import Parser, run
from fastgpt.model.config import GPTConfig

PAGE, README = RESULTS / "cpus.md", REPOSITORY / "README.md"
START, END = "<!-- from here on by python -m bench.cpu_table -->\n", "<!-- to here -->\n"  # of the short form
SHORT = "124m"  # the model that it shows
TUNED = ("eager, memory kept", "compile, memory kept")

COLUMNS = (
    "CPU", "cores / threads", "ISA", "dtype", "tokens/s", "ms a step", "eager", "compile", "best tuned",
    "torch", "date", "commit", "command",
)  # fmt: skip
SHORT_COLUMNS = ("CPU", "threads", "ISA", "dtype", "tokens/s", "ms a step", "eager", "compile", "best tuned")
WORDS = {"CPU", "ISA", "dtype", "torch", "date", "commit", "command"}  # columns that are no figures

INTRODUCTION = """\
# GPT-2 training speed by CPU

*tokens/s* and *ms a step* are fastgpt's, for a whole training step: forward, backward, clipping and AdamW. *eager*,
*compile* and *best tuned* are how many times as long the same model takes in plain PyTorch in the same run: as it
comes, under torch.compile, and the faster of the two with malloc kept from returning memory. *differs* means that the
losses are not those of fastgpt, `-` that the figure was not recorded.

*CPU* is the folder of the records: the model name; family, model and stepping where the name does not tell the
generation; the widest instruction set of the CPU. *cores* are the machine's, *threads* the run's. *ISA* is the widest
instruction set that products of the dtype could use; it is less than the CPU has where the run was held to less.

`make bench-cpu` measures your CPU in under ten minutes and prints its rows. `python -m bench.cpu_table` writes this
page from the records: run it, and add the folder and the page to a pull request.
"""


@dataclass(frozen=True)
class Row:
    """One model of one record.

    Attributes:
        model: its name in ``bench.cpu``.
        section: its name and shape: rows of different shapes cannot be compared.
        flops: of a token, by which sections are sorted.
        folder: the CPU's, under ``bench/results``.
        cells: by column.
        tokens_per_s: of fastgpt.
    """

    model: str
    section: str
    flops: float
    folder: str
    cells: dict[str, str]
    tokens_per_s: float


def rows(record: dict[str, Any], page: str) -> list[Row]:
    """A record's models.

    Args:
        record: by ``bench.cpu``; the oldest ones tell neither ``cpu`` nor ``isa``.
        page: of that record, from ``bench/results``.
    """
    e = record["environment"]
    folder = page.split("/")[0]
    cells = {
        "CPU": f"[{folder}]({page})",
        "cores / threads": f"{e['cpu']['cores'] if 'cpu' in e else '-'} / {record['threads']}",
        "threads": f"{record['threads']}",
        "ISA": isa(e, record["dtype"]),
        "dtype": record["dtype"],
        "torch": e["torch"],
        "date": record["date"][:10],
        "commit": "-" if e["commit"] is None else e["commit"][:10] + (", changed" if e["uncommitted_changes"] else ""),
        "command": f"`{record['command']}`",
    }
    return [row_of(model, record["dtype"], folder, cells) for model in record["models"]]


def row_of(model: dict[str, Any], dtype: str, folder: str, cells: dict[str, str]) -> Row:
    """One of a record's models; ``cells`` are what all of them share."""
    config = GPTConfig(**model["config"])
    contenders = model["contenders"]
    ms = contenders["fastgpt"]["median_ms"]
    losses, allowed = contenders["fastgpt"]["losses"], AGREE[getattr(torch, dtype)]

    def times(*names: str) -> str:
        timed = [contenders[name] for name in names if name in contenders]
        agreeing = [c["median_ms"] for c in timed if difference(losses, c["losses"]) <= allowed]
        return f"{min(agreeing) / ms:.2f}" if agreeing else "differs" if timed else "-"

    tokens_per_s = 1e3 * model["batch_size"] * config.block_size / ms
    return Row(
        model["model"],
        f"{model['model']}: {config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}, "
        f"{model['batch_size']} x {config.block_size} tokens a step",
        config.flops_per_token,
        folder,
        {
            **cells,
            "tokens/s": f"{tokens_per_s:,.0f}",
            "ms a step": f"{ms:.1f}",
            "eager": times("eager"),
            "compile": times("compile"),
            "best tuned": times(*TUNED),
        },
        tokens_per_s,
    )


def isa(environment: dict[str, Any], dtype: str) -> str:
    """The widest instruction set that products of ``dtype`` could use.

    AVX512_BF16 multiplies bf16 alone, while on AMX fastgpt's products of fp32 run too, in parts of bf16.
    """
    found = environment["cpu_capability"].lower()  # by PyTorch, which tells nothing beyond AVX-512 apart
    if found == "avx512" and dtype == "bfloat16":
        return environment.get("isa", "avx512 or wider")
    could = environment.get("isa", found)
    return "avx512" if could == "avx512_bf16" else could


def collect(results: Path) -> list[Row]:
    """Of every record; largest model first, then by dtype, fastest first."""
    found = [
        row
        for path in sorted(results.glob("*/step*.json"))
        for row in rows(json.loads(path.read_text()), path.with_suffix(".md").relative_to(results).as_posix())
    ]
    return sorted(found, key=lambda row: (-row.flops, row.section, row.cells["dtype"], -row.tokens_per_s))


def table(found: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Lines of Markdown."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if column in WORDS else "--:" for column in columns) + "|",
        *("| " + " | ".join(row.cells[column] for column in columns) + " |" for row in found),
    ]


def sections(found: Sequence[Row]) -> list[str]:
    """Lines of Markdown, a table a model."""
    lines = []
    for section in dict.fromkeys(row.section for row in found):
        lines += [f"## {section}", "", *table([row for row in found if row.section == section]), ""]
    return lines


def page(found: Sequence[Row]) -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *sections(found)])


def readme(text: str, found: Sequence[Row]) -> str:
    """README.md with the short form: of one model, each CPU's fastest row in each dtype."""
    fastest: dict[tuple[str, str], Row] = {}
    for row in found:
        if row.model == SHORT:
            fastest.setdefault((row.folder, row.cells["dtype"]), row)
    before, rest = text.split(START)
    lines = table(list(fastest.values()), SHORT_COLUMNS)
    short = "\n".join(lines).replace("](", "](bench/results/")  # links are from the page's folder
    return f"{before}{START}{short}\n{END}{rest.split(END)[1]}"


def addition(record: dict[str, Any], folder: Path, name: str) -> str:
    """The rows that a record adds to the page, and how to send them where it lies in ``bench/results``."""
    lines = ["Rows for GPT-2 training speed by CPU (bench/results/cpus.md):", ""]
    lines += sections(rows(record, f"{folder.name}/{name}.md"))
    if folder.parent == RESULTS:
        lines += [
            "To send them: run python -m bench.cpu_table,",
            f"then add bench/results/{folder.name}, bench/results/cpus.md and README.md to a pull request.",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its short form."""
    Parser(prog="python -m bench.cpu_table", description=__doc__).parse_args(argv)
    found = collect(RESULTS)
    PAGE.write_text(page(found))
    README.write_text(readme(README.read_text(), found))
    print(f"{len(found)} rows in {PAGE.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    run(main)
