"""``python -m bench.kernels``: each kernel against its best peers at GPT-2 124M's shapes, on this very device.

    python -m bench.kernels                                     # on a GPU if there is one
    python -m bench.kernels --device cpu --ops gelu layer_norm

Contenders do the same work from the same tensors and take turns (see timing.py); medians count. Before one is
timed, its outputs and gradients are held against the eager computation in fp32 (fp64 if the operands are fp32):
an error more than ten times that of eager PyTorch at the operands' dtype is wrong. The share of the ceiling
divides by the GEMM rate or the copy bandwidth of the same run, the better of a measurement before and one after.

Writes kernels-DTYPE.json and .md into bench/results/DEVICE, anew after every op; a CPU's are named after its threads
too. Exit status: 0 done; 1 a kernel of fastgpt's was wrong or did not run; 2 the request was wrong.
"""

import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt.kernels as ours
from bench.report import Row, markdown, summarise, table
from bench.timing import CPUTimer, CUDATimer, Timer, Unit, conditions, interleave, provenance, results_folder
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.hardware import find_device, measure_bandwidth, measure_gemm_peak
from fastgpt.kernels.dispatch import backend_of

Function = Callable[..., Any]

WRONG = 10.0  # times the error of eager PyTorch
SDPA = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


@dataclass(frozen=True)
class Setting:
    """What all ops share: GPT-2 124M's shapes, but for the batch; device and dtype. Draws the tensors.

    The optimizer's model may have fewer layers, ``L``, and a smaller vocabulary.
    """

    device: torch.device
    dtype: torch.dtype
    B: int
    T: int = 1024
    C: int = 768
    H: int = 12
    V: int = 50304
    adamw_L: int = 12
    adamw_V: int = 50304

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.draw(*shape).mul_(scale).requires_grad_()

    def targets(self) -> Tensor:
        return torch.randint(self.V, (self.B * self.T,), device=self.device)


@dataclass(frozen=True)
class Contender:
    """One way to do an op's work.

    Attributes:
        name: fastgpt's own start with its name.
        function: takes the op's inputs, returns a tensor or several.
        whole: does all of the work; one that does not is timed, but neither checked nor a peer.
        main_grad: where it leaves the one gradient that autograd does not get.
    """

    name: str
    function: Function
    whole: bool = True
    main_grad: Tensor | None = None


@dataclass(frozen=True)
class Op:
    """An op at one shape.

    Attributes:
        inputs: leaves; every one gets a gradient. An optimizer has none, and works on operands of its own.
        douts: gradients of the outputs; ``None`` for a loss.
        contenders: the first is the kernel in question.
        eager: the contender that gives the truth and whose error is the measure.
        work: FLOPs or bytes by pass: ``fwd`` without gradients, ``fwd+bwd``, or an optimizer's ``step``.
        unit: ``TFLOP/s`` or ``GB/s``, what work over time comes to.
        random: no two contenders compute the same, so there is nothing to compare.
        before: puts operands that a call changes back as they were.
    """

    inputs: list[Tensor]
    douts: list[Tensor | None]
    contenders: list[Contender]
    eager: str
    work: dict[str, float]
    unit: str
    random: bool = False
    before: Callable[[], object] = lambda: None


# ---- the ops ----


