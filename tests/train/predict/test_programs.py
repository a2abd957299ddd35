"""Other programs' steps as calls: their arithmetic agrees with the trace of our own step."""

from collections import Counter
from dataclasses import replace

import pytest

from fastgpt.gpus import GPUS
from fastgpt.model import GPTConfig
from fastgpt.train.predict import roofline
from fastgpt.train.predict.programs import PROGRAMS, Workload, calls, tokens_per_second
from fastgpt.train.predict.trace import Setup, trace_step

GPT2 = GPTConfig(bias=False)
WORK = Workload.of(GPT2, 8, 64)
CARD = roofline.machine(GPUS["NVIDIA GeForce RTX 4070"])


def total(counted, kind, what="flops"):
    return sum(times * getattr(call, what) for call, times in counted.items() if call.kind == kind)


def rate(name, work=WORK):
    return tokens_per_second(PROGRAMS[name], work, CARD)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_gpt2_has_the_products_of_our_own_step(name):
    micro_step, _ = calls(PROGRAMS[name], WORK)
    ours = Counter(trace_step(Setup(GPT2, 8, recompute="none")).micro_step)
    assert total(micro_step, "GEMM") == pytest.approx(total(ours, "GEMM"), rel=1e-6)


def test_attention_has_two_products_forward_and_five_backward_of_the_scores_that_are_not_masked():
    micro_step, _ = calls(PROGRAMS["nanoGPT"], WORK)
    scores = 12 * 8 * 12 * 1024 * 1024 / 2  # layers, sequences, heads
    assert total(micro_step, "attention") == 7 * 2 * 64 * scores


def test_a_block_that_is_recomputed_adds_its_forward():
    once, _ = calls(PROGRAMS["llm-foundry"], WORK)
    twice, _ = calls(PROGRAMS["llm-foundry"], replace(WORK, recompute="block"))
    inputs, _ = calls(PROGRAMS["llm-foundry"], replace(WORK, recompute="inputs"))
    tokens, C = WORK.tokens, GPT2.n_embd
    assert total(twice, "GEMM") - total(once, "GEMM") == 12 * 2 * 12 * C * C * tokens
    assert (
        total(inputs, "GEMM") - total(once, "GEMM") == 12 * 2 * 7 * C * C * tokens
    )  # q, k, v and the first of the MLP
    assert total(twice, "attention") / total(once, "attention") == pytest.approx(9 / 7)


def test_heads_that_share_keys_and_gated_mlps_have_products_of_their_width():
    qwen = Workload(24, 896, 14, 2, 4864, True, 151_936, 1024, 16, 32)
    micro_step, _ = calls(PROGRAMS["llmq"], qwen)
    parameters = 24 * (896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864) + 151_936 * 896
    assert parameters / 1e6 == pytest.approx(494, abs=1)  # Qwen2.5 0.5B
    assert total(micro_step, "GEMM") == 6.0 * parameters * qwen.tokens


def test_muons_products_are_done_once_an_update_and_shared():
    muon = replace(WORK, muon=True)
    _, alone = calls(PROGRAMS["nanochat"], muon)
    _, of_four = calls(PROGRAMS["nanochat"], replace(muon, shards=4))
    square, wide = 5 * 6 * 768**3, 5 * (2 * 8 + 2) * 768**3  # X X', A A, B X
    assert total(alone, "GEMM") == 12 * (4 * square + 2 * wide)
    assert total(alone, "GEMM") == 4 * total(of_four, "GEMM")
    assert total(alone, "other", "bytes") == 4 * total(of_four, "other", "bytes")


def test_what_compiles_is_faster_than_eager_and_what_holds_bf16_faster_still():
    assert rate("nanoGPT") < rate("nanoGPT, compiled") < rate("llm.c")


def test_more_micro_batches_an_update_are_faster():
    assert rate("nanoGPT", replace(WORK, accumulation=1)) < rate("nanoGPT")
