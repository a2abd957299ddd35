"""What lies around an operand in memory changes no bit of a result.

Every operand, and the incoming gradient, is a part of a wider tensor whose other elements are NaN, infinite or huge.
The same call on the same layout with zeros there is the truth, to the bit.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fastgpt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
    geglu,
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
from fastgpt.kernels.matmul import matmul_into

EXAMPLES = 2000 if "FASTGPT_TEST_ALL" in os.environ else 100

# Off and on the depth of a tile of AMX (32) and the widths of vectors and blocks.
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65, 96, 127, 200]
FILLS = [float("nan"), float("inf"), float("-inf"), 3e38]


def within(t, margin, fill):
    """A copy of ``t`` inside of a tensor larger in the last two dimensions, whose other elements are ``fill``."""
    *outer, rows, columns = (1, *t.shape)
    larger = t.new_full((*outer, rows + 2, columns + margin), fill)
    part = larger[..., 1 : rows + 1, margin // 2 : margin // 2 + columns]
    part.copy_(t)
    return part.view(t.shape) if t.dim() == 1 else part[0]


def product(a, b):
    """``a @ b`` into fp32, and added to it."""
    out = torch.zeros(a.shape[0], b.shape[1])
    matmul_into(out, a, b, accumulate=True)
    return matmul_into(torch.empty(a.shape[0], b.shape[1], dtype=a.dtype), a, b), out


# Name: the shapes of its operands from sizes M, K and N, and the function, which is given targets below N too.
CALLS = {
    "linear": (lambda M, K, N: [(M, K), (N, K), (N,)], lambda targets: linear),
    "linear_cross_entropy": (
        lambda M, K, N: [(M, K), (N, K)],
        lambda targets: lambda x, weight: linear_cross_entropy(x, weight, targets),
    ),
    "cross_entropy": (lambda M, K, N: [(M, N)], lambda targets: lambda x: cross_entropy(x, targets)),
    "linear_cross_entropy, of each row": (
        lambda M, K, N: [(M, K), (N, K)],
        lambda targets: (
            lambda x, weight: linear_cross_entropy(
                x, weight, targets, reduction="none", softcap=5.0, label_smoothing=0.1
            )
        ),
    ),
    "cross_entropy, options": (
        lambda M, K, N: [(M, N)],
        lambda targets: (
            lambda x: cross_entropy(
                x, targets, weight=torch.linspace(1, 2, x.shape[1]), softcap=5.0, z_loss=0.1, label_smoothing=0.1
            )
        ),
    ),
    "attention": (lambda M, K, N: 3 * [(1, 2, M, min(K, 65))], lambda targets: attention),
    "attention_qkv": (lambda M, K, N: [(2, min(M, 65), 6 * min(K, 65))], lambda targets: lambda x: attention_qkv(x, 2)),
    "rotary": (
        lambda M, K, N: [(2, min(M, 65), 3, 2 * min(K, 65))],
        lambda targets: lambda x: rotary(x, *rotary_tables(*x.shape[1::2]), interleaved=len(targets) % 2 > 0),
    ),
    "rms_norm_rotary": (
        lambda M, K, N: [(2, min(M, 65), 3, 2 * min(K, 65)), (2 * min(K, 65),)],
        lambda targets: (
            lambda x, w: rms_norm_rotary(x, *rotary_tables(*x.shape[1::2]), w, interleaved=len(targets) % 2 > 0)
        ),
    ),
    "rotary_qkv": (
        lambda M, K, N: [(2, min(M, 65), 8 * min(K, 65))],
        lambda targets: (
            lambda x: rotary_qkv(
                x, 2, *rotary_tables(x.shape[1], x.shape[2] // 4), n_kv_head=1, qk_norm=len(targets) % 2 > 0
            )
        ),
    ),
    "layer_norm": (lambda M, K, N: [(M, K), (K,), (K,)], lambda targets: layer_norm),
    "add_layer_norm": (lambda M, K, N: [(M, K), (M, K), (K,), (K,)], lambda targets: add_layer_norm),
    "rms_norm": (lambda M, K, N: [(M, K), (K,)], lambda targets: rms_norm),
    "add_rms_norm": (lambda M, K, N: [(M, K), (M, K), (K,)], lambda targets: add_rms_norm),
    "gelu": (lambda M, K, N: [(M, K)], lambda targets: gelu),
    "relu2": (lambda M, K, N: [(M, K)], lambda targets: relu2),
    "swiglu": (lambda M, K, N: [(M, K), (M, K)], lambda targets: swiglu),
    "geglu": (lambda M, K, N: [(M, 2 * K)], lambda targets: geglu),
}


def outcome(function, tensors, margin, fill, transposed):
    """Outputs and gradients, with so wide a margin full of ``fill`` around every operand and incoming gradient."""
    leaves = [within(t.T, margin, fill).T if flip else within(t, margin, fill) for t, flip in transposed(tensors)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    douts = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, [within(d, margin, fill) if d.dim() else d for d in douts])
    return [*outputs, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("name", CALLS)
def test_what_lies_around_the_operands_changes_no_bit(backend, dtype, name):
    shapes, function = CALLS[name]

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None)
    @given(*[st.sampled_from(SIZES)] * 3, st.sampled_from(FILLS), st.sampled_from([1, 3, 32, 70]), st.integers(0, 7))
    def holds(M, K, N, fill, margin, flips):
        note(f"M={M} K={K} N={N} {fill} margin={margin} {flips:b}")
        torch.manual_seed(M + K + N)
        tensors = [torch.randn(shape).to(dtype) for shape in shapes(M, K, N)]
        call = function(torch.randint(N, (M,)))
        # matrices may lie in memory column by column
        transposed = lambda ts: [(t, t.dim() == 2 and flips >> i & 1) for i, t in enumerate(ts)]  # noqa: E731
        got, truth = (outcome(call, tensors, margin, around, transposed) for around in (fill, 0.0))
        for g, t in zip(got, truth, strict=True):
            assert t.isfinite().all()
            assert torch.equal(g, t)

    holds()


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_what_lies_around_the_operands_changes_no_bit_of_a_product(backend, dtype):
    @settings(max_examples=2 * EXAMPLES, derandomize=True, deadline=None)
    @given(*[st.sampled_from(SIZES)] * 3, st.sampled_from(FILLS), st.sampled_from([1, 3, 32, 70]), st.integers(0, 3))
    def holds(M, K, N, fill, margin, flips):
        torch.manual_seed(M + K + N)
        a, b = (torch.randn(s).to(dtype) for s in ((M, K), (K, N)))

        def around(fill):
            laid = (
                within(t.T, margin, fill).T if flips >> i & 1 else within(t, margin, fill) for i, t in enumerate((a, b))
            )
            return product(*laid)

        for got, truth in zip(around(fill), around(0.0), strict=True):
            assert truth.isfinite().all()
            assert torch.equal(got, truth)

    holds()


# The two faults of PyTorch's products of bf16 on AMX that these tests were written for.


@pytest.mark.parametrize("K", [33, 34, 65, 769])
def test_a_nan_in_one_row_leaves_the_row_before_it_as_it_was(backend, device, K):
    x, weight = (torch.randn(n, K, device=device).bfloat16() for n in (40, 20))
    x[3] = torch.nan
    assert linear(x, weight).isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("K", [31, 33, 63, 65, 127])
@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_rows_of_a_wider_matrix_are_multiplied_without_what_is_behind_them(backend, device, K, fill):
    x, weight = (torch.randn(n, K, device=device).bfloat16() for n in (40, 20))
    y = linear(within(x, 40, fill), within(weight, 40, fill))
    torch.testing.assert_close(y, F.linear(x.float(), weight.float()).bfloat16())


@pytest.mark.parametrize("how", ["compiled", "autocast"])
def test_pytorchs_product_is_kept_from_what_is_behind_a_row(how):
    x, weight = torch.randn(40, 33), torch.randn(21, 33)
    if how == "compiled":
        x, weight = x.bfloat16(), weight.bfloat16()
    x[3] = torch.nan
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = (torch.compile(linear, fullgraph=True) if how == "compiled" else linear)(x, weight)
    assert y.isnan().any(1).nonzero().tolist() == [[3]]
    dy = torch.ones_like(y)
    dy[5] = torch.nan
    y.backward(dy)
    assert x.grad.isnan().any(1).nonzero().tolist() == [[5]]
