"""A model of the step: how long it takes, and what fits, on a device that need not be there.

The calls are those of ``account.py``. A matrix product takes what its tiles need, a wave of them as long as a whole
one, or what its bytes need, if that is more; attention a share of that rate; all else its bytes. Nothing overlaps.

Shares marked *assumed* come from what is commonly seen of cuBLAS and of attention kernels, not from a measurement of
ours; a device whose ceilings have been measured is predicted from those. ``errors`` tells how far off the model has
been wherever a step was measured, and belongs beside every prediction.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastgpt import hardware
from fastgpt.errors import RequestError
from fastgpt.gpus import GPU
from fastgpt.limits import Bound
from fastgpt.model import GPTConfig
from fastgpt.train.account import Account, Call, Setup, count
from fastgpt.train.config import AUTO, TrainConfig

MEASURED = Path(__file__).parent / "measured.json"  # by bench.mfu; copied from its records

# FLOP/s of a large product, as a share of the dense peak at the table's clock: what others have measured
# (bench/public_points.json). GeForce cards boost beyond that clock; data-centre cards are held back by their power.
GEMM_SHARE = {80: 0.84, 86: 1.03, 89: 1.03, 90: 0.8, 120: 1.05}
OTHER_GEMM_SHARE = 0.75  # with less power: 0.66 on an H100 PCIe, 0.74 on an L40S, 0.75 to 0.81 on an A100 PCIe
COPY_SHARE = 0.88  # of the memory's bandwidth, measured likewise
LAUNCH_SECONDS = 2e-6  # assumed, of the shortest kernel in a CUDA graph
HOST_SECONDS = 50e-6  # of a call on a CPU, beside its work; fitted, as below


@dataclass(frozen=True)
class Shares:
    """What of a device's ceilings the parts of a step get to.

    Attributes:
        product: of a large product's FLOP/s, products whose tiles fill the device.
        attention: of a large product's FLOP/s, attention.
        elementwise: of a copy's bandwidth, norms, GELU and the loss, which also compute.
    """

    product: float
    attention: float
    elementwise: float


GPU_SHARES = Shares(1.0, 0.6, 1.0)  # assumed
# Fitted to bench/results/amd-epyc-family-26-model-2-stepping-1-avx512-bf16/mfu-*.json, two cores: there the errors
# below are no test of them.
CPU_SHARES = Shares(0.87, 0.42, 0.27)

# Rows and columns of a product that one block computes, and the share of the best rate that it gets to. Assumed.
TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.95, (128, 64): 0.85, (64, 128): 0.85, (64, 64): 0.7}
SPLITS = (1, 2, 4, 8)  # of the inner dimension

MOST_SEQUENCES = 128  # of a micro-batch: beyond it nothing is won

# Bytes that CUDA's context, its libraries and their workspaces keep beside the tensors. Assumed.
CUDA_RESERVE = 700 << 20


# What a process on a CPU takes beside its tensors and beside what it held when free memory was read: a constant, and a
# share of what every step allocates and frees. The constant is PyTorch's compiler, which counting imports (150 MiB),
# pages of libraries touched at their first use (110), threads and the plot. The share is temporaries that the account
# does not see, such as oneDNN's copies of weights, and gaps in malloc's heap, which is never returned (memory.py).
# Measured on an Intel Xeon with AMX as VmHWM - VmRSS at first - the account's peak, in 14 runs of 2 to 6 layers of 128
# to 768, vocabularies of 256 and 50,257, fp32 and bf16: 239 MiB where 64 pass, 610 where 820 do, and always less than
# 320 + 0.5 times what passes, by 2 % at least. The constant is a tenth more for what was not measured: where a cgroup
# ends, the kernel kills, and nothing can be halved.
CPU_RESERVE = 352 << 20
CPU_GAPS = 0.5


@dataclass(frozen=True)
class Machine:
    """What a device does at best.

    Attributes:
        name: what its maker calls it.
        gemm: FLOP/s of a large matrix product in the training dtype.
        bandwidth: bytes a second of a large copy, read and write both counted.
        peak: dense peak, FLOP/s, for MFU; ``None`` where it is not known.
        memory: bytes; ``None`` for no limit.
        n_sm: streaming multiprocessors; ``None`` for a CPU.
    """

    name: str
    gemm: float
    bandwidth: float
    peak: float | None = None
    memory: int | None = None
    n_sm: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What the model says of a step; nothing here has been measured.

    Attributes:
        micro_step: seconds of a micro-batch's forward and backward, by kind of call.
        update: seconds of the optimizer.
        tokens: in a micro-batch.
        flops: of a micro-batch, as MFU counts them.
        peak: the machine's dense peak.
        memory: bytes that tensors hold at most.
        reserve: bytes that are taken beside the tensors.
    """

    micro_step: dict[str, float]
    update: float
    tokens: int
    flops: float
    peak: float | None
    memory: int
    reserve: int = 0

    @property
    def held(self) -> int:
        """Bytes that a step takes in all."""
        return self.memory + self.reserve

    def seconds(self, accumulation: int = 1) -> float:
        """Of an update of so many micro-batches."""
        return accumulation * sum(self.micro_step.values()) + self.update

    def tokens_per_second(self, accumulation: int = 1) -> float:
        """Training throughput."""
        return accumulation * self.tokens / self.seconds(accumulation)

    def mfu(self, accumulation: int = 1) -> float | None:
        """Share of the dense peak; ``None`` where that is not known."""
        return None if self.peak is None else accumulation * self.flops / self.seconds(accumulation) / self.peak


