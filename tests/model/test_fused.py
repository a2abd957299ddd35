from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.kernels import use_backend
from fastgpt.kernels.dry_run import dry_run
from fastgpt.model import GPT, GPTConfig, fused
from fastgpt.train.parameters import ParameterStore

TINY = GPTConfig(block_size=24, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
B = 3


def step(config, *, recompute=None, store=False, dtype=torch.float32, frozen=(), prepare=lambda model: None):
    """Loss and gradients of a step, by functions that recompute so much, or without one kernel after the other."""
    torch.manual_seed(1)
    model = GPT(config, recompute or "cheap")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen) if frozen else True)
    if store:
        flat = ParameterStore(model, dtype)
    else:
        model.to(dtype)
    prepare(model)
    x, y = torch.randint(config.vocab_size, (2, B, config.block_size))
    with pytest.MonkeyPatch.context() as patch:
        if recompute is None:
            patch.setattr(fused, "available", lambda x: False)
        loss = model(x, y)
        loss.backward()
    if store:
        return loss.detach(), flat.named(flat.grad)
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", fused.RECOMPUTE)
def test_a_branch_gives_every_bit_that_its_kernels_give_one_by_one(recompute, bias, dropout, store, dtype):
    config = replace(TINY, bias=bias, dropout=dropout)
    loss, gradients = step(config, recompute=recompute, store=store, dtype=dtype)
    expected_loss, expected = step(config, store=store, dtype=dtype)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradients[name], gradient), name


class _Arguments(TorchDispatchMode):
    """Notes what attention's backward is called with."""

    def __init__(self):
        super().__init__()
        self.last = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastgpt.attention_qkv_backward.default:
            self.last.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [*fused.RECOMPUTE, None])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_layer_is_told_whether_its_gradient_must_be_the_same_each_time(monkeypatch, recompute, deterministic):
    model = GPT(TINY, recompute or "cheap", deterministic)
    if recompute is None:
        monkeypatch.setattr(fused, "available", lambda x: False)
    with use_backend("auto"), dry_run("cuda"), torch.device("meta"), _Arguments() as arguments:
        model.to("meta")
        x, y = torch.zeros(2, B, TINY.block_size, dtype=torch.int64)
        model(x, y).backward()
    assert [last is False for last in arguments.last] == [not deterministic] * TINY.n_layer


@pytest.mark.parametrize("recompute", fused.RECOMPUTE)
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


def double_the_output(model):
    """By a hook between a block and the norm behind it."""
    model.transformer.h[0].register_forward_hook(lambda block, given, output: (2 * output[0], output[1]))


def use_the_output_twice(model):
    """Another term of the loss takes it, by way of the sum that the next block adds to."""
    model.transformer.h[0].register_forward_hook(lambda block, given, output: (output[0], output[1] + output[0].sin()))


def triple_the_gradient(model):
    model.transformer.h[0].register_forward_hook(
        lambda block, given, output: (output[0].register_hook(lambda gradient: 3 * gradient), None)[1]
    )


@pytest.mark.parametrize("prepare", [lambda model: None, double_the_output, use_the_output_twice, triple_the_gradient])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [*fused.RECOMPUTE, None])
def test_gradients_in_the_store_are_those_that_autograd_gives_without_one(recompute, dropout, prepare):
    config = replace(TINY, dropout=dropout)
    _, gradients = step(config, recompute=recompute, store=True, prepare=prepare)
    _, expected = step(config, recompute=recompute, prepare=prepare)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_without_dropout_no_projection_into_the_residual_stream_sums_its_biass_gradient(monkeypatch):
    summed = []
    product = fused.weight_and_bias_gradient
    monkeypatch.setattr(
        fused, "weight_and_bias_gradient", lambda *args: summed.append((args[2].shape, args[-1])) or product(*args)
    )
    C = TINY.n_embd
    for recompute in fused.RECOMPUTE:
        for dropout in (0.0, 0.3):
            summed.clear()
            step(replace(TINY, dropout=dropout), recompute=recompute, store=True)
            into_the_stream = [asked for shape, asked in summed if shape[0] == C]
            assert into_the_stream == [bool(dropout)] * (2 * TINY.n_layer)


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
            patch.setattr(fused, "available", lambda x: False)
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


@pytest.mark.parametrize("recompute", fused.RECOMPUTE)
def test_a_branch_refuses_a_second_derivative(recompute):
    model = GPT(TINY, recompute)
    x, y = torch.randint(TINY.vocab_size, (2, B, TINY.block_size))
    weight = model.transformer.h[0].mlp.c_fc.weight
    (gradient,) = torch.autograd.grad(model(x, y), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()
