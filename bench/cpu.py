"""``python -m bench.cpu``: a whole training step on the CPU, against the same GPT in plain PyTorch.

    python -m bench.cpu                       # three models in fp32, under ten minutes on two cores
    python -m bench.cpu --dtype bfloat16      # fp32 weights and sums, products in bf16
    python -m bench.cpu --models char --threads 1
    python -m bench.cpu --isa avx2            # as on a CPU without AVX-512

Contenders are fastgpt's step (GPT, flat store, FusedAdamW, and that again with moments of 8 bits) and plain PyTorch's
(``model/reference.py``, ``torch.optim.AdamW``, ``clip_grad_norm_``; bf16 by autocast): eager, under torch.compile,
and each of these with malloc kept from returning memory, which is the one thing that a user could do from outside.
Each has a process of its own, as memory is at stake; they train on the same tokens from the same weights and take
turns, a few steps each; medians count. Beside fastgpt's step its matrix products alone are timed, the outputs
allocated before, the same products by PyTorch, and the GEMM peak: the better of both at 2048 x 2048.

Writes step-N-threads.json, .md and .png into bench/results/DEVICE; models and a dtype that are not the usual ones are
part of their names, and so is the instruction set where ``--isa``, or the environment, holds the run to less than the
CPU has (``hardware.LIMITS`` lists the variables). Exit status: 0 done; 1 a contender failed or the losses disagree; 2
the request was wrong.

Ends with the rows that the run adds to the table of CPUs (cpu_table.py), and how to send them.
"""

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from bench.contenders import AGREE, Update, difference, fastgpt_update, plain_update
from bench.cpu_table import addition, isa
from bench.timing import commit, conditions, provenance, results_folder
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.kernels import use_backend
from fastgpt.kernels.linear_cross_entropy import chunk_rows
from fastgpt.kernels.matmul import matmul_into
from fastgpt.model.config import GPTConfig
from fastgpt.train.memory import keep_freed_memory

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Each model's shape, its batch size, and the steps that a contender takes in one turn.
MODELS: dict[str, tuple[GPTConfig, int, int]] = {
    "char": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12, 30),
    "30m": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=512, vocab_size=50304), 2, 1),
    "124m": (GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=50304), 1, 1),
    # two presets, without dropout, which would make the losses incomparable; the second with a quarter of its batch,
    # so that 24 GB hold all contenders
    "quickstart": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=256, bias=False), 16, 10),
    "shakespeare-char": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 16, 1),
}
USUAL = ("char", "30m", "124m")


# ---- the contenders ----


def fastgpt(config: GPTConfig, dtype: torch.dtype, state_bits: int = 32) -> Update:
    """The step, and malloc as the trainer sets it once the model is in its store: its first home is then gone."""
    update = fastgpt_update(config, CPU, dtype, state_bits=state_bits)
    keep_freed_memory()
    return update


def plain(config: GPTConfig, dtype: torch.dtype, mode: str | None = None, keep_memory: bool = False) -> Update:
    """PyTorch's step, with malloc as it comes or kept from returning memory."""
    if keep_memory:
        keep_freed_memory()
    return plain_update(config, CPU, dtype, mode=mode)


CONTENDERS: dict[str, Callable[..., Update]] = {
    "fastgpt": fastgpt,
    "eager": plain,
    "compile": partial(plain, mode="default"),
    "eager, memory kept": partial(plain, keep_memory=True),
    "compile, memory kept": partial(plain, mode="default", keep_memory=True),
    "fastgpt, 8-bit moments": partial(fastgpt, state_bits=8),
}
INEXACT = {"fastgpt, 8-bit moments"}  # another arithmetic: its losses are recorded and need not agree
PRODUCTS, TORCH_PRODUCTS = "products alone", "products alone, PyTorch's"


def products(config: GPTConfig, batch_size: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """The matrix products of a step's layers and loss, attention's left out, into memory that is there already."""
    N, C, V = batch_size * config.block_size, config.n_embd, config.vocab_size

    def small(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).to(dtype)

    calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    for n_in, n_out in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)) * config.n_layer:
        x, y, weight = small(N, n_in), small(N, n_out), small(n_out, n_in)
        calls += [
            (y, x, weight.T, False),
            (torch.empty_like(x), y, weight, False),
            (torch.zeros(n_out, n_in), y.T, x, True),
        ]
    x, weight, dweight = small(N, C), small(V, C), torch.zeros(V, C)
    rows = chunk_rows(x, V)
    logits, dx = small(rows, V), small(rows, C)
    for start in range(0, N, rows):
        chunk = x[start : start + rows]
        n = len(chunk)
        calls += [(logits[:n], chunk, weight.T, False), (dx[:n], logits[:n], weight, False)]
        calls += [(dweight, logits[:n].T, chunk, True)]

    def multiply() -> None:
        for out, a, b, accumulate in calls:
            matmul_into(out, a, b, accumulate=accumulate)

    return multiply


