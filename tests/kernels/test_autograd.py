"""Every public function under autograd: gradients for those who ask, as often as they ask, and never a second order."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

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
from tests.kernels import local, peers


def targets(t):
    return torch.tensor([1, -1, 4, 0], device=t.device)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def packed(qkv):
    q, k, v = (t.view(2, 9, 2, 4).transpose(1, 2) for t in qkv.chunk(3, -1))
    return causal(q, k, v).transpose(1, 2).reshape(2, 9, 8)


OPTIONS = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2}


def angles(t):
    return rotary_tables(9, 4, device=t.device)


def turned(x):
    cos, sin = (t.unsqueeze(1) for t in angles(x))
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def turned_packed(qkv, qk_norm):
    heads, v = qkv.unflatten(-1, (6, 4)).split([4, 2], 2)
    return torch.cat([turned(F.rms_norm(heads, (4,), eps=1e-6) if qk_norm else heads), v], 2).flatten(-2)


# Each function, the same in plain PyTorch, and the shapes of what it can be differentiated by.
FUNCTIONS = {
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, (8,), w, b), [(4, 8), (8,), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b: add_layer_norm(x, r, w, b)[0],
        lambda x, r, w, b: F.layer_norm(x + r, (8,), w, b),
        [(4, 8), (4, 8), (8,), (8,)],
    ),
    "rms_norm": (rms_norm, lambda x, w: F.rms_norm(x, (8,), w, 1e-6), [(4, 8), (8,)]),
    "add_rms_norm": (
        lambda x, r, w: add_rms_norm(x, r, w)[0],
        lambda x, r, w: F.rms_norm(x + r, (8,), w, 1e-6),
        [(4, 8), (4, 8), (8,)],
    ),
    "gelu": (
        lambda x, b: gelu(x, bias=b),
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        [(4, 8), (8,)],
    ),
    "relu2": (relu2, lambda x: F.relu(x).square(), [(4, 8)]),
    "swiglu and geglu": (swiglu, lambda gate, up: F.silu(gate) * up, [(4, 8), (4, 8)]),
    "swiglu and geglu, packed": (
        lambda x: geglu(x, approximate="none"),
        lambda x: F.gelu(x[:, :4]) * x[:, 4:],
        [(4, 8)],
    ),
    "attention": (attention, causal, [(2, 3, 9, 4)] * 3),
    "attention_qkv": (lambda t: attention_qkv(t, 2), packed, [(2, 9, 24)]),
    "rotary": (lambda x: rotary(x, *angles(x)), turned, [(2, 9, 3, 4)]),
    "rms_norm_rotary": (
        lambda x, w: rms_norm_rotary(x, *angles(x), w),
        lambda x, w: turned(F.rms_norm(x, (4,), w, 1e-6)),
        [(2, 9, 3, 4), (4,)],
    ),
    "rotary_qkv": (
        lambda x: rotary_qkv(x, 2, *angles(x)),
        lambda x: turned_packed(x, qk_norm=False),
        [(2, 9, 24)],
    ),
    "rotary_qkv, normed": (
        lambda x: rotary_qkv(x, 2, *angles(x), qk_norm=True),
        lambda x: turned_packed(x, qk_norm=True),
        [(2, 9, 24)],
    ),
    "attention, local": (
        lambda *t: attention(*t, window=4, softcap=2.0),
        local.formula(window=4, softcap=2.0),
        [(2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 4)],
    ),
    "cross_entropy": (
        lambda x: cross_entropy(x, targets(x)),
        lambda x: F.cross_entropy(x, targets(x), ignore_index=-1),
        [(4, 7)],
    ),
    "cross_entropy, options": (
        lambda x: cross_entropy(x, targets(x), **OPTIONS),
        lambda x: peers.cross_entropy(x, targets(x), **OPTIONS),
        [(4, 7)],
    ),
    "linear": (linear, F.linear, [(4, 8), (7, 8), (7,)]),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, targets(x)),
        lambda x, w: F.cross_entropy(x @ w.T, targets(x), ignore_index=-1),
        [(4, 8), (7, 8)],
    ),
    "linear_cross_entropy, of each row": (
        lambda x, w: linear_cross_entropy(x, w, targets(x), reduction="none", **OPTIONS),
        lambda x, w: peers.cross_entropy(x @ w.T, targets(x), reduction="none", **OPTIONS),
        [(4, 8), (7, 8)],
    ),
}
functions = pytest.mark.parametrize(("ours", "plain", "shapes"), FUNCTIONS.values(), ids=list(FUNCTIONS))
by_argument = pytest.mark.parametrize(
    ("name", "argument"), [(name, i) for name, (_, _, shapes) in FUNCTIONS.items() for i in range(len(shapes))]
)


@pytest.fixture
def functorch(backend, device):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter is called without the dispatcher, which would unwrap the tensors")


def inputs(shapes, device):
    return [torch.randn(shape, device=device) for shape in shapes]


@by_argument
def test_only_an_argument_that_asks_gets_a_gradient(backend, device, name, argument):
    ours, plain, shapes = FUNCTIONS[name]
    tensors = inputs(shapes, device)
    tensors[argument].requires_grad_()
    ours(*tensors).square().sum().backward()
    gradient, tensors[argument].grad = tensors[argument].grad, None
    plain(*tensors).square().sum().backward()
    torch.testing.assert_close(gradient, tensors[argument].grad, rtol=1e-4, atol=1e-5)
    assert all(t.grad is None for i, t in enumerate(tensors) if i != argument)


@functions
def test_nothing_that_asks_means_no_graph(backend, device, ours, plain, shapes):
    tensors = inputs(shapes, device)
    assert not ours(*tensors).requires_grad
    with torch.no_grad():
        assert not ours(*(t.requires_grad_() for t in tensors)).requires_grad


@functions
def test_where_nothing_is_differentiated_the_bits_are_the_same(backend, device, ours, plain, shapes):
    tensors = [t.requires_grad_() for t in inputs(shapes, device)]
    with_graph = ours(*tensors)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(ours(*tensors), with_graph)


@functions
@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(backend, device, ours, plain, shapes, gradients):
    """Also where gradients are off: forward mode does not ask whether they are."""
    tensors = inputs(shapes, device)
    with gradients(), forward_ad.dual_level():
        tensors[0] = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match=r"implement the jvp"):
            ours(*tensors)


@by_argument
def test_a_second_derivative_is_refused(backend, device, name, argument):
    """Also where the way there does not lead through the incoming gradient, which PyTorch's own guard misses."""
    ours, plain, shapes = FUNCTIONS[name]
    tensors = [t.requires_grad_() for t in inputs(shapes, device)]

    def penalty(function):
        """Of the gradient's size, and of the argument's, so that something is left if the first were dropped."""
        gradients = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
        return sum(g.square().sum() for g in gradients) + tensors[argument].square().sum()

    try:
        gradient = torch.autograd.grad(penalty(ours), tensors[argument])[0]
    except RuntimeError as error:
        assert str(error).startswith(f"{name.partition(',')[0]}: cannot be differentiated twice")  # noqa: PT017
    else:  # no gradient depends on what is added last, nor on what is turned
        assert (name, argument) in {("layer_norm", 2), ("linear", 2), ("rotary", 0), ("rotary_qkv", 0)}
        torch.testing.assert_close(gradient, torch.autograd.grad(penalty(plain), tensors[argument])[0])


