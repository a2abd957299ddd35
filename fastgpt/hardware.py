"""Devices: their names, their peaks with sources, and the ceilings measured on the one at hand."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.errors import RequestError


@dataclass(frozen=True)
class GPU:
    """Dense tensor-core peak for bf16 inputs with fp32 accumulation, memory bandwidth and capacity."""

    bf16_tflops: float
    bandwidth_gb_s: float
    memory_gb: int
    source: str


# By the exact name that CUDA reports. Sparse figures, twice the dense, are never used.
GPUS = {
    "NVIDIA GeForce RTX 4070": GPU(58.3, 504, 12, "NVIDIA Ada whitepaper v2.1: 46 SMs x 512 FLOP x 2475 MHz"),
    "NVIDIA H100 80GB HBM3": GPU(989.4, 3350, 80, "NVIDIA H100 datasheet, SXM5, dense"),
    "NVIDIA H200": GPU(989.4, 4800, 141, "NVIDIA H200 datasheet, SXM, dense"),
}


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is a GPU if there is one.

    Raises:
        RequestError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"--device takes cpu, cuda, cuda:N or auto, not '{name}'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; --device cpu works"
        )
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"--device {name} is not supported; cpu and cuda are")
    return device


def device_name(device: torch.device) -> str:
    """What the maker calls this device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s for matrix products of ``dtype``, or ``None`` where it is not known."""
    gpu = GPUS.get(device_name(device)) if device.type == "cuda" else None
    return gpu.bf16_tflops * 1e12 if gpu is not None and dtype == torch.bfloat16 else None


def training_dtype(device: torch.device) -> torch.dtype:
    """What ``--dtype auto`` means: bf16 on a GPU and on a CPU that multiplies it natively, fp32 elsewhere.

    Measured on two Zen 5 cores (AVX512_BF16): products of bf16 run at 2.2 times the rate of fp32. A CPU without the
    instructions widens every operand first, and is slower with bf16 than without.
    """
    native = device.type == "cuda" or any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if native else torch.float32


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product on ``device``: the median over about ``seconds``."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def measure_bandwidth(device: torch.device, megabytes: int = 256, seconds: float = 0.5) -> float:
    """Bytes per second of a copy larger than any cache, read and write both counted."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, seconds)


def median_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """What ``run`` takes on ``device``: the median over about ``budget`` seconds."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once()]
    while sum(times) < budget:
        times.append(once())
    return statistics.median(times)
