"""``python -m bench.mfu``: whole training steps against torch.compile, and what share of the device they use.

    python -m bench.mfu --preset gpt2-124m                  # on a GPU if there is one
    python -m bench.mfu --preset gpt2-124m --vram 12GB      # and each at its largest micro-batch in 12 GB
    python -m bench.mfu --preset quickstart --device cpu --contenders eager fastgpt

Contenders are fastgpt's step, with CUDA graphs, without, and with attention's backward in a single pass, which is not
deterministic; plain PyTorch as nanoGPT has it (``model/reference.py`` under autocast, fused AdamW): eager, under
torch.compile, with max-autotune, and with PyTorch's own linear + cross-entropy; and the strongest of plain PyTorch:
bf16 weights with fp32 masters, one graph, a compiled optimizer, the faster fused attention. All live in one process,
start from the same weights, train on the same tokens and take turns; medians count. MFU divides by the device's dense
peak (``fastgpt/gpus.py``), *achievable* by the rate of a large matrix product in the same run.

``--vram`` limits the process to so much memory, CUDA's own included, finds each one's largest micro-batch there and
times it at that.
``--profile`` adds where the time goes, by kind of kernel. ``--loss_steps N`` also trains each for N updates, and plain
PyTorch in fp32 beside them.

Writes mfu-PRESET.json, .md and .png (named after micro-batch and dtype too, a CPU's also after threads) into
bench/results/DEVICE. Exit status: 0 done; 1 fastgpt failed, the losses disagree, or none of the baselines that were
asked for could be timed; 2 the request was wrong.
"""

import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from bench.contenders import AGREE, Update, fastgpt_update, plain_update, strongest_update
from bench.timing import commit, conditions, provenance, results_folder
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.model.config import GPTConfig
from fastgpt.model.fused import RECOMPUTE
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict import micro_batch, roofline, trace
from fastgpt.train.predict.trace import Setup, trace_step
from fastgpt.train.presets import PRESETS
from fastgpt.train.step import Batch, leave_default_stream
from fastgpt.units import parse_gigabytes

# Those that could spoil the GPU for the others come after those that have least in them.
CONTENDERS: dict[str, Callable[..., Update]] = {
    "eager": plain_update,
    "fastgpt, no graphs": partial(fastgpt_update, cuda_graphs=False),
    "fastgpt": fastgpt_update,
    "fastgpt, single pass": partial(fastgpt_update, deterministic=False),
    "compile": partial(plain_update, mode="default"),
    "compile, chunked loss": partial(plain_update, mode="default", chunked_loss=True),
    "compile, max-autotune": partial(plain_update, mode="max-autotune"),
    "strongest": strongest_update,
    "strongest, max-autotune": partial(strongest_update, mode="max-autotune"),
}
OURS = "fastgpt"
# elsewhere there are no graphs, no atomics, and nothing to tune
GPU_ONLY = ("fastgpt, no graphs", "fastgpt, single pass", "strongest, max-autotune")
WARM_UP = 3  # updates: compile, record graphs, replay them


@dataclass
class Contender:
    """One of them, and what it has shown.

    Attributes:
        update: takes micro-batches.
        peak_bytes: what it holds at most, weights included; ``None`` on a CPU, which does not tell.
        ms: of each turn, per update.
        losses: of each update, from the first.
        failure: what was raised, which ended its part.
    """

    update: Update | None = None
    peak_bytes: int | None = None
    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failure: str | None = None


