"""linear and embedding, whose weight gradients go into main_grad if there is one; matmul_into beneath them."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import dispatch, embedding, linear
from fastgpt.kernels.main_grad import main_grad_of
from fastgpt.kernels.matmul import matmul_into


def operands(*shape, C_out=9, dtype=torch.float32, device=None):
    x, weight, bias = (torch.randn(s, device=device) for s in (shape, (C_out, shape[-1]), (C_out,)))
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def give_main_grad(weight, start=0.0):
    weight.main_grad = torch.full(weight.shape, start, dtype=torch.float32, device=weight.device)
    return weight.main_grad


# On both sides of 16, below which products go to PyTorch, and of the register tiles; K past one block of depth
SHAPES = [((8,), 9), ((1, 1), 1), ((63, 127), 33), ((17, 700), 65), ((3, 5, 7, 33), 16), ((0, 8), 9)]
shapes = pytest.mark.parametrize(("shape", "C_out"), SHAPES, ids=str)


@shapes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_linear_is_as_accurate_as_pytorch(device, dtype, rule, shape, C_out, with_bias):
    tensors = operands(*shape, C_out=C_out, dtype=dtype, device=device)
    rule.accuracy(linear, F.linear, tensors if with_bias else tensors[:2])


@shapes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("carriers", [{1}, {2}, {1, 2}], ids=["weight", "bias", "both"])
def test_main_grad_of_linear_receives_what_autograd_would_give(device, dtype, rule, shape, C_out, with_bias, carriers):
    leaves = operands(*shape, C_out=C_out, dtype=dtype, device=device)[: 2 + with_bias]
    carriers = {i for i in carriers if i < len(leaves)}
    for i in carriers:
        give_main_grad(leaves[i], start=1.0)
    dy = torch.randn(*shape[:-1], C_out, device=device).to(dtype)
    linear(*leaves).backward(dy)
    peer = rule.run(F.linear, leaves, [dy])[1]
    truth = rule.run(F.linear, [t.double() for t in leaves], [dy.double()])[1]
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i in carriers)
        got = leaf.main_grad.double() - 1.0 if i in carriers else leaf.grad
        rule.error(f"gradient {i}", got, [peer[i]], truth[i], dtype, rule.gradient)


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_parameter_keeps_its_main_grad_as_it_is(device, frozen):
    tensors = operands(20, 33, C_out=20, device=device)
    for t in tensors[1:]:
        give_main_grad(t, start=1.0)
    tensors[frozen].requires_grad_(False)
    linear(*tensors).sum().backward()
    for i in (1, 2):
        assert (tensors[i].main_grad == 1.0).all() == (i == frozen)


COLUMNS = [(1, 63), (63, 1), (127, 33), (1023, 63), (65, 513), (2, 40_000), (0, 7)]


@pytest.mark.parametrize("shape", COLUMNS, ids=str)
def test_column_sums_are_added_to_what_is_there_in_fp32(device, dtype, rule, shape):
    x, before = torch.randn(shape, device=device).to(dtype), torch.randn(shape[1], device=device)
    sums, again = before.clone(), before.clone()
    for t in (sums, again):
        dispatch.resolve("add_column_sums_", x)(t, x)
    peer = before + x.float().sum(0)
    rule.error("sums", sums, [peer], before.double() + x.double().sum(0), torch.float32, rule.output)
    assert torch.equal(sums, again)


def test_column_sums_are_taken_of_any_strides(device, dtype, strided):
    x = strided(torch.randn(37, 65, device=device).to(dtype))
    sums = torch.ones(65, device=device)
    dispatch.resolve("add_column_sums_", x)(sums, x)
    torch.testing.assert_close(sums, 1 + x.float().sum(0))


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_linear_takes_any_strides(device, dtype, rule, strided, incoming):
    inputs = operands(5, 7, 33, C_out=20, dtype=dtype, device=device)
    if incoming:
        rule.accuracy(linear, F.linear, inputs, strided)
    else:
        rule.accuracy(linear, F.linear, [strided(t.detach()) for t in inputs])


def test_only_the_gradients_that_are_needed_are_computed(device):
    tensors = operands(20, 33, C_out=20, device=device)
    everything = torch.autograd.grad(linear(*tensors).sum(), tensors)
    for needed in range(3):
        leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors)]
        linear(*leaves).sum().backward()
        assert torch.equal(leaves[needed].grad, everything[needed])
        assert [leaf.grad is None for leaf in leaves].count(True) == 2
    with torch.no_grad():
        assert not linear(*tensors).requires_grad


def test_main_grad_accumulates(device, dtype):
    x, weight, _ = operands(63, 33, C_out=20, dtype=dtype, device=device)
    index = torch.randint(9, (4, 50), device=device)
    for function in (lambda: linear(x, weight), lambda: embedding(index, weight)):
        once = give_main_grad(weight)
        function().sum().backward()
        twice = give_main_grad(weight, start=1.0)
        function().sum().backward()
        function().sum().backward()
        assert once.abs().max() > 1  # the weight's gradient is not all zero
        torch.testing.assert_close(twice, 1 + 2 * once)


def test_main_grad_keeps_what_bf16_would_lose():
    """256 + 1 is 256 in bf16: a thousand small gradients after one large one are all lost, but not in fp32."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    give_main_grad(weight, start=256.0)
    for _ in range(1000):
        linear(torch.full((1, 1), 0.25, dtype=torch.bfloat16), weight).backward()
    assert weight.main_grad.item() == 256.0 + 250.0