def sdpa(backend: str, dropout_p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def sdpa_peers(dropout_p: float = 0.0) -> dict[str, Function]:
    return {"sdpa " + name.split("_")[0].lower(): partial(sdpa, name, dropout_p) for name in SDPA}


def attention_work(s: Setting) -> dict[str, float]:
    """Two products of 2 B T T C FLOPs forward and five backward, half of each above the diagonal."""
    forward = 2.0 * s.B * s.T * s.T * s.C
    return {"fwd": forward, "fwd+bwd": 3.5 * forward}


def attention_qkv(s: Setting, head_size: int = 64, dropout_p: float = 0.0) -> Op:
    """From the packed output of one linear layer to the input of the next, as nanoGPT goes about it."""
    n_head = s.C // head_size

    def unpacked(attend: Function, qkv: Tensor) -> Tensor:
        q, k, v = (t.view(s.B, s.T, n_head, head_size).transpose(1, 2) for t in qkv.split(s.C, dim=2))
        return attend(q, k, v).transpose(1, 2).contiguous().view(s.B, s.T, s.C)

    packed = partial(ours.attention_qkv, n_head=n_head, dropout_p=dropout_p)
    on_views = partial(unpacked, partial(ours.attention, dropout_p=dropout_p))
    contenders = [Contender("fastgpt attention_qkv", packed), Contender("fastgpt attention", on_views)]
    if s.device.type == "cuda":  # elsewhere it is the same
        contenders.append(Contender("fastgpt single pass", partial(packed, deterministic=False)))
    contenders += [Contender(name, partial(unpacked, attend)) for name, attend in sdpa_peers(dropout_p).items()]
    inputs, dout = [s.leaf(s.B, s.T, 3 * s.C)], s.draw(s.B, s.T, s.C)
    return Op(inputs, [dout], contenders, "sdpa math", attention_work(s), "TFLOP/s", random=dropout_p > 0.0)


def attention(s: Setting) -> Op:
    """Three tensors (B, H, T, D) in, one out, laid out as the contender likes."""
    shape = (s.B, s.H, s.T, s.C // s.H)
    peers = [Contender(name, attend) for name, attend in sdpa_peers().items()]
    contenders = [Contender("fastgpt", ours.attention), *peers]
    inputs = [s.leaf(*shape) for _ in range(3)]
    return Op(inputs, [s.draw(*shape)], contenders, "sdpa math", attention_work(s), "TFLOP/s")


def against_eager(
    kernel: Function, eager: Function, inputs: list[Tensor], douts: list[Tensor | None], forward: int, backward: int
) -> Op:
    """An op bound by memory: each pass reads and writes so many tensors of the first input's size, each once."""
    compiled = torch.compile(eager, dynamic=False)
    contenders = [Contender("fastgpt", kernel), Contender("eager", eager), Contender("torch.compile", compiled)]
    size = float(inputs[0].numel() * inputs[0].element_size())
    work = {"fwd": forward * size, "fwd+bwd": (forward + backward) * size}
    return Op(inputs, douts, contenders, "eager", work, "GB/s")


def layer_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), weight, bias)

    inputs = [s.leaf(B, T, C), s.leaf(C), s.leaf(C)]
    return against_eager(ours.layer_norm, eager, inputs, [s.draw(B, T, C)], 2, 3)


def add_layer_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (C,), weight, bias), total

    inputs = [s.leaf(B, T, C), s.leaf(B, T, C), s.leaf(C), s.leaf(C)]
    return against_eager(ours.add_layer_norm, eager, inputs, [s.draw(B, T, C), s.draw(B, T, C)], 4, 4)


def gelu(s: Setting, with_bias: bool = False) -> Op:
    shape = (s.B, s.T, 4 * s.C)

    def kernel(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ours.gelu(x, bias=bias)

    def eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate="tanh")

    inputs = [s.leaf(*shape)] + ([s.leaf(shape[-1])] if with_bias else [])
    return against_eager(kernel, eager, inputs, [s.draw(*shape)], 2, 3)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits of half precision are widened, as under autocast."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(wide, targets, ignore_index=-1)


def cross_entropy(s: Setting) -> Op:
    targets = s.targets()

    def eager(logits: Tensor) -> Tensor:
        return mean_loss(logits, targets)

    kernel = partial(ours.cross_entropy, targets=targets)
    return against_eager(kernel, eager, [s.leaf(s.B * s.T, s.V)], [None], 1, 2)


def in_place(kernel: Function, main_grad: Tensor) -> Contender:
    """The kernel with its weight gradient, the second input's, added into ``main_grad``."""

    def function(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        return kernel(x, weight, *others)

    return Contender("fastgpt main_grad", function, main_grad=main_grad)


def linear(s: Setting) -> Op:
    """The first linear layer of GPT-2's MLP; nothing for torch.compile to fuse."""
    B, T, C = s.B, s.T, s.C
    contenders = [
        Contender("fastgpt", ours.linear),
        in_place(ours.linear, torch.zeros(4 * C, C, device=s.device)),
        Contender("eager", F.linear),
    ]
    inputs = [s.leaf(B, T, C), s.leaf(4 * C, C, scale=0.02), s.leaf(4 * C)]
    forward = 2.0 * B * T * C * 4 * C
    return Op(inputs, [s.draw(B, T, 4 * C)], contenders, "eager", {"fwd": forward, "fwd+bwd": 3 * forward}, "TFLOP/s")


def linear_cross_entropy(s: Setting) -> Op:
    targets = s.targets()
    kernel = partial(ours.linear_cross_entropy, targets=targets)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return mean_loss(F.linear(x, weight), targets)

    contenders = [
        Contender("fastgpt", kernel),
        in_place(kernel, torch.zeros(s.V, s.C, device=s.device)),
        Contender("eager", eager),
        Contender("torch.compile", torch.compile(eager, dynamic=False)),
    ]
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        theirs = partial(F.linear_cross_entropy, target=targets, ignore_index=-1)
        contenders.append(Contender("F.linear_cross_entropy", theirs))
        if s.device.type == "cuda":  # saves memory; on a CPU it takes many times as long as all others together
            chunked = partial(theirs, options=torch.nn.LinearCrossEntropyOptions())
            contenders.append(Contender("F.linear_cross_entropy chunks", chunked))
    inputs = [s.leaf(s.B * s.T, s.C), s.leaf(s.V, s.C, scale=0.02)]
    forward = 2.0 * s.B * s.T * s.C * s.V
    return Op(inputs, [None], contenders, "eager", {"fwd": forward, "fwd+bwd": 3 * forward}, "TFLOP/s")


def gpt2_shapes(L: int, V: int, T: int, C: int) -> list[tuple[int, ...]]:
    """GPT-2's parameters, matrices before vectors; 124,475,904 numbers at L 12, V 50304, T 1024, C 768."""
    block: list[tuple[int, ...]] = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (3 * C,), (4 * C,), *[(C,)] * 6]
    return sorted([(V, C), (T, C), *block * L, (C,), (C,)], key=len, reverse=True)


