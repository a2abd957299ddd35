"""The device at hand: its name, its peak, and the ceilings measured on it."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastgpt import limits
from fastgpt.errors import RequestError
from fastgpt.gpus import BF16_SINCE, GPU, GPUS
from fastgpt.kernels import ops
from fastgpt.kernels.matmul import matmul_into
from fastgpt.limits import Bound


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


def known_gpu(device: torch.device) -> GPU | None:
    """This device's row of the table; ``None`` for a CPU, and for a GPU of which the table knows nothing."""
    gpu = GPUS.get(device_name(device)) if device.type == "cuda" else None
    # one name may stand for several cards, such as the RTX 3080 with 68 SMs and the one with 70
    same = gpu is not None and torch.cuda.get_device_properties(device).multi_processor_count == gpu.n_sm
    return gpu if same else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s for matrix products of ``dtype`` summed in fp32, or ``None`` where it is not known."""
    gpu = known_gpu(device)
    tflops = gpu.tflops(dtype) if gpu is not None else None
    return tflops * 1e12 if tflops is not None else None


def training_dtype(device: torch.device) -> torch.dtype:
    """What ``--dtype auto`` means: bf16 where the device multiplies it natively, else fp16 on a GPU, fp32 on a CPU.

    Measured on two Zen 5 cores (AVX512_BF16): products of bf16 run at 2.2 times the rate of fp32. A CPU without the
    instructions widens every operand first, and is slower with bf16 than without.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if 10 * major + minor >= BF16_SINCE else torch.float16
    native = any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if native else torch.float32


def memory(device: torch.device) -> tuple[Bound, Bound]:
    """Bytes of ``device`` that are free for this process, and all that it could have, each with what limits it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Bound(free, "GPU"), Bound(total, "GPU")
    return limits.memory()


# What PyTorch takes its number of threads from, the first one first. Left alone, it takes one a physical core.
THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")


def use_threads() -> Bound:
    """Have PyTorch compute on no more threads than can run at a time; for commands, at their start.

    PyTorch knows of cores and of affinity, not of a container's CPU quota: there its threads would wait for each other.
    What the environment says is left as it is. Returns how many threads there are, and what set that.
    """
    own = torch.get_num_threads()
    named = next((name for name in THREADS if name in os.environ), None)
    if named is not None:
        return Bound(own, named)
    found = limits.least([limits.threads(), Bound(own, "PyTorch's choice")])
    if found.amount < own:
        torch.set_num_threads(found.amount)
    return found


# Side of a matrix, by type of device, beside whose product launching and waiting for the end are short.
LARGE = {"cpu": 2048, "cuda": 8192}


def gemm_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product: PyTorch's, or on a CPU ours where it is faster."""
    size = LARGE[device.type]
    pytorchs = measure_gemm_peak(device, dtype, size, seconds)
    if device.type != "cpu" or ops.EXTENSION.library is None:
        return pytorchs
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.zeros(size, size)
    taken = median_seconds(lambda: matmul_into(out, a, b, accumulate=True), device, seconds)
    return max(pytorchs, 2 * size**3 / taken)


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product on ``device``: the median over about ``seconds``."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def measure_bandwidth(device: torch.device, megabytes: int = 256, seconds: float = 0.5) -> float:
    """Bytes per second of a copy larger than any cache, read and write both counted.

    The two tensors take a quarter of the free memory at most: where a cgroup limits it, more would end the process.
    """
    megabytes = max(1, min(megabytes, memory(device)[0].amount >> 23))
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
