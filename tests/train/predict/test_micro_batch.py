"""The micro-batch and the recomputation that are chosen for a device."""

from dataclasses import replace

import pytest

from fastgpt.gpus import find_gpu
from fastgpt.model import GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict import micro_batch, roofline, trace
from fastgpt.train.predict.trace import Setup, trace_step
from fastgpt.train.presets import PRESETS
from tests.train.predict.traced_once import traced_once

GPT2 = GPTConfig(bias=False)
GB = 2**30


@pytest.fixture(scope="module", autouse=True)
def one_trace_a_setup():
    with traced_once(micro_batch, roofline):
        yield


def gpt2(name, **options):
    shape = {key: PRESETS[name][key] for key in ("n_layer", "n_head", "n_embd")}
    return Setup(replace(GPT2, **shape), **{"batch_size": 1, **options})


def choice(name, memory=12 * GB, gpu="rtx-4070", **options):
    setup = gpt2(name, **options)
    kinds = micro_batch.kinds_of_recompute(TrainConfig(), "cuda")
    return micro_batch.choose(micro_batch.choices(setup, roofline.machine(find_gpu(gpu)), memory, 2**19, kinds))


@pytest.mark.parametrize("name", ["gpt2-30m", "gpt2-124m", "gpt2-350m"])
def test_a_preset_gets_a_micro_batch_for_the_reference_card_that_makes_the_update_exact(name):
    chosen = choice(name)
    assert chosen.batch_size * chosen.accumulation * 1024 == 2**19
    assert micro_batch.fits(gpt2(name, batch_size=chosen.batch_size, recompute=chosen.recompute), 12 * GB)


def test_with_a_ramp_a_micro_batch_divides_the_smallest_update_too():
    setup, machine = gpt2("gpt2-30m"), roofline.machine(find_gpu("h200"))
    found = micro_batch.choices(setup, machine, 100 * GB, 2**19, ["none"], 2**15)
    assert [choice.batch_size for choice in found] == [1, 2, 4, 8, 16, 32]
    assert all(choice.batch_size * choice.accumulation * 1024 == 2**19 for choice in found)


def test_less_memory_takes_a_smaller_micro_batch_or_more_recomputation_and_at_last_nothing():
    speeds = []
    for memory in (24 * GB, 12 * GB, 6 * GB, 4 * GB):
        chosen = choice("gpt2-124m", memory)
        assert chosen.prediction.memory + trace.CUDA_RESERVE <= memory
        speeds.append(chosen.prediction.tokens_per_second(chosen.accumulation))
    assert speeds == sorted(speeds, reverse=True)
    assert choice("gpt2-124m", 2 * GB) is None


def test_an_update_that_sequences_do_not_divide_has_no_micro_batch():
    machine = roofline.machine(find_gpu("rtx-4070"))
    assert micro_batch.choices(gpt2("gpt2-124m"), machine, 12 * GB, 500_000, ("cheap",)) == []


def test_gpt2_124m_fits_12_gb_with_sixteen_sequences_and_more():
    assert micro_batch.largest_batch(gpt2("gpt2-124m"), 12 * GB) >= 16


def test_gpt2_774m_needs_moments_of_eight_bits_and_blocks_recomputed():
    assert not micro_batch.fits(gpt2("gpt2-774m", recompute="block"), 12 * GB)
    assert micro_batch.fits(gpt2("gpt2-774m", recompute="block", state_bits=8, batch_size=4), 12 * GB)


def test_the_largest_batch_fits_and_the_next_one_does_not():
    setup = gpt2("gpt2-350m")
    largest = micro_batch.largest_batch(setup, 12 * GB)
    assert micro_batch.fits(replace(setup, batch_size=largest), 12 * GB)
    assert not micro_batch.fits(replace(setup, batch_size=largest + 1), 12 * GB)
    assert micro_batch.largest_batch(setup, 1 * GB) == 0


def test_no_more_is_recomputed_than_memory_requires():
    setup = gpt2("gpt2-124m", batch_size=16)
    kinds = micro_batch.kinds_of_recompute(TrainConfig(), "cuda")
    peaks = {kind: trace_step(replace(setup, recompute=kind)).peak + trace.CUDA_RESERVE for kind in kinds}
    assert peaks["none"] > peaks["cheap"] > peaks["block"]
    for kind, peak in peaks.items():
        assert micro_batch.least_recompute(setup, peak, kinds) == kind
    assert micro_batch.least_recompute(setup, peaks["block"] - 1, kinds) is None


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_with_torch_compile_memory_is_predicted_without_recomputation(device_type):
    assert micro_batch.kinds_of_recompute(TrainConfig(compile=True), device_type) == ("none",)
