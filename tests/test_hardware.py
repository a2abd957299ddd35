import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastgpt import hardware, limits
from fastgpt.errors import RequestError
from fastgpt.gpus import GPUS
from fastgpt.kernels import dispatch
from fastgpt.model import GPTConfig

CPU = torch.device("cpu")


@pytest.fixture
def named(monkeypatch):
    """Makes every CUDA device go by a name, with the SMs of the card of that name or with others."""

    def name(text, n_sm=None):
        if n_sm is None:
            n_sm = GPUS[text].n_sm if text in GPUS else 1
        properties = SimpleNamespace(multi_processor_count=n_sm)
        monkeypatch.setattr(hardware, "device_name", lambda device: text)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda")

    return name


def test_a_devices_peak_is_that_of_the_card_of_its_name(named):
    device = named("NVIDIA GeForce RTX 4070")
    assert hardware.known_gpu(device) is GPUS["NVIDIA GeForce RTX 4070"]
    peaks = {dtype: hardware.peak_flops(device, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert {dtype: round(peak / 1e12, 1) for dtype, peak in peaks.items()} == {
        torch.bfloat16: 58.3,
        torch.float16: 58.3,  # summed in fp32, as PyTorch's products are; 116.6 is with sums in fp16
        torch.float32: 29.1,
    }


def test_gpt2_124m_runs_at_68_thousand_tokens_a_second_at_most_on_the_rtx_4070(named):
    peak = hardware.peak_flops(named("NVIDIA GeForce RTX 4070"), torch.bfloat16)
    assert round(peak / GPTConfig(bias=False).flops_per_token, -3) == 68_000


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4070 Max", "nvidia geforce rtx 4070", "RTX 4070", "Some GPU", ""])
def test_a_device_that_is_not_in_the_table_has_no_peak_least_of_all_anothers(named, name):
    assert hardware.known_gpu(named(name)) is None
    assert hardware.peak_flops(named(name), torch.bfloat16) is None


def test_another_card_under_the_same_name_has_no_peak(named):
    device = named("NVIDIA GeForce RTX 3080", n_sm=70)  # 12 GB; the one of the table has 68 SMs and 10 GB
    assert hardware.known_gpu(device) is None
    assert hardware.peak_flops(device, torch.bfloat16) is None


def test_what_a_card_has_no_unit_for_has_no_peak(named):
    assert hardware.peak_flops(named("Tesla T4"), torch.bfloat16) is None
    assert hardware.peak_flops(named("Tesla T4"), torch.float16) == pytest.approx(65e12, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_peak_is_claimed_of_a_cpu(dtype):
    assert hardware.peak_flops(CPU, dtype) is None


def test_this_cpu_has_a_name():
    assert hardware.device_name(CPU).strip()


# ---- the CPU ----

AVX2, AVX512 = "avx2 fma", "avx2 fma avx512f avx512bw avx512dq avx512vl"
AMX = f"{AVX512} avx512_bf16 amx_tile amx_bf16"


def cpuinfo(name, family, model, stepping, flags, threads=2, cores=2):
    """What Linux says on x86."""
    return "\n".join(
        f"processor\t: {i}\nvendor_id\t: X\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"stepping\t: {stepping}\nphysical id\t: 0\ncore id\t\t: {i % cores}\nflags\t\t: {flags}\n"
        for i in range(threads)
    )


ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1

processor\t: 1
CPU part\t: 0xd40
"""


@pytest.fixture
def on_cpu(monkeypatch):
    """Puts this process on a CPU, with nothing that holds it to less and with what PyTorch finds there."""
    for variable in hardware.LIMITS:
        monkeypatch.delenv(variable, raising=False)

    def put(text, found="AVX512"):
        monkeypatch.setattr(hardware, "processor", lambda: hardware.parse_cpuinfo(text))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)

    return put


@pytest.mark.parametrize(
    ("name", "full_name"),
    [
        ("Intel(R) Xeon(R) Processor", "Intel(R) Xeon(R) Processor (family 6, model 85, stepping 7)"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 85, stepping 7)"),
        ("AMD EPYC", "AMD EPYC (family 6, model 85, stepping 7)"),
        ("QEMU Virtual CPU version 2.5+", "QEMU Virtual CPU version 2.5+ (family 6, model 85, stepping 7)"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "AMD Ryzen 9 7950X 16-Core Processor"),
        ("AMD EPYC 9R14", "AMD EPYC 9R14"),
        ("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz"),
    ],
)
def test_a_name_without_a_model_number_is_told_with_family_model_and_stepping(on_cpu, name, full_name):
    on_cpu(cpuinfo(name, 6, 85, 7, AVX512))
    assert hardware.device_name(CPU) == full_name


def test_a_cpu_is_what_the_kernel_says_of_it():
    found = hardware.parse_cpuinfo(cpuinfo("AMD EPYC", 26, 2, 1, f"{AVX512} avx512_bf16", threads=8, cores=4))
    assert found.name == "AMD EPYC"
    assert found.ids == {"family": "26", "model": "2", "stepping": "1"}
    assert found.cores == 4  # of eight threads
    assert found.isas == ("avx2", "avx512", "avx512_bf16")


def test_an_arm_cpu_is_told_by_its_part(monkeypatch):
    monkeypatch.setattr(hardware.platform, "processor", lambda: "aarch64")
    found = hardware.parse_cpuinfo(ARM)
    assert found.ids == {"implementer": "0x41", "part": "0xd40", "variant": "0x1", "revision": "1"}
    assert found.full_name == "aarch64 (implementer 0x41, part 0xd40, variant 0x1, revision 1)"
    assert found.cores == 2


def test_a_kernel_that_tells_nothing_leaves_what_python_knows():
    found = hardware.parse_cpuinfo("")
    assert found.full_name == found.name
    assert found.cores >= 1
    assert found.isas == ()


@pytest.mark.parametrize(
    ("flags", "widest"),
    [(AVX2, "avx2"), (AVX512, "avx512"), (f"{AVX512} avx512_bf16", "avx512_bf16"), (AMX, "amx")],
)
def test_nothing_in_the_environment_leaves_all_that_the_cpu_has(on_cpu, flags, widest):
    on_cpu(cpuinfo("X", 1, 1, 1, flags))
    assert hardware.isa() == widest
    assert hardware.held_to() == {}


@pytest.mark.parametrize(
    ("held_to", "widest"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "default"),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, "amx"),  # all that PyTorch itself can use
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
        ({"MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"}, "avx512_bf16"),
        ({"MKL_ENABLE_INSTRUCTIONS": "avx2"}, "amx"),  # no value of MKL's, which goes on as it was
        ({"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx2"),
    ],
)
def test_the_narrowest_limit_of_the_environment_counts(on_cpu, monkeypatch, held_to, widest):
    on_cpu(cpuinfo("X", 1, 1, 1, AMX))
    for variable, value in held_to.items():
        monkeypatch.setenv(variable, value)
    assert hardware.isa() == widest
    assert hardware.held_to() == held_to


def test_a_limit_beyond_what_the_cpu_has_gives_it_nothing(on_cpu, monkeypatch):
    on_cpu(cpuinfo("X", 1, 1, 1, AVX2), found="AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert hardware.isa() == "avx2"


def test_what_pytorch_found_counts_where_it_is_less_and_where_the_kernel_lists_none(on_cpu):
    on_cpu(cpuinfo("X", 1, 1, 1, AMX), found="AVX2")
    assert hardware.isa() == "avx2"
    on_cpu(ARM, found="SVE256")
    assert hardware.isa() == "sve256"
    on_cpu(cpuinfo("X", 1, 1, 1, "sse4_2"), found="DEFAULT")
    assert hardware.isa() == "default"


@pytest.mark.skipif("avx2" not in hardware.processor().isas, reason="for a CPU with AVX2")
@pytest.mark.parametrize("value", list(hardware.LIMITS["ATEN_CPU_CAPABILITY"]))
def test_pytorch_takes_the_limits_that_are_listed(value):
    code = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": value}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == hardware.LIMITS["ATEN_CPU_CAPABILITY"][value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gemm_rate_is_a_positive_number(dtype):
    rate = hardware.measure_gemm_peak(CPU, dtype, size=16, seconds=0.0)
    assert math.isfinite(rate)
    assert rate > 0


def test_the_bandwidth_is_a_positive_number():
    rate = hardware.measure_bandwidth(CPU, megabytes=1, seconds=0.0)
    assert math.isfinite(rate)
    assert rate > 0


def test_rates_are_work_by_the_median_time(monkeypatch):
    durations = iter([99.0, 2.0, 2.0, 50.0])  # the first is the warm-up
    clock = [0.0]

    def tick():
        clock.append(clock[-1] + (next(durations) if len(clock) % 2 else 0.0))
        return clock[-2]

    monkeypatch.setattr(hardware.time, "perf_counter", tick)
    assert hardware.measure_gemm_peak(CPU, torch.float32, size=10, seconds=40.0) == 2 * 10**3 / 2.0


def test_auto_is_a_gpu_if_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert hardware.find_device("auto").type == kind


def test_a_device_is_taken_by_its_number_if_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.find_device("cuda:1") == torch.device("cuda:1")
    assert hardware.find_device("cuda") == torch.device("cuda:0")  # set_per_process_memory_fraction asks for a number
    with pytest.raises(RequestError, match="--device cuda:2: PyTorch sees 2 CUDA devices here"):
        hardware.find_device("cuda:2")


@pytest.mark.parametrize("isa", ["default", *hardware.ISAS])
def test_an_environment_holds_a_process_to_an_instruction_set_or_less(isa):
    code = "from fastgpt import hardware; print(hardware.isa())"
    environment = {k: v for k, v in os.environ.items() if k not in hardware.LIMITS} | hardware.environment_for(isa)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    order = ["default", *hardware.ISAS]
    widest = hardware.processor().isas[-1] if hardware.processor().isas else "default"
    assert done.stdout.strip() == min(isa, widest, key=order.index)


def test_an_instruction_set_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^isa: 'avx1024' is none of default, avx2,"):
        hardware.environment_for("avx1024")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
def test_a_device_that_is_none_is_a_wrong_request(name):
    with pytest.raises(RequestError, match="--device"):
        hardware.find_device(name)


@pytest.mark.parametrize(
    ("isa", "vendor", "expected"),
    [
        ("default", "GenuineIntel", torch.float32),
        ("avx2", "AuthenticAMD", torch.float32),
        ("avx512", "AuthenticAMD", torch.float32),
        ("avx512_bf16", "AuthenticAMD", torch.bfloat16),
        ("avx512_bf16", "GenuineIntel", torch.float32),
        ("amx", "GenuineIntel", torch.bfloat16),
    ],
)
def test_a_cpu_trains_in_bf16_only_if_it_multiplies_it_faster(monkeypatch, isa, vendor, expected):
    monkeypatch.setattr(hardware, "isa", lambda: isa)
    monkeypatch.setattr(hardware, "processor", lambda: hardware.parse_cpuinfo(f"processor: 0\nvendor_id: {vendor}"))
    assert hardware.training_dtype(CPU) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_trains_in_bf16_if_it_has_it_and_else_in_fp16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.training_dtype(torch.device("cuda")) == expected


@pytest.mark.skipif(dispatch.EXTENSION.library is None, reason="for a machine with the C++ kernels")
def test_the_ceiling_of_products_is_ours_where_ours_is_faster(monkeypatch):
    monkeypatch.setitem(hardware.LARGE, "cpu", 64)
    monkeypatch.setattr(hardware, "median_seconds", lambda run, device, seconds: 1.0)
    monkeypatch.setattr(hardware, "measure_gemm_peak", lambda device, dtype, size, seconds: 1.0)
    assert hardware.gemm_ceiling(CPU, torch.float32) == 2 * 64**3
    monkeypatch.setattr(hardware, "measure_gemm_peak", lambda device, dtype, size, seconds: 1e99)
    assert hardware.gemm_ceiling(CPU, torch.float32) == 1e99


@pytest.mark.parametrize(("flops", "size"), [(1e12, 2048), (1e10, 1024), (1e8, 256)])
def test_a_slow_cpu_is_measured_by_a_smaller_product(monkeypatch, flops, size):
    monkeypatch.setattr(hardware, "product_seconds", lambda device, dtype, size, seconds=0.0: 2 * size**3 / flops)
    measured = []
    monkeypatch.setattr(
        hardware, "measure_gemm_peak", lambda device, dtype, size, seconds: measured.append(size) or 1e99
    )
    monkeypatch.setattr(hardware, "median_seconds", lambda run, device, seconds: 1.0)  # ours is not run
    assert hardware.gemm_ceiling(CPU, torch.bfloat16, 0.5) == 1e99
    assert measured == [size]


def test_no_more_memory_is_free_than_there_is():
    free, total = hardware.memory(CPU)
    assert 0 < free.amount <= total.amount


def test_a_copy_is_measured_in_a_quarter_of_the_free_memory(monkeypatch):
    sizes = []
    monkeypatch.setattr(limits, "memory", lambda: (limits.Bound(64 << 20, "RAM"),) * 2)
    monkeypatch.setattr(hardware, "median_seconds", lambda run, device, seconds: sizes.append(run().numel()) or 1.0)
    assert hardware.measure_bandwidth(CPU) == 2 * sizes[0] == 2 * (8 << 20)


@pytest.mark.parametrize(("kind", "megabytes"), [("cpu", 256), ("cuda", 1024)])
def test_on_a_gpu_the_copy_is_so_long_that_its_launch_is_short(monkeypatch, kind, megabytes):
    sizes = []

    def zeros(size, **options):
        sizes.append(size)
        return torch.empty(0)

    monkeypatch.setattr(hardware, "memory", lambda device: (limits.Bound(80 << 30, "GPU"),) * 2)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(hardware, "median_seconds", lambda run, device, seconds: 1.0)
    hardware.measure_bandwidth(torch.device(kind))
    assert sizes == [megabytes << 20]


@pytest.fixture
def own_threads(monkeypatch):
    """PyTorch has chosen 8 threads of its own."""
    for name in hardware.THREADS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("possible", "expected"), [((3, "a quota"), (3, "a quota")), ((64, "cores"), (8, "PyTorch's choice"))]
)
def test_pytorch_gets_no_more_threads_than_can_run(monkeypatch, own_threads, possible, expected):
    monkeypatch.setattr(limits, "threads", lambda: limits.Bound(*possible))
    assert hardware.use_threads() == expected
    assert torch.get_num_threads() == expected[0]


@pytest.mark.parametrize("name", hardware.THREADS)
def test_the_environments_number_of_threads_stands(monkeypatch, own_threads, name):
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(limits, "threads", lambda: limits.Bound(1, "cores"))
    assert hardware.use_threads() == (8, name)
    assert torch.get_num_threads() == 8


def test_importing_the_kernels_sets_no_threads():
    code = "import torch; n = torch.get_num_threads() + 1; torch.set_num_threads(n); import fastgpt.kernels; "
    code += "import fastgpt.hardware; assert torch.get_num_threads() == n"
    subprocess.run([sys.executable, "-c", code], check=True)
