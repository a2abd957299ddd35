"""rotary, rms_norm_rotary, rotary_qkv, their operators in place, rotary_tables and RotaryEmbedding."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import skip_init

from fastgpt.kernels import (
    RotaryEmbedding,
    attention,
    attention_qkv,
    dispatch,
    rms_norm_rotary,
    rotary,
    rotary_qkv,
    rotary_tables,
)

SHAPES = [(1, 1, 1, 2), (2, 63, 3, 64), (1, 127, 1, 10), (3, 5, 2, 34), (1, 1023, 1, 6), (2, 3, 5, 128), (1, 2, 3, 256)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(shape, device, by_sequence=False):
    """Of positions that begin anywhere; ``by_sequence``: elsewhere in each."""
    B, T, _, D = shape
    if not by_sequence:
        return rotary_tables(T, D, device=device, start=7)
    rows = [rotary_tables(T, D, device=device, start=100 * b) for b in range(B)]
    return tuple(torch.stack(t) for t in zip(*rows, strict=True))


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def turned(x, cos, sin, interleaved):
    """As a product of complex numbers."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = torch.complex(cos.to(x.dtype), sin.to(x.dtype)).unsqueeze(-2)
    product = torch.view_as_real(torch.complex(*pairs.unbind(-1)) * angles)
    return product.flatten(-2) if interleaved else product.transpose(-1, -2).flatten(-2)


def both(cos, sin, interleaved):
    """Ours and plain PyTorch's, which rounds once too."""
    return (
        lambda x: rotary(x, cos, sin, interleaved=interleaved),
        lambda x: turned(wide(x), cos, sin, interleaved).to(x.dtype),
    )


def both_normed(cos, sin, interleaved, eps=1e-6):
    """Of x and perhaps a weight. Plain PyTorch rounds after the norm, as models do."""

    def plain(x, weight=None):
        normal = F.rms_norm(x, x.shape[-1:], weight, eps)
        return normal if cos is None else turned(wide(normal), cos, sin, interleaved).to(x.dtype)

    def ours(x, weight=None):
        return rms_norm_rotary(x, cos, sin, weight, eps, interleaved=interleaved)

    return ours, plain


def both_packed(cos, sin, interleaved, n_head, n_kv_head, qk_norm):
    def plain(qkv):
        heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
        moving, rest = heads.split([n_head + n_kv_head, n_kv_head], 2)
        if qk_norm:
            moving = F.rms_norm(moving, moving.shape[-1:], eps=1e-6)
        if cos is not None:
            moving = turned(wide(moving), cos, sin, interleaved).to(qkv.dtype)
        return torch.cat([moving, rest], 2).flatten(-2)

    def ours(qkv):
        return rotary_qkv(qkv, n_head, cos, sin, n_kv_head=n_kv_head, qk_norm=qk_norm, interleaved=interleaved)

    return ours, plain


# ---- the error rule ----


@forms
@shapes
@pytest.mark.parametrize("by_sequence", [False, True], ids=["shared positions", "positions by sequence"])
def test_a_rotation_is_as_accurate_as_pytorch(device, dtype, rule, shape, interleaved, by_sequence):
    cos, sin = tables(shape, device, by_sequence)
    rule.accuracy(*both(cos, sin, interleaved), [torch.randn(shape, device=device).to(dtype)])


@forms
@shapes
@pytest.mark.parametrize("with_weight", [False, True], ids=["no weight", "weight"])
def test_a_norm_and_a_rotation_are_as_accurate_as_pytorch(device, dtype, rule, shape, interleaved, with_weight):
    inputs = [torch.randn(size, device=device).to(dtype) for size in (shape, shape[-1:])][: 1 + with_weight]
    rule.accuracy(*both_normed(*tables(shape, device), interleaved), inputs)


@pytest.mark.parametrize("with_weight", [False, True], ids=["no weight", "weight"])
def test_the_norm_alone_is_as_accurate_as_pytorch(device, dtype, rule, with_weight):
    inputs = [torch.randn(size, device=device).to(dtype) for size in ((2, 63, 3, 34), (34,))][: 1 + with_weight]
    rule.accuracy(*both_normed(None, None, False, eps=0.5), inputs)


