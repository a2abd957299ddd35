import math

import pytest
import torch

from fastgpt import hardware
from fastgpt.errors import RequestError
from fastgpt.model import GPTConfig

CPU = torch.device("cpu")


@pytest.fixture
def named(monkeypatch):
    """Makes every CUDA device go by a name."""

    def name(text):
        monkeypatch.setattr(hardware, "device_name", lambda device: text)
        return torch.device("cuda")

    return name


def test_the_rtx_4070_peak_is_its_sms_times_their_flops_times_the_clock():
    # NVIDIA's Ada whitepaper: 46 SMs, 4 tensor cores each, 64 FMA a clock with fp32 accumulate, 2475 MHz boost.
    gpu = hardware.GPUS["NVIDIA GeForce RTX 4070"]
    peak = 46 * (4 * 64 * 2) * 2475e6 / 1e12
    assert round(peak, 1) == gpu.bf16_tflops == 58.3
    # 192-bit GDDR6X at 21 Gbit/s a pin.
    assert gpu.bandwidth_gb_s == 192 * 21 / 8 == 504
    assert gpu.memory_gb == 12


def test_gpt2_124m_runs_at_68_thousand_tokens_a_second_at_most_on_the_rtx_4070(named):
    peak = hardware.peak_flops(named("NVIDIA GeForce RTX 4070"), torch.bfloat16)
    assert round(peak / GPTConfig(bias=False).flops_per_token, -3) == 68_000


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_hopper_peaks_are_the_dense_ones(named, name):
    # 132 SMs, 4 tensor cores each, 512 FMA a clock, 1830 MHz boost; the data sheet's 1979 is with sparsity.
    peak = hardware.peak_flops(named(name), torch.bfloat16) / 1e12
    assert peak == pytest.approx(132 * 4 * 512 * 2 * 1830e6 / 1e12, rel=1e-3)
    assert round(peak) == 989
    assert peak < 1979 / 2 + 1


def test_h200_differs_from_h100_in_memory_alone():
    h100, h200 = hardware.GPUS["NVIDIA H100 80GB HBM3"], hardware.GPUS["NVIDIA H200"]
    assert (h100.bandwidth_gb_s, h200.bandwidth_gb_s) == (3350, 4800)
    assert (h100.memory_gb, h200.memory_gb) == (80, 141)


def test_every_row_has_a_source():
    assert all(len(gpu.source) > 10 for gpu in hardware.GPUS.values())


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4070 Ti", "NVIDIA GeForce RTX 4070 Laptop GPU", "Some GPU", ""])
def test_a_device_that_is_not_in_the_table_has_no_peak_least_of_all_anothers(named, name):
    assert hardware.peak_flops(named(name), torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bf16_peak_is_no_other_dtypes(named, dtype):
    assert hardware.peak_flops(named("NVIDIA GeForce RTX 4070"), dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_peak_is_claimed_of_a_cpu(dtype):
    assert hardware.peak_flops(CPU, dtype) is None


def test_this_cpu_has_a_name():
    assert hardware.device_name(CPU).strip()


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
    with pytest.raises(RequestError, match="--device cuda:2: PyTorch sees 2 CUDA devices here"):
        hardware.find_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
def test_a_device_that_is_none_is_a_wrong_request(name):
    with pytest.raises(RequestError, match="--device"):
        hardware.find_device(name)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [(None, torch.float32), ("_is_avx512_bf16_supported", torch.bfloat16), ("_is_amx_tile_supported", torch.bfloat16)],
)
def test_a_cpu_trains_in_bf16_only_if_it_multiplies_it_natively(monkeypatch, instructions, expected):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions, raising=False)
    assert hardware.training_dtype(torch.device("cpu")) == expected
    assert hardware.training_dtype(torch.device("cuda")) == torch.bfloat16
