"""patch_nanogpt: the same model, computed by the kernels."""

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastgpt import kernels
from fastgpt.integrations import patch_nanogpt, unpatch
from tests.integrations.nanogpt import (
    GPT,
    MLP,
    Block,
    CausalSelfAttention,
    Config,
    LayerNorm,
    NewGELU,
    WithoutDropout,
    WithReturnLogits,
)  # fmt: skip
from tests.integrations.surgery import classes, replaced


def data(config, B=3, T=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = T or config.block_size - 1
    start = torch.randint(config.vocab_size, (B, 1), generator=generator)
    tokens = (start + torch.arange(T + 1)) % config.vocab_size
    targets = tokens[:, 1:].clone()
    targets[0, ::5] = -1
    return tokens[:, :-1], targets


def made(**kwargs):
    return GPT(Config(**kwargs))


# ---- the same numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_patched_model_is_as_accurate_as_the_original(roughened, as_accurate, bias, dtype):
    model = roughened(made(bias=bias))
    idx, targets = data(model.config)
    as_accurate(model, patch_nanogpt, lambda m: m(idx, targets), dtype)


@pytest.mark.parametrize("norm", ["LayerNorm", "nn.LayerNorm"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_either_gelu_and_torchs_layer_norm_are_taken(roughened, as_accurate, approximate, norm):
    model = roughened(made())
    for module in list(model.modules()):
        if isinstance(module, MLP):
            module.gelu = nn.GELU(approximate)
        if isinstance(module, Block) and norm == "nn.LayerNorm":
            module.ln_1, module.ln_2 = (nn.LayerNorm(48, eps=1e-3) for _ in range(2))
    idx, targets = data(model.config)
    as_accurate(model, patch_nanogpt, lambda m: m(idx, targets), torch.float32)


@pytest.mark.parametrize("kind", [WithoutDropout, WithReturnLogits], ids=["build-nanogpt's", "llm.c's"])
def test_models_without_dropout_are_taken(roughened, as_accurate, kind):
    model = roughened(kind(Config()))
    idx, targets = data(model.config)
    targets[0, ::5] = -100 if kind is WithoutDropout else -1
    as_accurate(model, patch_nanogpt, lambda m: m(idx, targets), torch.float32)


def test_a_loss_that_ignores_another_index_than_is_known_is_refused():
    class Odd(WithoutDropout):
        def forward(self, idx, targets=None):
            logits = self.lm_head(self.hidden(idx))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=5)
            return logits, loss

    with pytest.raises(ValueError, match="it fails"):
        patch_nanogpt(Odd(Config()))


def test_logits_are_returned_in_training_where_they_are_asked_for():
    model = patch_nanogpt(WithReturnLogits(Config()))
    idx, targets = data(model.config)
    assert model(idx, targets, return_logits=True)[0].shape == (*idx.shape, model.config.vocab_size)
    assert model(idx, targets)[0] is None
    assert model(idx, targets, return_logits=False)[0] is None
    torch.testing.assert_close(model(idx, targets, return_logits=True)[1], model(idx, targets)[1])


def test_an_activation_that_only_has_the_name_of_a_gelu_is_refused():
    model = WithReturnLogits(Config())
    model.transformer.h[1].mlp.gelu.__class__ = type("NewGELU", (NewGELU,), {"forward": lambda self, x: F.relu(x)})
    with pytest.raises(ValueError, match="maths is not what it is taken for"):
        patch_nanogpt(model)


def test_twenty_steps_have_the_losses_of_the_original(losses):
    model = made()
    ours = patch_nanogpt(copy.deepcopy(model))
    batches = [data(model.config, seed=seed) for seed in range(20)]
    expected = losses(model, lambda m, batch: m(*batch)[1], batches)
    assert losses(ours, lambda m, batch: m(*batch)[1], batches) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]


def test_dropout_drops_in_training_and_not_in_evaluation():
    model = patch_nanogpt(made(dropout=0.4))
    idx, targets = data(model.config)
    assert model(idx, targets)[1] != model(idx, targets)[1]
    model.eval()
    assert model(idx, targets)[1] == model(idx, targets)[1]


# ---- what comes back ----


def test_training_returns_no_logits_and_evaluation_returns_them():
    model = patch_nanogpt(made())
    idx, targets = data(model.config)
    logits, loss = model(idx, targets)
    assert logits is None
    assert loss.dim() == 0
    assert model(idx)[0].shape == (3, 1, 131)
    logits, _ = model.eval()(idx, targets)
    assert logits.shape == (3, 31, 131)


def test_fp16_keeps_the_original_loss():
    model = patch_nanogpt(made())
    with torch.autocast("cpu", torch.float16):
        logits, _ = model(*data(model.config))
    assert logits is not None


def test_too_long_a_sequence_fails_as_before():
    model = patch_nanogpt(made())
    with pytest.raises(AssertionError, match="too long"):
        model(*data(model.config, T=33))


# ---- the same object ----


def test_unpatch_restores_classes_and_bits():
    model = made()
    idx, targets = data(model.config)
    before, expected = classes(model), model(idx, targets)
    assert unpatch(patch_nanogpt(model)) is model
    assert classes(model) == before
    got = model(idx, targets)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_names_parameters_and_random_numbers_are_left_alone():
    model = made(dropout=0.1)
    model.transformer.h[0].eval()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    patch_nanogpt(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert {c.__name__ for c in classes(model).values()} >= {"GPT", "Block", "CausalSelfAttention", "MLP", "Linear"}
    assert isinstance(model, GPT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_patched_and_can_be_unpatched(copied):
    model = patch_nanogpt(made())
    idx, targets = data(model.config)
    twin = copied(model)
    assert classes(twin) == classes(model)
    assert torch.equal(twin(idx, targets)[1], model(idx, targets)[1])
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert type(unpatch(twin)) is GPT
    assert type(model) is not GPT


def test_hooks_fire_on_modules_that_would_be_fused():
    model = patch_nanogpt(made())
    fired = []
    for name in ("transformer.h.0.ln_2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.gelu", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    logits, _ = model(*data(model.config))
    assert len(fired) == 4
    assert logits is not None  # the output layer was asked for


def test_a_layer_put_in_place_of_a_patched_one_is_used():
    model = patch_nanogpt(made())
    idx, targets = data(model.config)
    mlp = model.transformer.h[0].mlp
    mlp.c_fc = nn.Sequential(mlp.c_fc, nn.Hardtanh(-0.01, 0.01))
    changed = model(idx, targets)[1]
    mlp.c_fc = mlp.c_fc[0]
    assert changed != model(idx, targets)[1]


def test_compiles_without_a_graph_break():
    model = patch_nanogpt(made())
    idx, targets = data(model.config)
    _, expected = model(idx, targets)
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    _, loss = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_bf16_autocast_gives_the_loss_of_the_original_to_bf16s_precision(roughened):
    model = roughened(made())
    idx, targets = data(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = model(idx, targets)
        _, loss = patch_nanogpt(model)(idx, targets)
        loss.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=2e-2, atol=0.0)


def test_transformers_is_not_imported():
    code = "import sys, fastgpt.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- refusals ----


def rms_norm(self, x):
    return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def other_eps(self, x):
    return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


def rotary(self, x):
    q, k, v = self.heads(x)
    T, D = q.shape[2:]
    angle = torch.arange(T)[:, None] / 100 ** (torch.arange(D // 2) / (D // 2))

    def turn(t):
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)

    y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def window(self, x):
    q, k, v = self.heads(x)
    near = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-3)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def parallel(self, x):
    return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_1(x))


def squared(self, x):
    return self.dropout(self.c_proj(self.gelu(self.c_fc(x)).square()))


def in_training_only(self, x):
    x = x + self.attn(self.ln_1(x))
    return x + self.mlp(self.ln_2(x)) * (0.9 if self.training else 1.0)


def soft_cap(self, idx, targets=None):
    logits = 15.0 * torch.tanh(self.lm_head(self.hidden(idx)) / 15.0)
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def smoothed(self, idx, targets=None):
    logits = self.lm_head(self.hidden(idx))
    smoothing = 0.1 if self.training else 0.0
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=smoothing)


def ignoring_another_index(self, idx, targets=None):
    logits = self.lm_head(self.hidden(idx))
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def scaled_embedding(self, idx, targets=None):
    weight = self.transformer.wpe.weight
    weight.data.mul_(4.0)
    try:
        return GPT.forward(self, idx, targets)
    finally:
        weight.data.div_(4.0)


PLACES = {LayerNorm: "transformer.ln_f", CausalSelfAttention: "transformer.h.0", MLP: "transformer.h.0"}
PLACES |= {Block: "transformer.h.0", GPT: "model"}


@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        (LayerNorm, rms_norm),
        (LayerNorm, other_eps),
        (CausalSelfAttention, rotary),
        (CausalSelfAttention, window),
        (MLP, squared),
        (Block, parallel),
        (Block, in_training_only),
        (GPT, soft_cap),
        (GPT, smoothed),
        (GPT, scaled_embedding),
        (GPT, ignoring_another_index),
    ],
)
def test_other_maths_under_nanogpts_names_is_refused(kind, forward):
    model = made()
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    before = classes(model)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=f"^{PLACES[kind]}: (its maths is not|it fails on .* Target -1 is out of bounds)"
    ):
        patch_nanogpt(model)
    assert classes(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def changed(name, module):
    """Makes the model with one module replaced."""
    return lambda: replaced(made(), name, module())


def patched_twice():
    return patch_nanogpt(made())


def overridden():
    model = made()
    attn = model.transformer.h[1].attn
    attn.forward = types.MethodType(lambda self, x: x, attn)
    return model


def on_meta():
    with torch.device("meta"):
        return made()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "^model: has no lm_head, transformer"),
        (patched_twice, "^model: already patched"),
        (overridden, "^transformer.h.1.attn: its forward is overridden"),
        (on_meta, "^model: is on the meta device"),
        (changed("transformer.h.1.mlp.gelu", nn.SiLU), "^transformer.h.1.mlp.gelu: expected GELU, got SiLU"),
        (
            changed("transformer.h.0.attn.q_norm", nn.Identity),
            "^transformer.h.0.attn: has q_norm, which nanoGPT's does not have",
        ),
        (
            changed("transformer.h.0.attn.c_proj", nn.Identity),
            "^transformer.h.0.attn.c_proj: expected Linear, got Identity",
        ),
        (changed("lm_head", lambda: nn.Linear(48, 131)), "^lm_head: has a bias"),
        (changed("transformer.wpe", lambda: nn.Embedding(32, 40)), "^model: it fails on random input"),
        (changed("transformer.ln_f", lambda: nn.LayerNorm(40)), "^transformer.ln_f: expected a weight of 48"),
        (lambda: made(n_head=1, n_embd=264), "^transformer.h.0.attn: has heads of 264"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_name_and_left_as_it_was(build, message):
    model = build()
    before = classes(model)
    with pytest.raises(ValueError, match=message):
        patch_nanogpt(model)
    assert classes(model) == before


def test_a_module_that_has_become_something_else_is_not_unpatched_by_half():
    model = patch_nanogpt(made())
    linear = model.lm_head
    linear.__class__ = type("Sharded", (type(linear),), {})
    before = classes(model)
    with pytest.raises(ValueError, match=r"^lm_head: has become a Sharded"):
        unpatch(model)
    assert classes(model) == before
    assert isinstance(linear, kernels.Linear)


def test_unpatching_what_was_never_patched_does_nothing():
    model = made()
    before = classes(model)
    assert classes(unpatch(model)) == before