@forms
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (4, 1)], ids=str)
def test_packed_heads_are_as_accurate_as_pytorch(device, dtype, rule, interleaved, qk_norm, heads):
    n_head, n_kv_head = heads
    shape = (2, 63, n_head + 2 * n_kv_head, 34)
    qkv = torch.randn(2, 63, shape[2] * 34, device=device).to(dtype)
    rule.accuracy(*both_packed(*tables(shape, device), interleaved, *heads, qk_norm), [qkv])


def test_packed_heads_may_be_normed_alone(device, dtype, rule):
    qkv = torch.randn(2, 9, 8 * 6, device=device).to(dtype)
    rule.accuracy(*both_packed(None, None, False, 4, 2, True), [qkv])


@forms
@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
@pytest.mark.parametrize("name", ["rotary", "rms_norm_rotary", "rotary_qkv", "rotary_qkv normed"])
def test_heads_are_taken_in_any_strides(device, dtype, rule, strided, interleaved, incoming, name):
    shape = (3, 5, 6, 18)
    cos, sin = tables(shape, device)
    inputs = [torch.randn(shape, device=device)]
    if name == "rotary":
        functions = both(cos, sin, interleaved)
    elif name == "rms_norm_rotary":
        functions = both_normed(cos, sin, interleaved)
        inputs.append(torch.randn(18, device=device))
    else:
        functions = both_packed(cos, sin, interleaved, 2, 2, name.endswith("normed"))
        inputs = [inputs[0].flatten(-2)]
    inputs = [t.to(dtype) for t in inputs]
    if incoming:
        rule.accuracy(*functions, inputs, dout_layout=strided)
    else:
        rule.accuracy(*functions, [strided(t) for t in inputs])


@forms
def test_tables_may_have_any_strides_too(device, dtype, strided, interleaved):
    x = torch.randn(3, 5, 2, 18, device=device).to(dtype)
    cos, sin = (strided(t) for t in tables(x.shape, device, by_sequence=True))
    got = rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(got, rotary(x, cos.contiguous(), sin.contiguous(), interleaved=interleaved))


# ---- what a rotation is ----