def adamw(s: Setting, flat: bool = False, dtype: torch.dtype = torch.float32) -> Op:
    """Clip to norm 1, update the parameters, copy them to bf16 if they are fp32, zero the gradients."""
    shapes = gpt2_shapes(s.adamw_L, s.adamw_V, s.T, s.C)
    n_decayed = sum(len(shape) > 1 for shape in shapes)
    if flat:
        shapes = [(sum(map(math.prod, part)),) for part in (shapes[:n_decayed], shapes[n_decayed:])]
        n_decayed = 1
    first, drawn = ([0.02 * torch.randn(shape, device=s.device, dtype=dtype) for shape in shapes] for _ in range(2))
    params, grads = ([torch.zeros_like(p) for p in first] for _ in range(2))
    copied = params if dtype == torch.float32 else []
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in copied]
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def optimizer(kind: Function, **options: Any) -> Any:
        groups = {0.1: params[:n_decayed], 0.0: params[n_decayed:]}
        parameters = [{"params": part, "weight_decay": decay} for decay, part in groups.items()]
        return kind(parameters, lr=1e-3, betas=(0.9, 0.95), **options)

    fused = optimizer(ours.FusedAdamW, max_grad_norm=1.0, copies=dict(zip(copied, copies, strict=True)))
    plain = optimizer(torch.optim.AdamW, fused=True)
    fused.step()  # makes the state, which the two share
    plain.state.update({p: fused.state[p] for p in params})

    def before() -> None:
        """The tenth step, with moments such as nine before it could have left."""
        torch._foreach_copy_(params, first)
        torch._foreach_copy_(grads, drawn)
        for p, g in zip(params, drawn, strict=True):
            fused.state[p]["step"].data.fill_(9.0)  # past autograd, or FusedAdamW would wait for it to count anew
            fused.state[p]["exp_avg"].copy_(g)
            torch.mul(g, g, out=fused.state[p]["exp_avg_sq"])

    def kernel() -> list[Tensor]:
        fused.step(zero_grad=True)
        return params + copies + grads

    def peer() -> list[Tensor]:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        plain.step()
        if copies:
            torch._foreach_copy_(copies, params)
        torch._foreach_zero_(grads)
        return params + copies + grads

    contenders = [
        Contender("fastgpt", kernel),
        Contender(f"torch fused, clip, {'copy, ' * bool(copies)}zero", peer),
        Contender("torch fused, step only", plain.step, whole=False),
    ]
    # numbers a parameter: 1 for the norm; 4 read and 3 written by the update; 1 for the zero. And 2 bytes for the copy
    work = {"step": (9.0 * dtype.itemsize + 2.0 * bool(copies)) * sum(p.numel() for p in params)}
    return Op([], [], contenders, contenders[1].name, work, "GB/s", before=before)


# Name: how to build it, and the most rounds that it is timed for.
OPS: dict[str, tuple[Callable[[Setting], Op], int]] = {
    "attention_qkv": (attention_qkv, 100),
    "attention_qkv_d32": (partial(attention_qkv, head_size=32), 30),
    "attention_qkv_d128": (partial(attention_qkv, head_size=128), 30),
    "attention_qkv_dropout": (partial(attention_qkv, dropout_p=0.1), 30),
    "attention": (attention, 100),
    "layer_norm": (layer_norm, 100),
    "add_layer_norm": (add_layer_norm, 100),
    "gelu": (gelu, 100),
    "gelu_bias": (partial(gelu, with_bias=True), 100),
    "cross_entropy": (cross_entropy, 100),
    "linear": (linear, 100),
    "linear_cross_entropy": (linear_cross_entropy, 100),
    "adamw_flat": (partial(adamw, flat=True), 50),
    "adamw_list": (adamw, 50),
    "adamw_bf16": (partial(adamw, dtype=torch.bfloat16), 50),
}


