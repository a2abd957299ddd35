import math

import pytest
import torch

from fastgpt.model import GPT, GPTConfig
from fastgpt.model.config import padded_vocab_size

SHAPES = [
    {"block_size": 8, "vocab_size": 65, "n_layer": 1, "n_head": 1, "n_embd": 4},
    {"block_size": 64, "vocab_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128},
    {"block_size": 17, "vocab_size": 331, "n_layer": 3, "n_head": 3, "n_embd": 21},
    {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768},
    {"block_size": 1024, "vocab_size": 50257, "n_layer": 48, "n_head": 25, "n_embd": 1600},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_layer']}x{shape['n_embd']}")
def test_parameter_counts_are_those_of_the_model_that_is_built(shape, bias):
    config = GPTConfig(**shape, bias=bias)
    with torch.device("meta"):
        model = GPT(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert config.n_params == count
    assert config.n_params_without_positions == count - model.transformer.wpe.weight.numel()


def gpt2_parameters(vocab_size, bias):
    """GPT-2 124M's parameters, written out: (with positions, without)."""
    linear = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]  # c_attn, c_proj, c_fc, c_proj
    layer = sum(i * o for i, o in linear) + 2 * 768
    if bias:
        layer += sum(o for _, o in linear) + 2 * 768
    without = vocab_size * 768 + 12 * layer + (768 + 768 * bias)
    return without + 1024 * 768, without


def test_gpt2_124m_has_the_parameters_that_are_published_of_it():
    # 124,439,808 is what Hugging Face's gpt2 counts; 124.37M and 123.59M are what nanoGPT prints for its own.
    assert gpt2_parameters(50257, bias=True)[0] == 124_439_808
    assert gpt2_parameters(50304, bias=False) == (124_373_760, 123_587_328)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2_124m_counts_124_4m_parameters_and_123_6m_without_positions(vocab_size, bias):
    config = GPTConfig(vocab_size=vocab_size, bias=bias)
    assert (config.n_params, config.n_params_without_positions) == gpt2_parameters(vocab_size, bias)
    assert abs(config.n_params / 1e6 - 124.4) < 0.15
    assert abs(config.n_params_without_positions / 1e6 - 123.6) < 0.15


def test_the_defaults_are_gpt2_124m_with_a_padded_vocabulary():
    config = GPTConfig()
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
    assert config.n_params == 124_475_904
    assert config.n_params_without_positions == 123_689_472


def test_a_token_of_gpt2_124m_costs_854_8_mflop_at_1024():
    # nanoGPT's GPT-2: no biases. The biases add 6 FLOPs each.
    plain, biased = GPTConfig(bias=False), GPTConfig(bias=True)
    assert round(plain.flops_per_token / 1e6, 1) == 854.8
    assert biased.flops_per_token - plain.flops_per_token == 6 * (12 * (2304 + 768 + 3072 + 768 + 2 * 768) + 768)


def test_attention_counts_in_full_and_grows_with_the_context():
    short, long = (GPTConfig(block_size=T, n_layer=2, n_head=2, n_embd=8, vocab_size=65) for T in (16, 32))
    # Scores and their product with the values: 2 matrix products of 2 T C FLOPs, forward once and backward twice.
    assert long.flops_per_token - short.flops_per_token == 2 * 3 * (2 * 2 * 16 * 8)


@pytest.mark.parametrize(("n_embd", "n_head"), [(768, 10), (100, 12), (7, 2), (5, 8), (1, 2), (64, 63), (97, 12)])
def test_a_width_that_the_heads_do_not_divide_is_refused_with_values_that_work(n_embd, n_head):
    with pytest.raises(ValueError, match=f"n_embd={n_embd} is not divisible by n_head={n_head}") as caught:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    advice = str(caught.value).partition(";")[2].split()
    other_head, other_embd = (int(word.partition("=")[2]) for word in advice if "=" in word)
    assert GPTConfig(n_embd=n_embd, n_head=other_head).n_head == other_head <= n_head
    assert GPTConfig(n_embd=other_embd, n_head=n_head).n_embd == other_embd
    assert abs(other_embd - n_embd) < n_head


@pytest.mark.parametrize("name", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_a_size_below_one_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GPTConfig(**{name: 0})


@pytest.mark.parametrize("name", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_a_size_of_a_slip_of_the_hand_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be at most 16,777,216, got 1,000,000,000"):
        GPTConfig(**{name: 10**9})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(dropout=dropout)


@pytest.mark.parametrize(
    ("size", "padded"), [(50257, 50304), (50304, 50304), (50305, 50432), (65, 65), (999, 999), (1000, 1024)]
)
def test_large_vocabularies_are_padded_to_a_multiple_of_128_and_small_ones_left_alone(size, padded):
    assert padded_vocab_size(size) == padded


def test_heads_wider_than_the_kernels_take_are_refused():
    with pytest.raises(ValueError, match=r"makes heads of 512; .* n_head=2 or more"):
        GPTConfig(n_embd=512, n_head=1)