@forms
def test_the_inverse_gives_back_what_was_there_and_norms_are_kept(device, dtype, interleaved):
    x = torch.randn(2, 65, 3, 64, device=device).to(dtype)
    cos, sin = rotary_tables(65, 64, device=device)
    operator = dispatch.resolve("rotary", x)
    y = operator(x, cos, sin, interleaved, False)
    back = operator(y, cos, sin, interleaved, True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(y.double().norm(dim=-1), x.double().norm(dim=-1), rtol=eps, atol=0.0)
    assert torch.equal(y[:, 0], x[:, 0])  # position 0 has angle 0


@forms
def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone(device, interleaved):
    q, k = (torch.randn(64, device=device).expand(1, 50, 1, 64) for _ in range(2))
    cos, sin = rotary_tables(50, 64, device=device)
    q, k = (rotary(t, cos, sin, interleaved=interleaved)[0, :, 0] for t in (q, k))
    products = q @ k.T
    for distance in range(-49, 50):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


def test_interleaved_pairs_are_those_of_halves_in_another_order(device, dtype):
    x = torch.randn(2, 9, 3, 34, device=device).to(dtype)
    cos, sin = tables(x.shape, device)
    order = torch.arange(34, device=device).view(17, 2).T.flatten()  # 0 2 4 … 1 3 5 …
    eps = torch.finfo(dtype).eps
    for function in (rotary, rms_norm_rotary):
        halves, interleaved = function(x[..., order], cos, sin), function(x, cos, sin, interleaved=True)
        torch.testing.assert_close(halves, interleaved[..., order], rtol=4 * eps, atol=4 * eps)


# ---- in place ----


def packed(dtype, device, B=2, T=33, n_head=4, n_kv_head=2, D=34):
    """Packed q, k and v, and the view of q and k."""
    qkv = torch.randn(B, T, (n_head + 2 * n_kv_head) * D, device=device).to(dtype)
    return qkv, qkv.unflatten(-1, (-1, D))[:, :, : n_head + n_kv_head]


@forms
@pytest.mark.parametrize("inverse", [False, True])
def test_in_place_a_rotation_has_the_same_bits_and_leaves_the_values_alone(device, dtype, interleaved, inverse):
    qkv, heads = packed(dtype, device)
    cos, sin = tables(heads.shape, device)
    before = qkv.clone()
    expected = dispatch.resolve("rotary", qkv)(heads, cos, sin, interleaved, inverse)
    dispatch.resolve("rotary_", qkv)(heads, cos, sin, interleaved, inverse)
    assert torch.equal(heads, expected)
    assert torch.equal(qkv[..., 6 * 34 :], before[..., 6 * 34 :])
    if not inverse:
        whole = rotary_qkv(before, 4, cos, sin, n_kv_head=2, interleaved=interleaved)
        assert torch.equal(whole, qkv)


@forms
@pytest.mark.parametrize("turns", [True, False], ids=["turned", "norm alone"])
def test_in_place_a_norm_and_its_gradient_have_the_same_bits_and_leave_the_values_alone(
    device, dtype, interleaved, turns
):
    qkv, heads = packed(dtype, device)
    cos, sin = tables(heads.shape, device) if turns else (None, None)
    before, dqkv = qkv.clone(), torch.randn_like(qkv)
    leaf = before.clone().requires_grad_()
    whole = rotary_qkv(leaf, 4, cos, sin, n_kv_head=2, qk_norm=True, interleaved=interleaved)
    whole.backward(dqkv)
    expected, scales = dispatch.resolve("rms_norm_rotary", qkv)(
        before.unflatten(-1, (-1, 34))[:, :, :6], None, cos, sin, 1e-6, interleaved
    )
    rstd = dispatch.resolve("rms_norm_rotary_", qkv)(heads, cos, sin, 1e-6, interleaved)
    assert torch.equal(heads, expected)
    assert torch.equal(rstd, scales)
    assert torch.equal(qkv, whole)
    assert torch.equal(qkv[..., 6 * 34 :], before[..., 6 * 34 :])
    dheads, values = dqkv.unflatten(-1, (-1, 34))[:, :, :6], dqkv[..., 6 * 34 :].clone()
    dispatch.resolve("rms_norm_rotary_backward_", qkv)(dheads, heads, cos, sin, rstd, interleaved)
    assert torch.equal(dqkv[..., 6 * 34 :], values)
    assert torch.equal(dqkv, leaf.grad)


@forms
@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_heads_of_any_strides_are_changed_in_place(device, dtype, interleaved, layout):
    x, dy = (torch.randn(3, 5, 2, 18, device=device).to(dtype) for _ in range(2))
    cos, sin = tables(x.shape, device)

    def laid_out(t):
        if layout == "permuted":
            return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        larger = t.new_full((*t.shape[:-1], 39), math.nan)
        larger[..., 1:-2:2] = t
        return larger[..., 1:-2:2]

    def outcome(make):
        turned, normed, grad = make(x), make(x), make(dy)
        dispatch.resolve("rotary_", x)(turned, cos, sin, interleaved, False)
        rstd = dispatch.resolve("rms_norm_rotary_", x)(normed, cos, sin, 1e-6, interleaved)
        dispatch.resolve("rms_norm_rotary_backward_", x)(grad, normed, cos, sin, rstd, interleaved)
        return turned, normed, grad, rstd

    for got, expected in zip(outcome(laid_out), outcome(torch.clone), strict=True):
        if dispatch.backend_of(device, dtype)[0] == "reference":  # PyTorch adds in an order that depends on strides
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps)
        else:
            assert torch.equal(got, expected)


@forms
def test_the_gradient_from_the_result_is_right_for_tables_of_any_length(device, rule, interleaved):
    """Such as YaRN's, whose cosines and sines are multiplied by a factor."""
    x = torch.randn(2, 33, 3, 34, device=device)
    cos, sin = (1.5 * t for t in tables(x.shape, device))
    sin[:, 3] *= 0.5
    qkv = x.flatten(-2)
    rule.accuracy(*both_packed(cos, sin, interleaved, 1, 1, True), [qkv])
    rule.accuracy(*both_normed(cos, sin, interleaved), [x])


# ---- the weight ----