def product_flops(config: GPTConfig, batch_size: int) -> float:
    """FLOPs of :func:`products`."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6.0 * batch_size * config.block_size * weights


# ---- a process a contender ----


@dataclass(frozen=True)
class Turn:
    """What a contender did in one turn."""

    ms: list[float]
    losses: list[float]
    peak_mib: float


def contend(
    connection: Connection, contender: str, config: GPTConfig, batch_size: int, dtype: torch.dtype, threads: int
) -> None:
    """Take as many steps as each message asks for, until the pipe closes. 0 forgets the peak of memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    tokens = torch.Generator().manual_seed(2)
    if contender in CONTENDERS:
        work = CONTENDERS[contender](config, dtype)
    else:
        multiply = products(config, batch_size, dtype)
        work = lambda batches: multiply() or torch.tensor(torch.nan)  # noqa: E731
    with use_backend("reference" if contender == TORCH_PRODUCTS else "auto"), suppress(EOFError):
        while True:
            steps = connection.recv()
            ms, losses = [], []
            for _ in range(steps):
                drawn = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), generator=tokens)
                x, y = drawn[:, :-1], drawn[:, 1:].contiguous()
                start = time.perf_counter()
                losses.append(work([(x, y)]).item())
                ms.append((time.perf_counter() - start) * 1e3)
            if steps == 0:
                forget_peak()
            connection.send(Turn(ms, losses, peak_mib()))


def peak_mib() -> float:
    """The process's largest resident size since :func:`forget_peak`, libraries included; NaN where that is not told."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Let the largest resident size be counted from here on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ---- the rounds ----


class Pool:
    """The contenders' processes, of which one works at a time."""

    def __init__(self, contenders: Sequence[str], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for contender in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=contend, args=(theirs, contender, *args), daemon=True)
            process.start()
            theirs.close()
            self.pipes[contender] = ours
            self.processes.append(process)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes.values():
            pipe.close()
        for process in self.processes:
            process.join()

    def turn(self, contender: str, steps: int) -> Turn:
        """So many steps by one contender, while the others sleep."""
        try:
            self.pipes[contender].send(steps)
            return self.pipes[contender].recv()
        except (EOFError, ConnectionError):
            sys.exit(f"error: the process of '{contender}' has died; is there memory for all of them?")


def measure(name: str, dtype: torch.dtype, threads: int, seconds: float) -> dict[str, Any]:
    """One model: every contender's times and losses, in turns for about so many seconds."""
    config, batch_size, steps = MODELS[name]
    everyone = [*CONTENDERS, PRODUCTS, TORCH_PRODUCTS]
    times: dict[str, list[float]] = {contender: [] for contender in everyone}
    losses: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    peaks: dict[str, float] = {}
    gemm_peaks = [hardware.gemm_ceiling(CPU, dtype, 0.5)]
    with Pool(everyone, config, batch_size, dtype, threads) as pool:
        for contender in everyone:  # compile, and let memory settle
            pool.turn(contender, 2)
            pool.turn(contender, 0)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(times[PRODUCTS]) < 3:
            for contender in everyone:
                turn = pool.turn(contender, steps)
                times[contender] += turn.ms
                peaks[contender] = turn.peak_mib
                if contender in losses:
                    losses[contender] += turn.losses
    gemm_peaks.append(hardware.gemm_ceiling(CPU, dtype, 0.5))
    rate = product_flops(config, batch_size) / (median(times[PRODUCTS]) * 1e-3)
    return {
        "model": name,
        "config": asdict(config),
        "batch_size": batch_size,
        "contenders": {
            contender: {
                "median_ms": median(times[contender]),
                "quartiles_ms": quantiles(times[contender], n=4)[::2],
                "steps": len(times[contender]),
                "peak_mib": peaks[contender],
                "losses": losses[contender],
            }
            for contender in CONTENDERS
        },
        "products_ms": median(times[PRODUCTS]),
        "torch_products_ms": median(times[TORCH_PRODUCTS]),
        "products_share_of_peak": rate / max(gemm_peaks),
        "gemm_peak_gflops": max(gemm_peaks) / 1e9,
        "loss_differences": {
            contender: difference(losses["fastgpt"], losses[contender])
            for contender in CONTENDERS
            if contender not in INEXACT
        },
    }


# ---- the records ----

COLUMNS = ("model", "contender", "ms", "quartiles", "/ fastgpt", "/ products", "peak MiB", "/ eager's", "last loss")


