"""A roofline model of the training step: its time on a device that need not be present.

Each call in the trace (``trace.py``) takes the longer of its arithmetic and its memory traffic, and calls do not
overlap:

- The arithmetic of a matrix product follows from its tiles: the last wave of tiles takes as long as a full one.
- The arithmetic of attention runs at a fraction of the rate of a large matrix product.
- The traffic is the call's bytes, less what a GPU still finds in its L2 cache.

The constants of GPUs are fitted to one half of the public measurements (``fit.py``, which also gives the error on the
other half), relative to usual fractions of a card's specifications. For a device that is not in the table of cards, its
rates are measured. :func:`errors` compares the model with every step of fastgpt that was measured, and belongs beside
every prediction.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastgpt import hardware
from fastgpt.gpus import GPU, GPUS
from fastgpt.model import GPTConfig
from fastgpt.train.predict.points import large_product
from fastgpt.train.predict.trace import Call, Setup, Trace, reserve, trace_step

# ---- devices and predictions ----


@dataclass(frozen=True)
class Shares:
    """The fractions of a device's peak rates that the parts of a step reach.

    Attributes:
        product: FLOP/s of products whose tiles fill the device, relative to a large product.
        attention: FLOP/s of attention, relative to a large product; on a GPU, for long sequences.
        elementwise: bandwidth of norms, activations and the loss, relative to a copy; they also compute.
        reuse: fraction of the L2 cache that holds operands which a kernel reads.
    """

    product: float = 1.0
    attention: float = 0.6
    elementwise: float = 1.0
    reuse: float = 0.5


@dataclass(frozen=True)
class Machine:
    """The peak rates of a device.

    Attributes:
        name: the vendor's name.
        gemm: FLOP/s of a large matrix product in the training dtype.
        bandwidth: bytes per second of a large copy, counting both reads and writes.
        peak: dense peak in FLOP/s, for MFU; ``None`` where it is unknown.
        memory: bytes; ``None`` for no limit.
        n_sm: streaming multiprocessors; ``None`` for a CPU.
        l2: bytes of a GPU's L2 cache.
        shares: fractions of these rates that a step on a GPU reaches.
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
    """The predicted time and memory of a step. Nothing here was measured.

    Attributes:
        micro_step: seconds of one micro-batch's forward and backward, by kind of call.
        update: seconds of the optimizer, once per update.
        tokens: tokens in a micro-batch.
        flops: FLOPs of a micro-batch as MFU counts them.
        peak: the device's dense peak in FLOP/s; ``None`` where it is unknown.
        memory: bytes that tensors hold at the peak.
        reserve: bytes that the step takes outside its tensors.
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
        """Bytes that the step takes in total."""
        return self.memory + self.reserve

    @property
    def seconds_of_micro_step(self) -> float:
        """The seconds of a micro-batch, without the optimizer's."""
        return sum(self.micro_step.values())

    def seconds(self, accumulation: int = 1) -> float:
        """Return the seconds of an update of ``accumulation`` micro-batches."""
        return accumulation * self.seconds_of_micro_step + self.update

    def tokens_per_second(self, accumulation: int = 1) -> float:
        """Return the training throughput."""
        return accumulation * self.tokens / self.seconds(accumulation)

    def mfu(self, accumulation: int = 1) -> float | None:
        """Return the model FLOPs utilization: the fraction of the dense peak; ``None`` where that is unknown."""
        return None if self.peak is None else accumulation * self.flops / self.seconds(accumulation) / self.peak


# ---- the time of a step ----

# By family of cards (gpus.py), fitted to one half of the public steps. ``python -m fastgpt.train.predict.fit`` prints
# this table, and a test repeats the fit. A family without a public step has the defaults of Shares, which are assumed.
GPU_SHARES = {
    "sm_120 GeForce": Shares(1.023, 0.631, reuse=0.408),
    "sm_120 PCIe": Shares(1.037, 0.608, reuse=0.408),
    "sm_80 PCIe": Shares(0.850, 0.414, reuse=0.408),
    "sm_80 SXM": Shares(0.921, 0.332, reuse=0.408),
    "sm_89 GeForce": Shares(1.053, 0.708, reuse=0.408),
    "sm_89 PCIe": Shares(0.816, 0.506, reuse=0.408),
    "sm_90 SXM": Shares(0.859, 0.439, reuse=0.408),
}
# Fitted to bench/results/amd-epyc-family-26-model-2-stepping-1-avx512-bf16/mfu-*.json, on two cores. So the errors of
# these records (see errors below) are errors of a fit, not a test of the model.
CPU_SHARES = Shares(0.87, 0.42, 0.27)

