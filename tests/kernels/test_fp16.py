"""fp16, which of the compiled backends only Triton takes: every function by the error rule."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import (
    FusedAdamW,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
    dispatch,
    geglu,
    gelu,
    layer_norm,
    linear_cross_entropy,
    relu2,
    rms_norm,
    rms_norm_rotary,
    rotary,
    rotary_qkv,
    rotary_tables,
    swiglu,
)
from tests.kernels import local, peers

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def half(*shape):
    return torch.randn(shape).half()


def plain_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_attention_qkv(qkv):
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, 2, C3 // 6).permute(2, 0, 3, 1, 4)
    return plain_attention(q, k, v).transpose(1, 2).reshape(B, T, C3 // 3)


def in_fp32(function):
    """Plain PyTorch's function with its arithmetic in fp32, as ours has it."""
    return lambda *t: function(*(x if x.dtype == torch.float64 else x.float() for x in t))


ANGLES = rotary_tables(63, 34)


def angles(x):
    return [t.to(x.device) for t in ANGLES]


def turned(x):
    """By tables of fp32, rounded once."""
    cos, sin = (t.unsqueeze(1) for t in angles(x))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def plain_rotary_qkv(x):
    heads, v = x.unflatten(-1, (5, 34)).split([4, 1], 2)
    return torch.cat([turned(F.rms_norm(heads, (34,), eps=1e-6)), v], 2).flatten(-2)


def targets(n):
    return torch.arange(n) % 50


CASES = {
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), [(63, 127), (127,), (127,)]),
    "add_layer_norm": (
        lambda *t: add_layer_norm(*t)[0],
        lambda x, r, w: F.layer_norm(x + r, x.shape[-1:], w),
        [(63, 127), (63, 127), (127,)],
    ),
    "rms_norm": (rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), [(63, 127), (127,)]),
    "add_rms_norm": (
        lambda *t: add_rms_norm(*t)[0],
        lambda x, r, w: F.rms_norm(x + r, x.shape[-1:], w, 1e-6),
        [(63, 127), (63, 127), (127,)],
    ),
    "relu2": (relu2, lambda x: F.relu(x).square(), [(63, 127)]),
    "swiglu": (swiglu, in_fp32(lambda gate, up: F.silu(gate) * up), [(63, 127), (63, 127)]),
    "geglu, packed": (
        geglu,
        in_fp32(lambda x: F.gelu(x[:, :127], approximate="tanh") * x[:, 127:]),
        [(63, 254)],
    ),
    "gelu": (gelu, lambda x: F.gelu(x, approximate="tanh"), [(63, 127)]),
    "gelu with bias": (
        lambda x, b: gelu(x, bias=b),
        in_fp32(lambda x, b: F.gelu(x + b, approximate="tanh")),
        [(63, 127), (127,)],
    ),
    "attention": (attention, plain_attention, [(1, 2, 130, 40)] * 3),
    "attention, single pass": (lambda *t: attention(*t, deterministic=False), plain_attention, [(1, 2, 130, 40)] * 3),
    "attention_qkv": (lambda t: attention_qkv(t, 2), plain_attention_qkv, [(1, 130, 96)]),
    "rotary": (lambda t: rotary(t, *angles(t)), turned, [(1, 63, 3, 34)]),
    "rms_norm_rotary": (
        lambda t, w: rms_norm_rotary(t, *angles(t), w),
        lambda t, w: turned(F.rms_norm(t, (34,), w, 1e-6)),
        [(1, 63, 3, 34), (34,)],
    ),
    "rotary_qkv": (
        lambda t: rotary_qkv(t, 3, *angles(t), n_kv_head=1, qk_norm=True),
        plain_rotary_qkv,
        [(1, 63, 5 * 34)],
    ),
    "attention, local": (
        lambda *t: attention(*t, window=40, softcap=5.0),
        local.formula(window=40, softcap=5.0),
        [(1, 2, 130, 40), (1, 1, 130, 40), (1, 1, 130, 40)],
    ),
    "cross_entropy": (
        lambda t: cross_entropy(t, targets(63)),
        in_fp32(lambda t: F.cross_entropy(t, targets(63))),
        [(63, 127)],
    ),
    "cross_entropy, options": (
        lambda t: cross_entropy(t, targets(63), softcap=5.0, z_loss=0.01, label_smoothing=0.1),
        lambda t: peers.cross_entropy(t, targets(63), softcap=5.0, z_loss=0.01, label_smoothing=0.1),
        [(63, 127)],
    ),
    "linear_cross_entropy, of each row": (
        lambda x, w: linear_cross_entropy(x, w, targets(63), reduction="none", softcap=5.0),
        lambda x, w: peers.cross_entropy(F.linear(x, w), targets(63), reduction="none", softcap=5.0),
        [(63, 20), (127, 20)],
    ),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, targets(63)),
        lambda x, w: F.cross_entropy(
            F.linear(x, w) if x.dtype == torch.float64 else F.linear(x, w).float(), targets(63)
        ),
        [(63, 20), (127, 20)],
    ),
}


@pytest.mark.parametrize(("ours", "plain", "shapes"), CASES.values(), ids=list(CASES))
def test_fp16_is_as_accurate_as_pytorch(backend, rule, ours, plain, shapes):
    rule.accuracy(ours, plain, [half(*shape) for shape in shapes])


@pytest.mark.parametrize("tanh", [True, False], ids=["tanh", "exact"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_the_forward_of_gelu_made_again_in_the_backward_has_the_same_bits_in_fp16(backend, with_bias, tanh):
    x, dy, bias = half(63, 127), half(63, 127), half(127) if with_bias else None
    expected = dispatch.resolve("gelu", x)(x, bias, tanh), *dispatch.resolve("gelu_backward", x)(dy, x, bias, tanh)
    y, dbias = dispatch.resolve("gelu_backward_recompute_", x)(dy, x, bias, tanh)
    assert all(map(torch.equal, (y, dy, dbias), expected))


def test_sums_of_fp16_columns_are_added_in_fp32(backend):
    x, sums = half(63, 127), torch.ones(127)
    dispatch.resolve("add_column_sums_", x)(sums, x)
    torch.testing.assert_close(sums, 1 + x.float().sum(0))


@pytest.mark.parametrize("function", [layer_norm, lambda x, w, b: gelu(x, bias=b)], ids=["layer_norm", "gelu"])
def test_fp16_gradients_are_added_to_a_main_grad_in_fp32(backend, function):
    x, *vectors = (t.requires_grad_() for t in (half(63, 127), half(127), half(127)))
    expected = torch.autograd.grad(function(x, *vectors).sum(), vectors, allow_unused=True)
    for t in vectors:
        t.main_grad = torch.ones(127)
    function(x, *vectors).sum().backward()
    for t, gradient in zip(vectors, expected, strict=True):
        assert t.grad is None
        wide = torch.zeros(127) if gradient is None else gradient.float()
        torch.testing.assert_close(t.main_grad - 1, wide, rtol=2**-10, atol=1e-5)


def test_fp16_parameters_take_the_steps_of_fp32_ones_rounded(backend):
    wide = torch.nn.Parameter(torch.randn(300).half().float())
    narrow = torch.nn.Parameter(wide.detach().half())
    grad = torch.randn(300).half()
    wide.grad, narrow.grad = grad.float(), grad
    for parameter in (wide, narrow):
        FusedAdamW([parameter], lr=1e-2).step()
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-11, atol=1e-6)