def table(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row a contender of each model, and one for the products alone."""
    rows = []
    for r in results:
        ours = r["contenders"]["fastgpt"]["median_ms"]
        for contender, c in r["contenders"].items():
            rows.append(
                (
                    r["model"], contender, f"{c['median_ms']:.1f}", " to ".join(f"{q:.1f}" for q in c["quartiles_ms"]),
                    f"{c['median_ms'] / ours:.2f}", f"{c['median_ms'] / r['products_ms']:.2f}",
                    f"{c['peak_mib']:.0f}", f"{c['peak_mib'] / r['contenders']['eager']['peak_mib']:.0%}",
                    f"{c['losses'][-1]:.5f}",
                )
            )  # fmt: skip
        share = f"{r['products_share_of_peak']:.0%} of {r['gemm_peak_gflops']:.0f} GFLOP/s"
        for products_alone, ms, note in (
            (PRODUCTS, r["products_ms"], share), (TORCH_PRODUCTS, r["torch_products_ms"], "")
        ):  # fmt: skip
            ratios = f"{ms / ours:.2f}", f"{ms / r['products_ms']:.2f}"
            rows.append((r["model"], products_alone, f"{ms:.1f}", note, *ratios, "", "", ""))
    return rows


def markdown(record: dict[str, Any]) -> str:
    """What was measured on what, and the table."""
    e = record["environment"]
    return "\n".join(
        [
            f"# A training step on {e['device']}",
            "",
            f"`{record['command']}`, {record['date']}, {commit(e)};",
            f"torch {e['torch']}, Python {e['python']}, {isa(e, record['dtype'])}, {record['threads']} threads, "
            f"{record['dtype']}.",
            "Medians of contenders in turns; peak memory is a whole process's. Models: "
            + "; ".join(
                f"{r['model']}: {r['config']['n_layer']} layers of {r['config']['n_embd']}, vocabulary "
                f"{r['config']['vocab_size']}, {r['batch_size']} x {r['config']['block_size']} tokens"
                for r in record["models"]
            )
            + ".",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---|---|" + "--:|" * (len(COLUMNS) - 2),
            *("| " + " | ".join(row) + " |" for row in table(record["models"])),
            "",
        ]
    )


def plot(record: dict[str, Any], image: Path) -> None:
    """Step times as bars, a group a model, fastgpt's as 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = dict(zip(CONTENDERS, ("#c0392b", "#7f8c8d", "#34495e", "#bdc3c7", "#9bb7d4", "#e6b0aa"), strict=False))
    width = 0.8 / len(CONTENDERS)
    for i, r in enumerate(record["models"]):
        ours = r["contenders"]["fastgpt"]["median_ms"]
        for j, (contender, c) in enumerate(r["contenders"].items()):
            x, height = i + (j - (len(CONTENDERS) - 1) / 2) * width, c["median_ms"] / ours
            axes.bar(x, height, 0.92 * width, color=colours[contender], label=contender if i == 0 else None)
            axes.annotate(f"{height:.2f}", (x, height), xytext=(0, 2), textcoords="offset points", ha="center", size=7)
        axes.hlines(r["products_ms"] / ours, i - 0.4, i + 0.4, color="black", lw=1, ls=":")
    axes.plot([], [], color="black", lw=1, ls=":", label="fastgpt's matrix products alone")
    axes.set_xticks(
        range(len(record["models"])),
        [f"{r['model']}\n{r['contenders']['fastgpt']['median_ms']:.0f} ms" for r in record["models"]],
    )
    threads = f"{record['threads']} thread{'s'[: record['threads'] > 1]}"
    machine = f"{record['environment']['device']}, {isa(record['environment'], record['dtype'])}"
    axes.set(ylabel="time of a step, fastgpt = 1", title=f"Training step, {machine}, {threads}, {record['dtype']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=4, fontsize=8)
    figure.savefig(image)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the records, print the table."""
    usual = hardware.use_threads().amount
    parser = Parser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=USUAL, help=f"default {' '.join(USUAL)}")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default float32")
    parser.add_argument("--threads", type=int, default=usual, help="default as many as can run at a time")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each model, its start and end not counted")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    parser.add_argument("--isa", choices=["default", *hardware.ISAS], help="hold all contenders to an instruction set")
    flags = parser.parse_args(argv)
    environment = hardware.environment_for(flags.isa) if flags.isa else {}
    if not environment.items() <= os.environ.items():  # the libraries look at them when they are loaded
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, "-m", "bench.cpu", *(sys.argv[1:] if argv is None else argv)])
    if flags.threads < 1:
        raise RequestError("--threads is at least 1")
    torch.set_num_threads(flags.threads)
    folder = flags.out or results_folder(CPU)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **provenance("bench.cpu", argv, CPU),
        "dtype": flags.dtype,
        "threads": flags.threads,
        "models": [measure(name, DTYPES[flags.dtype], flags.threads, flags.seconds) for name in flags.models],
    }
    unusual = (
        *(flags.models if tuple(flags.models) != USUAL else ()),
        *([flags.dtype] if flags.dtype != "float32" else ()),
    )
    stem = "-".join(["step", *unusual]) + conditions(CPU)
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(record))
    plot(record, folder / f"{stem}.png")
    rows = [COLUMNS, *table(record["models"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print(
            "  ".join(
                f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    apart = {
        f"{r['model']} {contender}": difference
        for r in record["models"]
        for contender, difference in r["loss_differences"].items()
    }
    print(f"losses differ by at most {max(d for d in apart.values() if d < math.inf):.1e}")
    wrong = [who for who, difference in apart.items() if difference > AGREE[DTYPES[flags.dtype]]]
    if wrong:
        print(f"disagree with fastgpt: {', '.join(wrong)}")
    print(f"\n{addition(record, folder, stem)}")
    return int(bool(wrong))


if __name__ == "__main__":
    run(main)