# ---- the check ----


def evaluate(function: Function, inputs: Sequence[Tensor], douts: Sequence[Tensor | None], backward: bool) -> list[Any]:
    """Outputs, and after them the gradients of the inputs if there is a backward."""
    with torch.set_grad_enabled(backward):
        outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, douts, allow_unused=True) if backward else ())


def copies_of(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]


def true_results(op: Op, dtype: torch.dtype) -> list[Tensor]:
    """The eager computation on operands widened to fp32, or to fp64 if they are fp32; an optimizer's as it is."""
    eager = next(c.function for c in op.contenders if c.name == op.eager)
    if not op.inputs:
        op.before()
        return [t.clone() for t in eager()]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    douts = [None if d is None else d.to(wide) for d in op.douts]
    return [t.detach() for t in evaluate(eager, copies_of(op.inputs, wide), douts, backward=True)]


def errors_of(contender: Contender, op: Op, truth: Sequence[Tensor], backward: bool) -> list[tuple[float, float]]:
    """Each result's largest error, and the rounding of its dtype, as parts of its largest true value."""
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


def check(op: Op, backward: bool, truth: Sequence[Tensor]) -> dict[str, Row]:
    """By contender: ``status``, which is ``right``, ``wrong: why`` or ``skipped: why``, and its ``errors``."""
    found: dict[str, Row] = {}
    allowed: list[float] = []
    for contender in sorted(op.contenders, key=lambda c: c.name != op.eager):
        outcome: Row = {"status": "right", "errors": None}
        found[contender.name] = outcome
        if op.random or not contender.whole:
            continue
        try:
            errors = errors_of(contender, op, truth, backward)
        except Exception as error:
            outcome["status"] = skipped(error)
            continue
        outcome["errors"] = [e for e, _ in errors]
        # eager comes first; an error of its that is less than a rounding is luck
        allowed = allowed or [WRONG * max(pair) for pair in errors]
        bad = [(e, limit) for (e, _), limit in zip(errors, allowed, strict=True) if not e <= limit]  # a NaN is bad
        if bad:
            outcome["status"] = "wrong: error {:.1e}, at most {:.1e} allowed".format(*bad[0])
    return found


