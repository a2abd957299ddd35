"""A model of the step: how long it takes on a device that need not be there.

A roofline for each call of ``trace.py``. A matrix product takes what its tiles need, a wave of them as long as a
whole one, or what its bytes need, if that is more; attention a share of that rate; all else its bytes, less what a GPU
still has in its L2 cache. Nothing overlaps.

A GPU's shares are fitted to half of what others have measured (``predict/fit.py``, which also tells the error on the
other half); a device whose ceilings have been measured is predicted from those. ``errors`` tells how far off the model
has been wherever a step of ours was measured, and belongs beside every prediction.
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
from fastgpt.gpus import GPU, GPUS
from fastgpt.model import GPTConfig
from fastgpt.train.predict.points import large_product
from fastgpt.train.predict.trace import Call, Setup, Trace, reserve, trace_step

MEASURED = Path(__file__).parent / "measured.json"  # by bench.mfu; copied from its records

COPY_SHARE = 0.88  # of the memory's bandwidth: the median of what others have measured (predict/points.json)
LAUNCH_SECONDS = 2e-6  # assumed, of the shortest kernel in a CUDA graph
HOST_SECONDS = 50e-6  # of a call on a CPU, beside its work; fitted, as below


@dataclass(frozen=True)
class Shares:
    """What of a device's ceilings the parts of a step get to.

    Attributes:
        product: of a large product's FLOP/s, products whose tiles fill the device.
        attention: of a large product's FLOP/s, attention; on a GPU over long sequences.
        elementwise: of a copy's bandwidth, norms, GELU and the loss, which also compute.
        reuse: of the L2 cache, what a kernel still finds there of its operands.
    """

    product: float = 1.0
    attention: float = 0.6
    elementwise: float = 1.0
    reuse: float = 0.5


# By family of cards (gpus.py), fitted to half of the public steps by python -m fastgpt.train.predict.fit, as the tests
# do anew. A family without a step has what the fit starts from, which is assumed.
GPU_SHARES = {
    "sm_120 GeForce": Shares(1.023, 0.631, reuse=0.408),
    "sm_120 PCIe": Shares(1.037, 0.608, reuse=0.408),
    "sm_80 PCIe": Shares(0.850, 0.414, reuse=0.408),
    "sm_80 SXM": Shares(0.921, 0.332, reuse=0.408),
    "sm_89 GeForce": Shares(1.053, 0.708, reuse=0.408),
    "sm_89 PCIe": Shares(0.816, 0.506, reuse=0.408),
    "sm_90 SXM": Shares(0.859, 0.438, reuse=0.408),
}
# Fitted to bench/results/amd-epyc-family-26-model-2-stepping-1-avx512-bf16/mfu-*.json, two cores: there the errors
# below are no test of them.
CPU_SHARES = Shares(0.87, 0.42, 0.27)

# Rows and columns of a product that one block computes, and the share of the best rate that it gets to. Assumed.
TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.95, (128, 64): 0.85, (64, 128): 0.85, (64, 64): 0.7}
SPLITS = (1, 2, 4, 8)  # of the inner dimension

# Attention on a GPU over T tokens runs at T / (T + 512) of its rate over many: tiles are masked by half, softmax begins
# and ends. FlashAttention-2 on A100 and H100, with heads of 64 and 128 and 512 to 16,384 tokens, has 450 to 550 there
# (predict/points.json).
HALF_RATE_LENGTH = 512


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
        l2: bytes of a GPU's L2 cache.
        shares: of these that a GPU's step gets to.
    """

    name: str
    gemm: float
    bandwidth: float
    peak: float | None = None
    memory: int | None = None
    n_sm: int | None = None
    l2: int = 0
    shares: Shares = Shares()


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
    memory = int(gpu.memory_gb * 2**30)
    for row in measurements():
        if row["device"] == gpu.name and row["dtype"] == str(dtype).removeprefix("torch."):
            found = measured(gpu.name, row["gemm_flops"], row["bandwidth"], peak * 1e12, gpu.n_sm)
            return replace(found, memory=memory)
    gemm, bandwidth = large_product(gpu) * peak * 1e12, COPY_SHARE * gpu.bandwidth_gb_s * 1e9
    return replace(measured(gpu.name, gemm, bandwidth, peak * 1e12, gpu.n_sm), memory=memory)


