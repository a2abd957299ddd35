"""The modules against torch.nn's: state_dicts, numbers, defaults, refusals, and all that is done to a module."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.kernels import (
    GEGLU,
    GELU,
    AddLayerNorm,
    AddRMSNorm,
    CausalSelfAttention,
    CrossEntropyLoss,
    Embedding,
    LayerNorm,
    Linear,
    LinearCrossEntropyLoss,
    ReLU2,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    cross_entropy,
    modules,
)

V, C, B, T = 17, 24, 2, 5


class CausalMultiheadAttention(nn.MultiheadAttention):
    """torch.nn's, called as a GPT calls it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]


class NormOfSum(nn.LayerNorm):
    """torch.nn's after the sum that it is of."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + residual), x + residual


class Rotation(nn.Module):
    """torch.nn has none: a product of complex numbers."""

    def __init__(self, head_size: int, n_positions: int, device: str | None = None) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
        angles = torch.outer(torch.arange(n_positions, device=device), frequencies)
        self.register_buffer("factors", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        product = torch.complex(a, b) * self.factors[: x.shape[1]].unsqueeze(1)
        return torch.cat([product.real, product.imag], -1)


class RMSNormOfSum(nn.RMSNorm):
    """Likewise."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + residual), x + residual


class SquaredReLU(nn.Module):
    """torch.nn has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class GatedUnit(nn.Module):
    """torch.nn has none."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return self.activation(gate) * up


def rows():
    return torch.randn(B, T, C)


def targets(*shape):
    index = torch.randint(V, shape)
    index.view(-1)[::4] = -100
    return index


TORCHS_LOSS = getattr(nn, "LinearCrossEntropyLoss", None)

# Each module and torch.nn's, what both are made with, and their inputs.
PAIRS = {
    "Linear": (Linear, nn.Linear, (C, V), {}, lambda: [rows()]),
    "Linear, no bias": (Linear, nn.Linear, (C, V), {"bias": False}, lambda: [rows()]),
    "Embedding": (Embedding, nn.Embedding, (V, C), {}, lambda: [torch.randint(V, (B, T))]),
    "LayerNorm": (LayerNorm, nn.LayerNorm, (C,), {}, lambda: [rows()]),
    "LayerNorm, no bias": (LayerNorm, nn.LayerNorm, (C,), {"bias": False, "eps": 0.1}, lambda: [rows()]),
    "AddLayerNorm": (AddLayerNorm, NormOfSum, (C,), {}, lambda: [rows(), rows()]),
    "RMSNorm": (RMSNorm, nn.RMSNorm, (C,), {}, lambda: [rows()]),
    "RMSNorm, no weight": (
        RMSNorm, nn.RMSNorm, (C,), {"elementwise_affine": False, "eps": 0.1}, lambda: [rows()],
    ),
    "AddRMSNorm": (AddRMSNorm, RMSNormOfSum, (C,), {"eps": 1e-6}, lambda: [rows(), rows()]),
    "GELU": (GELU, nn.GELU, (), {}, lambda: [rows()]),
    "GELU, tanh": (GELU, nn.GELU, ("tanh",), {}, lambda: [rows()]),
    "ReLU2": (ReLU2, SquaredReLU, (), {}, lambda: [rows()]),
    "SwiGLU": (SwiGLU, lambda: GatedUnit(nn.SiLU()), (), {}, lambda: [rows(), rows()]),
    "SwiGLU, packed": (SwiGLU, lambda: GatedUnit(nn.SiLU()), (), {}, lambda: [rows()]),
    "GEGLU": (GEGLU, lambda: GatedUnit(nn.GELU("tanh")), (), {}, lambda: [rows(), rows()]),
    "GEGLU, exact": (GEGLU, lambda kind: GatedUnit(nn.GELU(kind)), ("none",), {}, lambda: [rows()]),
    "CausalSelfAttention": (CausalSelfAttention, CausalMultiheadAttention, (C, 3), {}, lambda: [rows()]),
    "CausalSelfAttention, no bias": (
        CausalSelfAttention, CausalMultiheadAttention, (C, 3), {"bias": False}, lambda: [rows()],
    ),
    "RotaryEmbedding": (RotaryEmbedding, Rotation, (8, T + 2), {}, lambda: [torch.randn(B, T, 3, 8)]),
    "CrossEntropyLoss": (CrossEntropyLoss, nn.CrossEntropyLoss, (), {}, lambda: [torch.randn(8, V), targets(8)]),
    "CrossEntropyLoss, all options": (
        CrossEntropyLoss, nn.CrossEntropyLoss, (torch.rand(V),), {"label_smoothing": 0.1, "reduction": "sum"},
        lambda: [torch.randn(8, V), targets(8)],
    ),
    "CrossEntropyLoss, of each row": (
        CrossEntropyLoss, nn.CrossEntropyLoss, (), {"weight": torch.rand(V), "reduction": "none"},
        lambda: [torch.randn(8, V), targets(8)],
    ),
    "LinearCrossEntropyLoss": (
        LinearCrossEntropyLoss, TORCHS_LOSS, (C, V), {}, lambda: [torch.randn(8, C), targets(8)],
    ),
    "LinearCrossEntropyLoss, all options": (
        LinearCrossEntropyLoss, TORCHS_LOSS, (C, V), {"weight": torch.rand(V), "label_smoothing": 0.1},
        lambda: [torch.randn(8, C), targets(8)],
    ),
    "LinearCrossEntropyLoss, of each row": (
        LinearCrossEntropyLoss, TORCHS_LOSS, (C, V), {"reduction": "none", "ignore_index": -100},
        lambda: [torch.randn(8, C), targets(8)],
    ),
}  # fmt: skip
pairs = pytest.mark.parametrize("name", PAIRS)
WITHOUT_PARAMETERS = "GELU", "ReLU2", "SwiGLU", "GEGLU", "RotaryEmbedding", "CrossEntropyLoss"
takes_factory = [name for name in PAIRS if name.split(",")[0] not in WITHOUT_PARAMETERS]