def skipped(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"skipped: {type(error).__name__}: {lines[0] if lines else ''}"[:160]


# ---- the measurement ----


def measure(op: Op, timer: Timer, dtype: torch.dtype, rounds: tuple[int, int], seconds: float) -> list[Row]:
    """A row for each pass and contender."""
    deadline = time.perf_counter() + seconds
    truth = [] if op.random else true_results(op, dtype)
    checked = {name: check(op, name == "fwd+bwd", truth) for name in op.work}
    del truth
    size = sum(t.numel() * t.element_size() for t in op.inputs)
    n_sets = min(16, 1 + timer.cache_bytes // size) if size else 1
    input_sets = [op.inputs] + [copies_of(op.inputs) for _ in range(n_sets - 1)]

    def calls(function: Function, backward: bool) -> None:
        for inputs in input_sets:
            evaluate(function, inputs, op.douts, backward)

    rows = []
    for n_left, (name, work) in zip(range(len(op.work), 0, -1), op.work.items(), strict=True):
        units = {}
        for contender in op.contenders:
            outcome = checked[name][contender.name]
            if outcome["status"] == "right":
                unit = Unit(partial(calls, contender.function, name == "fwd+bwd"), n_sets, op.before)
                try:
                    timer.warm_up(unit)
                    units[contender.name] = unit
                except Exception as error:
                    outcome["status"] = skipped(error)
        times = interleave(units, timer, (deadline - time.perf_counter()) / n_left, rounds)
        for c in op.contenders:
            row = {"pass": name, "contender": c.name, "ours": c.name.startswith("fastgpt"), "whole": c.whole}
            row |= checked[name][c.name]
            got = times.get(c.name)
            if isinstance(got, Exception):
                row["status"] = skipped(got)
            elif got:
                row |= figures(got, units[c.name], work, op.unit)
            rows.append(row)
    return rows


def figures(times: Sequence[float], unit: Unit, work: float, rate_unit: str) -> Row:
    """What a row says of a contender that was timed; ``times`` are milliseconds a call."""
    rate = work / (median(times) * 1e-3) / (1e12 if rate_unit == "TFLOP/s" else 1e9)
    first, _, third = quantiles(times, n=4)
    return {
        "status": "timed",
        "median_ms": median(times),
        "quartiles_ms": [first, third],
        "rate": rate,
        "unit": rate_unit,
        "host_ms": None if unit.host_ms is None else unit.host_ms / unit.calls,
        "peak_mib": None if unit.peak_bytes is None else unit.peak_bytes / 2**20,
        "calls_per_round": unit.calls,
        "rounds_ms": list(times),
    }


def benchmark(
    names: Sequence[str], setting: Setting, timer: Timer, seconds: float, note: Callable[[list[Row]], None]
) -> list[Row]:
    """The rows of all ops; one that cannot even be set up is a row of its own. ``note`` gets those so far."""
    deadline = time.perf_counter() + seconds
    fewest_rounds = 3 if setting.device.type == "cpu" else 20
    rows: list[Row] = []
    for n_left, name in zip(range(len(names), 0, -1), names, strict=True):
        print(f"measuring {name}", file=sys.stderr, flush=True)
        build, most_rounds = OPS[name]
        share = (deadline - time.perf_counter()) / n_left
        try:
            torch.manual_seed(0)
            if setting.device.type == "cuda":  # this op's memory may be what the last one's still holds
                gc.collect()
                torch.cuda.empty_cache()
            new = measure(build(setting), timer, setting.dtype, (fewest_rounds, most_rounds), share)
        except Exception as error:
            new = [{"pass": "all", "contender": "all", "ours": True, "whole": True, "status": skipped(error)}]
        rows += [{"op": name, **row} for row in new]
        note(rows)
        torch.compiler.reset()  # compiled code keeps its op's tensors alive
    return rows


def ceilings_of(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """GEMM rate and copy bandwidth; on a GPU at sizes beside which launching, and waiting for the end, are short."""
    size, megabytes = (2048, 256) if device.type == "cpu" else (8192, 2048)
    gemm, copy = measure_gemm_peak(device, dtype, size), measure_bandwidth(device, megabytes)
    return {"TFLOP/s": gemm / 1e12, "GB/s": copy / 1e9}


def parse(argv: Sequence[str] | None) -> tuple[Any, Setting]:
    """The flags, and the setting that they ask for."""
    parser = Parser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default bfloat16; on a CPU float32"
    )
    parser.add_argument("--batch_size", type=int, help="sequences; default 8, on a CPU 1")
    parser.add_argument("--block_size", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--seconds", type=float, default=150.0, help="for everything; a few rounds are run in any case")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)
    cpu = device.type == "cpu"
    batch_size = (1 if cpu else 8) if flags.batch_size is None else flags.batch_size
    if batch_size < 1 or flags.block_size < 1:
        raise RequestError("--batch_size and --block_size are at least 1")
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
    folder = flags.out or results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = ceilings_of(device, dtype)
    record: Row = {
        **provenance("bench.kernels", argv, device),
        "shapes": {name: size for name, size in vars(setting).items() if isinstance(size, int)},
        "dtype": str(dtype).removeprefix("torch."),
    }
    record["environment"]["backend"] = " ".join(backend_of(device, dtype))
    stem = folder / f"kernels-{record['dtype']}{conditions(device)}"

    def note(rows: list[Row]) -> None:
        for row in rows:
            row["share_of_ceiling"] = row["rate"] / ceilings[row["unit"]] if row["status"] == "timed" else None
        record.update(rows=rows, ceilings=ceilings, summary=summarise(rows), seconds=time.perf_counter() - start)
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(record))

    timer: Timer = CPUTimer() if device.type == "cpu" else CUDATimer(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend of sdpa that cannot run says why, at length
        left = flags.seconds - (time.perf_counter() - start)
        rows = benchmark(flags.ops, setting, timer, left, note)
    try:
        after = ceilings_of(device, dtype)
    except RuntimeError:  # a kernel that strayed has ended all use of the GPU; what is known is written all the same
        after = ceilings
    ceilings = {unit: max(ceilings[unit], after[unit]) for unit in ceilings}
    note(rows)
    print(f"{stem}.json, {stem.name}.md: {record['environment']['device']}, {record['seconds']:.0f} s\n")
    print(table(record["summary"]))
    return int(any(row["ours"] and row["status"] != "timed" for row in rows))


if __name__ == "__main__":
    run(main)
