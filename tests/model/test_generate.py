import math

import pytest
import torch

from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig
from fastgpt.model.generate import generate
from fastgpt.model.gpt import KVCache

CONFIG = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = GPT(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that what came before decides
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def prompt():
    return torch.randint(64, (3, 5), generator=torch.Generator().manual_seed(0))


def written(*args, **kwargs):
    return torch.stack(list(generate(*args, **kwargs)), dim=1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def greedy_without_cache(model, prompt, n):
    """The likeliest continuation, reading the whole context for every token."""
    block_size = model.config.block_size
    context, drawn = prompt[:, -block_size:], []
    for _ in range(n):
        if context.shape[1] > block_size:
            context = context[:, -block_size // 2 :]
        drawn.append(model(context).argmax(-1))
        context = torch.cat((context, drawn[-1][:, None]), dim=1)
    return torch.stack(drawn, dim=1)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_reading_everything_again(model, prompt):
    cache = KVCache(CONFIG, 3, model.transformer.wte.weight)
    torch.testing.assert_close(model(prompt, cache=cache), model(prompt), rtol=1e-4, atol=1e-4)
    context = prompt
    for token in torch.randint(64, (11, 3, 1), generator=seeded(1)):
        context = torch.cat((context, token), dim=1)
        torch.testing.assert_close(model(token, cache=cache), model(context), rtol=1e-4, atol=1e-4)
        assert cache.length == context.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(4, 7), (1, 3, 2, 5), (10, 1)])
def test_a_prompt_may_be_read_in_pieces(model, pieces):
    tokens = torch.randint(64, (3, sum(pieces)), generator=seeded(1))
    cache = KVCache(CONFIG, 3, model.transformer.wte.weight)
    for piece in tokens.split(pieces, dim=1):
        logits = model(piece, cache=cache)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_has_no_room_beyond_the_context(model):
    cache = KVCache(CONFIG, 1, model.transformer.wte.weight)
    model(torch.zeros(1, 16, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="17 positions, but block_size is 16"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_cached_generation_is_what_recomputing_every_token_gives(model, prompt):
    expected = greedy_without_cache(model, prompt, 11)
    assert len(expected.unique()) > 5  # a model that repeats one token would agree with anything
    assert torch.equal(written(model, prompt, 11, temperature=0.0), expected)


@pytest.mark.parametrize("T", [1, 15, 16, 40])
def test_generation_goes_on_beyond_the_context(model, T):
    prompt = torch.randint(64, (2, T), generator=seeded(2))
    expected = greedy_without_cache(model, prompt, 50)
    assert torch.equal(written(model, prompt, 50, temperature=0.0), expected)


def test_a_context_of_one_token_still_generates():
    model = GPT(GPTConfig(block_size=1, vocab_size=8, n_layer=1, n_head=1, n_embd=8)).eval()
    assert written(model, torch.zeros(1, 3, dtype=torch.int64), 5).shape == (1, 5)


def test_as_many_tokens_come_as_were_asked_for(model, prompt):
    tokens = list(generate(model, prompt, 7))
    assert [token.shape for token in tokens] == [(3,)] * 7
    assert all(token.dtype == torch.int64 for token in tokens)
    assert list(generate(model, prompt, 0)) == []


def test_top_1_is_temperature_0(model, prompt):
    greedy = written(model, prompt, 20, temperature=0.0)
    assert torch.equal(written(model, prompt, 20, temperature=5.0, top_k=1), greedy)
    assert not torch.equal(written(model, prompt, 20, temperature=5.0, top_k=2), greedy)


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-39, 1e-45, 1e-320, 5e-324])
def test_a_temperature_near_0_is_temperature_0(model, prompt, temperature):
    greedy = written(model, prompt, 20, temperature=0.0)
    assert torch.equal(written(model, prompt, 20, temperature=temperature), greedy)


def test_only_the_likeliest_k_tokens_are_drawn(model, prompt):
    with torch.no_grad():
        likeliest = set(model(prompt[:1]).topk(3).indices[0].tolist())
    drawn = written(model, prompt[:1].expand(300, -1), 1, temperature=100.0, top_k=3, generator=seeded(0))
    assert set(drawn.flatten().tolist()) == likeliest


def test_a_top_k_beyond_the_vocabulary_is_no_limit(model, prompt):
    unlimited = written(model, prompt, 10, generator=seeded(0))
    assert torch.equal(written(model, prompt, 10, top_k=1000, generator=seeded(0)), unlimited)


@pytest.mark.parametrize("temperature", [1e30, 1e300, math.inf])
def test_at_a_huge_temperature_the_likeliest_k_tokens_are_equally_likely(model, prompt, temperature):
    with torch.no_grad():
        likeliest = model(prompt[:1]).topk(3).indices[0]
    prompts = prompt[:1].expand(900, -1)
    drawn = written(model, prompts, 1, temperature=temperature, top_k=3, generator=seeded(0))
    counts = (drawn == likeliest).sum(0)
    assert counts.sum() == 900
    assert counts.min() > 250


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_refused(model, prompt, temperature):
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(RequestError, match="the model's logits are not finite"):
        next(generate(model, prompt, 1, temperature=temperature))


@pytest.mark.parametrize("temperature", [0.0, 100.0])
def test_ids_in_the_padding_of_the_vocabulary_are_never_drawn(model, temperature):
    prompts = torch.randint(40, (100, 4), generator=seeded(5))
    options = {"temperature": temperature, "generator": seeded(0)}
    assert written(model, prompts, 8, **options).max() >= 40  # they would be
    assert written(model, prompts, 8, vocab_size=40, **options).max() < 40


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, prompt):
    first, again, other = (written(model, prompt, 20, generator=seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_low_temperature_draws_the_likeliest_more_often(model, prompt):
    with torch.no_grad():
        likeliest = model(prompt[:1]).argmax()
    prompts = prompt[:1].expand(400, -1)
    cold, hot = (
        (written(model, prompts, 1, temperature=t, generator=seeded(0)) == likeliest).float().mean() for t in (0.5, 4.0)
    )
    assert cold > hot + 0.1


def test_generation_leaves_no_graph_behind(model, prompt):
    assert not any(token.requires_grad for token in generate(model, prompt, 2))
    assert torch.is_grad_enabled()


def test_top_p_keeps_the_likeliest_tokens_that_have_the_share_together(model, prompt):
    with torch.no_grad():
        probabilities = model(prompt).softmax(-1)
    ordered, order = probabilities.sort(-1, descending=True)
    n_kept = (ordered.cumsum(-1) - ordered < 0.5).sum(-1)
    assert n_kept.min() >= 1
    drawn = torch.stack([written(model, prompt, 1, top_p=0.5, generator=seeded(i))[:, 0] for i in range(200)])
    for row in range(3):
        assert set(drawn[:, row].tolist()) == set(order[row, : n_kept[row]].tolist())


def test_a_share_of_one_changes_nothing_and_a_tiny_one_takes_the_likeliest(model, prompt):
    plain = written(model, prompt, 6, generator=seeded(1))
    assert torch.equal(written(model, prompt, 6, top_p=1.0, generator=seeded(1)), plain)
    assert torch.equal(
        written(model, prompt, 6, top_p=1e-9, generator=seeded(1)), greedy_without_cache(model, prompt, 6)
    )


def test_a_repetition_penalty_makes_the_tokens_of_the_context_less_likely(model, prompt):
    with torch.no_grad():
        logits = model(prompt)
    expected = logits.clone()
    for row, tokens in enumerate(prompt.tolist()):
        for token in set(tokens):
            expected[row, token] = logits[row, token] / 1e6 if logits[row, token] > 0 else logits[row, token] * 1e6
    drawn = written(model, prompt, 1, temperature=0.0, repetition_penalty=1e6)
    assert torch.equal(drawn[:, 0], expected.argmax(-1))
    long = written(model, prompt, 10, temperature=0.0, repetition_penalty=1e6)
    for row in range(3):  # all logits of new tokens are larger than the suppressed ones, if one is positive
        assert len(set(long[row].tolist())) == 10


def test_a_cache_that_is_too_short_is_named(model):
    cache = KVCache(CONFIG, 1, model.transformer.wte.weight, 3)
    model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cache: it has room for 3 positions, and 4 are asked for"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    assert cache.length == 2
