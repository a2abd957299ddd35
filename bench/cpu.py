"""``python -m bench.cpu``: a whole training step on the CPU, against the same GPT in plain PyTorch.

    python -m bench.cpu                       # three models in fp32, under ten minutes on two cores
    python -m bench.cpu --dtype bfloat16      # fp32 weights and sums, products in bf16
    python -m bench.cpu --models char --threads 1
    python -m bench.cpu --isa avx2            # as on a CPU without AVX-512

Contenders:

- fastgpt's step (GPT, flat store, FusedAdamW), with 32-bit and with 8-bit moments
- plain PyTorch's step (``model/reference.py``, ``torch.optim.AdamW``, ``clip_grad_norm_``; bf16 by autocast): eager,
  under torch.compile, and both again with malloc kept from returning memory, which needs no change of code

Each contender has its own process, because malloc's settings and its free memory belong to a process. All start from
the same weights, train on the same tokens and take turns of a few steps. Medians are reported. For comparison, the
matrix products of fastgpt's step are timed alone, into memory that is already allocated, and so are the same products
by PyTorch. Shares are of the GEMM peak: the better of both at 2048 x 2048.

Writes step-N-threads.json, .md and .png into bench/results/DEVICE. The names also have the models and the dtype if they
are not the usual ones, and the instruction set if ``--isa`` or the environment limits the run to less than the CPU has
(``hardware.LIMITS`` lists the variables). Exit status: 0 done; 1 a contender failed or the losses disagree; 2 the
request was wrong.

At the end it prints the rows that the run adds to the table of CPUs (bench/results/cpus.md), and how to send them.
"""

import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contenders import ALONE
from bench.index import addition
from bench.pages import Record, draw
from bench.records import begin, conditions, results_folder, write
from bench.steps import Contender, Request, compare, report, timed_update
from bench.timing import figures, interleave
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.kernels import use_backend
from fastgpt.kernels.linear_cross_entropy import chunk_rows
from fastgpt.kernels.matmul import matmul_into
from fastgpt.model.config import GPTConfig

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Each model's shape, its batch size, and the steps in one turn, which are long compared with a change of processes.
MODELS: dict[str, tuple[GPTConfig, int, int]] = {
    "char": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12, 30),
    "30m": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=512, vocab_size=50304), 2, 1),
    "124m": (GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=512, vocab_size=50304), 1, 1),
    # two presets, without dropout, so that losses can be compared; the second with a quarter of its batch, so that
    # 24 GB hold all contenders
    "quickstart": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=256, bias=False), 16, 10),
    "shakespeare-char": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 16, 1),
}
USUAL = ("char", "30m", "124m")

CONTENDERS = ALONE
PRODUCTS, TORCH_PRODUCTS = "products alone", "products alone, PyTorch's"


# ---- the products of a step ----


def products(config: GPTConfig, batch_size: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """The matrix products of a step's layers and loss, without attention's, into memory that is already allocated."""
    N, C, V = batch_size * config.block_size, config.n_embd, config.vocab_size

    def small(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.02).to(dtype)

    calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    for n_in, n_out in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)) * config.n_layer:
        x, y, weight = small(N, n_in), small(N, n_out), small(n_out, n_in)
        calls += [
            (y, x, weight.T, False),  # y = x W^T
            (torch.empty_like(x), y, weight, False),  # dx = dy W
            (torch.zeros(n_out, n_in), y.T, x, True),  # dW += dy^T x, in fp32
        ]
    x, weight, dweight = small(N, C), small(V, C), torch.zeros(V, C)
    rows = chunk_rows(x, V)  # of logits at a time, as linear_cross_entropy has it
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
    """FLOPs of :func:`products`: 2 per weight and token, forward and twice backward."""
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    return 6.0 * batch_size * config.block_size * weights


# ---- a process for each contender ----


@dataclass(frozen=True)
class Turn:
    """One turn of a contender. ``peak_bytes`` is the peak of its process since the last turn of 0 steps."""

    ms: list[float]
    losses: list[float]
    peak_bytes: int | None


def contend(connection: Connection, contender: str, request: Request, threads: int) -> None:
    """Take the number of steps that each message states, until the pipe closes. 0 resets the peak of memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)  # the same weights for all
    tokens = torch.Generator().manual_seed(2)
    config, shape = request.config, (request.batch_size, request.config.block_size + 1)
    if contender in CONTENDERS:
        work = CONTENDERS[contender](config, CPU, request.dtype)
    else:
        multiply = products(config, request.batch_size, request.dtype)
        work = lambda batches: multiply() or torch.tensor(torch.nan)  # noqa: E731
    with use_backend("reference" if contender == TORCH_PRODUCTS else "auto"), suppress(EOFError):
        while True:
            steps = connection.recv()
            ms, losses = [], []
            for _ in range(steps):
                drawn = torch.randint(config.vocab_size, shape, generator=tokens)
                batch = drawn[:, :-1], drawn[:, 1:].contiguous()
                took, loss = timed_update(work, [batch], CPU)
                ms.append(took)
                losses.append(loss)
            if steps == 0:
                forget_peak()
            connection.send(Turn(ms, losses, peak_bytes()))


def peak_bytes() -> int | None:
    """The largest resident size of the process since :func:`forget_peak`, libraries included; ``None`` if unknown."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024  # in kB, as the kernel calls 1024 bytes