def test_an_input_that_needs_no_gradient_gets_none():
    x, weight, _ = operands(63, 33)
    x = x.detach()
    give_main_grad(weight)
    linear(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.main_grad, x.sum(0).expand(9, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_of_embedding_adds_up_repeated_indices(dtype):
    index = torch.tensor([[1, 1, 0], [1, 2, 0]])
    weight = torch.randn(5, 4).to(dtype).requires_grad_()
    main_grad = give_main_grad(weight)
    y = embedding(index, weight)
    dy = torch.randint(-8, 8, (2, 3, 4)).to(dtype)
    y.backward(dy)
    expected = torch.zeros(5, 4)
    for row, d in zip(index.flatten().tolist(), dy.view(-1, 4).float(), strict=True):
        expected[row] += d
    assert torch.equal(y, F.embedding(index, weight))
    assert torch.equal(main_grad, expected)
    assert weight.grad is None


def test_without_main_grad_embedding_is_pytorchs():
    index, weight = torch.tensor([[1, 1, 0], [1, 2, 0]]), torch.randn(5, 4, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    assert torch.equal(embedding(index, weight), F.embedding(index, weight))
    ours = torch.autograd.grad(embedding(index, weight), weight, dy)
    assert torch.equal(*ours, *torch.autograd.grad(F.embedding(index, weight), weight, dy))


def test_a_gradient_expanded_over_tokens_reaches_every_one():
    weight = torch.randn(5, 4, requires_grad=True)
    give_main_grad(weight)
    dy = torch.randn(4)
    embedding(torch.tensor([[0, 3], [3, 3]]), weight).backward(dy.expand(2, 2, 4))
    torch.testing.assert_close(weight.main_grad[3], 3 * dy)
    torch.testing.assert_close(weight.main_grad[0], dy)
    assert weight.main_grad[[1, 2, 4]].count_nonzero() == 0


def test_main_grad_counts_only_for_a_parameter_being_differentiated():
    weight = torch.randn(9, 8)
    assert main_grad_of(weight) is None
    weight.main_grad = torch.zeros(9, 8)
    assert main_grad_of(weight) is None, "needs no gradient"
    weight.requires_grad_()
    assert main_grad_of(weight) is weight.main_grad
    with torch.no_grad():
        assert main_grad_of(weight) is None


def test_a_compiled_graph_returns_its_gradients_and_leaves_main_grad_alone():
    x, weight, bias = operands(5, 8)
    index = torch.tensor([1, 2, 2])
    give_main_grad(weight)

    def function(x, weight, bias):
        return linear(x, weight, bias).sum() + embedding(index, weight).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
    del weight.main_grad
    expected = torch.autograd.grad(function(x, weight, bias), (x, weight, bias))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(20, 8), torch.ones(20, 7), None),
        (torch.ones(20, 8), torch.ones(20, 8), torch.ones(19)),
        (torch.ones(20, 8), torch.ones(20, 8).bfloat16(), None),
        (torch.ones(20, 8), torch.ones(20, 8), torch.ones(20).double()),
        (torch.ones(20, 8), torch.ones(20, 8, device="meta"), None),
    ],
    ids=["weight: columns", "bias: shape", "weight: dtype", "bias: dtype", "weight: device"],
)
def test_a_wrong_argument_is_refused_as_pytorch_refuses_it(backend, x, weight, bias):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        linear(x, weight, bias)