def test_a_weight_of_zero_gets_its_gradient(device, dtype, rule):
    x, weight = torch.randn(2, 33, 3, 34, device=device).to(dtype), torch.zeros(34, device=device, dtype=dtype)
    rule.accuracy(*both_normed(*tables(x.shape, device), False), [x, weight])


@forms
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 63, 3, 34), (1, 1023, 2, 6), (0, 5, 2, 8)], ids=str)
def test_the_gradient_of_a_weight_is_added_to_its_main_grad_unrounded(device, dtype, rule, interleaved, shape):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, before = torch.randn(shape[-1], device=device).to(dtype), torch.randn(shape[-1], device=device)
    cos, sin = tables(shape, device)
    _, rstd = dispatch.resolve("rms_norm_rotary", x)(x, weight, cos, sin, 1e-6, interleaved)
    backward, main_grad = dispatch.resolve("rms_norm_rotary_backward", x), before.clone()
    dx, nothing = backward(dy, x, weight, cos, sin, rstd, interleaved, main_grad)
    expected, rounded = backward(dy, x, weight, cos, sin, rstd, interleaved)
    assert torch.equal(dx, expected)
    assert nothing.shape == (0,)
    assert rounded.shape == weight.shape
    sums = []
    for dtype_of_sum in (torch.float32, torch.float64):
        normal = x.to(dtype_of_sum) * rstd.to(dtype_of_sum).unsqueeze(-1)
        sums.append(
            before.to(dtype_of_sum) + (turned(dy.to(dtype_of_sum), cos, -sin, interleaved) * normal).sum((0, 1, 2))
        )
    rule.error("main_grad", main_grad, sums[:1], sums[1], torch.float32, rule.gradient)


def test_a_weight_with_a_main_grad_gets_its_gradient_there_unless_it_is_frozen(device, dtype):
    x, weight = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in ((2, 9, 3, 34), (34,)))
    cos, sin = tables(x.shape, device)
    dx, dweight = torch.autograd.grad(rms_norm_rotary(x, cos, sin, weight).sum(), (x, weight))
    weight.main_grad = torch.ones(34, device=device)
    weight.requires_grad_(False)
    assert torch.equal(*torch.autograd.grad(rms_norm_rotary(x, cos, sin, weight).sum(), x), dx)
    assert (weight.main_grad == 1.0).all()
    rms_norm_rotary(x, cos, sin, weight.requires_grad_()).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, dweight.float(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_main_grad_that_cannot_be_added_to_is_refused(device):
    x, weight, rstd = (torch.ones(s, device=device) for s in ((1, 2, 3, 8), (8,), (1, 2, 3)))
    for wrong in (torch.ones(7), torch.ones(8).bfloat16(), torch.ones(16)[::2]):
        with pytest.raises((RuntimeError, ValueError), match="main_grad: expected 8 elements of float32"):
            dispatch.resolve("rms_norm_rotary_backward", x)(
                x, x, weight, None, None, rstd, False, wrong.to(device)
            )  # fmt: skip


# ---- what spoils what, and what is the same twice ----


@forms
@pytest.mark.parametrize("at", [0, 5, 16, 33])
def test_a_nan_reaches_its_partner_and_with_a_norm_its_head(device, dtype, interleaved, at):
    x = torch.randn(2, 3, 4, 34, device=device).to(dtype)
    cos, sin = tables(x.shape, device)
    x[1, 2, 3, at] = math.nan
    partner = at ^ 1 if interleaved else (at + 17) % 34
    y = rotary(x, cos, sin, interleaved=interleaved)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, i] for i in sorted((at, partner))]
    y = rms_norm_rotary(x, cos, sin, interleaved=interleaved)
    assert y[1, 2, 3].isnan().all()
    assert y.isnan().sum() == 34
    out = rotary_qkv(x.flatten(-2), 2, cos, sin, n_kv_head=1, qk_norm=True, interleaved=interleaved)
    assert out.isnan().nonzero().tolist() == [[1, 2, 3 * 34 + at]]  # the fourth head is v's