class Tokens:
    """Batches that can be learnt and that no file is needed for.

    Rare and frequent tokens, each half the time followed by one of its own; the same ones for everybody who starts
    with the same seed.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, seed: int = 2) -> None:
        self.shape = batch_size, config.block_size + 1
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        V = config.vocab_size
        self.frequency = 1.0 / torch.arange(1, V + 1)  # Zipf's law
        self.successor = torch.randperm(V, generator=self.generator)

    def next(self) -> Batch:
        B, T1 = self.shape
        drawn = torch.multinomial(self.frequency, B * T1, replacement=True, generator=self.generator).view(B, T1)
        follows = torch.rand(B, T1, generator=self.generator) < 0.5
        for t in range(1, T1):
            drawn[:, t] = torch.where(follows[:, t], self.successor[drawn[:, t - 1]], drawn[:, t])
        drawn = drawn.to(self.device)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        config: the model, without dropout.
        batch_size: of a micro-batch.
        accumulation: micro-batches in an update.
        recompute: by fastgpt: ``none``, ``cheap`` or ``block``.
    """

    name: str
    config: GPTConfig
    batch_size: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype
    recompute: str = "cheap"

    @property
    def tokens(self) -> int:
        """In an update."""
        return self.batch_size * self.accumulation * self.config.block_size

    def setup(self) -> Setup:
        """The step of fastgpt, as the plan wants it."""
        return Setup(self.config, self.batch_size, self.device.type, self.dtype, recompute=self.recompute)

    def make(self, name: str) -> Update:
        """A contender's update."""
        options = {"recompute": self.recompute} if name.startswith(OURS) else {}
        return CONTENDERS[name](self.config, self.device, self.dtype, self.accumulation, **options)

    def batches(self, seed: int = 2) -> Iterator[list[Batch]]:
        """An update's micro-batches, again and again."""
        tokens = Tokens(self.config, self.batch_size, self.device, seed)
        while True:
            yield [tokens.next() for _ in range(self.accumulation)]


# ---- the rounds ----


def prepare(name: str, request: Request) -> Contender:
    """Make a contender, warm it up, and see what memory it takes."""
    contender = Contender()
    cuda = request.device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(request.device)
    before = torch.cuda.memory_allocated(request.device) if cuda else 0
    torch.manual_seed(1)
    try:
        contender.update = request.make(name)
        batches = request.batches(seed=3)
        for _ in range(WARM_UP):
            contender.losses.append(contender.update(next(batches)).item())
        synchronise(request.device)
    except Exception as error:
        contender.update, contender.failure = None, describe(error)
    if cuda:
        contender.peak_bytes = torch.cuda.max_memory_allocated(request.device) - before
    return contender


def take_turns(contenders: dict[str, Contender], request: Request, seconds: float, least: int = 3) -> None:
    """Time an update of each in turn for about so many seconds."""
    start = time.perf_counter()
    for n, batches in enumerate(request.batches()):
        if n >= least and time.perf_counter() - start > seconds:
            return
        for contender in contenders.values():
            if contender.update is not None:
                turn(contender, batches, request.device)


def turn(contender: Contender, batches: list[Batch], device: torch.device) -> None:
    """One update."""
    assert contender.update is not None
    try:
        synchronise(device)
        start = time.perf_counter()
        loss = contender.update(batches)
        synchronise(device)
        contender.ms.append(1e3 * (time.perf_counter() - start))
        contender.losses.append(loss.item())
    except Exception as error:
        contender.update, contender.failure = None, describe(error)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# torch.compile records CUDA graphs for these: one memory pool for all of them, which only a reset gives back.
RECORDED = ("compile, max-autotune", "strongest", "strongest, max-autotune")


def release() -> None:
    """Give back what nobody holds any more; what has been compiled is forgotten."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


# ---- the largest micro-batch ----


def largest(
    name: str, request: Request, guess: int, note: Callable[[dict[str, Any]], None], seconds: float = 1.0
) -> dict[str, Any]:
    """A contender's largest micro-batch in the memory that the process may use, to a tenth, and its speed there.

    The search starts from ``guess``; ``note`` gets the best so far after every try. What is compiled for the second
    size serves all the others, as PyTorch then takes the size for a variable.
    """
    best: dict[str, Any] = {"batch_size": 0}

    def fits(batch_size: int) -> bool:
        resized = replace(request, batch_size=batch_size, accumulation=1, recompute="cheap")
        contender = prepare(name, resized)
        if contender.update is not None:
            take_turns({name: contender}, resized, seconds, least=2)
        it_does = contender.update is not None
        if not it_does:
            best["beyond"] = contender.failure  # out of memory, or was it something else?
        else:
            ms = median(contender.ms)
            if batch_size > best["batch_size"] or (batch_size == best["batch_size"] and ms < best["ms"]):
                tokens_per_s = 1e3 * resized.tokens / ms
                best.update(batch_size=batch_size, ms=ms, tokens_per_s=tokens_per_s, peak_bytes=contender.peak_bytes)
        note(best)
        contender.update = None
        if name in RECORDED:
            release()
        return it_does

    # away from the guess in steps that double, then between what fits and what does not
    low, high, step = 0, guess, max(1, guess // 10)
    while fits(high):
        low, high, step = high, high + step, 2 * step
    while high - low > max(1, low // 10):
        middle = (low + high) // 2 if low else max(1, high - step)
        step *= 2
        if fits(middle):
            low = middle
        else:
            high = middle
    if name.startswith("compile") and name not in RECORDED and best["batch_size"] not in (0, guess):
        release()  # once more, compiled for this size alone: that may be faster
        fits(best["batch_size"])
    return best


def first_guess(name: str, request: Request, memory: int, measured: dict[str, Any]) -> int:
    """A micro-batch that about fills so many bytes: of fastgpt the plan's, of others from the peak ``measured``."""
    if name.startswith(OURS):
        return max(1, micro_batch.largest_batch(replace(request.setup(), recompute="cheap"), memory))
    at_rest = 16 * request.config.n_params  # fp32 weights, gradients and two moments; in bf16 with masters as much
    passing = (measured.get("peak_bytes") or 0) - at_rest
    if passing <= 0:
        return request.batch_size
    return max(1, int((memory - trace.CUDA_RESERVE - at_rest) * request.batch_size / passing))


