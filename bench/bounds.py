"""Lower bounds on a kernel's time from its machine code and the bytes it moves: a prediction, not a measurement.

There are four resources: the tensor cores, the special-function units, the issue of instructions, and the memory. Each
is treated as if it were never idle and nothing else took time. A kernel cannot be faster than the slowest of them. Of
two configurations, try the one with the lower bound first. Loads and stores through shared memory count as issue slots
in proportion to their width. Atomic additions count as stores, because NVIDIA does not document the rate at which L2
adds. So kernels with atomics may be further from their bound than others.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.sass import Instruction, Machine
from fastgpt import gpus
from fastgpt.gpus import GPU

# One card for each architecture.
GPUS = {
    gpu.capability: gpu
    for gpu in (
        gpus.GPUS["NVIDIA A100-SXM4-40GB"],
        gpus.GPUS["NVIDIA GeForce RTX 3090"],
        gpus.GPUS["NVIDIA GeForce RTX 4070"],
        gpus.GPUS["NVIDIA H100 80GB HBM3"],
        gpus.GPUS["NVIDIA GeForce RTX 5070"],
    )
}

# Limits of an SM, from NVIDIA's CUDA programming guide, table of compute capabilities.
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 120: 1536}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 120: 24}
SPECIAL = 16  # results of special functions a cycle
REGISTERS_PER_SM = 65536
RESERVED_SHARED = 1024  # bytes that the system takes in each block; an SM has that much more than a block may use


def blocks_per_sm(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """The number of blocks of a kernel that an SM holds at the same time."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
    return min(
        BLOCKS[gpu.capability],
        THREADS[gpu.capability] // (32 * warps),
        REGISTERS_PER_SM // (per_warp * warps),
        (gpu.shared_memory + RESERVED_SHARED) // (shared + RESERVED_SHARED),
    )


class Launch(NamedTuple):
    """A kernel, what it was compiled to, and what it is given."""

    kernel: str  # file and function
    machine: Machine
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """How many there are."""
        return math.prod(self.grid)


# The instructions of one repeat, the number of repeats in the whole launch, and the bytes that must be moved.
Work = tuple[list[Instruction], float, float]


def bound(gpu: GPU, launch: Launch) -> dict[str, float]:
    """Microseconds that each resource needs at least; empty for kernels that take no time in a training step."""
    work_of = WORK.get(launch.kernel.split()[0])
    work = work_of(launch) if work_of else None
    if work is None:
        return {}
    instructions, repeats, n_bytes = work
    warps = launch.options.get("num_warps", 4) * repeats
    per_second = gpu.n_sm * gpu.boost_mhz * 1e6
    flops = sum(_mma_flops(i) for i in instructions)
    special = 32 * sum(i.pipe == "special" for i in instructions)  # one result for each thread of a warp
    issue = sum(_issue_slots(i) for i in instructions)
    seconds = {
        "tensor": warps * flops / (gpu.flops_per_cycle * per_second),
        "special": warps * special / (SPECIAL * per_second),
        "issue": warps * issue / (4 * per_second),  # four schedulers an SM, one instruction a cycle each
        "memory": n_bytes / (gpu.bandwidth_gb_s * 1e9),
    }
    return {name: 1e6 * s for name, s in seconds.items() if s > 0.0}


def _attention(launch: Launch) -> Work | None:
    kernel, machine, grid, args, options = launch
    if kernel == "attention delta":
        out = args[0]
        return machine.code, launch.programs, out.numel() * (2 * out.element_size() + 4)
    if kernel == "attention round_dq":
        sums, dq = args[:2]
        return machine.code, launch.programs, sums.numel() * (4 + dq.element_size())
    # take the loop without a mask for both loops; the masked one has a compare and a select more for each element
    loops = [loop for loop in machine.loops if any(i.pipe == "tensor" for i in loop)]
    # the work is stated for as many keys as queries, of which causality alone hides some
    if not loops or not options["SQUARE"] or options["WINDOW"] or options["DOCUMENTS"] or options["GROUP"] > 1:
        return None
    # the number of tensors of the size of q, and further bytes per element of q: the sums of dq, in fp32, enter L2 once
    # and leave it once
    moved, besides = {"forward": (4, 0), "dq": (6, 0), "dk_dv": (6, 0), "single_pass": (6, 8)}[kernel.split()[1]]
    q = args[0]
    n_bytes = q.numel() * (moved * q.element_size() + besides)
    return min(loops, key=len), _tiles(kernel, q.shape, grid, options), n_bytes


