"""What torch.autocast does to each public function: dtypes, numbers, gradients, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
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
    use_backend,
)

half, single = torch.bfloat16, torch.float32


def targets(t):
    return torch.tensor([1, -1, 4, 0], device=t.device)


def angles(t):
    return rotary_tables(9, 4, device=t.device)


# Each function, its inputs' shapes and dtypes, what it computes in, and the dtype of its result.
CASES = {
    "linear": (linear, [(4, 8), (7, 8), (7,)], [half, single, single], half, half),
    "attention": (attention, [(2, 3, 9, 4)] * 3, [single, half, single], half, half),
    "attention_qkv": (lambda t: attention_qkv(t, 2), [(2, 9, 24)], [single], half, half),
    "attention, local": (
        lambda *t: attention(*t, window=4, softcap=2.0), [(2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 4)],
        [single, half, single], half, half,
    ),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, targets(x)), [(4, 8), (7, 8)], [single, single], half, single,
    ),
    "layer_norm": (layer_norm, [(4, 8), (8,), (8,)], [half, single, single], single, single),
    "add_layer_norm": (
        lambda *t: add_layer_norm(*t)[0], [(4, 8), (4, 8), (8,)], [half, single, single], single, single,
    ),
    "rotary": (lambda x: rotary(x, *angles(x)), [(2, 9, 3, 4)], [half], half, half),
    "rotary, fp32": (lambda x: rotary(x, *angles(x)), [(2, 9, 3, 4)], [single], single, single),
    "rms_norm_rotary": (
        lambda x, w: rms_norm_rotary(x, *angles(x), w), [(2, 9, 3, 4), (4,)], [half, single], half, half,
    ),
    "rotary_qkv": (lambda x: rotary_qkv(x, 2, *angles(x), qk_norm=True), [(2, 9, 24)], [half], half, half),
    "rms_norm": (rms_norm, [(4, 8), (8,)], [half, single], single, single),
    "add_rms_norm": (
        lambda *t: add_rms_norm(*t)[0], [(4, 8), (4, 8), (8,)], [half, single, single], single, single,
    ),
    "relu2": (relu2, [(4, 8)], [half], half, half),
    "swiglu": (swiglu, [(4, 8), (4, 8)], [half, half], half, half),
    "swiglu, packed": (swiglu, [(4, 8)], [single], single, single),
    "gelu": (lambda x, b: gelu(x, bias=b), [(4, 8), (8,)], [half, single], half, half),
    "linear_cross_entropy, of each row": (
        lambda x, w: linear_cross_entropy(
            x, w, targets(x), reduction="none", class_weight=torch.arange(7.0, device=x.device), softcap=3.0
        ),
        [(4, 8), (7, 8)], [single, single], half, single,
    ),
    "cross_entropy": (lambda x: cross_entropy(x, targets(x)), [(4, 7)], [half], half, single),
}  # fmt: skip
cases = pytest.mark.parametrize(("function", "shapes", "dtypes", "inside", "result"), CASES.values(), ids=list(CASES))


def outcome(function, inputs):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


@cases
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_inputs_are_cast_as_documented(backend, device, function, shapes, dtypes, inside, result, compiled):
    if compiled and backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")
    inputs = [torch.randn(s, device=device).to(d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
    torch._dynamo.reset()
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast(device.type, half):
        got = outcome(called, inputs)
    cast = [t.detach().to(inside).requires_grad_() for t in inputs]
    expected = outcome(function, cast)
    assert got[0].dtype == result
    assert [g.dtype for g in got[1:]] == dtypes
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b.float()).abs().max() <= 2**-7 * b.float().abs().max()  # an ulp of bf16 or two


@cases
def test_other_mixtures_of_dtypes_are_refused_outside_of_it(function, shapes, dtypes, inside, result):
    if len(set(dtypes)) == 1:
        pytest.skip("a single dtype is no mixture")
    with pytest.raises(TypeError, match="dtype"):
        function(*(torch.randn(s).to(d) for s, d in zip(shapes, dtypes, strict=True)))


def test_an_operator_computes_in_its_own_precision_inside():
    """The reference's products of fp32 would lose half their bits if autocast reached them."""
    q, k, v = (torch.randn(1, 2, 33, 16).bfloat16() for _ in range(3))
    with use_backend("reference"):
        expected = attention(q, k, v)
        with torch.autocast("cpu", half):
            assert torch.equal(attention(q, k, v), expected)


def test_float64_is_left_alone():
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    with torch.autocast("cpu", half):
        torch.testing.assert_close(layer_norm(x, weight), F.layer_norm(x, (8,), weight))
        assert attention(*(torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))).dtype == torch.float64


def test_a_main_grad_gets_the_gradient_of_a_cast_weight():
    x, weight = torch.randn(4, 8), torch.randn(7, 8, requires_grad=True)
    with torch.autocast("cpu", half):
        linear_cross_entropy(x, weight, targets(x)).backward()
        expected, weight.grad, weight.main_grad = weight.grad, None, torch.zeros(7, 8)
        linear_cross_entropy(x, weight, targets(x)).backward()
    torch.testing.assert_close(weight.main_grad, expected, rtol=2**-6, atol=2**-9)
