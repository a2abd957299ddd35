"""patch_gpt2: transformers' GPT-2, computed by the kernels."""

import copy
import pickle
import types
import warnings

import pytest
import torch
import torch.nn as nn

from fastgpt import kernels
from fastgpt.integrations import patch_gpt2, unpatch

pytest.importorskip("transformers", reason="patch_gpt2 is about a model of transformers")

import transformers
from transformers import GPT2LMHeadModel

from tests.integrations.gpt2 import T, V, close, labelled, made, same_gradients, tokens, twins
from tests.integrations.surgery import classes, replaced

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, about its next version


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel that only the patch calls was called."""
    counts = dict.fromkeys(("attention_qkv", "attention", "add_layer_norm", "gelu", "linear_cross_entropy"), 0)

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    return counts


# ---- the same numbers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_a_patched_model_is_as_accurate_as_the_original(roughened, as_accurate, activation, dtype):
    ids = tokens()

    def run(model):
        output = model(ids, labels=labelled(ids))
        return output.logits, output.loss

    as_accurate(roughened(made(activation_function=activation)), patch_gpt2, run, dtype)


@pytest.mark.parametrize(
    "flags", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=lambda f: next(iter(f))
)
def test_scores_are_scaled_as_transformers_scales_them(roughened, as_accurate, flags):
    ids = tokens()

    def run(model):
        output = model(ids, labels=ids)
        return output.logits, output.loss

    as_accurate(roughened(made(**flags)), patch_gpt2, run, torch.float32)


def test_twenty_steps_have_the_losses_of_the_original(losses):
    model = made()
    ours = patch_gpt2(copy.deepcopy(model))
    batches = [tokens(seed=seed) for seed in range(20)]
    expected = losses(model, lambda m, ids: m(ids, labels=labelled(ids)).loss, batches)
    assert losses(ours, lambda m, ids: m(ids, labels=labelled(ids)).loss, batches) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_losses_accumulated_over_batches_of_unequal_size_are_those_of_the_original(losses, as_tensor):
    def loss_of(model, ids):
        parts = [(ids[:1], labelled(ids[:1], every=2)), (ids[1:], ids[1:])]
        n = sum((labels[:, 1:] != -100).sum() for _, labels in parts)
        n = n if as_tensor else n.item()
        return sum(model(part, labels=labels, num_items_in_batch=n).loss for part, labels in parts)

    model = made()
    ours = patch_gpt2(copy.deepcopy(model))
    batches = [tokens(seed=seed) for seed in range(20)]
    assert losses(ours, loss_of, batches) == pytest.approx(losses(model, loss_of, batches), rel=1e-4)


def test_a_batch_without_any_label_has_loss_and_gradient_zero_when_its_items_are_counted_elsewhere(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    for m in (model, ours):
        loss = m(ids, labels=torch.full_like(ids, -100), num_items_in_batch=7).loss
        loss.backward()
        assert loss == 0.0
        assert all((p.grad == 0.0).all() for p in m.parameters())


def test_labels_shifted_by_the_caller_are_taken_as_they_are(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    arguments = {"labels": ids, "shift_labels": labelled(ids.roll(-2, dims=1))}
    close(ours(ids, **arguments).loss, model(ids, **arguments).loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_padded_batches_give_what_they_gave(roughened, side, mode):
    model, ours = (m.train(mode) for m in twins(roughened))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, slice(7) if side == "left" else slice(-7, None)] = 0
    arguments = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "output_hidden_states": True}
    arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    expected, got = model(ids, **arguments), ours(ids, **arguments)
    close(got.loss, expected.loss)
    close(got.hidden_states[-1], expected.hidden_states[-1])
    expected.loss.backward()
    got.loss.backward()
    same_gradients(ours, model)


@pytest.mark.parametrize("mask", [None, torch.ones(3, T, dtype=torch.long)], ids=["no mask", "a mask of ones"])
def test_every_kernel_is_used_where_nothing_is_padded(roughened, calls, mask):
    model, ours = twins(roughened)
    ids = tokens()
    calls.update(dict.fromkeys(calls, 0))
    got = ours(ids, attention_mask=mask, labels=ids)
    close(got.loss, model(ids, labels=ids).loss)
    assert calls.pop("attention_qkv") + calls.pop("attention") == 2
    assert calls == {"add_layer_norm": 2, "gelu": 2, "linear_cross_entropy": 1}


def test_packed_sequences_stay_apart(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    positions = torch.cat((torch.arange(10), torch.arange(T - 10))).expand_as(ids)
    for use_cache in (None, False):
        arguments = {"position_ids": positions, "labels": ids, "use_cache": use_cache}
        close(ours(ids, **arguments).loss, model(ids, **arguments).loss)


def test_four_dimensional_masks_and_embedded_inputs_give_what_they_gave(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    near = torch.ones(T, T, dtype=torch.bool).tril().triu(-4)[None, None]
    close(ours(ids, attention_mask=near, labels=ids).loss, model(ids, attention_mask=near, labels=ids).loss)
    embedded = model.transformer.wte(ids).detach()
    close(ours(inputs_embeds=embedded, labels=ids).loss, model(inputs_embeds=embedded, labels=ids).loss)


def test_eager_attention_stays_eager_and_gives_its_weights(roughened, calls):
    model, ours = twins(roughened, attn_implementation="eager")
    ids = tokens()
    expected = model(ids, labels=ids, output_attentions=True)
    got = ours(ids, labels=ids, output_attentions=True)
    close(got.loss, expected.loss)
    assert len(got.attentions) == 2
    close(got.attentions[1], expected.attentions[1])
    assert calls["attention_qkv"] == 0


def test_dropout_drops_in_training_and_not_in_evaluation():
    model = patch_gpt2(made(attn_pdrop=0.4))
    ids = tokens()
    assert model(ids, labels=ids).loss != model(ids, labels=ids).loss
    model.eval()
    assert model(ids, labels=ids).loss == model(ids, labels=ids).loss


# ---- generation ----


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_generation_writes_the_same_tokens(roughened, arguments):
    model, ours = (m.eval() for m in twins(roughened))
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in ({"attention_mask": torch.ones_like(ids)}, {"attention_mask": mask}):
            assert torch.equal(ours.generate(ids, **given, **arguments), model.generate(ids, **given, **arguments))


def test_a_cache_filled_in_two_parts_gives_the_logits_of_one(roughened, calls):
    model, ours = (m.eval() for m in twins(roughened))
    ids = tokens()
    calls.update(dict.fromkeys(calls, 0))
    first = ours(ids[:, :9])
    assert calls["attention"] == 2
    second = ours(ids[:, 9:], past_key_values=first.past_key_values)
    close(torch.cat((first.logits, second.logits), dim=1), model(ids).logits)


# ---- what comes back ----


def test_training_returns_loss_and_logits_and_a_cache_only_if_asked(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    output = ours(ids, labels=ids)
    assert list(output) == ["loss", "logits"]
    loss, _ = ours(ids, labels=ids, return_dict=False)
    close(loss, model(ids, labels=ids, return_dict=False)[0])
    output = ours(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert output.past_key_values.get_seq_length() == T
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize("flag", ["reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"])
def test_a_training_step_passes_what_transformers_own_tests_ask_of_it(flag):
    model = patch_gpt2(made(**{flag: True}))
    ids = tokens()
    output = model(ids, token_type_ids=torch.randint(2, ids.shape), labels=ids)
    assert output.loss.shape == ()
    assert output.logits.shape == (*ids.shape, V)
    output.loss.backward()


@pytest.mark.parametrize("arguments", [{"logits_to_keep": 5}, {}, {"return_dict": False}], ids=str)
def test_logits_come_back_in_evaluation_and_without_labels(roughened, arguments):
    model, ours = twins(roughened)
    ids = tokens()
    close(ours(ids, **arguments)[0], model(ids, **arguments)[0])
    labels = {"labels": ids[:, -5:] if "logits_to_keep" in arguments else ids}
    got, expected = (m.eval()(ids, **labels, **arguments) for m in (ours, model))
    close(got[0], expected[0])
    close(got[1], expected[1])


def test_logits_to_keep_and_a_loss_of_ones_own_are_computed_as_before(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    assert ours(ids, labels=ids[:, -5:], logits_to_keep=5).logits.shape == (3, 5, V)
    for m in (model, ours):
        m.loss_function = lambda logits, labels, **_: logits.square().mean()
    close(ours(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_fp16_keeps_the_original_loss():
    model = patch_gpt2(made())
    with torch.autocast("cpu", torch.float16):
        assert model(tokens(), labels=tokens()).logits is not None


# ---- the same object ----


def test_unpatch_restores_classes_and_bits(roughened):
    model = roughened(made())
    ids = tokens()
    before, expected = classes(model), model(ids, labels=ids)
    assert unpatch(patch_gpt2(model)) is model
    assert classes(model) == before
    got = model(ids, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


def test_names_parameters_modes_and_random_numbers_are_left_alone():
    model = made(attn_pdrop=0.1)
    model.transformer.h[0].eval()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    names = {name: (c.__name__, c.__module__) for name, c in classes(model).items()}
    patch_gpt2(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (c.__name__, c.__module__) for name, c in classes(model).items()} == names


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_patched_and_can_be_unpatched(copied):
    model = patch_gpt2(made())
    ids = tokens()
    twin = copied(model)
    assert classes(twin) == classes(model)
    assert torch.equal(twin(ids, labels=ids).loss, model(ids, labels=ids).loss)
    assert type(unpatch(twin)) is GPT2LMHeadModel
    assert type(model) is not GPT2LMHeadModel


def test_what_a_patched_model_saves_loads_as_an_ordinary_one(tmp_path):
    model = patch_gpt2(made())
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_hooks_fire_on_modules_that_would_be_fused():
    model = patch_gpt2(made())
    fired = []
    for name in ("transformer.h.0.ln_2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.act", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    assert model(tokens(), labels=tokens()).logits is not None  # the output layer was asked for
    assert len(fired) == 4


def test_a_layer_wrapped_after_the_patch_is_used():
    class Wrapped(nn.Module):
        """As LoRA does: the weight of what it wraps, and another product."""

        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 1.0

    model = patch_gpt2(made())
    ids = tokens()
    before, mlp = model(ids, labels=ids).loss, model.transformer.h[0].mlp
    mlp.c_fc = Wrapped(mlp.c_fc)
    assert (model(ids, labels=ids).loss - before).abs() > 1e-4


def test_compiles_without_a_graph_break_and_with_the_kernels(roughened, calls):
    model, ours = twins(roughened)
    ids = tokens()
    calls.update(dict.fromkeys(calls, 0))
    torch.compile(ours, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    assert calls["gelu"] == 2  # while it was traced
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 23):  # some before mask all they trace
        assert calls["attention"] == 2
    model(ids, labels=ids).loss.backward()
    same_gradients(ours, model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_no_inner_activations(
    roughened, use_reentrant, calls
):
    model, ours = twins(roughened)
    ids = tokens()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls.update(dict.fromkeys(calls, 0))
    ours(ids, labels=ids).loss.backward()
    assert calls["gelu"] == 4  # of two layers, each once more in the backward
    model(ids, labels=ids).loss.backward()
    same_gradients(ours, model)


def test_bf16_autocast_gives_the_loss_of_the_original_to_bf16s_precision(roughened):
    model, ours = twins(roughened)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = ours(ids, labels=ids).loss, model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0.0)
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


# ---- refusals ----


def changed(name, module):
    """Makes GPT-2 with one module replaced."""
    return lambda: replaced(made(), name, module())


def overridden():
    model = made()
    mlp = model.transformer.h[1].mlp
    mlp.forward = types.MethodType(lambda self, x: x, mlp)
    return model


def subclassed():
    class Mine(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return Mine(made().config)


def on_meta():
    with torch.device("meta"):
        return made()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "^model: expected transformers' GPT2LMHeadModel, got Linear"),
        (lambda: made().transformer, "^model: expected transformers' GPT2LMHeadModel, got GPT2Model"),
        (subclassed, "^model: expected transformers' GPT2LMHeadModel, got Mine"),
        (lambda: patch_gpt2(made()), "^model: already patched"),
        (lambda: made(add_cross_attention=True), "^model: has cross attention"),
        (lambda: made(activation_function="relu"), "^transformer.h.0.mlp.act: ReLU is not a GELU"),
        (lambda: made(n_head=1, n_embd=264), "^transformer.h.0.attn: has heads of 264"),
        (overridden, "^transformer.h.1.mlp: its forward is overridden"),
        (on_meta, "^model: is on the meta device"),
        (
            changed("transformer.h.1.attn.c_attn", lambda: nn.Linear(48, 144)),
            "^transformer.h.1.attn.c_attn: expected Conv1D, got Linear",
        ),
        (changed("lm_head", lambda: nn.Linear(48, V)), "^lm_head: has a bias"),
        (changed("transformer.ln_f", nn.Identity), "^transformer.ln_f: expected LayerNorm, got Identity"),
    ],
)
def test_what_cannot_be_patched_is_refused_by_name_and_left_as_it_was(build, message):
    model = build()
    before = classes(model)
    with pytest.raises(ValueError, match=message):
        patch_gpt2(model)
    assert classes(model) == before


def test_a_version_of_transformers_that_computes_otherwise_is_refused(monkeypatch):
    model = made()
    before = classes(model)
    original = GPT2LMHeadModel.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.loss = output.loss * (1.01 if self.training else 1.0)
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    with pytest.raises(ValueError, match=r"^model: its maths .* loss would be off"):
        patch_gpt2(model)
    assert classes(model) == before


def test_a_version_of_transformers_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.56.2")
    with pytest.raises(ValueError, match=r"^model: transformers 4.56.2 is too old; 4.57"):
        patch_gpt2(made())
