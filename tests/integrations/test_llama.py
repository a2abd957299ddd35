"""patch_llama: transformers' Llama, computed by the kernels."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn

from fastgpt import kernels
from fastgpt.integrations import patch_llama, unpatch

pytest.importorskip("transformers", reason="patch_llama is about a model of transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from tests.integrations.gpt2 import close, labelled, same_gradients, tokens
from tests.integrations.surgery import classes, replaced

V = 131  # of the tokens in gpt2.py


def made(attn_implementation="sdpa", **kwargs):
    config = {
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48,
        "intermediate_size": 100, "vocab_size": V, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = LlamaForCausalLM._from_config(LlamaConfig(**config | kwargs), attn_implementation=attn_implementation)
    return model.train()


def twins(roughened, **kwargs):
    """A model and a patched copy of it."""
    model = roughened(made(**kwargs))
    return model, patch_llama(copy.deepcopy(model))


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel that only the patch calls was called."""
    counts = dict.fromkeys(("attention", "rotary", "rms_norm", "add_rms_norm", "swiglu", "linear_cross_entropy"), 0)

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    return counts


KINDS = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "heads of another width": {"head_dim": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_patched_model_is_as_accurate_as_the_original(roughened, as_accurate, kind, dtype):
    ids = tokens()

    def run(model):
        output = model(ids, labels=labelled(ids))
        return output.logits, output.loss

    as_accurate(roughened(made(**KINDS[kind])), patch_llama, run, dtype)


def test_scaled_rotary_positions_are_transformers_own(roughened, as_accurate):
    ids = tokens()
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}

    def run(model):
        output = model(ids, labels=ids)
        return output.logits, output.loss

    as_accurate(roughened(made(rope_parameters=scaled)), patch_llama, run, torch.float32)


def test_twenty_steps_have_the_losses_of_the_original(losses):
    model = made()
    ours = patch_llama(copy.deepcopy(model))
    batches = [tokens(seed=seed) for seed in range(20)]
    expected = losses(model, lambda m, ids: m(ids, labels=labelled(ids)).loss, batches)
    assert losses(ours, lambda m, ids: m(ids, labels=labelled(ids)).loss, batches) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]


def test_a_training_step_runs_on_the_kernels(calls):
    model = patch_llama(made())
    calls.update(dict.fromkeys(calls, 0))
    model(tokens(), labels=tokens()).loss.backward()
    assert calls == {
        "attention": 2, "rotary": 4, "rms_norm": 3, "add_rms_norm": 2, "swiglu": 2, "linear_cross_entropy": 1,
    }  # fmt: skip


def test_logits_of_a_training_step_are_computed_if_they_are_read(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    outputs = [m(ids, labels=labelled(ids)) for m in (model, ours)]
    close(outputs[1].logits.contiguous(), outputs[0].logits)
    for output in outputs:
        (output.loss + output.logits.square().mean()).backward()
    same_gradients(ours, model)


def test_padding_runs_in_transformers_own_attention(roughened, calls):
    model, ours = twins(roughened)
    calls.update(dict.fromkeys(calls, 0))
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, :5] = 0
    close(ours.eval()(ids, attention_mask=mask).logits[:, 5:], model.eval()(ids, attention_mask=mask).logits[:, 5:])
    assert calls["attention"] == 0


def test_it_generates_what_the_original_generates(roughened):
    model, ours = twins(roughened)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(tokens()), "pad_token_id": 0}
    expected = model.eval().generate(tokens(), **options)
    assert torch.equal(ours.eval().generate(tokens(), **options), expected)


def test_a_cache_is_filled_as_the_original_fills_it(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    caches = [m.eval()(ids, use_cache=True).past_key_values for m in (model, ours)]
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        close(b.keys, a.keys)
        close(b.values, a.values)
    for m, cache in zip((model, ours), caches, strict=True):
        m.logits_after = m(ids[:, :1], past_key_values=cache).logits
    close(ours.logits_after, model.logits_after)


def test_hidden_states_and_eager_attention_are_the_originals(roughened):
    model, ours = twins(roughened, attn_implementation="eager")
    ids = tokens()
    expected, got = (m.eval()(ids, output_hidden_states=True, output_attentions=True) for m in (model, ours))
    for a, b in zip(expected.hidden_states + expected.attentions, got.hidden_states + got.attentions, strict=True):
        close(b, a)


def test_unpatch_gives_every_module_its_class_back():
    model = made()
    before = classes(model)
    patch_llama(model)
    assert classes(model) != before
    assert classes(unpatch(model)) == before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_patched_too(again):
    model = patch_llama(made())
    other = again(model)
    assert torch.equal(other(tokens(), labels=tokens()).loss, model(tokens(), labels=tokens()).loss)
    assert not any(hasattr(type(m), "fastgpt_original") for m in unpatch(other).modules())


REFUSED = {
    "not a Llama": (lambda: nn.Linear(3, 3), "^model: expected transformers' LlamaForCausalLM, got Linear"),
    "twice": (lambda: patch_llama(made()), "^model: already patched"),
    "another activation": (lambda: made(hidden_act="gelu"), r"^model.layers.0.mlp.act_fn: GELUActivation is not SiLU"),
    "heads of an odd size": (lambda: made(num_attention_heads=16, num_key_value_heads=16), "has heads of 3"),
    "another norm": (
        lambda: replaced(made(), "model.layers.1.input_layernorm", nn.LayerNorm(48)),
        r"^model.layers.1.input_layernorm: expected LlamaRMSNorm, got LayerNorm",
    ),
    "another layer": (
        lambda: replaced(made(), "model.layers.0.mlp.up_proj", nn.Identity()),
        r"^model.layers.0.mlp.up_proj: expected Linear, got Identity",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_model_that_cannot_be_patched_is_refused_and_unchanged(case):
    build, message = REFUSED[case]
    model = build()
    before = classes(model)
    with pytest.raises(ValueError, match=message):
        patch_llama(model)
    assert classes(model) == before


def test_a_model_with_other_maths_is_refused():
    model = made()
    norm = type(model.model.norm)
    original = norm.forward
    try:
        norm.forward = lambda self, x: original(self, x) * 0.9
        before = classes(model)
        with pytest.raises(ValueError, match="maths is not what it is taken for"):
            patch_llama(model)
        assert classes(model) == before
    finally:
        norm.forward = original