def test_a_nan_spoils_its_own_row_only(device, dtype):
    x, weight, bias = operands(40, 33, C_out=20, dtype=dtype, device=device)
    x = x.detach()
    x[3, 5] = torch.nan
    assert linear(x, weight, bias).isnan().all(-1).nonzero().tolist() == [[3]]
    assert linear(x, weight, bias).isnan().sum() == 20


def need_products_of_ours(*dtypes):
    if dtypes not in dispatch.EXTENSION.products:
        pytest.skip("products are PyTorch's on this CPU")


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit_of_a_weight_gradient(device, rule, on_threads):
    inputs = operands(130, 65, C_out=70, device=device)
    dy = torch.randn(130, 70, device=device)
    need_products_of_ours(torch.float32, torch.float32)
    one, two = (on_threads(n, lambda: rule.run(linear, inputs, [dy])) for n in (1, 2))
    assert torch.equal(one[0][0], two[0][0])
    assert all(map(torch.equal, one[1], two[1]))


# ---- matmul_into ----


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (16, 1, 16), (17, 321, 33), (63, 127, 513), (200, 640, 31)])
@pytest.mark.parametrize("kind", ["plain", "bias", "accumulate"])
def test_matmul_into_writes_every_element(device, dtype, rule, M, K, N, kind):
    a, b, bias, held = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (K, N), (N,), (M, N)))
    out = held.clone() if kind == "accumulate" else torch.full_like(held, torch.nan)
    given = bias if kind == "bias" else None

    def plain(a, b, bias, held):
        return {"plain": a @ b, "bias": torch.addmm(bias, a, b), "accumulate": torch.addmm(held, a, b)}[kind]

    assert matmul_into(out, a, b, given, accumulate=kind == "accumulate") is out
    tensors = a, b, bias, held
    rule.error("out", out, [plain(*tensors)], plain(*(t.double() for t in tensors)), dtype, rule.output)


@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 1, 1), (1, 127, 5), (2, 48, 64), (3, 640, 63), (7, 321, 130), (8, 64, 50)]
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_few_rows_are_multiplied_by_a_transposed_weight(device, dtype, rule, M, K, N, has_bias):
    """As when a text is generated. What lies around the operands and the result is NaN, and stays it."""
    around = [torch.full((n + 2, m + 5), torch.nan, device=device).to(dtype) for n, m in ((M, K), (N, K), (M, N))]
    a, weight, out = (t[1:-1, 2:-3] for t in around)
    for t in (a, weight):
        t.copy_(torch.randn(t.shape, device=device))
    bias = torch.randn(N, device=device).to(dtype) if has_bias else None
    matmul_into(out, a, weight.T, bias)
    assert around[2].isnan().sum() == around[2].numel() - M * N

    def plain(a, weight, bias):
        return a @ weight.T if bias is None else torch.addmm(bias, a, weight.T)

    inputs = a.contiguous(), weight.contiguous(), bias
    truth = plain(*(None if t is None else t.double() for t in inputs))
    rule.error("out", out, [plain(*inputs)], truth, dtype, rule.output)


@pytest.mark.parametrize("kind", ["plain", "accumulate"])
def test_matmul_into_takes_operands_and_a_result_of_any_row_stride(device, rule, strided, kind):
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 50, device=device)
    larger = torch.full((42, 60), torch.nan, device=device)
    out = larger[1:41, 3:53]
    out.fill_(1.0)
    for left, right in ((strided(a), b), (a, strided(b)), (a.T.contiguous().T, b.T.contiguous().T)):
        out.fill_(1.0)
        matmul_into(out, left, right, accumulate=kind == "accumulate")
        start = 1.0 if kind == "accumulate" else 0.0
        rule.error("out", out, [start + left @ right], start + left.double() @ right.double(), out.dtype, rule.output)
        assert larger.isnan().sum() == 42 * 60 - 40 * 50, "around the result"