# The least time of a call in a CUDA graph: on an H200, an update of preset quickstart takes 0.62 ms for 135 calls.
LAUNCH_SECONDS = 4.5e-6
HOST_SECONDS = 50e-6  # of each call on a CPU, in addition to its work; fitted together with CPU_SHARES

# Rows and columns of a product that one block computes, and the fraction of the best rate that the tile size reaches:
# smaller tiles load more bytes per FLOP. Assumed.
TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.95, (128, 64): 0.85, (64, 128): 0.85, (64, 64): 0.7}
SPLITS = (1, 2, 4, 8)  # parts of the inner dimension that blocks compute separately (split-K), to get more tiles

# Attention on a GPU over T tokens reaches T / (T + 512) of its rate over long sequences: the tiles on the diagonal are
# half masked, and softmax has a prologue and an epilogue. FlashAttention-2 on A100 and H100, with heads of 64 and 128
# and 512 to 16,384 tokens, gives 450 to 550 for this constant (points.json; a test repeats that).
HALF_RATE_LENGTH = 512


def predict(setup: Setup, machine: Machine, trace: Trace | None = None) -> Prediction:
    """Predict the time and memory of a step on a device.

    Args:
        setup: the step.
        machine: the device.
        trace: the step's trace, if the caller has it already.
    """
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
    """Return the predicted seconds of one call."""
    shares = CPU_SHARES if machine.n_sm is None else machine.shares
    bandwidth = machine.bandwidth * (shares.elementwise if call.kind in ("norm", "activation", "loss") else 1.0)
    if call.product is not None:
        computing = _product_seconds(call, machine) / shares.product
    else:
        computing = call.flops / (shares.attention * machine.gemm)
        if machine.n_sm is not None and call.length:
            computing *= 1.0 + HALF_RATE_LENGTH / call.length  # 1 / (T / (T + 512))
    # At most half of the traffic can hit the cache: operands that the kernel before has just written.
    cached = min(shares.reuse * machine.l2, call.bytes / 2)
    work = max(computing, (call.bytes - cached) / bandwidth)
    return work + HOST_SECONDS if machine.n_sm is None else max(work, LAUNCH_SECONDS)


def _product_seconds(call: Call, machine: Machine) -> float:
    """Return the seconds of a matrix product's arithmetic with the tile size and split that are fastest.

    A GPU computes one tile per multiprocessor at a time, so tiles are done in waves of ``n_sm``. A last wave that is
    not full takes as long as a full one: its time is that of ``n_sm`` tiles.
    """
    if machine.n_sm is None or call.product is None:
        return call.flops / machine.gemm
    M, N, K = call.product
    fastest = math.inf
    for (rows, columns), share in TILES.items():
        tiles = math.ceil(M / rows) * math.ceil(N / columns)
        for split in SPLITS:
            waves = math.ceil(tiles * split / machine.n_sm)
            # FLOPs as if every wave were full; a tile takes 2 FLOPs for each of rows x columns x K / split
            work = waves * 2.0 * rows * columns * math.ceil(K / split) * machine.n_sm
            # the parts of a split product are fp32, written by one kernel and read by another: 4 + 4 bytes
            partial_sums = 0 if split == 1 else 8.0 * split * M * N
            fastest = min(fastest, work / (share * machine.gemm) + partial_sums / machine.bandwidth)
    return fastest


# ---- the rates of devices ----

MEASURED = Path(__file__).parent / "measured.json"  # records of bench.mfu, collected by bench.measured

COPY_SHARE = 0.88  # of the theoretical bandwidth: the median of the copies that others have measured (points.json)