# ---- where the time goes ----

KINDS = (  # the first that matches a kernel's name
    ("attention", r"attention|flash|fmha|sdpa|mha"),
    ("optimizer", r"adam|multi_tensor|squares_kernel|root_kernel|foreach|lpnorm"),
    ("GEMM", r"gemm|cutlass|xmma|nvjet|cublas|matmul|\bmm\b|addmm|s16816|splitk"),
    ("loss", r"cross_entropy|log_softmax|nll_loss|SoftMax"),
    ("norm", r"layer_norm|native_layer_norm|layernorm|GammaBeta|columns_sum"),
    ("GELU", r"gelu"),
    ("embedding", r"embedding|indexing_backward|index_put|radix_?sort"),
    ("copy", r"memcpy|memset|copy|fill"),
)

# Inductor names a kernel after all that it fused, products beside it too: what kind of kernel it is comes first.
INDUCTORS = {"triton_tem_": "GEMM", "triton_for_": "optimizer"}  # templates of products; lists of tensors


def kind_of(kernel: str) -> str:
    """Which part of a step a kernel belongs to, by its name."""
    for start, kind in INDUCTORS.items():
        if kernel.startswith(start):
            return kind
    kinds = [(k, pattern) for k, pattern in KINDS if k != "GEMM" or not kernel.startswith("triton_")]
    return next((kind for kind, pattern in kinds if re.search(pattern, kernel, re.IGNORECASE)), "other")


def time_budget(contender: Contender, request: Request) -> dict[str, float]:
    """Milliseconds of one update by kind of kernel; ``idle`` is what no kernel fills."""
    if contender.update is None:
        return {}
    batches = next(request.batches())
    synchronise(request.device)
    cuda = request.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        start = time.perf_counter()
        contender.update(batches)
        synchronise(request.device)
        wall = 1e3 * (time.perf_counter() - start)
    budget: dict[str, float] = {}
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue  # an annotation covers kernels that are counted already
        budget[kind_of(event.key)] = budget.get(kind_of(event.key), 0.0) + us / 1e3
    budget["idle"] = max(0.0, wall - sum(budget.values()))
    return budget


# ---- the loss after so many updates ----


def loss_curve(name: str, request: Request, n_updates: int) -> list[float]:
    """A contender's losses from the first update on; of ``eager, fp32`` plain PyTorch's in fp32."""
    release()
    torch.manual_seed(1)
    try:
        exact = name == "eager, fp32"
        update = (
            plain_update(request.config, request.device, torch.float32, request.accumulation)
            if exact
            else request.make(name)
        )
        losses = [update(batches) for batches, _ in zip(request.batches(), range(n_updates), strict=False)]
        return torch.stack(losses).tolist()
    except Exception as error:
        print(f"{name}: {describe(error)}")
        return [math.nan]