@functions
def test_a_graph_that_is_retained_gives_the_same_gradients_again(backend, device, ours, plain, shapes):
    tensors = [t.requires_grad_() for t in inputs(shapes, device)]
    out = ours(*tensors)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, tensors, dout), strict=True):
        assert torch.equal(a, b)


@functions
def test_torch_func_grad_agrees_with_autograd(functorch, device, ours, plain, shapes):
    tensors = inputs(shapes, device)
    arguments = tuple(range(len(tensors)))
    got = torch.func.grad(lambda *t: ours(*t).square().sum(), argnums=arguments)(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    for a, b in zip(got, torch.autograd.grad(ours(*leaves).square().sum(), leaves), strict=True):
        assert torch.equal(a, b)


@functions
def test_torch_func_grad_of_itself_is_refused(functorch, device, ours, plain, shapes):
    first = torch.func.grad(lambda x, *rest: ours(x, *rest).square().sum())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda *t: first(*t).sum())(*inputs(shapes, device))


@functions
def test_deterministic_mode_changes_nothing(backend, device, ours, plain, shapes):
    tensors = [t.requires_grad_() for t in inputs(shapes, device)]

    def gradients():
        out = ours(*tensors)
        return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)

    usual = gradients()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        again = gradients()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


@functions
@pytest.mark.needs_gpu
def test_a_cuda_graph_replays_forward_and_backward(ours, plain, shapes):
    tensors = [t.requires_grad_() for t in inputs(shapes, "cuda")]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles the kernels
        for _ in range(2):
            torch.autograd.grad(ours(*tensors).square().sum(), tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(*tensors)
        captured = torch.autograd.grad(out.square().sum(), tensors)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t))
    graph.replay()
    eager = ours(*tensors)
    assert torch.equal(out, eager)
    for a, b in zip(captured, torch.autograd.grad(eager.square().sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_a_view_with_its_sign_still_to_be_flipped_is_read_right(backend, device):
    """PyTorch keeps ``x.conj().imag`` as the numbers of ``x`` and a note that they are to be negated."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the dispatcher flips signs, and the interpreter is called without it")
    x = torch.randn(4, 8, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    weight = torch.ones(8, device=device)
    torch.testing.assert_close(layer_norm(x, weight), layer_norm(x.clone().resolve_neg().contiguous(), weight))
