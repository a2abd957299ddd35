from dataclasses import replace

import pytest
import torch

from fastgpt.model import GPT, GPTConfig, branches
from fastgpt.train.parameters import ParameterStore

TINY = GPTConfig(block_size=24, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
B = 3


def step(config, *, recompute=None, store=False, dtype=torch.float32, frozen=()):
    """Loss and gradients of a step, by branches that recompute so much, or without one kernel after the other."""
    torch.manual_seed(1)
    model = GPT(config, recompute or "cheap")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen) if frozen else True)
    if store:
        gradients = ParameterStore(model, dtype).grad
    else:
        model.to(dtype)
    x, y = torch.randint(config.vocab_size, (2, B, config.block_size))
    with pytest.MonkeyPatch.context() as patch:
        if recompute is None:
            patch.setattr(branches, "available", lambda x: False)
        loss = model(x, y)
        loss.backward()
    if store:
        return loss.detach(), {"all": gradients}
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", branches.RECOMPUTE)
def test_a_branch_gives_every_bit_that_its_kernels_give_one_by_one(recompute, bias, dropout, store, dtype):
    config = replace(TINY, bias=bias, dropout=dropout)
    loss, gradients = step(config, recompute=recompute, store=store, dtype=dtype)
    expected_loss, expected = step(config, store=store, dtype=dtype)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("recompute", branches.RECOMPUTE)
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    "frozen", [("c_attn.weight",), ("c_proj.bias", "ln_2.weight"), ("c_fc.weight", "c_fc.bias", "c_proj.weight")]
)
def test_a_frozen_parameter_gets_no_gradient_and_the_others_theirs(frozen, store, recompute):
    _, gradients = step(TINY, recompute=recompute, store=store, frozen=frozen)
    _, expected = step(TINY, store=store, frozen=frozen)
    for name, gradient in expected.items():
        if gradient is None:
            assert name.endswith(frozen)
            assert gradients[name] is None
        else:
            assert torch.equal(gradients[name], gradient), name


def floats_kept(config, recompute):
    """Floats of B * T * C and more that a forward keeps for the backward, in units of B * T * C."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    model = GPT(config, recompute or "cheap")
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    x, y = torch.randint(config.vocab_size, (2, B, config.block_size))
    unit = B * config.block_size * config.n_embd
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), pytest.MonkeyPatch.context() as patch:
        if recompute is None:
            patch.setattr(branches, "available", lambda x: False)
        loss = model(x, y)  # holds the graph, so that no memory is used twice
    assert loss.requires_grad
    return sum(n for address, n in kept.items() if address not in parameters and n >= unit) / unit


@pytest.mark.parametrize(("recompute", "per_layer"), [("none", 16), ("cheap", 10), ("block", 1), (None, 16)])
def test_a_layer_keeps_as_many_floats_as_stated(recompute, per_layer):
    one, three = (floats_kept(replace(TINY, n_layer=n), recompute) for n in (1, 3))
    assert three - one == 2 * per_layer


def test_another_word_for_what_is_recomputed_is_refused():
    with pytest.raises(ValueError, match="recompute: 'all' is none of none, cheap, block"):
        GPT(TINY, "all")


@pytest.mark.parametrize("recompute", branches.RECOMPUTE)
def test_a_branch_refuses_a_second_derivative(recompute):
    model = GPT(TINY, recompute)
    x, y = torch.randint(TINY.vocab_size, (2, B, TINY.block_size))
    weight = model.transformer.h[0].mlp.c_fc.weight
    (gradient,) = torch.autograd.grad(model(x, y), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()