def made(name, **options):
    """The module and torch.nn's, each from the same seed."""
    ours, theirs, args, kwargs, _ = PAIRS[name]
    if theirs is None:
        pytest.skip("torch.nn has no LinearCrossEntropyLoss before 2.13")
    torch.manual_seed(2)
    one = ours(*args, **kwargs, **options)
    torch.manual_seed(2)
    return one, theirs(*args, **kwargs, **options)


def only(name, **options):
    ours, _, args, kwargs, _ = PAIRS[name]
    return ours(*args, **kwargs, **options)


def outcome(module, inputs, call=None):
    """Outputs, then the gradients of the inputs and of the parameters."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = (module if call is None else call)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.linspace(-1, 1, o.numel() + 1)[1:].view(o.shape).to(o.dtype) for o in outputs]
    asking = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, asking, douts))


def close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_module_is_here():
    public = {name for name, value in vars(modules).items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert public == {name.split(",")[0] for name in PAIRS}


@pairs
def test_outputs_and_gradients_are_torch_nns(backend, device, name):
    with torch.device(device):
        ours, theirs = made(name)
        inputs = PAIRS[name][-1]()
        close(outcome(ours, inputs), outcome(theirs, inputs))


@pairs
def test_a_seed_initialises_it_as_torch_nns(name):
    ours, theirs = made(name)
    for (key, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b)


@pairs
def test_either_state_dict_loads_into_the_other(name):
    ours, theirs = made(name)
    inputs = PAIRS[name][-1]()
    for source, destination in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter) / 8)
        destination.load_state_dict(source.state_dict(), strict=True)
        close(outcome(ours, inputs), outcome(theirs, inputs))


def test_defaults_are_torch_nns():
    assert LayerNorm(C).eps == nn.LayerNorm(C).eps
    assert GELU().approximate == nn.GELU().approximate
    assert CrossEntropyLoss().ignore_index == LinearCrossEntropyLoss(C, V).ignore_index == -100
    assert CausalSelfAttention(C, 3).dropout == nn.MultiheadAttention(C, 3).dropout == 0.0
    for module, args in ((Linear, (C, V)), (LayerNorm, (C,)), (CausalSelfAttention, (C, 3))):
        parameters = dict(module(*args).named_parameters())
        assert any(key.endswith("bias") for key in parameters)
        assert all(p.dtype == torch.float32 for p in parameters.values())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Embedding(V, C, padding_idx=0), "padding_idx"),
        (lambda: Embedding(V, C, padding_idx=3), "padding_idx"),
        (lambda: Embedding(V, C, max_norm=1.0), "max_norm"),
        (lambda: Embedding(V, C, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: Embedding(V, C, sparse=True), "sparse"),
        (lambda: LayerNorm((T, C)), "normalized_shape"),
        (lambda: AddLayerNorm((T, C)), "normalized_shape"),
        (lambda: LinearCrossEntropyLoss(C, V, bias=True), "bias"),
        (lambda: LinearCrossEntropyLoss(C, V, out_features=(2,)), "out_features"),
        (lambda: LinearCrossEntropyLoss(C, V, weight=torch.ones(V + 1)), "weight"),
        (lambda: CrossEntropyLoss(label_smoothing=1.1), "label_smoothing"),
        (lambda: CrossEntropyLoss(reduction="average"), "reduction"),
        (lambda: CrossEntropyLoss(softcap=0.0), "softcap"),
        (lambda: RMSNorm((T, C)), "normalized_shape"),
        (lambda: AddRMSNorm((T, C)), "normalized_shape"),
        (lambda: GEGLU("erf"), "approximate"),
        (lambda: CausalSelfAttention(C, 3, kdim=8), "kdim"),
        (lambda: CausalSelfAttention(C, 5), "num_heads"),
        (lambda: CausalSelfAttention(C, 3, dropout=1.0), "dropout"),
    ],
)
def test_what_only_torch_nn_offers_is_refused_by_name_when_it_is_made(make, named):
    with pytest.raises((ValueError, TypeError), match=named):
        make()


def test_the_loss_without_logits_takes_any_number_of_leading_dimensions():
    loss = LinearCrossEntropyLoss(C, V)
    x, index = torch.randn(B, T, C), targets(B, T)
    logits = x @ loss.linear.weight.T
    torch.testing.assert_close(loss(x, index), nn.functional.cross_entropy(logits.view(-1, V), index.view(-1)))
    torch.testing.assert_close(loss.linear(x), logits)


def test_the_loss_of_each_position_has_the_shape_of_the_targets():
    x, index = torch.randn(B, T, C), targets(B, T)
    loss = LinearCrossEntropyLoss(C, V, reduction="none")
    expected = nn.functional.cross_entropy((x @ loss.linear.weight.T).view(-1, V), index.view(-1), reduction="none")
    torch.testing.assert_close(loss(x, index), expected.view(B, T))


@pytest.mark.parametrize("of_a_layer", [False, True], ids=["logits", "layer"])
def test_class_weights_are_a_buffer_that_moves_with_the_module(of_a_layer):
    weight = torch.rand(V)
    loss = LinearCrossEntropyLoss(C, V, weight=weight) if of_a_layer else CrossEntropyLoss(weight)
    assert torch.equal(loss.state_dict()["weight"], weight)
    assert loss.to(torch.bfloat16).weight.dtype == torch.bfloat16
    x = torch.randn(8, C if of_a_layer else V).bfloat16()
    assert loss(x, targets(8)).isfinite()


def test_a_soft_cap_and_a_z_loss_are_what_torch_nn_does_not_have():
    logits, index, x = torch.randn(8, V), targets(8), torch.randn(8, C)
    options = {"softcap": 2.0, "z_loss": 0.1}
    expected = cross_entropy(logits, index, -100, **options)
    assert torch.equal(CrossEntropyLoss(**options)(logits, index), expected)
    loss = LinearCrossEntropyLoss(C, V, **options)
    torch.testing.assert_close(loss(x, index), cross_entropy(loss.linear(x), index, -100, **options))
    for module in (loss, CrossEntropyLoss(**options)):
        assert "softcap=2.0, z_loss=0.1" in repr(module)


@pytest.mark.parametrize("name", takes_factory)
def test_it_is_made_on_a_device_in_a_dtype(name):
    for parameter in only(name, device="meta", dtype=torch.bfloat16).parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.bfloat16


@pairs
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(name, copied):
    module = only(name)
    twin = copied(module)
    inputs = PAIRS[name][-1]()
    assert type(twin) is type(module)
    assert all(torch.equal(a, b) for a, b in zip(outcome(twin, inputs), outcome(module, inputs), strict=True))
    for a, b in zip(twin.parameters(), module.parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Linear", "Linear(in_features=24, out_features=17, bias=True)"),
        ("Embedding", "Embedding(17, 24)"),
        ("LayerNorm", "LayerNorm((24,), eps=1e-05, elementwise_affine=True"),
        ("AddLayerNorm", "AddLayerNorm((24,), eps=1e-05, elementwise_affine=True"),
        ("GELU, tanh", "GELU(approximate='tanh')"),
        ("CausalSelfAttention", "24, num_heads=3, dropout=0.0, bias=True"),
        ("CausalSelfAttention, no bias", "24, num_heads=3, dropout=0.0, bias=False"),
        ("RotaryEmbedding", "8, n_positions=7, base=10000.0, interleaved=False"),
        ("CrossEntropyLoss", "CrossEntropyLoss()"),
        ("LinearCrossEntropyLoss", "ignore_index=-100"),
        ("LinearCrossEntropyLoss, of each row", "ignore_index=-100, reduction=none"),
        ("LinearCrossEntropyLoss, all options", "label_smoothing=0.1"),
    ],
)
def test_it_shows_what_it_was_made_with(name, shown):
    assert repr(only(name)).startswith(PAIRS[name][0].__name__ + "(")
    assert shown in repr(only(name))


@pairs
def test_it_compiles_into_one_graph(name):
    torch._dynamo.reset()
    module = only(name)
    inputs = PAIRS[name][-1]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(outcome(module, inputs, compiled), outcome(module, inputs))


def test_dropout_drops_in_training_alone():
    module, x = CausalSelfAttention(C, 3, dropout=0.5), rows()
    plain = CausalSelfAttention(C, 3)
    plain.load_state_dict(module.state_dict())
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), plain(x))
    assert not torch.equal(module.train()(x), plain(x))


class Model(nn.Module):
    """A GPT of one layer, of nothing but these modules, its output layer tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = Embedding(V, C), Embedding(T, C)
        self.before, self.between, self.after = LayerNorm(C), AddLayerNorm(C), AddLayerNorm(C, bias=False)
        self.attention, self.up, self.gelu, self.down = (
            CausalSelfAttention(C, 3),
            Linear(C, 4 * C),
            GELU(),
            Linear(4 * C, C),
        )
        self.loss = LinearCrossEntropyLoss(C, V)
        self.loss.linear.weight = self.wte.weight

    def hidden(self, index):
        x = self.wte(index) + self.wpe(torch.arange(index.shape[1], device=index.device))
        h, x = self.between(self.attention(self.before(x)), x)
        return self.after(self.down(self.gelu(self.up(h))), x)[0]

    def forward(self, index, target):
        return self.loss(self.hidden(index), target)


