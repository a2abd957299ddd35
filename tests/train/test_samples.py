"""Samples while training."""

import pytest
import torch

from fastgpt.data.tokenizers import CharTokenizer
from fastgpt.model import GPT, GPTConfig
from fastgpt.train import samples

TOKENIZER = CharTokenizer("abcdefgh")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(16, 8, 1, 1, 8)).train()


def sample(model, check=lambda: None):
    return samples.sample(model, TOKENIZER, [0, 1], 7, check)


def test_a_sample_draws_none_of_the_runs_random_numbers(model):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = sample(model)
    assert torch.equal(torch.rand(3), expected)
    assert sample(model) == first
    assert len(first) == samples.NEW_TOKENS
    assert model.training


def test_a_model_that_has_diverged_or_is_out_of_memory_has_no_sample(model, monkeypatch):
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    assert sample(model) is None

    def out_of_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(samples, "generate", out_of_memory)
    assert sample(model) is None
    assert model.training


def test_a_request_to_stop_is_heard_between_two_tokens(model):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, check)
    assert len(calls) == 3
    assert model.training