def machine(gpu: GPU, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """What a card of the table should do: the ceilings measured on one, or assumed shares of its figures."""
    peak = gpu.tflops(dtype)
    if peak is None:
        raise ValueError(f"gpu: the {gpu.name} has no {dtype}")
    fed = gpu.halved or (gpu.capability in (80, 90) and "PCI" not in gpu.name.upper())  # a GeForce, or a socket's card
    share = GEMM_SHARE.get(gpu.capability, OTHER_GEMM_SHARE) if fed else OTHER_GEMM_SHARE
    assumed = Machine(
        gpu.name, share * peak * 1e12, COPY_SHARE * gpu.bandwidth_gb_s * 1e9, peak * 1e12,
        int(gpu.memory_gb * 2**30), gpu.n_sm,
    )  # fmt: skip
    for row in measurements():
        if row["device"] == gpu.name and row["dtype"] == str(dtype).removeprefix("torch."):
            return replace(assumed, gemm=row["gemm_flops"], bandwidth=row["bandwidth"])
    return assumed


def at_hand(device: torch.device, dtype: torch.dtype) -> Machine:
    """This device: its row of the table, or where there is none what it takes a second to measure."""
    gpu = hardware.known_gpu(device)
    if gpu is not None and gpu.tflops(dtype) is not None:
        return machine(gpu, dtype)
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None
    gemm, bandwidth = hardware.gemm_ceiling(device, dtype), hardware.measure_bandwidth(device)
    return Machine(hardware.device_name(device), gemm, bandwidth, n_sm=n_sm)


def predict(setup: Setup, machine: Machine, account: Account | None = None) -> Prediction:
    """The time of a step on a machine."""
    account = account or count(setup)
    micro_step: dict[str, float] = {}
    for call in account.micro_step:
        micro_step[call.kind] = micro_step.get(call.kind, 0.0) + seconds(call, machine)
    flops = float(setup.model.flops_per_token) * setup.tokens
    update = sum(seconds(call, machine) for call in account.update)
    return Prediction(
        micro_step, update, setup.tokens, flops, machine.peak, account.peak, reserve(setup.device_type, account)
    )


def seconds(call: Call, machine: Machine) -> float:
    """What one call takes."""
    shares = CPU_SHARES if machine.n_sm is None else GPU_SHARES
    bandwidth = machine.bandwidth * (shares.elementwise if call.kind in ("norm", "GELU", "loss") else 1.0)
    if call.product is not None:
        computing = _product_seconds(call, machine) / shares.product
    else:
        computing = call.flops / (shares.attention * machine.gemm)
    work = max(computing, call.bytes / bandwidth)
    return work + HOST_SECONDS if machine.n_sm is None else max(work, LAUNCH_SECONDS)


def _product_seconds(call: Call, machine: Machine) -> float:
    if machine.n_sm is None or call.product is None:
        return call.flops / machine.gemm
    M, N, K = call.product
    fastest = math.inf
    for (rows, columns), share in TILES.items():
        tiles = math.ceil(M / rows) * math.ceil(N / columns)
        for split in SPLITS:
            waves = math.ceil(tiles * split / machine.n_sm)
            work = waves * 2.0 * rows * columns * math.ceil(K / split) * machine.n_sm
            partial_sums = 0 if split == 1 else 8.0 * split * M * N  # fp32, written and read
            fastest = min(fastest, work / (share * machine.gemm) + partial_sums / machine.bandwidth)
    return fastest


# ---- memory ----


def kinds_of_recompute(requested: str, device_type: str) -> tuple[str, ...]:
    """What ``--recompute`` leaves open, least first. On a CPU ``cheap`` costs no time, as memory is slow there."""
    if requested != "auto":
        return (requested,)
    return ("none", "cheap", "block") if device_type == "cuda" else ("cheap",)


def fits(setup: Setup, memory: int) -> bool:
    """Whether a step should fit so many bytes that are free."""
    account = count(setup)
    return account.peak + reserve(setup.device_type, account) <= memory


def least_recompute(setup: Setup, memory: int, kinds: Sequence[str]) -> str | None:
    """The first of these kinds with which the step fits; ``None`` if it does with none."""
    return next((kind for kind in kinds if fits(replace(setup, recompute=kind), memory)), None)


@dataclass(frozen=True)
class Choice:
    """A micro-batch for a device, with what is recomputed to make it fit.

    Attributes:
        batch_size: sequences, B.
        recompute: ``none``, ``cheap`` or ``block``.
        accumulation: micro-batches in an update.
        prediction: of its time and memory.
    """

    batch_size: int
    recompute: str
    accumulation: int
    prediction: Prediction


def choices(setup: Setup, machine: Machine, memory: int, total: int, kinds: Sequence[str]) -> list[Choice]:
    """Every micro-batch that fits and divides an update of ``total`` tokens, each with every kind of recomputation.

    Args:
        setup: its micro-batch and recomputation are ignored.
        machine: predicts by it.
        memory: bytes that there are.
        total: tokens of an update.
        kinds: of recomputation.
    """
    found = []
    sequences, rest = divmod(total, setup.model.block_size)
    for kind in kinds:
        for batch_size in [] if rest else _sizes(sequences):
            tried = replace(setup, batch_size=batch_size, recompute=kind)
            prediction = predict(tried, machine)
            if prediction.held > memory:
                break
            found.append(Choice(batch_size, kind, sequences // batch_size, prediction))
    return found


def _sizes(sequences: int) -> list[int]:
    """Micro-batches to try, ascending: every divisor up to 8, and of the others those that suit the tensor cores."""
    divisors = [n for n in range(1, min(sequences, MOST_SEQUENCES) + 1) if sequences % n == 0]
    return [n for n in divisors if n <= 8 or n % 8 == 0]


def choose(found: Sequence[Choice]) -> Choice | None:
    """The one that takes least memory among those within a hundredth of the fastest; ``None`` of none."""
    if not found:
        return None
    best = max(choice.prediction.tokens_per_second(choice.accumulation) for choice in found)
    near = [c for c in found if c.prediction.tokens_per_second(c.accumulation) >= 0.99 * best]
    return min(near, key=lambda choice: choice.prediction.memory)


def settle(config: TrainConfig, setup: Setup, memory: Bound, found: Sequence[Choice]) -> TrainConfig:
    """The request with what it leaves to the device: micro-batch, accumulation and recomputation.

    Args:
        config: its micro-batch is kept if it names one.
        setup: the model, device type, dtype and bits of the moments.
        memory: bytes that there are, and what limits them.
        found: what :func:`choices` found in it; needed only where the micro-batch is left open.

    Raises:
        RequestError: nothing fits, or no number of micro-batches makes the update exact.
    """
    if config.batch_size != AUTO:
        kinds = kinds_of_recompute(config.recompute, setup.device_type)
        asked = replace(setup, batch_size=config.batch_size)
        kind = kinds[0] if len(kinds) == 1 else least_recompute(asked, memory.amount, kinds)
        return replace(config, recompute=kind or kinds[-1])
    choice = choose(found)
    if choice is not None:
        return replace(config.with_batch_size(choice.batch_size), recompute=choice.recompute)
    if config.total_batch_size % config.block_size:
        config.with_batch_size(1)  # says what would be exact
    raise RequestError(
        f"not one sequence of {config.block_size} fits {memory.amount / 2**30:.1f} GiB ({memory.source}): "
        "--state_bits 8, --recompute block or a smaller model take less"
    )


def reserve(device_type: str, account: Account) -> int:
    """Bytes that a step takes beside its tensors, and beside what the process held before."""
    return CUDA_RESERVE if device_type == "cuda" else CPU_RESERVE + int(CPU_GAPS * account.passing)


def largest_batch(setup: Setup, memory: int, most: int = 512) -> int:
    """The largest micro-batch that fits; 0 if not even one sequence does."""
    low, high = 0, 1
    while high <= most and fits(replace(setup, batch_size=high), memory):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(setup, batch_size=middle), memory):
            low = middle
        else:
            high = middle
    return low


# ---- how far off it has been ----


@dataclass(frozen=True)
class Error:
    """A prediction beside its measurement.

    Attributes:
        device: where it was measured.
        model: what was trained there, in a few words.
        predicted_ms: of an update.
        measured_ms: of an update.
        predicted_peak: bytes that tensors hold at most.
        measured_peak: bytes; ``None`` where the device does not tell.
    """

    device: str
    model: str
    predicted_ms: float
    measured_ms: float
    predicted_peak: int
    measured_peak: int | None

    @property
    def time(self) -> float:
        """Relative error of the time; positive where the step was faster than predicted."""
        return self.predicted_ms / self.measured_ms - 1.0

    @property
    def memory(self) -> float | None:
        """Relative error of the memory."""
        return None if self.measured_peak is None else self.predicted_peak / self.measured_peak - 1.0


@cache
def measurements() -> Sequence[dict[str, Any]]:
    """Steps of fastgpt that were measured, and the ceilings of their devices."""
    return tuple(json.loads(MEASURED.read_text()))


def errors(rows: Iterable[dict[str, Any]] | None = None) -> list[Error]:
    """The model against every step measured."""
    found = []
    for row in measurements() if rows is None else rows:
        setup = Setup(
            GPTConfig(**row["model"]), row["batch_size"], row["device_type"], getattr(torch, row["dtype"]),
            row["state_bits"], row["recompute"],
        )  # fmt: skip
        account = count(setup)
        at_hand = Machine(row["device"], row["gemm_flops"], row["bandwidth"], n_sm=row["n_sm"])
        words = f"{row['name']}, {setup.batch_size} x {setup.model.block_size}, {row['dtype']}"
        predicted = predict(setup, at_hand, account).seconds(row["accumulation"])
        found.append(Error(row["device"], words, 1e3 * predicted, row["ms"], account.peak, row["peak_bytes"]))
    return found


def error_words(device: str) -> str:
    """How far off the model has been."""
    known = errors()
    if not known:
        return "no step has been measured yet, so nobody knows how far off this is"
    here = [error for error in known if error.device == device]
    if here:
        worst = max(here, key=lambda error: abs(error.time))
        return f"on this device the model is off by {worst.time:+.0%} at most ({worst.model})"
    low, high = min(error.time for error in known), max(error.time for error in known)
    devices = sorted({error.device for error in known})
    gpus = "" if any(name.startswith("NVIDIA") for name in devices) else "; no GPU has been measured"
    return f"where a step was measured ({', '.join(devices)}) the model is off by {low:+.0%} to {high:+.0%}{gpus}"