def measured(name: str, gemm: float, bandwidth: float, peak: float | None = None, n_sm: int | None = None) -> Machine:
    """A device by its ceilings; where it is a card of the table, with its cache and its family's shares."""
    found = Machine(name, gemm, bandwidth, peak, n_sm=n_sm)
    gpu = GPUS.get(name)
    if gpu is None:
        return found
    return replace(found, l2=int(gpu.l2_mb * 2**20), shares=GPU_SHARES.get(gpu.family, Shares()))


def at_hand(device: torch.device, dtype: torch.dtype) -> Machine:
    """This device: its row of the table, or where there is none what it takes a second to measure."""
    gpu = hardware.known_gpu(device)
    if gpu is not None and gpu.tflops(dtype) is not None:
        return machine(gpu, dtype)
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None
    gemm, bandwidth = hardware.gemm_ceiling(device, dtype), hardware.measure_bandwidth(device)
    return measured(hardware.device_name(device), gemm, bandwidth, n_sm=n_sm)


def predict(setup: Setup, machine: Machine, trace: Trace | None = None) -> Prediction:
    """The time of a step on a machine."""
    trace = trace or trace_step(setup)
    micro_step: dict[str, float] = {}
    for call in trace.micro_step:
        micro_step[call.kind] = micro_step.get(call.kind, 0.0) + seconds(call, machine)
    flops = float(setup.gpt_config.flops_per_token) * setup.tokens
    update = sum(seconds(call, machine) for call in trace.update)
    return Prediction(
        micro_step, update, setup.tokens, flops, machine.peak, trace.peak, reserve(setup.device_type, trace)
    )


def seconds(call: Call, machine: Machine) -> float:
    """What one call takes."""
    shares = CPU_SHARES if machine.n_sm is None else machine.shares
    bandwidth = machine.bandwidth * (shares.elementwise if call.kind in ("norm", "GELU", "loss") else 1.0)
    if call.product is not None:
        computing = _product_seconds(call, machine) / shares.product
    else:
        computing = call.flops / (shares.attention * machine.gemm)
        if machine.n_sm is not None and call.length:
            computing *= 1.0 + HALF_RATE_LENGTH / call.length
    cached = min(shares.reuse * machine.l2, call.bytes / 2)  # half of the operands at most: what was written last
    work = max(computing, (call.bytes - cached) / bandwidth)
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
        trace = trace_step(setup)
        device = measured(row["device"], row["gemm_flops"], row["bandwidth"], n_sm=row["n_sm"])
        words = f"{row['name']}, {setup.batch_size} x {setup.gpt_config.block_size}, {row['dtype']}"
        predicted = predict(setup, device, trace).seconds(row["accumulation"])
        found.append(Error(row["device"], words, 1e3 * predicted, row["ms"], trace.peak, row["peak_bytes"]))
    return found


def error_words(device: str) -> str:
    """How far off the model has been."""
    known = errors()
    if not known:
        return "no step of ours has been measured yet, so nobody knows how far off this is"
    here = [error for error in known if error.device == device]
    if here:
        worst = max(here, key=lambda error: abs(error.time))
        return f"on this device the model is off by {worst.time:+.0%} at most ({worst.model})"
    low, high = min(error.time for error in known), max(error.time for error in known)
    devices = sorted({error.device for error in known})
    gpus = "" if any(name.startswith("NVIDIA") for name in devices) else "; no GPU has been measured"
    return f"where our step was measured ({', '.join(devices)}) the model is off by {low:+.0%} to {high:+.0%}{gpus}"