def test_a_head_of_zeros_is_zeros(device, dtype):
    x = torch.zeros(1, 2, 3, 8, device=device, dtype=dtype, requires_grad=True)
    y = rms_norm_rotary(x, *tables(x.shape, device))
    y.backward(torch.ones_like(y))
    assert y.count_nonzero() == 0
    assert x.grad.isfinite().all()


@forms
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, rule, on_threads, interleaved):
    x, weight, dout = (torch.randn(s, device=device).to(dtype) for s in ((2, 511, 5, 34), (34,), (2, 511, 5, 34)))
    cos, sin = tables(x.shape, device)
    functions = [
        (lambda x, w: rms_norm_rotary(x, cos, sin, w, interleaved=interleaved), [x, weight]),
        (lambda x: rotary(x, cos, sin, interleaved=interleaved), [x]),
        (lambda x: rotary_qkv(x.flatten(-2), 3, cos, sin, n_kv_head=1, qk_norm=True).view_as(x), [x]),
    ]
    for function, inputs in functions:
        one, two, again = (on_threads(n, lambda f=function, i=inputs: rule.run(f, i, [dout])) for n in (1, 2, 2))
        for other in (two, again):
            assert all(map(torch.equal, (*one[0], *one[1]), (*other[0], *other[1])))


def test_results_are_contiguous_in_the_dtype_of_x(device, dtype):
    x = torch.randn(2, 4, 5, 8, device=device).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = tables(x.shape, device)
    for function in (lambda x: rotary(x, cos, sin), lambda x: rms_norm_rotary(x, cos, sin)):
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn(2, 4, 5, 8, device=device).to(dtype).transpose(1, 2))
        for t in (y, dx):
            assert t.dtype == dtype
            assert t.is_contiguous()


def test_of_no_sequences_there_is_nothing(device, dtype):
    x, weight = (torch.ones(s, device=device, dtype=dtype).requires_grad_() for s in ((0, 5, 2, 8), (8,)))
    cos, sin = tables(x.shape, device)
    for y in (
        rotary(x, cos, sin),
        rms_norm_rotary(x, cos, sin, weight),
        rotary_qkv(x.flatten(-2)[..., :12], 1, cos[:, :2], sin[:, :2]),
    ):
        x.grad = None
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert weight.grad.tolist() == [0.0] * 8


# ---- with attention ----