def _norm(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    x = args[0]
    passes = {"forward": 2 + 2 * options.get("HAS_RESIDUAL", 0), "backward": 3 + options.get("HAS_DSUM", 0)}
    n_bytes = passes[kernel.split()[1]] * x.numel() * x.element_size()
    if kernel.endswith("forward"):
        return machine.code, launch.programs, n_bytes
    return _looped(machine), -(-x.shape[0] // options["ROWS"]), n_bytes


def _activation(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    x = args[0]
    n_bytes = (2 if "forward" in kernel else 3 + options["AGAIN"]) * x.numel() * x.element_size()
    if kernel == "gelu bias_backward":
        return _looped(machine), _blocks_of(x, options), n_bytes
    return machine.code, launch.programs, n_bytes


def _rotary(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    x = args[0]
    n_bytes = (2 if kernel == "rotary forward" else 3) * x.numel() * x.element_size()
    if kernel == "rotary backward":
        B, T, H, _ = x.shape
        return _looped(machine), B * -(-T // options["POSITIONS"]) * -(-H // options["HEADS"]), n_bytes
    return machine.code, launch.programs, n_bytes


def _glu(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    x = args[0]
    n_bytes = (3 if kernel == "glu forward" else 5 + options["AGAIN"]) * x.numel() * x.element_size()
    return machine.code, launch.programs, n_bytes


def _linear(launch: Launch) -> Work | None:
    x = launch.args[0]
    return _looped(launch.machine), _blocks_of(x, launch.options), x.numel() * x.element_size()


def _embedding(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    if kernel != "embedding runs":
        return None
    dy, _, _, main_grad = args[:4]
    n_tokens = min(main_grad.shape[0], dy.shape[0])  # at most, if all are different
    n_bytes = dy.numel() * dy.element_size() + 8 * n_tokens * dy.shape[1]
    return _looped(machine), dy.shape[0] * -(-dy.shape[1] // options["COLUMNS"]), n_bytes


def _cross_entropy(launch: Launch) -> Work | None:
    kernel, machine, _, args, options = launch
    logits = args[1] if kernel == "cross_entropy backward" else args[0]
    rows, classes = logits.shape
    n_bytes = (1 if kernel == "cross_entropy forward" else 2) * logits.numel() * logits.element_size()
    return _looped(machine), rows * -(-classes // options["BLOCK"]), n_bytes


def _adamw(launch: Launch) -> Work | None:
    kernel, machine, _, _, options = launch
    elements = launch.programs * options.get("CHUNK", 0)
    if kernel == "adamw squares":
        return _looped(machine), elements // options["BLOCK"], 4 * elements
    if kernel == "adamw compact":
        return machine.code, launch.programs, 10 * elements
    if kernel == "adamw adamw":
        # bytes per parameter: 4 fp32 read and 3 written, the bf16 copy, and the zeroed fp32 gradient
        return machine.code, launch.programs, (28 + 2 + 4) * elements
    return None


# By file of fastgpt/kernels/triton/, the work of its launches. One without work here takes no time in a training step.
WORK: dict[str, Callable[[Launch], Work | None]] = {
    "attention": _attention,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "gelu": _activation,
    "relu2": _activation,
    "glu": _glu,
    "rotary": _rotary,
    "linear": _linear,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
}


def _blocks_of(x: Any, options: dict[str, Any]) -> int:
    """The blocks of ROWS by COLUMNS that ``x``, (N, C), has."""
    return -(-x.shape[1] // options["COLUMNS"]) * -(-x.shape[0] // options["ROWS"])


def _looped(machine: Machine) -> list[Instruction]:
    """The instructions of all innermost loops; of the whole kernel if it has none."""
    return [i for loop in machine.loops for i in loop] or machine.code


def _tiles(kernel: str, shape: Any, grid: tuple[int, ...], options: dict[str, Any]) -> int:
    """The number of (BLOCK_M, BLOCK_N) tiles of scores that the launch computes."""
    B, H, T, _ = shape
    M, N = options["BLOCK_M"], options["BLOCK_N"]
    if not options["CAUSAL"]:
        return B * H * -(-T // M) * -(-T // N)
    # causal: only tiles with an element on or below the diagonal
    if kernel in ("attention dk_dv", "attention single_pass"):
        return B * H * sum(-(-(T - n // M * M) // M) for n in range(0, T, N))
    return B * H * sum(-(-min(m + M, T) // N) for m in range(0, T, M))


def _mma_flops(i: Instruction) -> int:
    """FLOPs of one warp's share of a matrix instruction, from the shape in its name."""
    if i.pipe != "tensor":
        return 0
    shape = i.opcode.split(".")[1]
    if shape.startswith("64x"):  # HGMMA: four warps together
        m, n, k = (int(s) for s in shape.split("x"))
        return 2 * m * n * k // 4
    m, k = {"16816": (16, 16), "1688": (16, 8), "1684": (16, 4), "16832": (16, 32)}[shape]
    return 2 * m * 8 * k * (2 if "TF32" in i.opcode else 1)  # tf32 runs at half the rate


def _issue_slots(i: Instruction) -> int:
    """Cycles of a scheduler. Shared memory and L1 deliver 32 words a cycle to an SM, which has four schedulers."""
    if i.pipe != "memory":
        return 1
    if ".128" in i.opcode or ".F32x4" in i.opcode or (i.opcode.startswith("LDSM") and i.opcode.endswith(".4")):
        return 16
    return 8 if ".64" in i.opcode or ".F32x2" in i.opcode or i.opcode.endswith(".2") else 4