def machine(gpu: GPU, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Return the expected rates of a card of the table: usual fractions of its specifications.

    Raises:
        ValueError: the card does not support ``dtype``.
    """
    peak = gpu.tflops(dtype)
    if peak is None:
        raise ValueError(f"gpu: the {gpu.name} has no {dtype}")
    return Machine(
        gpu.name, large_product(gpu) * peak * 1e12, COPY_SHARE * gpu.bandwidth_gb_s * 1e9, peak * 1e12,
        int(gpu.memory_gb * 2**30), gpu.n_sm, int(gpu.l2_mb * 2**20), GPU_SHARES.get(gpu.family, Shares()),
    )  # fmt: skip


def machine_of(
    name: str, dtype: torch.dtype, gemm: float, bandwidth: float, peak: float | None = None, n_sm: int | None = None
) -> Machine:
    """Return a device with its measured rates; a card of the table with its expected ones, which its shares belong to.

    Measured rates would not fit these shares: an H200 that repeats a large product for a second slows down to 663
    TFLOP/s, where 798 are expected, and its training step is as fast as with these.
    """
    gpu = GPUS.get(name)
    if gpu is not None and gpu.tflops(dtype) is not None:
        return machine(gpu, dtype)
    return Machine(name, gemm, bandwidth, peak, n_sm=n_sm)


def at_hand(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return this machine's device: from the table, or measured if it is not there, which takes a second."""
    gpu = hardware.known_gpu(device)
    if gpu is not None and gpu.tflops(dtype) is not None:
        return machine(gpu, dtype)
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None
    gemm, bandwidth = hardware.gemm_ceiling(device, dtype), hardware.measure_bandwidth(device)
    return Machine(hardware.device_name(device), gemm, bandwidth, n_sm=n_sm)


# ---- the prediction's error where a step was measured ----


@dataclass(frozen=True)
class Error:
    """A prediction and the measurement of the same step.

    Attributes:
        device: where it was measured.
        model: what was trained there, in a few words.
        predicted_ms: predicted milliseconds of an update.
        measured_ms: measured milliseconds of an update.
        predicted_peak: bytes that tensors hold at the peak, predicted.
        measured_peak: measured bytes; ``None`` where the device does not report them.
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
        """Relative error of the peak memory; ``None`` where it was not measured."""
        return None if self.measured_peak is None else self.predicted_peak / self.measured_peak - 1.0


@cache
def measurements() -> Sequence[dict[str, Any]]:
    """Return the measured steps of fastgpt, each with the measured rates of its device."""
    return tuple(json.loads(MEASURED.read_text()))


def errors(rows: Iterable[dict[str, Any]] | None = None) -> list[Error]:
    """Compare predictions with measurements: all of :func:`measurements`, or ``rows``."""
    found = []
    for row in measurements() if rows is None else rows:
        setup = Setup(
            GPTConfig(**row["model"]), row["batch_size"], row["device_type"], getattr(torch, row["dtype"]),
            row["state_bits"], row["recompute"],
        )  # fmt: skip
        trace = trace_step(setup)
        rates = row["gemm_flops"], row["bandwidth"]
        device = machine_of(row["device"], setup.dtype, *rates, n_sm=row["n_sm"])
        words = f"{row['name']}, {setup.batch_size} x {setup.gpt_config.block_size}, {row['dtype']}"
        predicted = predict(setup, device, trace).seconds(row["accumulation"])
        found.append(Error(row["device"], words, 1e3 * predicted, row["ms"], trace.peak, row["peak_bytes"]))
    return found


def error_words(device: str) -> str:
    """Describe the prediction's error in one phrase: on this device if a step was measured there, else elsewhere."""
    known = errors()
    if not known:
        return "prediction error unknown: no step of fastgpt has been measured yet"
    here = [error for error in known if error.device == device]
    if here:
        worst = max(here, key=lambda error: abs(error.time))
        return f"largest prediction error on this device: {worst.time:+.0%} ({worst.model})"
    low, high = min(error.time for error in known), max(error.time for error in known)
    devices = sorted({error.device for error in known})
    gpus = "" if any(name.startswith("NVIDIA") for name in devices) else "; no GPU has been measured"
    return f"prediction error where fastgpt was measured ({', '.join(devices)}): {low:+.0%} to {high:+.0%}{gpus}"
