"""``python -m bench.kernels``: each kernel against its best peers at GPT-2 124M's shapes, on this device.

    python -m bench.kernels                                     # on a GPU if there is one
    python -m bench.kernels --device cpu --ops gelu layer_norm

Contenders do the same work on the same tensors and take turns (see timing.py); medians are reported. Before a contender
is timed, its outputs and gradients are compared with the eager computation in fp32 (fp64 if the operands are fp32). It
is wrong if its error is more than ten times that of eager PyTorch at the operands' dtype. The share of the ceiling
divides by the GEMM rate or the copy bandwidth of the same run: the better of two measurements, before and after.

Writes kernels-DTYPE.json and .md into bench/results/DEVICE, once more after every op; a CPU's names also have the
threads. Exit status: 0 done; 1 a kernel of fastgpt was wrong or did not run; 2 the request was wrong.
"""

import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ops import OPS, Contender, Function, Op, Setting
from bench.pages import Record, aligned, summarise
from bench.records import begin, conditions, results_folder, write
from bench.timing import CPUTimer, CUDATimer, Timer, Unit, error_in_a_line, figures, interleave, turn_of
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.hardware import find_device, measure_bandwidth, measure_gemm_peak
from fastgpt.kernels.dispatch import backend_of
from fastgpt.units import dtype_name, number

WRONG = 10.0  # times the error of eager PyTorch


# ---- the check ----


def evaluate(function: Function, inputs: Sequence[Tensor], douts: Sequence[Tensor | None], backward: bool) -> list[Any]:
    """The outputs, followed by the gradients of the inputs if ``backward``."""
    with torch.set_grad_enabled(backward):
        outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, douts, allow_unused=True) if backward else ())