def test_matmul_into_accumulates_bf16_products_in_fp32(device):
    a, b = torch.randn(40, 70, device=device).bfloat16(), torch.randn(70, 50, device=device).bfloat16()
    out = torch.ones(40, 50, device=device)
    matmul_into(out, a, b, accumulate=True)
    torch.testing.assert_close(out, 1 + (a.float() @ b.float()), rtol=0.01, atol=0.1)


@pytest.mark.parametrize(("M", "K", "N"), [(16, 1, 16), (17, 321, 33), (130, 2, 2000), (200, 1023, 40)])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("wide", [True, False], ids=["fp32 sums", "sums"])
def test_matmul_into_sums_the_rows_of_its_first_operand(device, dtype, rule, M, K, N, transposed, accumulate, wide):
    a = (torch.randn(K, M, device=device).T if transposed else torch.randn(M, K, device=device)).to(dtype)
    b = torch.randn(K, N, device=device).to(dtype)
    out = torch.zeros(M, N, device=device) if accumulate else torch.empty(M, N, device=device, dtype=dtype)
    sums_dtype = torch.float32 if wide else dtype
    before = torch.randn(M, device=device).to(sums_dtype) if accumulate else torch.zeros((), device=device)
    sums = before.clone() if accumulate else torch.full((M,), torch.nan, device=device, dtype=sums_dtype)
    matmul_into(out, a, b, accumulate=accumulate, row_sums=sums)
    peer = before + a.sum(1, dtype=sums_dtype)
    rule.error("row_sums", sums, [peer], before.double() + a.double().sum(1), sums_dtype, rule.output)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize(("M", "K", "N"), [(16, 1, 16), (17, 321, 33), (130, 2, 70), (63, 127, 513), (200, 640, 40)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_a_bf16_product_of_ours_is_rounded_to_fp32_alone(device, rule, M, K, N, transposed):
    need_products_of_ours(torch.bfloat16, torch.float32)
    a, b = (
        torch.randn(*reversed(shape)).bfloat16().T if across else torch.randn(shape).bfloat16()
        for shape, across in zip(((M, K), (K, N)), transposed, strict=True)
    )
    held = torch.randn(M, N)
    out = matmul_into(held.clone(), a, b, accumulate=True)
    exact = held.double() + a.double() @ b.double()
    rule.error("out", out, [held + a.float() @ b.float()], exact, torch.float32, rule.output)


@pytest.mark.parametrize(
    ("weight", "bias", "named"),
    [((5, 7), None, "weight"), ((8,), None, "weight"), ((5, 8), (4,), "bias"), ((5, 8), (1, 5), "bias")],
)
def test_a_shape_that_does_not_fit_is_named(weight, bias, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        linear(torch.randn(3, 8), torch.randn(weight), None if bias is None else torch.randn(bias))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 3.4e38, -3.4028234663852886e38, 1e-38])
@pytest.mark.parametrize("place", ["left", "right", "both"])
def test_a_product_of_the_largest_numbers_and_of_infinity_is_what_it_is_in_fp64(device, value, place):
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 50, device=device) / 70
    if place != "right":
        a[3, 5] = a[20, 69] = value
    if place != "left":
        b[5, 7] = b[68, 49] = value
    exact = (a.double() @ b.double()).float()
    out = matmul_into(torch.empty(40, 50, device=device), a, b)
    torch.testing.assert_close(out, exact, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [-1, 0x7FC00000, 0x7F800001, 0x7FFFFFFF])
def test_a_nan_of_any_bits_is_nan_in_its_row_alone(device, bits):
    a, b = torch.randn(40, 70, device=device), torch.randn(70, 50, device=device)
    a.view(torch.int32)[3, 5] = bits
    out = matmul_into(torch.empty(40, 50, device=device), a, b)
    assert out.isnan().all(1).nonzero().tolist() == [[3]]
    assert out.isnan().sum() == 50
