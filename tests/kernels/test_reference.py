"""The reference itself: against plain float64 PyTorch, published random numbers and the operators' fakes."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.kernels import ops, reference
from fastgpt.kernels import philox as production
from tests.kernels import test_ops

# ---- float64 ----


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def close(ours, theirs, atol=1e-13):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=atol)


def test_float64_layer_norm_is_exact_to_float64():
    x, residual, weight, bias = doubles((5, 33), (5, 33), 33, 33)
    close(reference.layer_norm(x, weight, bias, 1e-5)[0], F.layer_norm(x, (33,), weight, bias))
    y, total, _, _ = reference.add_layer_norm(x, residual, weight, None, 1e-5)
    close(y, F.layer_norm(x + residual, (33,), weight))
    assert torch.equal(total, x + residual)


def test_float64_rms_norm_is_exact_to_float64():
    x, residual, weight = doubles((5, 33), (5, 33), 33)
    close(reference.rms_norm(x, weight, 1e-6)[0], F.rms_norm(x, (33,), weight, 1e-6))
    y, total, _ = reference.add_rms_norm(x, residual, None, 1e-6)
    close(y, F.rms_norm(x + residual, (33,), None, 1e-6))
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("causal", [True, False])
def test_float64_attention_is_exact_to_float64(causal):
    q, k, v = doubles((2, 3, 17, 8), (2, 3, 17, 8), (2, 3, 17, 8))
    out, lse = reference.attention(q, k, v, causal, 0.3, 0.0, None)
    close(out, F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3))
    scores = (q @ k.mT) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
    close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize(("T", "S"), [(1, 5), (3, 5), (5, 5)])
def test_a_causal_query_sees_the_keys_up_to_its_own_position(T, S):
    q, k = doubles((1, 1, T, 4), (1, 1, S, 4))
    weights, _ = reference.attention(q, k, torch.eye(S, dtype=torch.float64)[None, None], True, 0.3, 0.0, None)
    for t in range(T):
        assert (weights[0, 0, t] > 0).tolist() == [s <= t + S - T for s in range(S)]


def test_float64_attention_backward_is_exact_to_float64():
    q, k, v, dout = (t.requires_grad_() for t in doubles(*[(2, 3, 17, 8)] * 4))
    truth = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), (q, k, v), dout)
    out, lse = reference.attention(q, k, v, True, 0.3, 0.0, None)
    for ours, theirs in zip(
        reference.attention_backward(dout, q, k, v, out, lse, True, 0.3, 0.0, None), truth, strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("tanh", [True, False])
def test_float64_gelu_and_its_slope_are_exact_to_float64(tanh):
    x, dy = doubles((7, 9), (7, 9))
    x.requires_grad_()
    y = F.gelu(x, approximate="tanh" if tanh else "none")
    close(reference.gelu(x.detach(), None, tanh), y.detach())
    close(reference.gelu_backward(dy, x.detach(), None, tanh)[0], torch.autograd.grad(y, x, dy)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype):
    x, weight, bias = (t.to(dtype) for t in doubles((5, 33), 33, 33))
    y = reference.layer_norm(x, weight, bias, 1e-5)[0]
    assert torch.equal(y, reference.layer_norm(x.float(), weight.float(), bias.float(), 1e-5)[0].to(dtype))
    q, k, v = (t.to(dtype) for t in doubles(*[(1, 2, 9, 8)] * 3))
    out, lse = reference.attention(q, k, v, True, 0.3, 0.0, None)
    wide_out, wide_lse = reference.attention(q.float(), k.float(), v.float(), True, 0.3, 0.0, None)
    assert torch.equal(out, wide_out.to(dtype))
    assert torch.equal(lse, wide_lse)


# ---- Philox ----

MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox-4x32-10 as its authors write it, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_generator_of_these_tests_gives_the_published_words(counter, key, words):
    """Known answers of Random123, the authors' own code (examples/kat_vectors)."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x123456789ABCDEF, 2**62 - 1])
def test_random_words_are_philox_with_the_documented_counter(seed):
    heads, rows, columns = torch.tensor([0, 5]), torch.tensor([0, 1023]), torch.arange(9)
    words = production.philox(torch.tensor(seed), heads.view(2, 1, 1), rows.view(1, 2, 1), columns.view(1, 1, 9))
    for i, head in enumerate(heads.tolist()):
        for j, row in enumerate(rows.tolist()):
            for column in columns.tolist():
                expected = philox((column // 4, row, head, 0), (seed & MASK, seed >> 32))[column % 4]
                assert words[i, j, column] == expected


def test_a_weight_is_dropped_where_its_word_is_below_p():
    factors = production.dropout_factors(torch.tensor(7), 0.25, 2, 3, 5, 9)
    assert factors.shape == (2, 3, 5, 9)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, factors.shape)).tolist():
        word = philox((j // 4, i, b * 3 + h, 0), (7, 0))[j % 4]
        assert factors[b, h, i, j].item() == (0.0 if word < 0.25 * 2**32 else pytest.approx(1 / 0.75))


# ---- fakes ----


def permuted(argument):
    """The dimensions of a tensor in the opposite order in memory, so that a layout that follows the input's shows."""
    if isinstance(argument, torch.Tensor) and argument.dim() > 1:
        order = list(reversed(range(argument.dim())))
        return argument.permute(order).contiguous().permute(order)
    return argument


def cases(dtype):
    """Those of test_ops.py that have outputs, permuted."""
    for name, arguments in test_ops.cases(dtype):
        if getattr(torch.ops.fastgpt, name).default._schema.returns:
            yield name, tuple(map(permuted, arguments))


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


CASES = [(dtype, *case) for dtype in (torch.float32, torch.bfloat16) for case in cases(dtype)]


@pytest.mark.parametrize(
    ("name", "arguments"), [pytest.param(name, arguments, id=f"{name}-{dtype}") for dtype, name, arguments in CASES]
)
def test_outputs_have_the_shape_strides_and_dtype_that_the_fake_promises(name, arguments):
    outputs = flat(getattr(reference, name)(*arguments))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            [mode.from_tensor(t) for t in a]
            if isinstance(a, list)
            else mode.from_tensor(a)
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        promised = flat(ops.OPERATORS[name].fake(*fakes))
    for ours, fake in zip(outputs, promised, strict=True):
        assert ours.shape == fake.shape
        assert ours.dtype == fake.dtype
        assert all(a == b or n <= 1 for a, b, n in zip(ours.stride(), fake.stride(), ours.shape, strict=True))


def test_every_operator_has_its_reference_and_its_case():
    assert all(callable(getattr(reference, name)) for name in ops.OPERATORS)
    without_outputs = {
        "adamw_", "adamw_8bit_", "matmul_", "add_column_sums_", "embedding_backward_", "rotary_",
        "rms_norm_rotary_backward_", "glu_backward_",
    }  # fmt: skip
    assert {name for _, name, _ in CASES} == set(ops.OPERATORS) - without_outputs