# ---- the record ----


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large product and bytes/s of a large copy, now."""
    return {
        "gemm_flops": hardware.gemm_ceiling(device, dtype, 1.0),
        "bandwidth": hardware.measure_bandwidth(device),
    }


Note = Callable[[dict[str, Any]], None]  # writes what is known so far


def measure(names: Sequence[str], request: Request, seconds: float, profiling: bool, note: Note) -> dict[str, Any]:
    """All contenders side by side; ``note`` gets the record of each stage, in case the next one is the last."""
    best = ceilings(request.device, request.dtype)
    contenders: dict[str, Contender] = {}
    for name in names:
        print(f"preparing {name}", flush=True)
        contenders[name] = prepare(name, request)
        alone = {name: replace(contenders[name], ms=[])}  # a first look, should the others take too long
        take_turns(alone, request, 0.0)
        note(describe_all(contenders | alone, request, best))
    print(f"timing {', '.join(name for name, c in contenders.items() if c.update is not None)}", flush=True)
    take_turns(contenders, request, seconds)
    note(describe_all(contenders, request, best))
    try:
        after = ceilings(request.device, request.dtype)
    except RuntimeError as error:  # a kernel that strayed has ended all use of the GPU
        print(f"no second look at the ceilings: {describe(error)}", flush=True)
        after = best
    best = {key: max(best[key], after[key]) for key in best}
    record = describe_all(contenders, request, best)
    for name, contender in contenders.items() if profiling else ():
        note(record)
        try:
            record["contenders"][name]["time_budget_ms"] = time_budget(contender, request)
        except Exception as error:  # a machine may forbid profiling
            print(f"no profile of {name}: {describe(error)}", flush=True)
    return record


def describe_all(contenders: dict[str, Contender], request: Request, best: dict[str, float]) -> dict[str, Any]:
    """The record of a measurement; ``best`` are the device's ceilings."""
    peak = hardware.peak_flops(request.device, request.dtype)
    setup = request.setup()
    traced = trace_step(setup)
    n_sm = (
        torch.cuda.get_device_properties(request.device).multi_processor_count
        if request.device.type == "cuda"
        else None
    )
    machine = roofline.measured(hardware.device_name(request.device), best["gemm_flops"], best["bandwidth"], peak, n_sm)
    predicted = roofline.predict(setup, machine, traced)
    flops = request.config.flops_per_token * request.tokens
    return {
        "name": request.name,
        "model": asdict(request.config),
        "batch_size": request.batch_size,
        "accumulation": request.accumulation,
        "device_type": request.device.type,
        "dtype": str(request.dtype).removeprefix("torch."),
        "state_bits": setup.state_bits,
        "recompute": setup.recompute,
        "n_sm": n_sm,
        "peak_flops": peak,
        **best,
        "contenders": {
            name: describe_contender(c, flops, peak, best["gemm_flops"], request.tokens)
            for name, c in contenders.items()
        },
        "predicted": {
            "ms": 1e3 * predicted.seconds(request.accumulation),
            "by_kind_ms": {kind: 1e3 * s * request.accumulation for kind, s in predicted.micro_step.items()},
            "update_ms": 1e3 * predicted.update,
            "peak_bytes": traced.peak,
            "memory": traced.memory,
        },
    }  # fmt: skip


def describe_contender(
    contender: Contender, flops: float, peak: float | None, gemm: float, tokens: int
) -> dict[str, Any]:
    """What a contender has shown, for the record."""
    if len(contender.ms) < 2:
        return {"failure": contender.failure or "not timed", "losses": contender.losses}
    ms = median(contender.ms)
    rate = flops / (1e-3 * ms)
    return {
        "ms": ms,
        "quartiles_ms": quantiles(contender.ms, n=4)[::2],
        "updates": len(contender.ms),
        "tokens_per_s": 1e3 * tokens / ms,
        "tflops": rate / 1e12,
        "mfu": rate / peak if peak else None,
        "of_gemm": rate / gemm,
        "peak_bytes": contender.peak_bytes,
        "losses": contender.losses,
        "failure": contender.failure,
    }


