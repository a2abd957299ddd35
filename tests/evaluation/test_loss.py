import math

import numpy as np
import pytest
import torch

from fastgpt.errors import RequestError
from fastgpt.evaluation.loss import text_loss
from fastgpt.model import GPT, GPTConfig

T, V = 12, 31


@pytest.fixture(scope="module", params=[{}, {"tied": False, "softcap": 3.0}], ids=["gpt2", "untied and capped"])
def model(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, V, 2, 2, 16, **request.param)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def text(n, seed=0):
    return np.random.default_rng(seed).integers(V, size=n).astype(np.uint16)


@torch.no_grad()
def one_by_one(model, tokens, stride):
    """The loss of every token but the first, each from logits of its own: the nearest window that has it at its end."""
    losses = {}
    for start in range(0, len(tokens), stride):
        for end in range(start + 1, min(start + T, len(tokens) - 1) + 1):
            if end not in losses:
                logits = model(torch.tensor(tokens[start:end].astype(np.int64))[None])[0].double()
                losses[end] = -logits.log_softmax(-1)[int(tokens[end])].item()
    return [losses[i] for i in range(1, len(tokens))]


@pytest.mark.parametrize("stride", [None, T, 5, 1])
@pytest.mark.parametrize("n", [2, 12, 13, 14, 50])
def test_every_token_but_the_first_is_predicted_once(model, n, stride):
    tokens = text(n)
    expected = one_by_one(model, tokens, stride or T)
    found = text_loss(model, tokens, 100, stride=stride, batch_size=3)
    assert found.tokens == n - 1
    assert found.nats == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(np.mean(expected) * n / math.log(2) / 100, rel=1e-5)


def test_the_error_is_that_of_the_mean_of_windows(model):
    tokens = text(T * 40 + 1)
    means = np.array(one_by_one(model, tokens, T)).reshape(40, T).mean(1)
    found = text_loss(model, tokens, 100)
    assert found.error == pytest.approx(means.std(ddof=1) / math.sqrt(40), rel=1e-4)
    assert found.bits_per_byte_error / found.bits_per_byte == pytest.approx(found.error / found.nats)
    assert text_loss(model, tokens[: T + 1], 100).error is None


def test_some_windows_are_spread_evenly_and_their_bytes_counted_in_proportion(model):
    tokens = text(T * 40 + 1)
    means = np.array(one_by_one(model, tokens, T)).reshape(40, T).mean(1)
    found = text_loss(model, tokens, len(tokens) * 3, n_windows=4)
    assert found.nats == pytest.approx(means[[5, 15, 25, 35]].mean(), rel=1e-5)
    assert (found.tokens, found.n_bytes) == (4 * T, 4 * T * 3)
    assert text_loss(model, tokens, 100, n_windows=1000) == text_loss(model, tokens, 100)


def test_with_a_byte_a_token_the_bits_are_those_of_the_loss(model):
    found = text_loss(model, text(3), 3)  # of which two are predicted
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2))


def test_bytes_may_be_unknown(model):
    found = text_loss(model, text(30), None)
    assert (found.bits_per_byte, found.bits_per_byte_error) == (None, None)


def test_what_cannot_be_evaluated_is_refused(model):
    for stride in (0, T + 1):
        with pytest.raises(RequestError, match=f"--stride must be from 1 to the model's context of {T}"):
            text_loss(model, text(30), 1, stride=stride)
    with pytest.raises(RequestError, match="a text of 1 tokens has no token to predict"):
        text_loss(model, text(1), 1)


def test_perplexity_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from fastgpt.model import huggingface

    torch.manual_seed(4)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=V, n_positions=T, eos_token_id=1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    tokens = text(8 * T + 1)
    losses = []
    for start in range(0, 8 * T, T):
        idx = torch.tensor(tokens[start : start + T + 1].astype(np.int64))[None]
        with torch.no_grad():
            logits = theirs(idx[:, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, idx[0, 1:]).item())
    found = text_loss(huggingface.load(tmp_path).eval(), tokens, None)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
