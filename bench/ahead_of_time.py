"""Compiles every Triton kernel in every shipped configuration for five architectures, without a GPU.

    python -m bench.ahead_of_time                     # what has changed; writes bench/results/ahead_of_time/
    python -m bench.ahead_of_time --all               # what has not changed as well
    python -m bench.ahead_of_time --arch 89 --only attention
    python -m bench.ahead_of_time --arch 89 --only attention --try BLOCK_M=64,128 num_warps=4,8

Operators are called on tensors without data, at GPT-2 124M's shapes. Each launch is compiled by the same code as on a
GPU. The result is then read: registers, shared memory, spills, instructions by pipe in the inner loops, and a lower
bound on the time (bench/bounds.py).
"""

import argparse
import datetime
import hashlib
import inspect
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench import bounds, sass
from bench.bounds import GPUS, blocks_per_sm, bound
from fastgpt import limits
from fastgpt.kernels.ops import GELU_EXACT, GELU_TANH, SILU
from fastgpt.kernels.triton import IMPLEMENTATIONS as OPS
from fastgpt.kernels.triton import launch

RESULTS = Path(__file__).parent / "results" / "ahead_of_time"
RECORD = RESULTS / "rows.json"  # written by main: rows by case and architecture, with a digest of their sources
SAMPLE = 4  # unchanged cases that are compiled all the same, to check the record; different ones every day

B, T, C, V = 8, 1024, 768, 50304  # GPT-2 124M; the micro-batch of a 12 GB card
PARAMETERS = 124_475_904  # with T 1024 and the vocabulary padded to V


@dataclass(frozen=True)
class Row:
    """One kernel, one configuration, one architecture.

    Attributes:
        kernel: file and function.
        case: dtype and shape.
        config: block sizes, warps, stages.
        stack: bytes of local memory per thread; more than 0 means spills.
        serialised: whether Hopper's asynchronous products wait for each other.
        loops: instructions by pipe, for each innermost loop.
        bounds: microseconds that each resource alone would need; empty if the work is not stated.
    """

    kernel: str
    case: str
    arch: int
    config: dict[str, int]
    registers: int
    shared: int
    stack: int
    blocks_per_sm: int
    has_dot: bool
    tensor: int
    serialised: bool
    loops: list[dict[str, int]]
    bounds: dict[str, float]


# ---- what is compiled ----


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(D: int, dtype: torch.dtype, causal: bool = True, dropout_p: float = 0.0) -> None:
    H = C // D
    qkv = _empty(B, T, 3 * H * D, dtype=dtype)
    seed = _empty(dtype=torch.int64) if dropout_p else None
    out, lse = OPS["attention_qkv"](qkv, H, causal, D**-0.5, dropout_p, seed)
    for deterministic in (True, False):
        OPS["attention_qkv_backward"](out, qkv, out, lse, H, causal, D**-0.5, dropout_p, seed, deterministic)


