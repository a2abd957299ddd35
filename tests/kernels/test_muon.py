"""FusedMuon: torch.optim.Muon for matrices, AdamW for the rest, and what both share."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fastgpt.kernels import FusedAdamW, FusedMuon, newton_schulz
from fastgpt.kernels.newton_schulz import COEFFICIENTS, orthogonalised

SHAPES = [(7, 33), (64, 16), (16, 16), (7, 33), (1, 5), (64, 16), (130, 257)]


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def place(request):
    return torch.device(request.param)


def matrices(device, shapes=SHAPES, dtype=torch.float32):
    return [Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in shapes]


def twins(params, dtype=None):
    return [Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def draw_gradients(*lists):
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, device=same[0].device)
        for p in same:
            p.grad = grad.to(p.dtype, copy=True)


# ---- the iteration ----


def polynomial(x, steps):
    """The singular values after ``steps``, in float64."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (7, 33), (33, 7), (16, 16), (130, 257)], ids=str)
def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay(place, shape):
    x = torch.randn(3, *shape, dtype=torch.float64, device=place)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    expected = (u * polynomial(s, 5).unsqueeze(1)) @ v
    torch.testing.assert_close(orthogonalised(x.clone()), expected, rtol=1e-9, atol=1e-9)
    found = orthogonalised(x.float().clone())
    assert found.dtype == newton_schulz.product_dtype(x.float())
    allowed = 1e-4 if found.dtype == torch.float32 else 0.1
    assert (found.double() - expected).abs().max() <= allowed


def test_large_singular_values_come_out_near_one(place):
    x = torch.randn(2, 64, 200, dtype=torch.float64, device=place)
    values = torch.linalg.svdvals(orthogonalised(x))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_one(place):
    assert not orthogonalised(torch.zeros(2, 3, 5, device=place)).any()


# ---- against torch.optim.Muon ----


@pytest.mark.parametrize("options", [
    {}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"weight_decay": 0.0}, {"momentum": 0.0},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)}, {"adjust_lr_fn": "original", "momentum": 0.8},
], ids=str)  # fmt: skip
def test_in_float64_without_rounding_the_step_is_torchs(place, options, monkeypatch):
    """torch.optim.Muon's products are bf16; with bfloat16() taken away from it both compute in float64."""
    ours = matrices(place, dtype=torch.float64)
    theirs = twins(ours)
    fused, plain = FusedMuon(ours, lr=0.02, **options), torch.optim.Muon(theirs, lr=0.02, **options)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())
    for _ in range(4):
        draw_gradients(ours, theirs)
        fused.step()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_it_is_as_near_the_truth_as_torchs_muon(place):
    ours = matrices(place)
    theirs, truths = twins(ours), twins(ours, torch.float64)
    start = [p.detach().double() for p in ours]
    optimizers = FusedMuon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02), FusedMuon(truths, lr=0.02)
    for _ in range(5):
        draw_gradients(ours, theirs, truths)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, truth, before in zip(ours, theirs, truths, start, strict=True):
        error, allowed = ((t.double() - truth).norm().item() for t in (p, q))
        assert error <= 1.2 * allowed + 1e-6 * before.norm().item()


