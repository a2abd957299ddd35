"""Every public function under torch.compile(fullgraph=True): forward and backward equal eager."""

import pytest
import torch

from fastgpt.kernels import (
    FusedAdamW,
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    cross_entropy,
    document_starts,
    embedding,
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
    use_backend,
)


def random(*shape):
    return torch.randn(shape, requires_grad=True)


def targets(t):
    return torch.tensor([1, -1, 4, 0], device=t.device)


def options(t):
    weight = torch.arange(1.0, 8.0, device=t.device)
    return {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2, "weight": weight}


def angles(t):
    """For heads (B, T, H, D)."""
    return rotary_tables(t.shape[1], t.shape[3], device=t.device)


CASES = {
    "layer_norm": (layer_norm, [(4, 8), (8,), (8,)]),
    "layer_norm, no bias": (layer_norm, [(4, 8), (8,)]),
    "add_layer_norm": (add_layer_norm, [(4, 8), (4, 8), (8,), (8,)]),
    "add_layer_norm, only the sum": (lambda *t: add_layer_norm(*t)[1] * t[2], [(4, 8), (4, 8), (8,)]),
    "rms_norm": (rms_norm, [(4, 8), (8,)]),
    "rms_norm, no weight": (rms_norm, [(4, 8)]),
    "add_rms_norm": (add_rms_norm, [(4, 8), (4, 8), (8,)]),
    "add_rms_norm, no weight": (add_rms_norm, [(4, 8), (4, 8)]),
    "gelu": (gelu, [(4, 8)]),
    "gelu, exact": (lambda t: gelu(t, "none"), [(4, 8)]),
    "gelu with bias": (lambda *t: gelu(t[0], bias=t[1]), [(4, 8), (8,)]),
    "relu2": (relu2, [(4, 8)]),
    "swiglu": (swiglu, [(4, 8), (4, 8)]),
    "swiglu, packed": (swiglu, [(4, 8)]),
    "swiglu, halves": (lambda t: swiglu(*t.chunk(2, -1)), [(4, 8)]),
    "geglu": (geglu, [(4, 8), (4, 8)]),
    "geglu, exact, packed": (lambda t: geglu(t, approximate="none"), [(4, 8)]),
    "attention": (attention, [(2, 3, 20, 8)] * 3),
    "attention, full": (lambda *t: attention(*t, causal=False, scale=0.3), [(2, 3, 20, 8)] * 3),
    "attention, transposed": (lambda *t: attention(*(x.transpose(1, 2) for x in t)), [(2, 20, 3, 8)] * 3),
    "attention, single pass": (lambda *t: attention(*t, deterministic=False), [(2, 3, 20, 8)] * 3),
    "attention, local": (
        lambda *t: attention(
            *t,
            window=7,
            softcap=2.0,
            documents=document_starts(torch.arange(40, device=t[0].device).view(2, 20) % 9, 8),
        ),
        [(2, 4, 20, 8), (2, 2, 20, 8), (2, 2, 20, 8)],
    ),
    "attention_qkv": (lambda t: attention_qkv(t, 2), [(2, 20, 24)]),
    "attention_qkv, shared keys": (lambda t: attention_qkv(t, 4, n_kv_head=2, window=5), [(2, 20, 32)]),
    "attention_qkv, single pass": (lambda t: attention_qkv(t, 2, deterministic=False), [(2, 20, 24)]),
    "rotary": (lambda t: rotary(t, *angles(t)), [(2, 20, 3, 8)]),
    "rotary, interleaved, transposed": (
        lambda t: rotary(t.transpose(1, 2), *angles(t.transpose(1, 2)), interleaved=True), [(2, 3, 20, 8)],
    ),
    "rms_norm_rotary": (lambda t, w: rms_norm_rotary(t, *angles(t), w), [(2, 20, 3, 8), (8,)]),
    "rms_norm_rotary, norm alone": (lambda t: rms_norm_rotary(t, eps=0.1), [(2, 20, 3, 8)]),
    "rotary_qkv": (lambda t: rotary_qkv(t, 2, *angles(t.unflatten(2, (4, 8))), n_kv_head=1), [(2, 20, 32)]),
    "rotary_qkv, normed": (
        lambda t: rotary_qkv(t, 2, *angles(t.unflatten(2, (6, 4))), qk_norm=True, interleaved=True), [(2, 20, 24)],
    ),
    "cross_entropy": (lambda t: cross_entropy(t, targets(t)), [(4, 7)]),
    "linear_cross_entropy": (lambda *t: linear_cross_entropy(*t, targets(t[0])), [(4, 8), (7, 8)]),
    "cross_entropy, options": (lambda t: cross_entropy(t, targets(t), **options(t)), [(4, 7)]),
    "cross_entropy, of each row": (lambda t: cross_entropy(t, targets(t), reduction="none"), [(4, 7)]),
    "linear_cross_entropy, options": (
        lambda x, w: linear_cross_entropy(x, w, targets(x), class_weight=options(x).pop("weight"), softcap=3.0),
        [(4, 8), (7, 8)],
    ),
    "linear_cross_entropy, of each row": (
        lambda x, w: linear_cross_entropy(x, w, targets(x), reduction="none", z_loss=0.1, label_smoothing=0.2),
        [(4, 8), (7, 8)],
    ),
    "linear": (linear, [(4, 8), (7, 8), (7,)]),
    "embedding": (lambda t: embedding(targets(t).abs(), t), [(7, 8)]),
}  # fmt: skip
cases = pytest.mark.parametrize(("function", "shapes"), CASES.values(), ids=list(CASES))


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _traceable(request):
    if "backend" not in request.fixturenames:
        return
    if request.getfixturevalue("backend") == "triton" and request.getfixturevalue("device").type == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")


