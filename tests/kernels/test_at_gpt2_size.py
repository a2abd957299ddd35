"""Every operator at GPT-2 124M's shapes, forward and backward, in every dtype, against float64.

The first thing to run on a GPU (``-m smoke``): it takes seconds there and compiles what a training step compiles. In
Triton's interpreter the same at small shapes.
"""

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
    embedding,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    relu2,
    rms_norm,
    rms_norm_rotary,
    rotary,
    rotary_qkv,
    rotary_tables,
    swiglu,
)
from fastgpt.kernels.attention import draw_seed
from fastgpt.kernels.philox import dropout_factors
from tests.kernels import peers

ON_GPU = torch.cuda.is_available()
# Few sequences: the truth takes float64's time and memory, also on a card of 12 GB.
B, T, C, H, V = (2, 1024, 768, 12, 50304) if ON_GPU else (1, 40, 32, 2, 130)

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
    pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"], indirect=True),
]


def plain_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain_attention_qkv(qkv, n_head):
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)
    return plain_attention(q, k, v).transpose(1, 2).reshape(B, T, C)


def plain_add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, (C,), weight, bias), total


def plain_add_rms_norm(x, residual, weight):
    total = x + residual
    return F.rms_norm(total, (C,), weight, 1e-6), total


def plain_swiglu(packed):
    wide = packed.float() if packed.dtype in (torch.bfloat16, torch.float16) else packed
    gate, up = wide.chunk(2, -1)
    return (F.silu(gate) * up).to(packed.dtype)


