import math

import pytest
import torch

from fastgpt.model import GPT, GPTConfig
from fastgpt.model.reference import ReferenceGPT

TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


def tokens(config, B=3, T=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (B, T or config.block_size)
    return tuple(torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2))


def twins(config, std=0.2):
    """A GPT and a ReferenceGPT of the same weights, wide enough apart for attention to matter."""
    torch.manual_seed(1)
    model, reference = GPT(config), ReferenceGPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    reference.load_state_dict(model.state_dict())
    return model, reference


def gradients(model, x, y):
    model.zero_grad(set_to_none=True)
    loss = model(x, y)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_agree(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} takes no part in the loss"
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("bias", [True, False])
def test_both_models_have_the_same_parameters_by_name_and_shape(bias):
    config = GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16, bias=bias)
    shapes = [{k: v.shape for k, v in kind(config).state_dict().items()} for kind in (GPT, ReferenceGPT)]
    assert shapes[0] == shapes[1]
    assert any("bias" in name for name in shapes[0]) == bias


def test_parameter_names_are_nanogpts():
    config = GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16)
    layer = {f"h.0.{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")}  # fmt: skip
    expected = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"} | layer
    assert set(GPT(config).state_dict()) == {f"transformer.{name}" for name in expected}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "T"), [(2, 2, 32, 16), (1, 3, 21, 13), (3, 1, 24, 1)])
def test_the_kernels_give_the_loss_and_gradients_of_plain_pytorch(n_layer, n_head, n_embd, T, bias):
    config = GPTConfig(block_size=16, vocab_size=65, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias)
    model, reference = twins(config)
    x, y = tokens(config, T=T)
    loss, grads = gradients(model, x, y)
    expected_loss, expected = gradients(reference, x, y)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    if T == 1:  # one key has all the weight whatever its score, so queries and keys get no gradient
        for named in (grads, expected):
            for name in [name for name in named if "c_attn" in name]:
                torch.testing.assert_close(named[name][: 2 * n_embd].abs().max(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_gradients_agree(grads, expected, 1e-5)


def test_positions_without_a_target_take_no_part_in_the_loss():
    model, reference = twins(TINY)
    x, y = tokens(TINY)
    y[0, 3:], y[2] = -1, -1
    loss, grads = gradients(model, x, y)
    expected_loss, expected = gradients(reference, x, y)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert_gradients_agree(grads, expected, 1e-5)


def test_without_targets_the_logits_of_the_next_token_come_out():
    model, reference = twins(TINY)
    x, _ = tokens(TINY, T=7)
    logits = model(x)
    assert logits.shape == (3, 65)
    torch.testing.assert_close(logits, reference(x), rtol=1e-4, atol=1e-5)


def test_logits_and_loss_speak_of_the_same_distribution():
    model, _ = twins(TINY)
    x, y = tokens(TINY, B=1)
    y[:, :-1] = -1
    expected = torch.nn.functional.cross_entropy(model(x), y[:, -1])
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_layer", [1, 8])
def test_weights_start_as_gpt2s_do(n_layer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=n_layer, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            sampling_error = 1 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() / expected - 1) < 5 * sampling_error, name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
        elif name.endswith(".bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_the_untrained_loss_is_that_of_guessing():
    torch.manual_seed(0)
    x, y = tokens(TINY, B=32)
    assert abs(GPT(TINY)(x, y).item() - math.log(65)) < 0.02


def test_the_output_layer_is_the_token_embedding():
    model, _ = twins(TINY)
    assert sum(parameter.shape == (65, 32) for parameter in model.parameters()) == 1
    x, y = tokens(TINY)
    x, y = x % 30, y % 30
    before = model(x)
    with torch.no_grad():
        model.transformer.wte.weight[40] *= 2.0  # no input has this token: only its logit may change
    change = model(x) - before
    torch.testing.assert_close(change[:, 40], before[:, 40], rtol=1e-4, atol=1e-5)
    assert torch.equal(change[:, torch.arange(65) != 40], torch.zeros(3, 64))
    _, grads = gradients(model, x, y)
    assert grads["transformer.wte.weight"][40].abs().max() > 0  # through the softmax alone


@pytest.mark.parametrize("position", [0, 7, 14])
def test_a_later_token_leaves_earlier_losses_alone(position):
    model, _ = twins(TINY)
    x, y = tokens(TINY)
    targets = torch.full_like(y, -1)
    targets[:, : position + 1] = y[:, : position + 1]
    later, present = x.clone(), x.clone()
    later[:, position + 1 :] = (x[:, position + 1 :] + 1) % 65
    present[:, position] = (x[:, position] + 1) % 65
    loss = model(x, targets)
    torch.testing.assert_close(model(later, targets), loss, rtol=1e-6, atol=0)
    assert (model(present, targets) - loss).abs() > 1e-3


def test_dropout_acts_in_training_and_not_in_evaluation():
    model, reference = twins(GPTConfig(**{**vars(TINY), "dropout": 0.3}))
    x, y = tokens(TINY)
    torch.manual_seed(0)
    first, second = model(x, y), model(x, y)
    assert (first - second).abs() > 1e-4
    torch.manual_seed(0)
    assert torch.equal(model(x, y), first)
    model.eval()
    reference.eval()
    evaluated = model(x, y)
    assert torch.equal(model(x, y), evaluated)
    torch.testing.assert_close(evaluated, reference(x, y), rtol=1e-6, atol=1e-6)


def test_dropout_acts_on_attention_weights_too(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_: x)  # nothing but attention's is left
    model, _ = twins(TINY)
    for block in model.transformer.h:
        block.attn.dropout = 0.5
    x, y = tokens(TINY)
    assert model(x, y) != model(x, y)
    model.eval()
    assert model(x, y) == model(x, y)


@pytest.mark.parametrize("with_targets", [True, False])
def test_a_sequence_longer_than_the_context_is_refused(with_targets):
    x, y = tokens(TINY, T=17)
    with pytest.raises(ValueError, match=r"17 positions, but block_size is 16"):
        GPT(TINY)(x, y if with_targets else None)


def test_a_shorter_sequence_than_the_context_is_taken():
    model, reference = twins(TINY)
    x, y = tokens(TINY, T=5)
    torch.testing.assert_close(model(x, y), reference(x, y), rtol=1e-6, atol=1e-6)


def test_a_bfloat16_model_stays_near_its_float32_twin():
    model, reference = twins(TINY, std=0.05)
    x, y = tokens(TINY)
    expected_loss, expected = gradients(reference, x, y)
    loss, grads = gradients(model.bfloat16(), x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0)
    assert_gradients_agree({name: g.float() for name, g in grads.items()}, expected, 0.1)


def test_the_compiled_model_is_one_graph_with_the_same_loss_and_gradients():
    config = GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16)
    model, _ = twins(config)
    x, y = tokens(config)
    expected_loss, expected = gradients(model, x, y)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss = compiled(x, y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-6, atol=1e-6)
    assert_gradients_agree({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)