def disagreement(record: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of each one's losses from plain PyTorch's, or fastgpt's if that is not there."""
    contenders = {name: c for name, c in record["contenders"].items() if not c["failure"]}
    truth = contenders.get("eager") or contenders.get(OURS)
    if truth is None:
        return {}
    found = {}
    for name, c in contenders.items():
        pairs = list(zip(c["losses"], truth["losses"], strict=False))
        finite = all(math.isfinite(a) and math.isfinite(b) for a, b in pairs)
        found[name] = max(abs(a - b) / abs(b) for a, b in pairs) if finite else math.inf
    return found


COLUMNS = ("contender", "ms", "quartiles", "tokens/s", "MFU", "achievable", "GiB", "/ fastgpt", "last loss", "most in")


def table(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a contender."""
    ours = record["contenders"].get(OURS, {}).get("ms")
    rows = []
    for name, c in record["contenders"].items():
        if "ms" not in c:
            rows.append((name, c["failure"], *[""] * (len(COLUMNS) - 2)))
            continue
        limited = record.get("largest", {}).get(name)
        most = f"{limited['batch_size']}: {limited.get('tokens_per_s', 0):,.0f} tokens/s" if limited else "-"
        rows.append(
            (
                name, f"{c['ms']:.1f}", " to ".join(f"{q:.1f}" for q in c["quartiles_ms"]), f"{c['tokens_per_s']:,.0f}",
                f"{c['mfu']:.1%}" if c["mfu"] is not None else "-", f"{c['of_gemm']:.1%}",
                f"{c['peak_bytes'] / 2**30:.2f}" if c["peak_bytes"] is not None else "-",
                f"{c['ms'] / ours:.2f}" if ours else "-", f"{c['losses'][-1]:.4f}", most,
            )
        )  # fmt: skip
    return rows


def columns(record: dict[str, Any]) -> tuple[str, ...]:
    """Titles; the last one names the memory limit."""
    vram = record.get("vram_gb")
    return (*COLUMNS[:-1], f"most in {vram:g} GB" if vram else "largest micro-batch")


def report(record: dict[str, Any], dtype: torch.dtype) -> int:
    """Print the table, the prediction and the verdict; the exit status."""
    # of the largest micro-batch nothing is known yet
    lines = [row[:-1] for row in (columns(record), *table(record))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *padded]))
    print(prediction(record))
    apart = disagreement(record)
    wrong = [name for name, difference in apart.items() if difference > AGREE[dtype]]
    print(f"losses differ by at most {max(apart.values(), default=math.nan):.1e}")
    if wrong:
        print(f"disagree: {', '.join(wrong)}")
    ours, baselines = (
        [c for name, c in record["contenders"].items() if name.startswith(OURS) == own] for own in (True, False)
    )
    failed = [c for c in ours if "ms" not in c]
    alone = bool(baselines) and not any("ms" in c and not c["failure"] for c in baselines)
    if alone:
        print("no baseline was timed to the end: there is nothing to compare with")
    sys.stdout.flush()
    return int(bool(wrong or failed or alone))


def prediction(record: dict[str, Any]) -> str:
    """What the plan says of fastgpt's step, beside what was measured."""
    p, c = record["predicted"], record["contenders"].get(OURS, {})
    text = f"The plan, from this run's ceilings, predicts {p['ms']:.1f} ms and {p['peak_bytes'] / 2**30:.2f} GiB"
    if "ms" in c:
        text += f"; measured {c['ms']:.1f} ms ({p['ms'] / c['ms'] - 1:+.1%})"
        if c["peak_bytes"] is not None:
            text += f" and {c['peak_bytes'] / 2**30:.2f} GiB ({p['peak_bytes'] / c['peak_bytes'] - 1:+.1%})"
    return text + "."


def markdown(record: dict[str, Any]) -> str:
    """What was measured on what, and the tables."""
    e, m = record["environment"], record["model"]
    peak = f"{record['peak_flops'] / 1e12:.1f} TFLOP/s" if record["peak_flops"] else "unknown"
    titles = columns(record)
    lines = [
        f"# {record['name']} on {e['device']}",
        "",
        f"`{record['command']}`, {record['date']}, {commit(e)};",
        f"torch {e['torch']}, Triton {e['triton']}, CUDA {e['cuda']}, driver {e['driver']}, Python {e['python']}.",
        f"{m['n_layer']} layers of {m['n_embd']}, vocabulary {m['vocab_size']}, {record['batch_size']} x "
        f"{m['block_size']} tokens a micro-batch, {record['accumulation']} of them an update, {record['dtype']}.",
        f"Medians of contenders in turns. Dense peak: {peak}; a large product in this run: "
        f"{record['gemm_flops'] / 1e12:.4g} TFLOP/s; a copy: {record['bandwidth'] / 1e9:.4g} GB/s.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---|" + "--:|" * (len(titles) - 1),
        *("| " + " | ".join(row) + " |" for row in table(record)),
        "",
        prediction(record),
    ]
    budgets = {name: c["time_budget_ms"] for name, c in record["contenders"].items() if c.get("time_budget_ms")}
    if budgets:
        kinds = [kind for kind, _ in KINDS] + ["other", "idle"]
        lines += ["", "Milliseconds of an update by kind of kernel (one update under the profiler):", ""]
        lines += ["| contender | " + " | ".join(kinds) + " |", "|---|" + "--:|" * len(kinds)]
        predicted = record["predicted"]
        expected = {**predicted["by_kind_ms"], "optimizer": predicted["update_ms"]}
        for name, budget in {**budgets, f"{OURS}, as predicted": expected}.items():
            lines.append(f"| {name} | " + " | ".join(f"{budget.get(kind, 0.0):.2f}" for kind in kinds) + " |")
    if "vram_gb" in record:
        whole, tensors = record["vram_gb"], record["vram_tensors_gb"]
        lines += [
            "",
            f"Of {whole:g} GB tensors may take {tensors:.2f}; CUDA and its libraries are assumed to take the rest.",
        ]
    if "loss_curves" in record:
        n = record["loss_steps"]
        lines += ["", f"Mean loss of the last {min(n, 10)} of {n} updates:", "", "| contender | loss |", "|---|--:|"]
        lines += [f"| {name} | {tail(losses):.5f} |" for name, losses in record["loss_curves"].items() if losses]
    return "\n".join(lines) + "\n"


def tail(losses: Sequence[float]) -> float:
    """Mean of the last ten."""
    last = losses[-10:]
    return sum(last) / len(last)


def plot(record: dict[str, Any], image: Path) -> None:
    """Tokens per second as bars; the ceiling is what a large product's rate would give."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = {name: c for name, c in record["contenders"].items() if "ms" in c}
    figure = Figure(figsize=(7.5, 0.9 + 0.5 * len(timed)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (name, c) in enumerate(timed.items()):
        axes.barh(y, c["tokens_per_s"], 0.7, color="#c0392b" if name.startswith(OURS) else "#7f8c8d")
        share = f", MFU {c['mfu']:.0%}" if c["mfu"] is not None else f", {c['of_gemm']:.0%} of a product's rate"
        axes.annotate(
            f"{c['tokens_per_s']:,.0f}{share}", (c["tokens_per_s"], y), xytext=(4, 0), textcoords="offset points",
            va="center", size=8,
        )  # fmt: skip
    axes.set_yticks(range(len(timed)), list(timed))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(c["tokens_per_s"] for c in timed.values()))
    title = f"{record['name']}, {record['batch_size']} x {record['model']['block_size']}, {record['dtype']}"
    axes.set(xlabel="tokens per second", title=f"{title}, {record['environment']['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image)


def requested(flags: Any) -> Request:
    """What the command line asks for."""
    values = {**PRESETS[flags.preset]}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size"):
        if getattr(flags, name) is not None:
            values[name] = getattr(flags, name)
    if values["batch_size"] is None:
        values["batch_size"] = 16
    values |= {"preset": flags.preset, "total_batch_size": 0}
    config = TrainConfig(**values)
    vocabulary = flags.vocab_size or (50304 if flags.preset.startswith("gpt2") else 256)
    model = replace(config.gpt_config(vocabulary), dropout=0.0)  # without chance, so that losses can be compared
    device = hardware.find_device(flags.device)
    dtype = hardware.training_dtype(device) if flags.dtype == "auto" else getattr(torch, flags.dtype)
    recompute = flags.recompute or ("none" if device.type == "cuda" else "cheap")
    return Request(flags.preset, model, config.batch_size, flags.accumulation, device, dtype, recompute)


def taking_part(asked: Sequence[str] | None, request: Request) -> list[str]:
    """Those of the contenders asked for, or of all, that can run here and would train right; a line for the others.

    Raises:
        RequestError: there are none.
    """
    names = [name for name in CONTENDERS if asked is None or name in asked]
    cuda = request.device.type == "cuda"
    if not cuda:
        names = [name for name in names if name not in GPU_ONLY]
    if not hasattr(F, "linear_cross_entropy"):
        names = [name for name in names if name != "compile, chunked loss"]
    left_out: dict[str, Sequence[str]] = {}
    if request.dtype == torch.float16:
        why = "they do not scale the loss, and gradients in float16 underflow"
        left_out[why] = [name for name in names if not name.startswith(OURS)]
    elif cuda and request.accumulation > 1:
        # pytorch/pytorch#169545 and #96693: weight.grad is the graph's own output, and the next replay writes there
        why = "the CUDA graphs that PyTorch records for them overwrite the gradients of the first micro-batch"
        left_out[why] = [name for name in names if name in RECORDED]
    for why, out in left_out.items():
        if out:
            print(f"without {', '.join(out)}: {why}", flush=True)
        names = [name for name in names if name not in out]
    if not names:
        raise RequestError("--contenders: none of these can run here")
    return names


def parse(argv: Sequence[str] | None) -> Any:
    """The flags."""
    parser = Parser(prog="python -m bench.mfu", description=__doc__)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="gpt2-124m", help="its model and micro-batch, 16 if it names none"
    )
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in an update; default 1")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=None, help="default all")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto for a GPU if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, help="by fastgpt; default none, on a CPU and for the largest cheap"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for the turns; default 30")
    parser.add_argument("--vram", help="limit for the largest micro-batch, such as 12GB; on a GPU")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by kind of kernel")
    parser.add_argument("--loss_steps", type=int, default=0, help="updates to train each for, beside fp32")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the records, print the table."""
    flags = parse(argv)
    request = requested(flags)
    vram = parse_gigabytes("vram", flags.vram) if flags.vram else None
    if vram and request.device.type != "cuda":
        raise RequestError("--vram limits a GPU's memory; there is none here")
    if vram and vram * 2**30 <= trace.CUDA_RESERVE:
        raise RequestError(f"--vram {flags.vram}: CUDA itself takes about {trace.CUDA_RESERVE / 2**30:.1f} GB")
    names = taking_part(flags.contenders, request)
    folder = flags.out or results_folder(request.device)
    leave_default_stream(request.device)
    record = provenance("bench.mfu", argv, request.device)

    def note(found: dict[str, Any]) -> None:
        record.update(found)
        write(record, folder)

    note(measure(names, request, flags.seconds, flags.profile, note))
    status = report(record, request.dtype)  # what comes now may take longer than there is time
    draw(record, folder)
    if flags.loss_steps:
        note({"loss_steps": flags.loss_steps, "loss_curves": {}})
        for name in (*names, "eager, fp32"):
            record["loss_curves"][name] = loss_curve(name, request, flags.loss_steps)
            note({})
        ends = ", ".join(f"{name} {tail(losses):.4f}" for name, losses in record["loss_curves"].items())
        print(f"mean loss of the last {min(flags.loss_steps, 10)} of {flags.loss_steps} updates: {ends}", flush=True)
    if vram:
        note({"vram_gb": vram, "vram_tensors_gb": vram - trace.CUDA_RESERVE / 2**30, "largest": {}})
        for name in names:
            within(vram, name, request, record, note)
    return status


def within(vram: float, name: str, request: Request, record: dict[str, Any], note: Note) -> None:
    """A contender's largest micro-batch and speed in so many GB, into the record; a line of it."""
    release()
    memory = int(vram * 2**30)
    guess = first_guess(name, request, memory, record["contenders"][name])
    print(f"largest micro-batch of {name}, from {guess}", flush=True)
    total = torch.cuda.get_device_properties(request.device).total_memory
    # the limit is one of PyTorch's allocator, which does not see what CUDA takes beside it
    fraction = min(1.0, (memory - trace.CUDA_RESERVE) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, request.device)

    def note_best(best: dict[str, Any]) -> None:
        record["largest"][name] = dict(best)
        note({})

    best = largest(name, request, guess, note_best)
    torch.cuda.set_per_process_memory_fraction(1.0, request.device)
    speed = f", {best['tokens_per_s']:,.0f} tokens/s" if "ms" in best else f": {best['beyond']}"
    print(f"{name}: at most {best['batch_size']} in {vram:g} GB{speed}", flush=True)


def stem_of(record: dict[str, Any], folder: Path) -> Path:
    """Where the files of a record lie, without their suffixes."""
    size = record["batch_size"], record["model"]["block_size"]
    return folder / f"mfu-{record['name']}-{size[0]}x{size[1]}-{record['dtype']}{conditions(record['device_type'])}"


def write(record: dict[str, Any], folder: Path) -> None:
    """The record, as JSON and as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem_of(record, folder)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(record))


def draw(record: dict[str, Any], folder: Path) -> None:
    """The record as a picture."""
    if any("ms" in c for c in record["contenders"].values()):
        try:
            plot(record, stem_of(record, folder).with_suffix(".png"))
        except ModuleNotFoundError as error:  # a machine with a GPU may have PyTorch and little else
            print(f"no picture: {error}")


if __name__ == "__main__":
    run(main)