@forms
def test_between_a_linear_layer_and_attention_nothing_is_copied(device, dtype, interleaved):
    B, T, H, D = 2, 17, 3, 16
    q, k, v = (torch.randn(B, T, H * D, device=device).to(dtype) for _ in range(3))
    cos, sin = rotary_tables(T, D, device=device)
    q, k = (rotary(t.view(B, T, H, D), cos, sin, interleaved=interleaved) for t in (q, k))
    out = attention(q.transpose(1, 2), k.transpose(1, 2), v.view(B, T, H, D).transpose(1, 2))
    by_head = q.transpose(1, 2).contiguous()  # (B, H, T, D)
    again = rotary(by_head.transpose(1, 2), cos, sin, interleaved=interleaved).transpose(1, 2)
    assert torch.equal(again, rotary(q, cos, sin, interleaved=interleaved).transpose(1, 2))
    before = [dispatch.resolve("rotary", t)(t, cos, sin, interleaved, True).flatten(-2) for t in (q, k)]
    whole = rotary_qkv(torch.cat([*before, v], -1), H, cos, sin, interleaved=interleaved)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(attention_qkv(whole, H), out.transpose(1, 2).flatten(-2), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("model", ["llama", "gptj"])
def test_the_forms_are_those_of_transformers(model):
    pytest.importorskip("transformers")
    B, T, H, D = 2, 9, 3, 16
    q = torch.randn(B, T, H, D)
    cos, sin = rotary_tables(T, D)
    if model == "llama":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        both = (torch.cat([t, t], -1).expand(B, T, D) for t in (cos, sin))
        theirs = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), *both)[0].transpose(1, 2)
    else:
        from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

        theirs = apply_rotary_pos_emb(q, sin.expand(B, T, D // 2), cos.expand(B, T, D // 2))
    torch.testing.assert_close(rotary(q, cos, sin, interleaved=model == "gptj"), theirs)


# ---- the tables ----


def test_tables_are_right_to_the_last_bit_at_far_positions(device):
    cos, sin = rotary_tables(3, 6, 500000.0, device=device, start=10**6)
    assert cos.device.type == device.type
    assert cos.dtype == sin.dtype == torch.float32
    for t in range(3):
        for i in range(3):
            angle = (10**6 + t) * 500000.0 ** (-2 * i / 6)
            assert cos[t, i].item() == pytest.approx(math.cos(angle), abs=6e-8)
            assert sin[t, i].item() == pytest.approx(math.sin(angle), abs=6e-8)


def test_tables_that_start_later_are_rows_of_longer_ones():
    longer, later = rotary_tables(20, 8), rotary_tables(5, 8, start=15)
    assert all(torch.equal(a[15:], b) for a, b in zip(longer, later, strict=True))
    assert rotary_tables(2, 8, device="meta")[0].is_meta
    with torch.device("meta"):
        assert rotary_tables(2, 8)[0].is_meta


def test_tables_that_require_a_gradient_are_refused(backend, device):
    x, (cos, sin) = torch.randn(1, 5, 6, 8, device=device), rotary_tables(5, 8, device=device)
    for name, given in (("cos", (cos.clone().requires_grad_(), sin)), ("sin", (cos, sin.clone().requires_grad_()))):
        for call in (rotary, rms_norm_rotary, lambda x, *t: rotary_qkv(x.flatten(-2), 2, *t)):
            with pytest.raises(ValueError, match=f"^{name}: gets no gradient"):
                call(x, *given)


def test_float64_gradients_agree_with_finite_differences():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 6), (6,)))
    cos, sin = tables(x.shape, "cpu")
    for form in ({"interleaved": False}, {"interleaved": True}):
        assert torch.autograd.gradcheck(partial(rotary, cos=cos, sin=sin, **form), (x,))
        assert torch.autograd.gradcheck(lambda x, w, f=form: rms_norm_rotary(x, cos, sin, w, **f), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm_rotary(x), (x,))
    qkv = torch.randn(2, 3, 4 * 6, dtype=torch.float64, requires_grad=True)
    for qk_norm in (False, True):
        options = {"n_kv_head": 1, "qk_norm": qk_norm}
        assert torch.autograd.gradcheck(partial(rotary_qkv, n_head=2, cos=cos, sin=sin, **options), (qkv,))


# ---- the module ----


def test_the_module_turns_by_its_tables_and_goes_on_where_a_cache_ends(backend, device):
    module = RotaryEmbedding(8, 20, 500.0, interleaved=True, device=device)
    x = torch.randn(2, 20, 3, 8, device=device)
    cos, sin = rotary_tables(20, 8, 500.0, device=device)
    whole = module(x)
    assert torch.equal(whole, rotary(x, cos, sin, interleaved=True))
    assert torch.equal(torch.cat([module(x[:, :13]), module(x[:, 13:], start=13)], 1), whole)
    positions = torch.tensor([[3, 1], [0, 19]], device=device)
    turned = rotary(x[:, :2], module.cos[positions], module.sin[positions], interleaved=True)
    for b in range(2):
        for t in range(2):
            one = x[b : b + 1, t : t + 1]
            assert torch.equal(turned[b : b + 1, t : t + 1], module(one, start=positions[b, t].item()))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).bfloat16()[1],
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: skip_init(RotaryEmbedding, 8, 20),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
def test_the_tables_keep_their_dtype_and_contents_whatever_is_done_to_the_module(cast):
    module, tables = cast(RotaryEmbedding(8, 20)), rotary_tables(20, 8)
    for ours, table in zip((module.cos, module.sin), tables, strict=True):
        assert torch.equal(ours, table)
    assert {name for name, _ in module.named_buffers()} == {"cos", "sin"}
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    x = torch.randn(1, 5, 2, 8).bfloat16()
    assert torch.equal(module(x), rotary(x, tables[0][:5], tables[1][:5]))


def test_the_module_shows_what_it_was_made_with_and_compiles():
    module = RotaryEmbedding(8, 20)
    assert repr(module) == "RotaryEmbedding(8, n_positions=20, base=10000.0, interleaved=False)"
    torch._dynamo.reset()
    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x, 3), module(x, 3))