def copies_of(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def true_results(op: Op, dtype: torch.dtype) -> list[Tensor]:
    """The eager computation on operands widened to fp32, or to fp64 if they are fp32. An optimizer's is not widened."""
    eager = next(c.function for c in op.contenders if c.name == op.eager)
    if not op.inputs:
        op.before()
        return [t.clone() for t in eager()]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    douts = [None if d is None else d.to(wide) for d in op.douts]
    return [t.detach() for t in evaluate(eager, copies_of(op.inputs, wide), douts, backward=True)]


def errors_of(contender: Contender, op: Op, truth: Sequence[Tensor], backward: bool) -> list[tuple[float, float]]:
    """For each result, its largest error and the rounding of its dtype, both divided by its largest true value."""
    op.before()
    if contender.main_grad is not None:
        contender.main_grad.zero_()
    errors = []
    results = evaluate(contender.function, op.inputs, op.douts, backward)
    for got, true in zip(results, truth, strict=False):
        result: Any = contender.main_grad if got is None else got.detach()
        largest = true.abs().max().item() or 1.0
        rounding = max(torch.finfo(t.dtype).eps for t in (result, *op.inputs))
        errors.append((torch.sub(true, result).abs_().max().item() / largest, rounding))
    return errors


def check(op: Op, backward: bool, truth: Sequence[Tensor]) -> dict[str, Record]:
    """By contender: ``failure``, which is ``None``, ``wrong: REASON`` or ``skipped: REASON``, and its ``errors``."""
    found: dict[str, Record] = {}
    allowed: list[float] = []
    for contender in sorted(op.contenders, key=lambda c: c.name != op.eager):
        outcome: Record = {"failure": None, "errors": None}
        found[contender.name] = outcome
        if op.random or not contender.whole:
            continue
        try:
            errors = errors_of(contender, op, truth, backward)
        except Exception as error:
            outcome["failure"] = f"skipped: {error_in_a_line(error)}"
            continue
        outcome["errors"] = [e for e, _ in errors]
        # Eager comes first and sets the limits. Its error may by chance be less than one rounding: the larger counts.
        allowed = allowed or [WRONG * max(pair) for pair in errors]
        bad = [(e, limit) for (e, _), limit in zip(errors, allowed, strict=True) if not e <= limit]  # NaN is bad
        if bad:
            outcome["failure"] = "wrong: error {:.1e}, at most {:.1e} allowed".format(*bad[0])
    return found


# ---- the measurement ----


def measure(op: Op, timer: Timer, dtype: torch.dtype, rounds: tuple[int, int], seconds: float) -> dict[str, Record]:
    """For each pass, the contenders as a record has them."""
    deadline = time.perf_counter() + seconds
    truth = [] if op.random else true_results(op, dtype)
    checked = {name: check(op, name == "fwd+bwd", truth) for name in op.work}
    del truth  # before the copies of the inputs are made
    size = sum(t.numel() * t.element_size() for t in op.inputs)
    n_sets = min(16, 1 + timer.cache_bytes // size) if size else 1
    input_sets = [op.inputs] + [copies_of(op.inputs) for _ in range(n_sets - 1)]

    def calls(function: Function, backward: bool) -> None:
        for inputs in input_sets:
            evaluate(function, inputs, op.douts, backward)

    passes = {}
    for n_left, (name, work) in zip(range(len(op.work), 0, -1), op.work.items(), strict=True):
        found = {
            c.name: {"ours": c.name.startswith("fastgpt"), "whole": c.whole, **checked[name][c.name]}
            for c in op.contenders
        }
        units = {}
        for contender in op.contenders:
            if found[contender.name]["failure"] is None:
                unit = Unit(partial(calls, contender.function, name == "fwd+bwd"), n_sets, op.before)
                try:
                    timer.warm_up(unit)
                    units[contender.name] = unit
                except Exception as error:
                    found[contender.name]["failure"] = f"skipped: {error_in_a_line(error)}"
        turns = {who: turn_of(unit, timer) for who, unit in units.items()}
        left = (deadline - time.perf_counter()) / n_left
        for who, readings in interleave(turns, left, rounds).items():
            if readings.failure is not None:
                found[who]["failure"] = f"skipped: {error_in_a_line(readings.failure)}"
            else:
                found[who] |= describe(readings.ms, units[who], work, op.unit)
        passes[name] = found
    return passes


def describe(ms: Sequence[float], unit: Unit, work: float, rate_unit: str) -> Record:
    """What a record says of a contender that was timed; ``ms`` are milliseconds of a call."""
    timed = figures(ms)
    return {
        **timed,
        "rate": work / (timed["ms"] * 1e-3),
        "unit": rate_unit,
        "host_ms": None if unit.host_ms is None else unit.host_ms / unit.calls,
        "peak_bytes": unit.peak_bytes,
        "calls_per_round": unit.calls,
        "rounds_ms": list(ms),
    }


def benchmark(
    names: Sequence[str], setting: Setting, timer: Timer, seconds: float, note: Callable[[list[Record]], None]
) -> list[Record]:
    """A comparison for each op and pass, or one for an op that cannot be set up. ``note`` gets those so far."""
    deadline = time.perf_counter() + seconds
    fewest_rounds = 3 if setting.device.type == "cpu" else 20
    shapes = {name: size for name, size in vars(setting).items() if isinstance(size, int)}
    comparisons: list[Record] = []
    for n_left, name in zip(range(len(names), 0, -1), names, strict=True):
        print(f"measuring {name}", file=sys.stderr, flush=True)
        build, most_rounds = OPS[name]
        share = (deadline - time.perf_counter()) / n_left
        try:
            torch.manual_seed(0)
            if setting.device.type == "cuda":  # otherwise this op might not get the memory that the last one used
                gc.collect()
                torch.cuda.empty_cache()
            passes = measure(build(setting), timer, setting.dtype, (fewest_rounds, most_rounds), share)
        except Exception as error:
            failed = {"ours": True, "whole": True, "failure": f"skipped: {error_in_a_line(error)}"}
            passes = {"all": {"all": failed}}
        comparisons += [
            {"name": f"{name} {each}", "shapes": shapes, "ceilings": {}, "ours": next(iter(found)), "contenders": found}
            for each, found in passes.items()
        ]
        note(comparisons)
        torch.compiler.reset()  # compiled code keeps its op's tensors alive
    return comparisons


def ceilings_of(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GEMM rate and copy bandwidth. A GPU's sizes are so large that launching and waiting do not count."""
    size, megabytes = (2048, 256) if device.type == "cpu" else (8192, 2048)
    return {"gemm_flops": measure_gemm_peak(device, dtype, size), "bandwidth": measure_bandwidth(device, megabytes)}


def add_ceilings(comparisons: Sequence[Record], ceilings: dict[str, float]) -> None:
    """Set the ceilings, and the share of them that each contender reaches."""
    by_unit = {"FLOP/s": ceilings["gemm_flops"], "B/s": ceilings["bandwidth"]}
    for comparison in comparisons:
        comparison["ceilings"] = ceilings
        for contender in comparison["contenders"].values():
            if "rate" in contender:
                contender["share_of_ceiling"] = contender["rate"] / by_unit[contender["unit"]]


# ---- the command ----


def overview(record: Record) -> str:
    """A line for each op and pass, of at most 100 columns: our time and the best peer's."""
    rows = [["", "ours ms", "best peer", "ms", "peer/ours", "ceiling"]]
    for comparison in record["comparisons"]:
        s = summarise(comparison, record["dtype"])
        if s.ms is None:
            failure = comparison["contenders"][comparison["ours"]]["failure"]
            rows.append([comparison["name"][:30], "", failure[:58], "", "", ""])
        else:
            optional = [(s.peer_ms, number), (s.ratio, "{:.2f}".format), (s.share, "{:.0%}".format)]
            cells = [form(value) if value is not None else "-" for value, form in optional]
            rows.append([comparison["name"][:30], number(s.ms), (s.peer or "-")[:29], *cells])
    return aligned(rows, words=(0, 2), widest=30)


def parse(argv: Sequence[str] | None) -> tuple[Any, Setting]:
    """Parse the flags, and make the setting from them."""
    parser = Parser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default bfloat16; on a CPU float32"
    )
    parser.add_argument("--batch_size", type=int, help="sequences; default 8, on a CPU 1")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--seconds", type=float, default=150.0, help="for everything; at least a few rounds are run")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)
    cpu = device.type == "cpu"
    batch_size = (1 if cpu else 8) if flags.batch_size is None else flags.batch_size
    if batch_size < 1 or flags.block_size < 1:
        raise RequestError("--batch_size and --block_size must be at least 1")
    smaller = {"adamw_L": 1, "adamw_V": 2816} if cpu else {}  # ten million parameters
    dtype = getattr(torch, flags.dtype or ("float32" if cpu else "bfloat16"))
    return flags, Setting(device, dtype, batch_size, flags.block_size, **smaller)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the records, print the table."""
    start = time.perf_counter()
    flags, setting = parse(argv)
    device, dtype = setting.device, setting.dtype
    if device.index is not None:
        torch.cuda.set_device(device)
    ceilings = ceilings_of(device, dtype)
    record = begin("kernels", "bench.kernels", argv, device, dtype_name(dtype))
    record["backend"] = " ".join(backend_of(device, dtype))
    stem = (flags.out or results_folder(device)) / f"kernels-{record['dtype']}{conditions(device)}"

    def note(comparisons: list[Record]) -> None:
        add_ceilings(comparisons, ceilings)
        record.update(comparisons=comparisons, seconds=time.perf_counter() - start)
        write(record, stem)

    timer: Timer = CPUTimer() if device.type == "cpu" else CUDATimer(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend of sdpa that cannot run gives its reasons at length
        left = flags.seconds - (time.perf_counter() - start)
        comparisons = benchmark(flags.ops, setting, timer, left, note)
    try:
        after = ceilings_of(device, dtype)
    except RuntimeError:  # an illegal access by a kernel makes the GPU unusable; keep the first ceilings
        after = ceilings
    ceilings = {name: max(ceilings[name], after[name]) for name in ceilings}
    note(comparisons)
    print(f"{stem}.json, {stem.name}.md: {record['device']['name']}, {record['seconds']:.0f} s\n")
    print(overview(record))
    every = [c for comparison in comparisons for c in comparison["contenders"].values()]
    return int(any(c["ours"] and c.get("ms") is None for c in every))


if __name__ == "__main__":
    run(main)
