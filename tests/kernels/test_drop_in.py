"""Calls that PyTorch's own functions, modules and optimizer take, given to ours unchanged."""

import inspect

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import skip_init

from fastgpt.kernels import (
    GELU,
    CrossEntropyLoss,
    Embedding,
    FusedAdamW,
    LayerNorm,
    Linear,
    LinearCrossEntropyLoss,
    RMSNorm,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
    embedding,
    geglu,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    relu2,
    rms_norm,
    swiglu,
)

# ---- modules ----

MODULES = {
    "Linear": (Linear, nn.Linear, (4, 2), torch.randn(3, 4)),
    "Embedding": (Embedding, nn.Embedding, (5, 4), torch.tensor([0, 4, 2])),
    "LayerNorm": (LayerNorm, nn.LayerNorm, (4,), torch.randn(3, 4)),
    "RMSNorm": (RMSNorm, nn.RMSNorm, (4,), torch.randn(3, 4)),
    "GELU": (GELU, nn.GELU, (), torch.randn(3, 4)),
}
modules = pytest.mark.parametrize(("ours", "theirs", "args", "x"), MODULES.values(), ids=list(MODULES))


@modules
def test_a_module_takes_its_input_by_name(ours, theirs, args, x):
    module, peer = ours(*args), theirs(*args)
    peer.load_state_dict(module.state_dict())
    (name,) = inspect.signature(peer.forward).parameters
    torch.testing.assert_close(module(**{name: x}), peer(**{name: x}))


@modules
def test_the_constructor_shows_torch_nns_signature(ours, theirs, args, x):
    assert inspect.signature(ours).parameters.keys() == inspect.signature(theirs).parameters.keys()


@pytest.mark.parametrize(
    ("module", "args"), [(Linear, (4, 2)), (Embedding, (5, 4)), (LayerNorm, (4,)), (RMSNorm, (4,))]
)
def test_initialisation_may_be_skipped(module, args):
    assert skip_init(module, *args).weight.device.type == "cpu"


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_a_norm_may_have_no_parameters(ours, theirs):
    module, peer = (kind(4, elementwise_affine=False) for kind in (ours, theirs))
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), peer(x))
    assert list(module.parameters()) == []


def test_a_loss_may_be_given_every_argument_at_its_default():
    for ours, theirs, args in (
        (CrossEntropyLoss, nn.CrossEntropyLoss, ()),
        (LinearCrossEntropyLoss, getattr(nn, "LinearCrossEntropyLoss", None), (4, 5)),
    ):
        if theirs is not None:  # torch.nn has no LinearCrossEntropyLoss before 2.13
            parameters = inspect.signature(theirs).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
            assert ours(*args, **defaults).ignore_index == -100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out_features", (2,)),
        ("bias", True),
        ("options", object()),
    ],
)
def test_an_argument_that_only_torch_nn_supports_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}.*do not support it; use torch.nn"):
        LinearCrossEntropyLoss(4, 5, **{name: value})


# ---- the optimizer ----


def test_the_optimizer_may_be_given_every_argument_of_pytorchs_at_its_default():
    parameters = list(inspect.signature(torch.optim.AdamW).parameters.values())[1:]
    weight, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = FusedAdamW([weight], **{p.name: p.default for p in parameters})
    theirs = torch.optim.AdamW([other])
    for p, optimizer in ((weight, ours), (other, theirs)):
        p.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    torch.testing.assert_close(weight, other)


@pytest.mark.parametrize("option", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}])
def test_the_choice_among_pytorchs_kernels_has_no_effect(option):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    FusedAdamW([weight], **option).step()
    assert (weight < 1).all()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_an_option_that_is_set_later_is_refused_too(option):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = FusedAdamW([weight])
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=f"^{option}: FusedAdamW supports only False"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))


# ---- functions ----


@pytest.mark.parametrize(
    "function", [layer_norm, lambda x, **options: add_layer_norm(x, torch.zeros_like(x), **options)[0]]
)
def test_layer_norm_takes_no_weight(device, dtype, rule, function):
    x = torch.randn(5, 33, device=device).to(dtype)
    rule.accuracy(lambda x: function(x), lambda x: F.layer_norm(x, x.shape[-1:]), [x])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_an_rms_norm_without_an_eps_has_torch_nns(name):
    """That of the arithmetic, not of the input: a row so small shows which."""
    x = 1e-4 * torch.randn(5, 33).to(getattr(torch, name))
    torch.testing.assert_close(RMSNorm(33, dtype=x.dtype)(x), torch.nn.RMSNorm(33, dtype=x.dtype)(x))


