"""What later GPTs have and GPT-2 has not: each option against plain PyTorch, in every way that a model runs."""

from dataclasses import replace

import pytest
import torch

from fastgpt.kernels import use_backend
from fastgpt.model import GPT, GPTConfig
from fastgpt.model.gpt import KVCache
from fastgpt.model.reference import ReferenceGPT

BASE = GPTConfig(block_size=24, vocab_size=65, n_layer=5, n_head=4, n_embd=64, bias=False)
OPTIONS = {
    "GPT-2": {},
    "rotary": {"positions": "rotary"},
    "RMS norm": {"norm": "rms"},
    "RMS norm, biases": {"norm": "rms", "bias": True},
    "QK-norm": {"qk_norm": True},
    "QK-norm, rotary": {"qk_norm": True, "positions": "rotary"},
    "squared ReLU": {"mlp": "relu2"},
    "squared ReLU, biases": {"mlp": "relu2", "bias": True},
    "SwiGLU": {"mlp": "swiglu"},
    "SwiGLU, biases": {"mlp": "swiglu", "bias": True},
    "grouped queries": {"n_kv_head": 2},
    "untied": {"tied": False},
    "soft cap": {"softcap": 5.0},
    "window": {"window": 7},
    "documents": {"end_of_text": 3},
    "value embeddings": {"value_embeddings": True},
    "all": {
        "positions": "rotary", "norm": "rms", "qk_norm": True, "mlp": "relu2", "n_kv_head": 1, "tied": False,
        "softcap": 15.0, "window": 5, "end_of_text": 0, "value_embeddings": True, "bias": True,
    },
}  # fmt: skip
options = pytest.mark.parametrize("name", list(OPTIONS))


@pytest.fixture(params=["reference", "cpp"], autouse=True)
def backend(request):
    try:
        with use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        pytest.skip(str(error))


def twins(name, recompute="cheap"):
    """Ours and plain PyTorch's, with the same weights, large enough that each part shows."""
    torch.manual_seed(1)
    config = replace(BASE, **OPTIONS[name])
    model, plain = GPT(config, recompute), ReferenceGPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() >= 2 else torch.randn_like(p) * 0.3 + 1.0)
    plain.load_state_dict(model.state_dict())
    return model, plain


def batch():
    torch.manual_seed(2)
    idx, targets = torch.randint(BASE.vocab_size, (2, 3, BASE.block_size))
    idx[:, 5], idx[1, 11] = 3, 0  # ends of documents
    return idx, targets


@options
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_loss_and_gradients_are_those_of_plain_pytorch(name, recompute):
    model, plain = twins(name, recompute)
    losses = [m(*batch()) for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
    for loss in losses:
        loss.backward()
    expected = dict(plain.named_parameters())
    for key, p in model.named_parameters():
        largest = expected[key].grad.abs().max()
        assert (p.grad - expected[key].grad).abs().max() <= 1e-4 * largest, key


@options
def test_what_is_recomputed_changes_no_bit(name):
    gradients = []
    for recompute in ("none", "cheap", "block"):
        model, _ = twins(name, recompute)
        loss = model(*batch())
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


@options
def test_with_a_main_grad_the_gradients_are_the_same(name):
    model, _ = twins(name)
    other, _ = twins(name)
    for p in other.parameters():
        p.main_grad = torch.zeros_like(p)
    for m in (model, other):
        m(*batch()).backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        found = q.main_grad if q.grad is None else q.main_grad + q.grad
        torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6, msg=key)


@options
def test_reading_a_text_token_by_token_gives_what_reading_it_at_once_does(name):
    model, plain = twins(name)
    idx, _ = batch()
    with torch.no_grad():
        cache = KVCache(model.config, len(idx), model.transformer.wte.weight)
        pieces = [model(idx[:, :10], cache=cache)]
        pieces += [model(idx[:, t : t + 1], cache=cache) for t in range(10, BASE.block_size)]
        for t, logits in zip((9, 17, 23), (pieces[0], pieces[8], pieces[14]), strict=True):
            torch.testing.assert_close(logits, plain(idx[:, : t + 1]), rtol=1e-4, atol=1e-4)


@options
def test_it_compiles_without_a_graph_break_to_the_same_loss(name, backend):
    if backend == "reference":
        pytest.skip("once is enough")
    torch._dynamo.reset()
    model, _ = twins(name)
    expected = model(*batch())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(*batch())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)


@options
def test_the_numbers_of_parameters_are_those_of_the_model(name):
    config = replace(BASE, **OPTIONS[name])
    model = GPT(config)
    named = dict(model.named_parameters())
    assert config.n_params == sum(p.numel() for p in named.values())
    of_blocks = [p.numel() for key, p in named.items() if key.startswith("transformer.h.") and p.dim() == 2]
    assert config.n_params_of_blocks == sum(of_blocks)
    learned = config.positions == "learned"
    assert config.n_params - config.n_params_without_positions == (24 * 64 if learned else 0)
    assert sorted(config.beyond_gpt2) == sorted(key for key in OPTIONS[name] if key != "bias")


def test_a_half_of_a_document_is_not_seen_from_another():
    """Other tokens before the end of a document change nothing behind it."""
    model, _ = twins("documents")
    idx, _ = batch()
    other = idx.clone()
    other[:, :5] = torch.randint(4, BASE.vocab_size, (3, 5))
    with torch.no_grad():
        first, second = (model.transformer(t) for t in (idx, other))
    assert torch.equal(first[:, 6:], second[:, 6:])
    assert not torch.equal(first[:, :5], second[:, :5])


def test_every_fourth_layer_and_the_last_one_see_beyond_the_window():
    config = replace(BASE, n_layer=9, window=8)
    assert [config.window_of(layer) for layer in range(9)] == [8, 8, 8, 0, 8, 8, 8, 0, 0]
    assert replace(config, window=24).window_of(0) == 0  # it sees the whole context anyway


def test_with_zero_init_each_block_begins_as_the_identity():
    model = GPT(replace(BASE, zero_init=True))
    idx, _ = batch()
    with torch.no_grad():
        embedded = model.transformer.wte(idx) + model.transformer.wpe.weight
        assert torch.equal(model.transformer(idx), model.transformer.ln_f(embedded)[0])


def test_flops_count_what_is_multiplied():
    """6 for each parameter in a product and 12 C for each position that a layer sees."""
    C, L, T, V = 64, 5, 24, 65
    plain = replace(BASE, norm="rms", positions="rotary")
    products = L * 12 * C * C + V * C + (2 * L + 1) * C
    assert plain.flops_per_token == 6 * products + 12 * L * C * T
    assert replace(plain, tied=False).flops_per_token == plain.flops_per_token
    assert replace(plain, value_embeddings=True).flops_per_token == plain.flops_per_token
    assert replace(plain, window=8).flops_per_token == 6 * products + 12 * C * (3 * 8 + 2 * T)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"n_kv_head": 3}, "n_kv_head=3 does not divide n_head=4"),
        ({"n_kv_head": 8}, "n_kv_head=8 does not divide n_head=4"),
        ({"n_kv_head": -1}, "n_kv_head=-1 does not divide n_head=4"),
        ({"positions": "rotary", "n_embd": 60}, "heads of an even size"),
        ({"softcap": -1.0}, "softcap must be a number of at least 0"),
        ({"softcap": float("nan")}, "softcap must be a number of at least 0"),
        ({"window": -1}, "window must be at least 0"),
        ({"end_of_text": 65}, "end_of_text=65 is no token of 65"),
    ],
)
def test_options_that_make_no_model_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        replace(BASE, **wrong)