def results(function, inputs):
    """Outputs and gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.linspace(1, 2, o.numel()).view(o.shape) for o in outputs]
    used = torch.autograd.grad(outputs, inputs, douts, allow_unused=True)
    return [o.detach() for o in outputs] + [
        torch.zeros_like(i) if g is None else g for g, i in zip(used, inputs, strict=True)
    ]


@cases
def test_a_compiled_function_equals_itself_in_eager(backend, function, shapes):
    inputs = [random(*shape) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, inputs), results(function, inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def block(x, index, wte, ln, w_qkv, w_out):
    """A transformer block with every function in it, from tokens to loss."""
    x = x + embedding(index, wte)
    h = layer_norm(x, ln)
    cos, sin = rotary_tables(10, 8, device=x.device)
    a = attention_qkv(rotary_qkv(linear(h, w_qkv), 2, cos, sin, qk_norm=True), 2)
    h, x = add_layer_norm(a, x, ln, wte[0])
    q, k, v = (t.view(2, 10, 2, 8) for t in (x, h, a))
    q, k, v = (t.transpose(1, 2) for t in (rotary(q, cos, sin), rms_norm_rotary(k, cos, sin, ln[:8]), v))
    q, k, v = (t.view(2, 10, 2, 8).transpose(1, 2) for t in (x, h, a))
    h, x = add_rms_norm(relu2(h), x, ln)
    h = swiglu(h, rms_norm(x)) + geglu(linear(h, w_qkv)[..., :32])
    x = x + linear(gelu(h) + gelu(h, "none"), w_out) + attention(q, k, v).transpose(1, 2).reshape(2, 10, 16)
    x = x.view(20, 16)
    return linear_cross_entropy(x, wte, index.view(20)) + cross_entropy(linear(x, wte), index.view(20))


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
@pytest.mark.parametrize(
    ("compiler", "dtype"), [("inductor", torch.float32), ("aot_eager", torch.bfloat16)], ids=["inductor", "bfloat16"]
)
def test_a_block_of_all_functions_in_one_graph_equals_eager(backend, compiler, dtype):
    shapes = [(2, 10, 16), (7, 16), (16,), (48, 16), (16, 16)]
    x, *weights = [(torch.randn(shape) / 4).to(dtype).requires_grad_() for shape in shapes]
    index = torch.randint(7, (2, 10))
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for ours, eager in zip(
        results(lambda *t: compiled(t[0], index, *t[1:]), [x, *weights]),
        results(lambda *t: block(t[0], index, *t[1:]), [x, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: attention(t, t, t),
        lambda t: add_layer_norm(t, t, t[0, 0, 0])[0],
        lambda t: add_rms_norm(t, t, t[0, 0, 0])[0],
        lambda t: swiglu(t, t),
    ],
    ids=["attention", "add_layer_norm", "add_rms_norm", "swiglu"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_tensor_may_be_several_arguments(backend, function, compiled):
    inputs = [random(2, 3, 20, 8)]
    called = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    ours = results(called, inputs)
    with use_backend("reference"):
        for a, b in zip(ours, results(function, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_one_graph_serves_every_length(backend):
    """Dynamic shapes: T is a symbol, and no second compilation happens."""
    compiled = torch.compile(lambda t: attention_qkv(t, 2), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (20, 33, 130):
            inputs = [random(2, T, 24)]
            for ours, eager in zip(
                results(compiled, inputs), results(lambda t: attention_qkv(t, 2), inputs), strict=True
            ):
                torch.testing.assert_close(ours, eager)


@cases
def test_dynamic_shapes_equal_eager(function, shapes):
    inputs = [random(*shape) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for ours, eager in zip(results(compiled, inputs), results(function, inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def test_manual_seed_governs_dropout_in_a_compiled_function(backend):
    function = lambda t: attention_qkv(t, 2, dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [random(2, 20, 24)]

    def draw(function, seed):
        torch.manual_seed(seed)
        return results(function, inputs)

    for ours, eager in zip(draw(compiled, 1), draw(function, 1), strict=True):
        torch.testing.assert_close(ours, eager)
    assert not torch.equal(draw(compiled, 1)[0], draw(compiled, 2)[0])


def test_a_compiled_function_follows_a_change_of_backend():
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    x = torch.randn(100_000) * 3
    with use_backend("auto"):
        assert torch.equal(compiled(x), gelu(x))
    with use_backend("reference"):
        assert torch.equal(compiled(x), gelu(x))


def test_the_optimizer_steps_beside_a_compiled_model(backend):
    """FusedAdamW itself is not for compiling; a step between compiled calls is seen by the next one."""
    weight = torch.nn.Parameter(torch.randn(7, 8))
    x = torch.randn(4, 8)
    optimizer = FusedAdamW([weight], lr=0.1, max_grad_norm=1.0)
    compiled = torch.compile(lambda: linear_cross_entropy(x, weight, targets(x)), fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(5):
        loss = compiled()
        loss.backward()
        optimizer.step(zero_grad=True)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