def test_matrices_of_one_shape_are_stepped_as_each_alone(place):
    together = matrices(place)
    alone = twins(together)
    optimizers = FusedMuon(together, lr=0.02), [FusedMuon([p], lr=0.02) for p in alone]
    for _ in range(3):
        draw_gradients(together, alone)
        optimizers[0].step()
        for optimizer in optimizers[1]:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_either_loads_the_others_state(place, direction):
    ours = matrices(place)
    theirs = twins(ours)
    fused, plain = FusedMuon(ours, lr=0.02, momentum=0.9), torch.optim.Muon(theirs, lr=0.02, momentum=0.9)
    source, target = (plain, fused) if direction == "from torch" else (fused, plain)
    for _ in range(3):
        draw_gradients(ours, theirs)
        source.step()
    for p, q in zip(*((theirs, ours) if source is plain else (ours, theirs)), strict=True):
        q.data.copy_(p)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    draw_gradients(ours, theirs)
    before = [p.detach().clone() for p in ours]
    fused.step()
    plain.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(fused.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
        assert (p - q).norm() <= 0.05 * (p - start).norm()  # torch's products are bf16


# ---- AdamW beside it ----


def mixed(device):
    """Two matrices for Muon, and an embedding and a vector for AdamW."""
    return matrices(device, [(8, 24), (8, 24)]), matrices(device, [(50, 8), (8,)])


def groups(of_muon, others):
    return [{"params": of_muon}, {"params": others, "use_muon": False, "lr": 3e-3, "betas": (0.8, 0.9)}]


def test_a_group_without_muon_is_stepped_by_adamw_to_the_same_bits(place):
    of_muon, others = mixed(place)
    theirs = twins(others)
    fused = FusedMuon(groups(of_muon, others), lr=0.02, weight_decay=0.2)
    adamw = FusedAdamW(theirs, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.2)
    for _ in range(3):
        draw_gradients(of_muon)
        draw_gradients(others, theirs)
        fused.step()
        adamw.step()
    assert all(map(torch.equal, others, theirs))


def test_the_norm_is_of_all_gradients_and_clips_all_of_them(place):
    of_muon, others = mixed(place)
    reference = twins(others)
    fused = FusedMuon(groups(of_muon, others), lr=0.02, max_grad_norm=0.5)
    adamw = FusedAdamW(reference, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1)
    draw_gradients(of_muon)
    draw_gradients(others, reference)
    norm = torch.stack([p.grad.norm() for p in (*of_muon, *others)]).norm()
    fused.step()
    torch.testing.assert_close(fused.grad_norm, norm)
    adamw.step(grad_scale=0.5 / (norm + 1e-6))
    for p, q in zip(others, reference, strict=True):
        torch.testing.assert_close(p, q)
    for p in of_muon:
        torch.testing.assert_close(fused.state[p]["momentum_buffer"], 0.05 * p.grad * 0.5 / norm, rtol=1e-4, atol=1e-8)


def test_a_step_that_is_not_finite_changes_nothing_and_does_not_count(place):
    of_muon, others = mixed(place)
    fused = FusedMuon(groups(of_muon, others), lr=0.02, skip_nonfinite=True)
    draw_gradients(of_muon)
    draw_gradients(others)
    fused.step()
    params = [*of_muon, *others]
    before = [p.detach().clone() for p in params], copy.deepcopy(fused.state_dict()["state"])
    of_muon[0].grad[0, 0] = math.nan
    fused.step(zero_grad=True)
    assert fused.found_inf == 1.0
    assert all(map(torch.equal, params, before[0]))
    for index, state in fused.state_dict()["state"].items():
        assert all(torch.equal(value, before[1][index][name]) for name, value in state.items())
    assert not any(p.grad.any() for p in params)


def test_gradients_are_scaled_zeroed_and_copies_written(place):
    of_muon, others = mixed(place)
    twin = twins(of_muon)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in (*of_muon, *others)}
    fused = FusedMuon(groups(of_muon, others), lr=0.02, copies=copies)
    plain = FusedMuon(twin, lr=0.02)
    draw_gradients(of_muon, twin)
    draw_gradients(others)
    for p in of_muon:
        p.grad *= 4.0
    fused.step(grad_scale=0.25, zero_grad=True)
    plain.step()
    assert all(map(torch.equal, of_muon, twin))
    assert all(torch.equal(copies[p], p.bfloat16()) for p in copies)
    assert not any(p.grad.any() for p in (*of_muon, *others))


def test_a_learning_rate_may_be_a_tensor_and_a_scheduler_may_set_it(place):
    params = matrices(place)
    other = twins(params)
    fused, plain = FusedMuon(params, lr=torch.tensor(0.02, dtype=torch.float64)), FusedMuon(other, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 1.0)
    draw_gradients(params, other)
    fused.step()
    plain.step()
    scheduler.step()
    assert all(map(torch.equal, params, other))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_to_the_same_bits(again):
    model = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Embedding(11, 5)})
    of_muon, others = [model["a"].weight], [model["a"].bias, model["b"].weight]
    pair = model, FusedMuon(groups(of_muon, others), lr=0.02)
    draw_gradients(list(model.parameters()))
    pair[1].step()
    other = again(pair)
    draw_gradients(list(model.parameters()), list(other[0].parameters()))
    for _, optimizer in (pair, other):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other[0].parameters()))


def test_the_same_gradients_give_the_same_bits(place):
    first = matrices(place)
    second = twins(first)
    for params in (first, second):
        torch.manual_seed(3)
        optimizer = FusedMuon(params, lr=0.02)
        for _ in range(3):
            draw_gradients(params)
            optimizer.step()
    assert all(map(torch.equal, first, second))


def test_a_parameter_without_a_gradient_stays(place):
    params = matrices(place)
    before = params[1].detach().clone()
    draw_gradients(params)
    params[1].grad = None
    FusedMuon(params).step()
    assert torch.equal(params[1], before)


# ---- momentum of 8 bits ----


def momentum_of(optimizer, p):
    return optimizer._momentum(optimizer.state[p])


def test_the_momentum_of_8_bits_follows_the_one_of_32(place):
    params = matrices(place)
    other = twins(params)
    exact, coded = FusedMuon(params, lr=0.0), FusedMuon(other, lr=0.0, state_bits=8)
    draw_gradients(params, other)
    for _ in range(60):  # one gradient: rounded to the nearest code, the momentum would stop at half of it
        exact.step()
        coded.step()
    errors = []
    for p, q in zip(params, other, strict=True):
        state = coded.state[q]
        assert state["momentum_buffer"].dtype == torch.uint8
        assert state["momentum_buffer_scale"].shape == (math.ceil(q.numel() / 256),)
        right = momentum_of(exact, p)
        large = right.abs() > 1e-3 * right.abs().max()  # the format ends 16 binades below the largest of a block
        errors.append((momentum_of(coded, q) / right - 1.0)[large])
    errors = torch.cat(errors)
    assert errors.std() < 0.125  # the largest distance of two codes
    assert errors.mean().abs() < 5 * errors.std() / len(errors) ** 0.5


