"""The roofline model: its arithmetic against numbers computed by hand, its error against every measured step."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt.gpus import GPUS, find_gpu
from fastgpt.model import GPTConfig
from fastgpt.train.predict import roofline
from fastgpt.train.predict.trace import Call, Setup, trace_step

GPT2 = GPTConfig(bias=False)
GB = 2**30

# Ten SMs, 1 TFLOP/s and 1 TB/s: round numbers.
CARD = roofline.Machine("card", gemm=1e12, bandwidth=1e12, peak=2e12, memory=12 * GB, n_sm=10)


def product(M, N, K, n_bytes=0.0):
    return Call("mm", "GEMM", 2.0 * M * N * K, n_bytes, (M, N, K))


# ---- arithmetic ----


def test_a_product_that_fills_every_sm_runs_at_the_rate_of_a_large_one():
    call = product(2560, 128, 4096)  # ten tiles of 256 x 128
    assert roofline.seconds(call, CARD) == pytest.approx(call.flops / 1e12)


def test_one_tile_too_many_costs_more_than_its_work():
    full, over = product(2560, 128, 65536), product(2560 + 256, 128, 65536)
    ratio = roofline.seconds(over, CARD) / roofline.seconds(full, CARD)
    assert over.flops / full.flops < ratio <= 2.0


def test_a_product_with_few_tiles_and_a_long_sum_is_split():
    few = product(128, 128, 1 << 20)
    unsplit = 10 * few.flops / (0.95 * 1e12)  # one SM of ten
    assert roofline.seconds(few, CARD) < unsplit / 4


def test_what_has_to_be_moved_takes_its_bytes():
    assert roofline.seconds(Call("gelu", "activation", 0.0, 5e9), CARD) == pytest.approx(5e-3)
    assert roofline.seconds(product(256, 128, 8, n_bytes=5e9), CARD) == pytest.approx(5e-3)


def test_half_of_what_a_kernel_moves_may_lie_in_the_cache():
    cached = replace(CARD, l2=2 * 10**9, shares=replace(CARD.shares, reuse=0.5))
    # 5 GB: half of the cache, 1 GB, is saved. 1 GB: half of the traffic is saved.
    assert roofline.seconds(Call("gelu", "activation", 0.0, 5e9), cached) == pytest.approx(4e-3)
    assert roofline.seconds(Call("gelu", "activation", 0.0, 1e9), cached) == pytest.approx(0.5e-3)


def test_attention_over_few_tokens_runs_at_less_of_its_rate():
    def rate(length):
        return 1e9 / roofline.seconds(Call("attention", "attention", 1e9, 0.0, length=length), CARD)

    assert rate(roofline.HALF_RATE_LENGTH) == pytest.approx(rate(10**9) / 2, rel=1e-3)
    assert rate(10**9) == pytest.approx(CARD.shares.attention * CARD.gemm, rel=1e-3)


def test_a_card_of_the_table_has_the_shares_of_its_family_and_its_cache_and_an_unknown_one_has_none():
    for gpu in (find_gpu("rtx-4070"), find_gpu("l40s")):
        assert roofline.machine(gpu).shares == roofline.GPU_SHARES[gpu.family]
        assert roofline.machine_of(gpu.name, torch.bfloat16, 1e12, 1e12) == roofline.machine(gpu)
        assert roofline.machine(gpu).l2 == gpu.l2_mb * 2**20
    assert roofline.machine_of("a card of the future", torch.bfloat16, 1e12, 2e12, n_sm=10) == roofline.Machine(
        "a card of the future", 1e12, 2e12, n_sm=10
    )


def test_nothing_on_a_gpu_takes_less_than_a_launch_and_on_a_cpu_than_a_call():
    tiny = Call("add", "other", 0.0, 8.0)
    assert roofline.seconds(tiny, CARD) == roofline.LAUNCH_SECONDS
    assert roofline.seconds(tiny, replace(CARD, n_sm=None)) == pytest.approx(roofline.HOST_SECONDS)


def test_an_update_is_its_micro_batches_and_the_optimizer():
    p = roofline.Prediction({"GEMM": 0.2, "norm": 0.1}, update=0.4, tokens=1000, flops=3e11, peak=1e12, memory=1)
    assert p.seconds(4) == pytest.approx(1.6)
    assert p.tokens_per_second(4) == pytest.approx(2500)
    assert p.mfu(4) == pytest.approx(4 * 3e11 / 1.6 / 1e12)
    assert replace(p, peak=None).mfu() is None


def test_a_card_with_twice_the_rates_takes_half_the_time():
    setup = Setup(GPT2, 4)
    twice = replace(CARD, gemm=2 * CARD.gemm, bandwidth=2 * CARD.bandwidth)
    trace = trace_step(setup)
    slow, fast = (roofline.predict(setup, m, trace).seconds() for m in (CARD, twice))
    assert slow / fast == pytest.approx(2.0, rel=0.01)  # not exactly: launches take as long as before


def test_a_step_is_never_predicted_to_beat_its_products():
    setup = Setup(GPT2, 16)
    for gpu in GPUS.values():
        if gpu.tflops(torch.bfloat16) is None:
            continue
        machine = roofline.machine(gpu)
        p = roofline.predict(setup, machine)
        assert sum(p.micro_step.values()) > 6 * 123.5e6 * setup.tokens / machine.gemm
        assert 0 < p.mfu(32) < machine.gemm / machine.peak * 1.2  # MFU counts attention in full


def test_a_card_without_the_dtype_is_refused():
    with pytest.raises(ValueError, match=r"has no torch\.bfloat16"):
        roofline.machine(find_gpu("t4"))


# ---- error ----

RESULTS = Path(__file__).parents[3] / "bench" / "results"


def test_every_measurement_is_one_of_the_records():
    from bench import measured

    assert json.loads(roofline.MEASURED.read_text()) == measured.rows(RESULTS)
    assert roofline.measurements()


def test_the_model_is_as_far_off_as_it_says_and_not_further_than_known():
    """If this fails, a change of the model or of the step has made the predictions worse."""
    for error in roofline.errors():
        assert error.time == pytest.approx(error.predicted_ms / error.measured_ms - 1)
        assert math.isfinite(error.time)
        if error.device.startswith("NVIDIA"):
            # a step of about a millisecond is mostly launch overhead, which the model knows only roughly
            assert abs(error.time) < (0.15 if error.measured_ms > 5 else 0.3), error
            assert error.memory is not None
            assert abs(error.memory) < 0.05, error
        else:
            assert abs(error.time) < 0.5, error
