"""The device of this machine: its name, its peak, and the ceilings measured on it."""

import getpass
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from fastgpt import limits
from fastgpt.errors import RequestError
from fastgpt.gpus import BF16_SINCE, GPU, GPUS
from fastgpt.kernels import dispatch
from fastgpt.kernels.matmul import matmul_into
from fastgpt.limits import Bound


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is a GPU if there is one.

    Raises:
        RequestError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
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
    # with its number, which some functions of PyTorch require
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def device_name(device: torch.device) -> str:
    """The maker's name of the device; for a CPU see :attr:`Processor.full_name`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor().full_name


# ---- the CPU ----

# The instruction sets that decide how long a step takes, narrowest first, and the kernel's flags for each.
ISAS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
}

# The kernel's names for the generation of a CPU, on x86 and on Arm, and ours.
IDS = {
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
    "CPU variant": "variant",
    "CPU revision": "revision",
}

_ONEDNN = {
    **dict.fromkeys(("SSE41", "AVX"), "default"),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), "avx2"),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), "avx512"),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), "avx512_bf16"),
}

# Environment variables that limit a library to narrower instructions than the CPU has. For each value, as the library
# spells it, the widest of ISAS that it still allows. oneDNN takes lower case too. Other values limit nothing. Where
# several values allow the same, environment_for sets the first.
# Sources: ATen's DispatchStub.cpp, oneDNN's "CPU Dispatcher Control", oneMKL's "mkl_enable_instructions".
LIMITS = {
    "ATEN_CPU_CAPABILITY": {"default": "default", "avx2": "avx2"},
    "ONEDNN_MAX_CPU_ISA": {**_ONEDNN, **{value.lower(): left for value, left in _ONEDNN.items()}},
    "MKL_ENABLE_INSTRUCTIONS": {
        **dict.fromkeys(("SSE4_2", "AVX"), "default"),
        **dict.fromkeys(("AVX2", "AVX2_E1"), "avx2"),
        **dict.fromkeys(("AVX512", "AVX512_E1", "AVX512_E2"), "avx512"),
        "AVX512_E3": "avx512_bf16",
    },
}


@dataclass(frozen=True)
class Processor:
    """A CPU as Linux describes it.

    Attributes:
        name: the model name, such as ``AMD EPYC 9R14``; a hypervisor may shorten it to ``AMD EPYC``.
        ids: family, model and stepping on x86; implementer, part, variant and revision on Arm; empty if unknown.
        cores: physical cores of the machine.
        isas: those of ``ISAS`` that it has, narrowest first; empty if unknown.
        vendor: ``GenuineIntel``, ``AuthenticAMD``; empty if unknown.
    """

    name: str
    ids: dict[str, str]
    cores: int
    isas: tuple[str, ...]
    vendor: str = ""

    @property
    def full_name(self) -> str:
        """The model name, followed by ``ids`` if no word of the name is a model number.

        A model number identifies the generation. It has three digits or more: ``7950X``, ``9R14``, ``E5-2680``.
        """
        words = re.sub(r"@.*", "", self.name).split()
        if not self.ids or any(len(re.findall(r"\d", word)) >= 3 for word in words):
            return self.name
        return f"{self.name} ({', '.join(f'{what} {value}' for what, value in self.ids.items())})"


def parse_cpuinfo(text: str) -> Processor:
    """The CPU that ``/proc/cpuinfo`` describes; if ``text`` is empty, what Python knows about it."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.split("\n\n")
    ]
    threads = [block for block in blocks if "processor" in block]
    first = threads[0] if threads else {}
    flags = set(first.get("flags", "").split())
    cores = {(thread.get("physical id"), thread.get("core id", thread["processor"])) for thread in threads}
    return Processor(
        first.get("model name") or platform.processor() or platform.machine(),
        {word: first[key] for key, word in IDS.items() if key in first},
        len(cores) or os.cpu_count() or 1,
        tuple(isa for isa, needed in ISAS.items() if needed <= flags),
        first.get("vendor_id", ""),
    )


@cache
def processor() -> Processor:
    """The CPU of this machine."""
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        return parse_cpuinfo("")


def environment_for(isa: str) -> dict[str, str]:
    """The environment variables that limit a new process to an instruction set: PyTorch, oneDNN, MKL and fastgpt.

    fastgpt's C++ kernels follow the first two. On a CPU that has less than ``isa`` they change nothing. Inductor gets a
    cache folder for each instruction set, because its cache does not distinguish them: a process that is limited to one
    would load code for another and compute wrong sums.

    Args:
        isa: one of ``ISAS``, or ``default`` for the compiler's own (SSE2 on x86, NEON on Arm).

    Raises:
        ValueError: there is no such instruction set.
    """
    if isa not in ("default", *ISAS):
        raise ValueError(f"isa: '{isa}' is none of default, {', '.join(ISAS)}")
    found = {variable: [v for v, left in values.items() if left == isa] for variable, values in LIMITS.items()}
    held = {variable: values[0] for variable, values in found.items() if values}
    return held | {"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor-{getpass.getuser()}-{isa}"}


def held_to() -> dict[str, str]:
    """The variables of ``LIMITS`` that are set, and their values."""
    return {variable: os.environ[variable] for variable in LIMITS if variable in os.environ}