def _attention_of_later_queries(D: int, dtype: torch.dtype) -> None:
    """The last quarter of the positions, as when a prompt is read in pieces."""
    q, k = (_empty(B, C // D, n, D, dtype=dtype) for n in (T // 4, T))
    out, lse = OPS["attention"](q, k, k, True, D**-0.5, 0.0, None)
    for deterministic in (True, False):
        OPS["attention_backward"](out, q, k, k, out, lse, True, D**-0.5, 0.0, None, deterministic)


def _attention_of_shared_keys(D: int, window: int = 0, softcap: float = 0.0, documents: bool = False) -> None:
    """Three heads of queries read one of keys."""
    H = C // D
    qkv, scores = _empty(B, T, (H + 2 * (H // 3)) * D), (window, softcap, None)
    if documents:
        scores = (window, softcap, _empty(B, 2, T, dtype=torch.int32))
    out, lse = OPS["attention_qkv"](qkv, H, True, D**-0.5, 0.0, None, H // 3, *scores)
    for deterministic in (True, False):
        OPS["attention_qkv_backward"](
            out, qkv, out, lse, H, True, D**-0.5, 0.0, None, deterministic, H // 3, *scores
        )  # fmt: skip


def _layer_norm(width: int) -> None:
    """With all optional arguments: residual, bias, gradient of the sum."""
    x, w = _empty(B, T, width), _empty(width)
    _, _, mean, rstd = OPS["add_layer_norm"](x, x, w, w, 1e-5)
    OPS["layer_norm_backward"](x, x, x, w, mean, rstd, True)
    main_grad = _empty(width, dtype=torch.float32)
    OPS["layer_norm_backward"](x, x, x, w, mean, rstd, True, main_grad, main_grad, main_grad)


def _rms_norm(width: int) -> None:
    """With all optional arguments, and with none."""
    x, w = _empty(B, T, width), _empty(width)
    _, _, rstd = OPS["add_rms_norm"](x, x, w, 1e-6)
    OPS["rms_norm_backward"](x, x, x, w, rstd, _empty(width, dtype=torch.float32))
    OPS["rms_norm"](x, None, 1e-6)
    OPS["rms_norm_backward"](x, None, x, None, rstd)


def _gelu(with_bias: bool, tanh: bool, again: bool = False) -> None:
    x, bias = _empty(B, T, 4 * C), _empty(4 * C) if with_bias else None
    main_grad = _empty(4 * C, dtype=torch.float32) if with_bias else None
    if again:
        OPS["gelu_backward_recompute_"](x, x, bias, tanh, main_grad)
    else:
        OPS["gelu"](x, bias, tanh)
        OPS["gelu_backward"](x, x, bias, tanh)


def _rotary(D: int, dtype: torch.dtype = torch.bfloat16, interleaved: bool = False) -> None:
    """A norm with a weight; without one, in place on the q and k of packed heads, where they are also turned alone."""
    H, angles = C // D, [_empty(T, D // 2, dtype=torch.float32)] * 2
    x, weight = _empty(B, T, H, D, dtype=dtype), _empty(D, dtype=dtype)
    heads = _empty(B, T, 3 * C, dtype=dtype).unflatten(2, (3 * H, D))[:, :, : 2 * H]
    _, rstd = OPS["rms_norm_rotary"](x, weight, *angles, 1e-6, interleaved)
    OPS["rms_norm_rotary_backward"](x, x, weight, *angles, rstd, interleaved, _empty(D, dtype=torch.float32))
    scales = OPS["rms_norm_rotary_"](heads, *angles, 1e-6, interleaved)
    OPS["rms_norm_rotary_backward_"](heads, heads, *angles, scales, interleaved)
    OPS["rotary_"](heads, *angles, interleaved, False)


def _rotary_qkv(D: int, turns: bool = True) -> None:
    """Packed, with a norm."""
    H, angles = C // D, [_empty(T, D // 2, dtype=torch.float32) if turns else None] * 2
    qkv = _empty(B, T, 3 * C)
    out, scales = OPS["rotary_qkv"](qkv, H, H, *angles, True, 1e-6, False)
    OPS["rotary_qkv_backward"](qkv, out, scales, H, H, *angles, False)


def _relu2() -> None:
    x = _empty(B, T, 4 * C)
    OPS["relu2"](x)
    OPS["relu2_backward"](x, x)
    OPS["relu2_backward_recompute_"](x, x)


def _glu(activation: int) -> None:
    """Of a packed tensor and, at a width that leaves no part of it aligned, of two."""
    H = 8 * C // 3
    packed, y = _empty(B, T, 2 * H), _empty(B, T, H)
    for gate, up in (packed.split(H, -1), (_empty(B, T, H + 1)[..., 1:], y)):
        OPS["glu"](gate, up, activation)
        for again in (None, y):
            OPS["glu_backward_"](*_empty(B, T, 2 * H).split(H, -1), y, gate, up, activation, again)


def _bias_gradient(rows: int, columns: int) -> None:
    OPS["add_column_sums_"](_empty(columns, dtype=torch.float32), _empty(rows, columns))


def _embedding(rows: int, columns: int) -> None:
    main_grad, index = _empty(V, columns, dtype=torch.float32), _empty(rows, dtype=torch.int64)
    OPS["embedding_backward_"](main_grad, _empty(rows, columns), index)


def _cross_entropy(
    rows: int, classes: int, softcap: float = 0.0, z_loss: float = 0.0, smoothing: float = 0.0, weighted: bool = False
) -> None:
    """With options, each row's loss has a gradient of its own where the logits are overwritten."""
    logits, targets, each = _empty(rows, classes), _empty(rows, dtype=torch.int64), _empty(rows, dtype=torch.float32)
    weight = _empty(classes, dtype=torch.float32) if weighted else None
    options = softcap, z_loss, smoothing, weight
    OPS["cross_entropy"](logits, targets, -1, *options)
    OPS["cross_entropy_backward"](each, logits, targets, each, -1, *options)
    OPS["cross_entropy_"](logits, targets, each if any(options[:3]) else _empty(dtype=torch.float32), -1, *options)


def _adamw(parameters: int = PARAMETERS) -> None:
    flat, copy = _empty(parameters, dtype=torch.float32), _empty(parameters)
    scalar = _empty(dtype=torch.float32)
    norm = OPS["grad_norm"]([flat])
    OPS["adamw_"]([flat], [flat], [flat], [flat], [copy], scalar, scalar, norm, 0.9, 0.95, 1e-8, 0.1, True, scalar)


def _adamw_8bit() -> None:
    """With 8-bit moments and bf16 parameters that are rounded stochastically."""
    flat, codes = _empty(PARAMETERS), _empty(PARAMETERS, dtype=torch.uint8)
    scales, scalar = _empty(-(-PARAMETERS // 256), dtype=torch.float32), _empty(dtype=torch.float32)
    OPS["adamw_8bit_"](
        [flat], [flat], [codes], [codes], [scales], [scales], [], scalar, scalar, scalar, _empty(dtype=torch.int64),
        0.9, 0.95, 1e-8, 0.1, True, True, scalar,
    )  # fmt: skip


BF16, FP32 = torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    **{f"attention bf16 D{D}": lambda D=D: _attention(D, BF16) for D in (32, 64, 96, 128, 256)},
    **{f"attention fp32 D{D}": lambda D=D: _attention(D, FP32) for D in (32, 64, 128)},
    **{f"attention bf16 D{D}, copied": lambda D=D: _attention(D, BF16) for D in (40, 72, 200)},
    "attention bf16 D64 later queries": lambda: _attention_of_later_queries(64, BF16),
    "attention fp32 D64 later queries": lambda: _attention_of_later_queries(64, FP32),
    "attention bf16 D64 full": lambda: _attention(64, BF16, causal=False),
    **{f"attention bf16 D{D} shared": lambda D=D: _attention_of_shared_keys(D) for D in (64, 128)},
    **{f"attention bf16 D{D} window": lambda D=D: _attention_of_shared_keys(D, window=256) for D in (64, 128)},
    **{
        f"attention bf16 D{D} local": lambda D=D: _attention_of_shared_keys(D, 256, 50.0, documents=True)
        for D in (64, 128)
    },
    **{f"attention bf16 D{D} dropout": lambda D=D: _attention(D, BF16, dropout_p=0.1) for D in (32, 64, 128, 256)},
    **{f"attention fp32 D{D} dropout": lambda D=D: _attention(D, FP32, dropout_p=0.1) for D in (32, 64, 128)},
    **{f"layer_norm bf16 C{w}": lambda w=w: _layer_norm(w) for w in (64, 128, 256, 512, 768, 1600, 4096, 8192)},
    **{f"rms_norm bf16 C{w}": lambda w=w: _rms_norm(w) for w in (64, 128, 256, 512, 768, 1600, 4096, 8192)},
    "gelu bf16 tanh": lambda: _gelu(False, True),
    "gelu bf16 exact": lambda: _gelu(False, False),
    "gelu bf16 bias": lambda: _gelu(True, True),
    "gelu bf16 tanh again": lambda: _gelu(False, True, again=True),
    "gelu bf16 exact again": lambda: _gelu(False, False, again=True),
    "gelu bf16 bias again": lambda: _gelu(True, True, again=True),
    **{f"rotary bf16 D{D}": lambda D=D: _rotary(D) for D in (32, 64, 128, 256)},
    "rotary fp32 D128": lambda: _rotary(128, FP32),
    **{f"rotary bf16 D{D} interleaved": lambda D=D: _rotary(D, interleaved=True) for D in (64, 256)},
    "rotary fp32 D128 interleaved": lambda: _rotary(128, FP32, interleaved=True),
    "rotary bf16 D64 packed": lambda: _rotary_qkv(64),
    "rotary bf16 D96 packed, norm alone": lambda: _rotary_qkv(96, turns=False),
    "relu2 bf16": _relu2,
    "glu bf16 silu": lambda: _glu(SILU),
    "glu bf16 gelu tanh": lambda: _glu(GELU_TANH),
    "glu bf16 gelu exact": lambda: _glu(GELU_EXACT),
    "linear bf16 bias": lambda: _bias_gradient(B * T, 3 * C),
    "linear bf16 bias, few rows": lambda: _bias_gradient(B, T * C),
    "embedding bf16": lambda: _embedding(B * T, C),
    f"cross_entropy bf16 V{V}": lambda: _cross_entropy(4096, V),
    "cross_entropy bf16 V65": lambda: _cross_entropy(4096, 65),
    f"cross_entropy bf16 V{V} capped, z-loss": lambda: _cross_entropy(4096, V, 30.0, 1e-4),
    f"cross_entropy bf16 V{V} smoothed": lambda: _cross_entropy(4096, V, smoothing=0.1),
    f"cross_entropy bf16 V{V} weighted": lambda: _cross_entropy(4096, V, weighted=True),
    f"cross_entropy bf16 V{V} all options": lambda: _cross_entropy(4096, V, 30.0, 1e-4, 0.1, weighted=True),
    "cross_entropy bf16 V65 all options": lambda: _cross_entropy(4096, 65, 30.0, 1e-4, 0.1, weighted=True),
    "adamw fp32": _adamw,
    "adamw fp32 unaligned": lambda: _adamw(PARAMETERS + 1),
    "adamw_8bit 8-bit bf16": _adamw_8bit,
}


# ---- compiling ----


class _Driver:
    """A stand-in for a GPU's driver, which Triton asks only for the target."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device for each architecture, because Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def kernel_name(kernel: Any) -> str:
    """``attention dq`` for ``_dq_kernel`` in attention.py."""
    return f"{kernel.fn.__module__.rpartition('.')[2]} {kernel.fn.__name__.strip('_').removesuffix('_kernel')}"


def compile_case(name: str, arch: int, overrides: dict[str, int] | None = None) -> list[Row]:
    """Compile every kernel that a case launches for one architecture; ``overrides`` replace configured values."""
    gpu = GPUS[arch]
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    rows: list[Row] = []

    def compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        options |= {k: v for k, v in (overrides or {}).items() if k in options}
        compiled = kernel.warmup(*args, grid=grid, **options)
        machine = sass.read(compiled.asm["cubin"])
        config = {k: v for k, v in options.items() if k in CONFIGURED and not isinstance(v, bool)}
        shared, warps = compiled.metadata.shared, options.get("num_warps", 4)
        rows.append(
            Row(
                kernel=kernel_name(kernel),
                case=name,
                arch=arch,
                config=config,
                registers=machine.registers,
                shared=shared,
                stack=machine.stack,
                blocks_per_sm=blocks_per_sm(gpu, machine.registers, shared, warps),
                has_dot="tt.dot" in compiled.asm["ttir"],
                tensor=machine.count("tensor"),
                serialised=machine.serialised,
                loops=[dict(sass.pipes(loop)) for loop in machine.loops],
                bounds=bound(gpu, bounds.Launch(kernel_name(kernel), machine, grid, args, options)),
            )
        )

    with launch.ahead_of_time(_device(arch), compile):
        CASES[name]()
    unique = {(r.kernel, json.dumps(r.config), r.registers, r.shared): r for r in rows}
    return list(unique.values())


def _device(arch: int) -> launch.Device:
    """The card that stands for an architecture, as a launch sees it."""
    gpu = GPUS[arch]
    return launch.Device(gpu.name, arch, gpu.n_sm, gpu.shared_memory)


CONFIGURED = (
    "BLOCK_M", "BLOCK_N", "ROWS", "COLUMNS", "BLOCK", "BLOCK_C", "CHUNK", "BLOCK_SHARES", "BLOCK_COLUMNS",
    "BLOCKS", "POSITIONS", "HEADS", "num_warps", "num_stages",
)  # fmt: skip


def _attempt(job: tuple[str, int, dict[str, int]]) -> list[Row]:
    try:
        return compile_case(*job)
    except Exception as error:
        if not job[2]:
            raise
        print(f"{job}: {type(error).__name__}", file=sys.stderr)  # --try may combine values that do not work together
        return []


def compile_all(jobs: list[tuple[str, int, dict[str, int]]]) -> Iterator[Row]:
    """Compile on all cores; the rows are in the order of the jobs."""
    with ProcessPoolExecutor(limits.threads().amount, get_context("spawn")) as pool:
        for rows in pool.map(_attempt, jobs):
            yield from rows


# ---- the record of what was compiled ----


def digest(case: str, arch: int) -> str:
    """A digest of all that a case's rows depend on: Triton, what the case launches on ``arch``, and how it is read."""
    launches: list[Any] = []

    def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        # cache_key: Triton's own digest of a kernel's source and of all that it calls
        work_of = bounds.WORK.get(kernel_name(kernel).split()[0])
        launches.append((kernel_name(kernel), kernel.cache_key, grid, [_described(a) for a in args], options))
        launches.append(inspect.getsource(work_of) if work_of else None)

    with launch.ahead_of_time(_device(arch), note):
        CASES[case]()
    everything = [triton.__version__, GPUS[arch], launches, _reader()]
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


@cache
def _reader() -> list[Any]:
    """All that turns a launch into a row, but for ``bounds.WORK``: what one op's work is says nothing of another's."""
    works, of_bounds = set(bounds.WORK.values()), vars(bounds)
    functions = [f for f in of_bounds.values() if inspect.isfunction(f) and f not in works]
    constants = {name: of_bounds[name] for name in of_bounds if name.isupper() and name not in ("GPUS", "WORK", "GPU")}
    return [CONFIGURED, constants, *map(inspect.getsource, [*functions, Row, compile_case, sass])]


def _described(argument: Any) -> Any:
    """All of an argument that a kernel is compiled for, and its size."""
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape), argument.stride(), argument.storage_offset()
    return argument


def recorded() -> dict[tuple[str, int], list[Row]]:
    """The rows of the record, without those of which a source has changed."""
    if not RECORD.exists():
        return {}
    return {
        (r["case"], r["arch"]): [Row(case=r["case"], arch=r["arch"], **row) for row in r["rows"]]
        for r in json.loads(RECORD.read_text())
        if r["case"] in CASES and r["digest"] == digest(r["case"], r["arch"])
    }


def record(rows: list[Row]) -> None:
    """Write rows, which :func:`recorded` reads."""
    entries = [
        {"case": case, "arch": arch, "digest": digest(case, arch), "rows": [_without_key(row) for row in group]}
        for (case, arch), group in itertools.groupby(rows, key=lambda row: (row.case, row.arch))
    ]
    RECORD.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


def _without_key(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in ("case", "arch")}


def changed_and_sample(jobs: list[tuple[str, int, dict[str, int]]]) -> list[Row]:
    """All rows of the jobs. Only those with a changed source are compiled, and a sample that differs from day to day.

    Raises:
        SystemExit: a row of the sample differs from the record.
    """
    known = recorded()
    unchanged = [job for job in jobs if job[:2] in known]
    sample = random.Random(datetime.date.today().isoformat()).sample(unchanged, min(SAMPLE, len(unchanged)))
    compiled: dict[tuple[str, int], list[Row]] = {}
    for row in compile_all([job for job in jobs if job[:2] not in known or job in sample]):
        compiled.setdefault((row.case, row.arch), []).append(row)
    for case, arch, _ in sample:
        if list(map(asdict, compiled[case, arch])) != list(map(asdict, known[case, arch])):
            sys.exit(f"error: '{case}' on sm_{arch} now compiles to something other than {RECORD.name} says")
    return [row for job in jobs for row in (known | compiled)[job[:2]]]


# ---- the table ----


def table(rows: list[Row]) -> str:
    """A Markdown table with a row for each kernel, in a fixed order, so that two versions can be compared."""
    head = (
        "| kernel | case | configuration | registers | shared, bytes | spills, bytes | blocks per SM |"
        " inner loops: tensor/special/memory/other | bound, us |\n"
        "|---|---|---|--:|--:|--:|--:|---|---|\n"
    )
    return head + "".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    config = " ".join(f"{k.removeprefix('num_')} {v}" for k, v in row.config.items())
    loops = ", ".join(
        "/".join(str(loop.get(p, 0)) for p in ("tensor", "special", "memory", "other")) for loop in row.loops
    )
    bounds = " ".join(f"{name} {us:.0f}" for name, us in row.bounds.items())
    return (
        f"| {row.kernel} | {row.case} | {config} | {row.registers} | {row.shared} | {row.stack} |"
        f" {row.blocks_per_sm} | {loops or '-'} | {bounds or '-'} |\n"
    )


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.ahead_of_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(GPUS), default=sorted(GPUS))
    parser.add_argument("--only", default="", help="only cases with names that start with this")
    parser.add_argument(
        "--try", nargs="+", default=[], dest="values", metavar="NAME=V,V", help="values to use instead of the shipped"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file, and no tables")
    parser.add_argument(
        "--all", action="store_true", help="compile all, not only what has changed since the last record, and a sample"
    )
    request = parser.parse_args()
    names = [name for name in CASES if name.startswith(request.only)]
    options = {name: map(int, values.split(",")) for name, values in (v.split("=") for v in request.values)}
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    jobs = [(name, arch, tried) for arch in request.arch for name in names for tried in combinations]
    # the record is of the shipped configurations, which --try replaces
    rows = list(compile_all(jobs)) if request.all or request.values else changed_and_sample(jobs)
    if request.json:
        request.json.write_text(json.dumps([asdict(row) for row in rows]))
        return
    for arch in request.arch:
        text = table([row for row in rows if row.arch == arch])
        if request.values or request.only:
            print(text)
            continue
        RESULTS.mkdir(parents=True, exist_ok=True)
        gpu = GPUS[arch]
        heading = f"# sm_{arch}, Triton {triton.__version__}\n\n{_explanation(gpu.name)}\n\n"
        (RESULTS / f"sm_{arch}.md").write_text(heading + text)
        print(f"bench/results/ahead_of_time/sm_{arch}.md: {sum(r.arch == arch for r in rows)} kernels")
    if not (request.values or request.only) and request.arch == sorted(GPUS):
        record(rows)


def _explanation(name: str) -> str:
    return (
        "What the compiler made of every kernel in every shipped configuration, at GPT-2 124M's shapes (B 8, T 1024)\n"
        "unless the case says otherwise; written by `python -m bench.ahead_of_time`, no GPU involved. Bounds are\n"
        f"predicted for {name} by bench/bounds.py, not measured."
    )


if __name__ == "__main__":
    main()