def plain_gelu(x, bias=None):
    """With the sum in fp32, as ours has it."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.gelu(wide if bias is None else wide + bias, approximate="tanh").to(x.dtype)


def turned(x, cos, sin):
    """By tables of fp32, rounded once; pairs of halves."""
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


def plain_rotary(x, weight=None):
    return turned(x if weight is None else F.rms_norm(x, x.shape[-1:], weight, 1e-6), *rotary_tables(T, C // H))


def plain_rotary_qkv(qkv, qk_norm=False):
    heads, v = qkv.unflatten(-1, (3 * H, C // H)).split([2 * H, H], 2)
    heads = F.rms_norm(heads, heads.shape[-1:], eps=1e-6) if qk_norm else heads
    return torch.cat([turned(heads, *rotary_tables(T, C // H)), v], 2).flatten(-2)


def mean_loss(logits, targets):
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(wide, targets)


# Name: ours, plain PyTorch's, shapes of the tensors, and whether targets come with them.
CASES = {
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, (C,), w, b), [(B, T, C), (C,), (C,)]),
    "add_layer_norm": (add_layer_norm, plain_add_layer_norm, [(B, T, C), (B, T, C), (C,), (C,)]),
    "rms_norm": (rms_norm, lambda x, w: F.rms_norm(x, (C,), w, 1e-6), [(B, T, C), (C,)]),
    "add_rms_norm": (add_rms_norm, plain_add_rms_norm, [(B, T, C), (B, T, C), (C,)]),
    "relu2": (relu2, lambda x: F.relu(x).square(), [(B, T, 4 * C)]),
    "swiglu": (swiglu, plain_swiglu, [(B, T, 4 * C)]),
    "gelu": (gelu, plain_gelu, [(B, T, 4 * C)]),
    "gelu with bias": (lambda x, b: gelu(x, bias=b), plain_gelu, [(B, T, 4 * C), (4 * C,)]),
    "attention": (attention, plain_attention, [(B, H, T, C // H)] * 3),
    "attention_qkv": (
        lambda qkv: attention_qkv(qkv, H), lambda qkv: plain_attention_qkv(qkv, H), [(B, T, 3 * C)],
    ),
    "attention_qkv, single pass": (
        lambda qkv: attention_qkv(qkv, H, deterministic=False), lambda qkv: plain_attention_qkv(qkv, H),
        [(B, T, 3 * C)],
    ),
    "attention_qkv, heads of twice the size": (
        lambda qkv: attention_qkv(qkv, H // 2), lambda qkv: plain_attention_qkv(qkv, H // 2), [(B, T, 3 * C)],
    ),
    "rotary": (lambda x: rotary(x, *rotary_tables(T, C // H)), plain_rotary, [(B, T, H, C // H)]),
    "rms_norm_rotary": (
        lambda x, w: rms_norm_rotary(x, *rotary_tables(T, C // H), w), plain_rotary, [(B, T, H, C // H), (C // H,)],
    ),
    "rotary_qkv": (lambda qkv: rotary_qkv(qkv, H, *rotary_tables(T, C // H)), plain_rotary_qkv, [(B, T, 3 * C)]),
    "rotary_qkv, normed": (
        lambda qkv: rotary_qkv(qkv, H, *rotary_tables(T, C // H), qk_norm=True),
        lambda qkv: plain_rotary_qkv(qkv, qk_norm=True), [(B, T, 3 * C)],
    ),
    "linear": (linear, F.linear, [(B, T, C), (3 * C, C), (3 * C,)]),
}  # fmt: skip

OPTIONS = {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}
LOSSES = {
    "cross_entropy": (cross_entropy, mean_loss, [(T, V)]),
    "linear_cross_entropy": (
        lambda x, w, targets: linear_cross_entropy(x, w / C**0.5, targets),
        lambda x, w, targets: mean_loss(F.linear(x, w / C**0.5), targets),
        [(T, C), (V, C)],
    ),
    "cross_entropy, options": (
        lambda logits, targets: cross_entropy(logits, targets, **OPTIONS),
        lambda logits, targets: peers.cross_entropy(logits, targets, **OPTIONS),
        [(T, V)],
    ),
}


def drawn(shapes, dtype):
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", list(CASES))
def test_an_operator_is_as_accurate_as_pytorch(backend, dtype, rule, name):
    ours, plain, shapes = CASES[name]
    rule.accuracy(ours, plain, drawn(shapes, dtype))


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_loss_is_as_accurate_as_pytorch(backend, dtype, rule, name):
    ours, plain, shapes = LOSSES[name]
    targets = torch.randint(V, (T,))
    rule.accuracy(lambda *t: ours(*t, targets), lambda *t: plain(*t, targets), drawn(shapes, dtype))


def test_attention_drops_the_weights_that_the_formula_drops(backend, dtype, rule):
    torch.manual_seed(1)
    factors = dropout_factors(draw_seed(0.2, torch.get_default_device()), 0.2, B, H, T, T)

    def ours(qkv):
        torch.manual_seed(1)
        return attention_qkv(qkv, H, dropout_p=0.2)

    def formula(qkv):
        q, k, v = qkv.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * (C // H) ** -0.5).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) * factors.to(qkv.dtype) @ v).transpose(1, 2).reshape(B, T, C)

    rule.accuracy(ours, formula, drawn([(B, T, 3 * C)], dtype))


def test_an_embeddings_gradient_is_added_to_what_is_there(backend, dtype, rule):
    """Tokens as frequent as in a text: one in seven is the most frequent one."""
    frequency = 1.0 / torch.arange(1, V + 1)
    tokens = torch.multinomial(frequency, B * T, replacement=True).view(B, T)
    weight, dout = drawn([(V, C), (B, T, C)], dtype)
    weight.requires_grad_().main_grad = torch.ones(V, C)
    embedding(tokens, weight).backward(dout)
    truth = torch.ones(V, C, dtype=torch.float64).index_add_(0, tokens.flatten(), dout.double().flatten(0, 1))
    peer = torch.ones(V, C).index_add_(0, tokens.flatten(), dout.float().flatten(0, 1))
    rule.error("main_grad", weight.main_grad, [peer], truth, torch.float32, rule.gradient)


def test_adamw_updates_as_pytorchs_does(backend, dtype, rule):
    """Twenty updates of a flat buffer, clipped."""
    (first,) = drawn([(3 * C * C,)], torch.float32)
    gradients = drawn([(3 * C * C,)] * 20, torch.float32)
    ours, peer, truth = (first.clone().to(d).requires_grad_() for d in (torch.float32, torch.float32, torch.float64))
    copy = torch.empty_like(first, dtype=torch.bfloat16)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [
        FusedAdamW([ours], max_grad_norm=1.0, copies={ours: copy}, **options),
        *(torch.optim.AdamW([p], **options) for p in (peer, truth)),
    ]
    for gradient in gradients:
        for p, optimizer in zip((ours, peer, truth), optimizers, strict=True):
            p.grad = gradient.to(p.dtype)
            if p is not ours:
                torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
    rule.error("parameters", ours.detach(), [peer.detach()], truth.detach(), torch.float32, rule.output)
    assert torch.equal(copy, ours.detach().bfloat16())