def forget_peak() -> None:
    """Count the largest resident size from here on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM: proc(5)


class Pool:
    """The processes of the contenders. Only one works at a time."""

    def __init__(self, contenders: Sequence[str], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would share the parent's memory
        self.pipes: dict[str, Connection] = {}
        self.processes = []
        for contender in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=contend, args=(theirs, contender, *args), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the process does
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
        """``steps`` steps of one contender, while the others sleep."""
        try:
            self.pipes[contender].send(steps)
            return self.pipes[contender].recv()
        except (EOFError, ConnectionError):
            sys.exit(f"error: the process of '{contender}' has ended; is there enough memory for all contenders?")


# ---- the measurement ----


def measure(name: str, dtype: torch.dtype, threads: int, seconds: float) -> Record:
    """One model: the contenders in turns for about ``seconds``, and at least three steps of each."""
    config, batch_size, steps = MODELS[name]
    request = Request(name, config, batch_size, 1, CPU, dtype)
    contenders = {name: Contender() for name in [*CONTENDERS, PRODUCTS, TORCH_PRODUCTS]}
    gemm_peaks = [hardware.gemm_ceiling(CPU, dtype, 0.5)]
    with Pool(list(contenders), request, threads) as pool:

        def turn_of(name: str) -> Callable[[], list[float]]:
            def turn() -> list[float]:
                done = pool.turn(name, steps)
                contenders[name].losses += done.losses
                contenders[name].peak_bytes = done.peak_bytes
                return done.ms

            return turn

        for name in contenders:
            pool.turn(name, 2)  # compile, and fill malloc's free lists
            pool.turn(name, 0)
        turns = {name: turn_of(name) for name in contenders}
        for name, readings in interleave(turns, seconds, (math.ceil(3 / steps), math.inf)).items():
            contenders[name].ms = readings.ms
    gemm_peaks.append(hardware.gemm_ceiling(CPU, dtype, 0.5))
    ceilings = {"gemm_flops": max(gemm_peaks)}
    alone = {name: contenders.pop(name) for name in (PRODUCTS, TORCH_PRODUCTS)}
    comparison = compare(request, contenders, ceilings)
    for name, contender in alone.items():
        comparison["contenders"][name] = describe_products(name, contender, request, ceilings["gemm_flops"])
    return comparison


def describe_products(name: str, contender: Contender, request: Request, gemm_flops: float) -> Record:
    """The products of a step, as a record has them."""
    timed = figures(contender.ms)
    rate = product_flops(request.config, request.batch_size) / (1e-3 * timed["ms"])
    return {
        "ours": name == PRODUCTS,
        "whole": False,
        "failure": None,
        **timed,
        "rate": rate,
        "unit": "FLOP/s",
        "share_of_ceiling": rate / gemm_flops,
    }


def parse(argv: Sequence[str] | None) -> Any:
    """Parse the flags."""
    usual = hardware.use_threads().amount
    parser = Parser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=USUAL, help=f"default {' '.join(USUAL)}")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default float32")
    parser.add_argument("--threads", type=int, default=usual, help="default as many as can run at a time")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each model, without its start and end")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    parser.add_argument("--isa", choices=["default", *hardware.ISAS], help="limit all contenders to an instruction set")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print the table."""
    flags = parse(argv)
    environment = hardware.environment_for(flags.isa) if flags.isa else {}
    if not environment.items() <= os.environ.items():  # libraries read these variables when they are loaded
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, "-m", "bench.cpu", *(sys.argv[1:] if argv is None else argv)])
    if flags.threads < 1:
        raise RequestError("--threads must be at least 1")
    torch.set_num_threads(flags.threads)
    unusual = (
        *(flags.models if tuple(flags.models) != USUAL else ()),
        *([flags.dtype] if flags.dtype != "float32" else ()),
    )
    stem = (flags.out or results_folder(CPU)) / ("-".join(["step", *unusual]) + conditions(CPU))
    record = begin("steps", "bench.cpu", argv, CPU, flags.dtype)
    record["comparisons"] = [measure(name, DTYPES[flags.dtype], flags.threads, flags.seconds) for name in flags.models]
    write(record, stem)
    draw(record, stem)
    status = report(record)
    print(f"\n{addition(record, stem)}")
    return status


if __name__ == "__main__":
    run(main)