def step(model, index, target, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(index, target)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_a_tied_weight_is_one_parameter_with_the_gradient_of_both_uses():
    model, index, target = Model(), torch.randint(V, (B, T)), targets(B, T)
    assert sum(p is model.wte.weight for p in model.parameters()) == 1
    assert copy.deepcopy(model).loss.linear.weight.shape == (V, C)
    twin = copy.deepcopy(model)
    assert twin.loss.linear.weight is twin.wte.weight
    together = torch.autograd.grad(model(index, target), model.wte.weight)[0]
    head = model.wte.weight.detach().clone().requires_grad_()
    hidden = model.hidden(index)
    logits = hidden.view(-1, C) @ head.T
    loss = CrossEntropyLoss()(logits, target.view(-1))
    parts = torch.autograd.grad(loss, (model.wte.weight, head))
    torch.testing.assert_close(together, sum(parts), rtol=1e-4, atol=1e-6)


def test_autocast_runs_a_model_of_them_in_bf16_close_to_fp32():
    model, index, target = Model(), torch.randint(V, (B, T)), targets(B, T)
    seen = {}
    for name in ("attention", "up", "between"):
        getattr(model, name).register_forward_hook(lambda module, _, out, name=name: seen.update({name: out}))
    full, half = step(model, index, target), step(model, index, target, autocast=True)
    assert [seen["attention"].dtype, seen["up"].dtype, seen["between"][0].dtype] == [torch.bfloat16] * 2 + [
        torch.float32
    ]
    for a, b in zip(half, full, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 0.03 * b.norm() + 1e-3
    assert not torch.equal(half[0], full[0])