def isa() -> str:
    """The widest instruction set that every library of this process may use: one of ``ISAS``, or ``default`` for none.

    That is what the CPU has, without what the environment forbids to PyTorch, oneDNN or MKL. If Linux lists none of
    ``ISAS``, it is what PyTorch found.
    """
    has, found = processor().isas, torch.backends.cpu.get_cpu_capability().lower()
    if not has:
        return found
    order = ["default", *ISAS]
    left = [LIMITS[variable].get(value, order[-1]) for variable, value in held_to().items()]
    if found in ("default", "avx2"):  # AVX-512 is the widest that PyTorch distinguishes, so it limits nothing
        left.append(found)
    narrowest = min(map(order.index, left), default=len(order))
    return ["default", *(name for name in has if order.index(name) <= narrowest)][-1]


# ---- peaks and ceilings ----


def known_gpu(device: torch.device) -> GPU | None:
    """This device's row of the table; ``None`` for a CPU, and for a GPU that is not in the table."""
    gpu = GPUS.get(device_name(device)) if device.type == "cuda" else None
    # one name may stand for several cards, such as the RTX 3080 with 68 SMs and the one with 70
    same = gpu is not None and torch.cuda.get_device_properties(device).multi_processor_count == gpu.n_sm
    return gpu if same else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s for matrix products of ``dtype`` summed in fp32; ``None`` if unknown."""
    gpu = known_gpu(device)
    tflops = gpu.tflops(dtype) if gpu is not None else None
    return tflops * 1e12 if tflops is not None else None


def training_dtype(device: torch.device) -> torch.dtype:
    """The dtype of ``--dtype auto``: bf16 where the device multiplies it faster, else fp16 on a GPU, fp32 on a CPU.

    Measured on two cores each: products of bf16 have 2.2 times the rate of fp32 on Zen 5 (AVX512_BF16), and 4.7 times
    on a Xeon with AMX. On the same Xeon limited to AVX512_BF16, a step in bf16 takes 1.5 times as long as one in fp32,
    because Intel's cores do no more of these products in a cycle. A CPU without the instructions widens every operand
    first, so bf16 is slower there too.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if 10 * major + minor >= BF16_SINCE else torch.float16
    faster = isa() == "amx" or (isa() == "avx512_bf16" and processor().vendor != "GenuineIntel")
    return torch.bfloat16 if faster else torch.float32


def memory(device: torch.device) -> tuple[Bound, Bound]:
    """Bytes of ``device`` that are free for this process, and that it could have at most, with the limits' sources."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Bound(free, "GPU"), Bound(total, "GPU")
    return limits.memory()


# The variables that set PyTorch's number of threads; the first one wins. Without them it uses one a physical core.
THREADS = ("MKL_NUM_THREADS", "OMP_NUM_THREADS")


def use_threads() -> Bound:
    """Limit PyTorch to the threads that can run at once. Commands call this at their start.

    PyTorch considers cores and affinity, but not a container's CPU quota, under which its threads would wait for each
    other. A number that the environment sets is kept. Returns the number of threads and its source.
    """
    own = torch.get_num_threads()
    named = next((name for name in THREADS if name in os.environ), None)
    if named is not None:
        return Bound(own, named)
    found = limits.least([limits.threads(), Bound(own, "PyTorch's choice")])
    if found.amount < own:
        torch.set_num_threads(found.amount)
    return found


# Sizes to measure with, by type of device: the side of a square matrix, and the megabytes of a copy. They are so large
# that launching and waiting count for little. (An H100 copies 256 MB in 0.17 ms, but a launch and a wait take 10 to 15
# us: too much.)
LARGE = {"cpu": 2048, "cuda": 8192}
MEGABYTES = {"cpu": 256, "cuda": 1024}


def gemm_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product: PyTorch's, or on a CPU ours where it is faster."""
    size = LARGE[device.type]
    if device.type == "cpu":  # one without bf16 instructions would need half a minute for a large product
        while size > 256 and 64 * product_seconds(device, dtype, size // 4) > 2 * seconds:
            size //= 2
    pytorchs = measure_gemm_peak(device, dtype, size, seconds)
    if device.type != "cpu" or dispatch.EXTENSION.library is None:
        return pytorchs
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.zeros(size, size)
    taken = median_seconds(lambda: matmul_into(out, a, b, accumulate=True), device, seconds)
    return max(pytorchs, 2 * size**3 / taken)


def measure_gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product on ``device``: the median over about ``seconds``."""
    return 2 * size**3 / product_seconds(device, dtype, size, seconds)


def product_seconds(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.0) -> float:
    """Seconds of PyTorch's product of two square matrices of ``size``: the median over about ``seconds``."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return median_seconds(lambda: torch.mm(a, b, out=out), device, seconds)


def measure_bandwidth(device: torch.device, megabytes: int | None = None, seconds: float = 0.5) -> float:
    """Bytes per second of a copy that is larger than any cache. Reads and writes both count.

    The two tensors take at most a quarter of the free memory: in a cgroup with a limit, more could end the process.

    Args:
        device: to measure.
        megabytes: of the copy; by default those of ``MEGABYTES``.
        seconds: to spend.
    """
    wanted = MEGABYTES[device.type] if megabytes is None else megabytes
    megabytes = max(1, min(wanted, memory(device)[0].amount >> 23))
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, seconds)


def median_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median time of ``run`` on ``device``, over about ``budget`` seconds."""

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