def test_with_8_bits_a_step_is_nearly_that_of_32(place):
    params = matrices(place, [(64, 64), (64, 64)])
    before, other = [p.detach().clone() for p in params], twins(params)
    exact, coded = FusedMuon(params, lr=0.02, weight_decay=0.0), FusedMuon(other, 0.02, 0.0, state_bits=8)
    for _ in range(5):
        draw_gradients(params, other)
        exact.step()
        coded.step()
    for p, q, start in zip(params, other, before, strict=True):
        assert torch.nn.functional.cosine_similarity((p - start).flatten(), (q - start).flatten(), dim=0) > 0.98


def test_a_skipped_step_leaves_codes_as_they_are(place):
    params = matrices(place)
    optimizer = FusedMuon(params, lr=0.02, state_bits=8, skip_nonfinite=True)
    draw_gradients(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    params[0].grad[0, 0] = math.inf
    optimizer.step()
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][name]) for name, value in state.items())


def test_matrices_of_one_shape_are_rounded_by_different_random_numbers(place):
    params = matrices(place, [(16, 16)])
    params.append(*twins(params))
    optimizer = FusedMuon(params, lr=0.02, state_bits=8)
    draw_gradients(params[:1], params[1:])
    optimizer.step()
    codes = [optimizer.state[p]["momentum_buffer"] for p in params]
    assert not torch.equal(*codes)


def test_a_loaded_state_of_8_bits_goes_on_to_the_same_bits(place):
    params = matrices(place)
    first = FusedMuon(params, lr=0.02, state_bits=8)
    draw_gradients(params)
    first.step()
    other = twins(params)
    second = FusedMuon(other, lr=0.02, state_bits=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        draw_gradients(params, other)
        first.step()
        second.step()
    assert all(map(torch.equal, params, other))
    for p, q in zip(params, other, strict=True):
        assert torch.equal(first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"])
    with pytest.raises(ValueError, match="8 bits, but state_bits is 32"):
        FusedMuon(twins(params)).load_state_dict(first.state_dict())


WRONG = {
    "a vector": (ValueError, "params", lambda p: FusedMuon([Parameter(torch.ones(3))])),
    "an empty matrix": (ValueError, "params", lambda p: FusedMuon([Parameter(torch.ones(0, 3))])),
    "three dimensions": (ValueError, "params", lambda p: FusedMuon([Parameter(torch.ones(2, 3, 4))])),
    "momentum 1": (ValueError, "momentum", lambda p: FusedMuon(p, momentum=1.0)),
    "momentum, a text": (TypeError, "momentum", lambda p: FusedMuon(p, momentum="0.9")),
    "nesterov": (TypeError, "nesterov", lambda p: FusedMuon(p, nesterov=1)),
    "no steps": (ValueError, "ns_steps", lambda p: FusedMuon(p, ns_steps=0)),
    "100 steps": (ValueError, "ns_steps", lambda p: FusedMuon(p, ns_steps=100)),
    "two coefficients": (ValueError, "ns_coefficients", lambda p: FusedMuon(p, ns_coefficients=(1.0, 2.0))),
    "a coefficient": (ValueError, "ns_coefficients", lambda p: FusedMuon(p, ns_coefficients=(1.0, 2.0, math.nan))),
    "adjust_lr_fn": (ValueError, "adjust_lr_fn", lambda p: FusedMuon(p, adjust_lr_fn="adam")),
    "eps": (ValueError, "eps", lambda p: FusedMuon(p, eps=-1.0)),
    "16 bits": (ValueError, "state_bits", lambda p: FusedMuon(p, state_bits=16)),
    "lr": (ValueError, "lr", lambda p: FusedMuon(p, lr=-1.0)),
    "weight_decay": (ValueError, "weight_decay", lambda p: FusedMuon(p, weight_decay=-1.0)),
    "use_muon": (TypeError, "use_muon", lambda p: FusedMuon([{"params": p, "use_muon": 1}])),
    "of a group": (ValueError, "momentum", lambda p: FusedMuon([{"params": p, "momentum": 2.0}])),
    "betas of a group": (ValueError, "betas", lambda p: FusedMuon([{"params": p, "use_muon": False, "betas": (1, 2)}])),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_argument_is_named(case):
    error, name, call = WRONG[case]
    with pytest.raises(error, match=f"^{name}: "):
        call(matrices("cpu", [(3, 4)]))


def test_adamws_state_is_not_taken_for_muons():
    params = matrices("cpu", [(3, 4)])
    adamw = FusedAdamW(twins(params))
    draw_gradients(adamw.param_groups[0]["params"])
    adamw.step()
    with pytest.raises(ValueError, match="momentum"):
        FusedMuon(params).load_state_dict(adamw.state_dict())