def test_an_rms_norm_loads_the_weight_of_transformers_norms():
    """Whose modules have one parameter, ``weight``, too."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs, ours = llama.LlamaRMSNorm(33, eps=1e-5), RMSNorm(33, eps=1e-5)
    with torch.no_grad():
        theirs.weight.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 33)
    torch.testing.assert_close(ours(x), theirs(x))


def test_embedding_takes_int32():
    weight = torch.randn(5, 3, requires_grad=True)
    index = torch.tensor([[4, 0, 4]], dtype=torch.int32)
    result = embedding(index, weight)
    assert torch.equal(result, F.embedding(index, weight))
    result.sum().backward()
    assert weight.grad.sum(1).tolist() == [3.0, 0.0, 0.0, 0.0, 6.0]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_takes_queries_without_heads(device, dtype, causal):
    q, k, v = (torch.randn(2, 9, 8, device=device).to(dtype) for _ in range(3))
    result = attention(q, k, v, causal=causal)
    assert torch.equal(result, attention(*(t.unsqueeze(1) for t in (q, k, v)), causal=causal).squeeze(1))
    assert result.shape == F.scaled_dot_product_attention(q, k, v, is_causal=causal).shape


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (0, 5, 4)])
def test_attention_takes_an_empty_batch(device, dtype, shape):
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
    result = attention(*leaves)
    assert (result.shape, result.dtype) == (shape, dtype)
    result.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [shape] * 3
    qkv = torch.randn(0, 5, 12, device=device).to(dtype).requires_grad_()
    packed = attention_qkv(qkv, 2)
    assert (packed.shape, packed.dtype) == ((0, 5, 4), dtype)
    packed.sum().backward()
    assert qkv.grad.shape == qkv.shape


def rows(*shape):
    """Large enough that threads share the work."""
    return torch.randn(*shape)


COPY_ON_WRITE = {
    "layer_norm": lambda t: layer_norm(t(rows(512, 256)), t(rows(256)), t(rows(256))),
    "add_layer_norm": lambda t: add_layer_norm(t(rows(512, 256)), t(rows(512, 256)), t(rows(256)))[0],
    "rms_norm": lambda t: rms_norm(t(rows(512, 256)), t(rows(256))),
    "add_rms_norm": lambda t: add_rms_norm(t(rows(512, 256)), t(rows(512, 256)), t(rows(256)))[0],
    "relu2": lambda t: relu2(t(rows(512, 256))),
    "swiglu": lambda t: swiglu(t(rows(512, 256)), t(rows(512, 256))),
    "geglu": lambda t: geglu(t(rows(512, 256))),
    "gelu": lambda t: gelu(t(rows(512, 256))),
    "attention": lambda t: attention(t(rows(2, 4, 64, 16)), t(rows(2, 4, 64, 16)), t(rows(2, 4, 64, 16))),
    "attention_qkv": lambda t: attention_qkv(t(rows(2, 64, 96)), 4),
    "cross_entropy": lambda t: cross_entropy(t(rows(512, 256)), t(torch.arange(512) % 256)),
    "cross_entropy, options": lambda t: cross_entropy(
        t(rows(512, 256)), t(torch.arange(512) % 256), weight=torch._lazy_clone(torch.ones(256)), label_smoothing=0.1
    ),
    "linear": lambda t: linear(t(rows(512, 256)), t(rows(128, 256)), t(rows(128))),
    "linear_cross_entropy": lambda t: linear_cross_entropy(
        t(rows(512, 32)), t(rows(64, 32)), t(torch.arange(512) % 64)
    ),
    "linear_cross_entropy, of each row": lambda t: linear_cross_entropy(
        t(rows(512, 32)), t(rows(64, 32)), t(torch.arange(512) % 64), reduction="none", softcap=3.0
    ),
}


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("name", COPY_ON_WRITE)
def test_inputs_may_be_copies_on_write(backend, name):
    """``torch._lazy_clone``; PyTorch refuses to copy one inside a parallel region."""

    def gradients(prepare):
        torch.manual_seed(3)
        leaves = []

        def leaf(t):
            leaves.append(prepare(t).requires_grad_(t.is_floating_point()))
            return leaves[-1]

        result = COPY_ON_WRITE[name](leaf)
        dout = prepare(torch.ones_like(result))
        return [result, *torch.autograd.grad(result, [t for t in leaves if t.requires_grad], dout)]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lazy, plain = gradients(torch._lazy_clone), gradients(torch.clone)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(lazy, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_parameters_gradients_and_moments_may_be_copies_on_write(backend, state_bits):
    weight = nn.Parameter(torch._lazy_clone(torch.ones(1 << 17)))
    weight.grad = torch._lazy_clone(torch.ones(1 << 17))
    optimizer = FusedAdamW([weight], max_grad_norm=1.0, state_bits=state_bits)
    optimizer.step()
    optimizer.state[weight] = {name: torch._lazy_clone(t) for name, t in optimizer.state[weight].items()}
    before = weight.detach().clone()
    optimizer.step()
    assert (weight < before).all()
