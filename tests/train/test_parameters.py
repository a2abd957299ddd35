import pytest
import torch

from fastgpt.kernels import FusedAdamW
from fastgpt.kernels.moments_8bit import MOMENT_BLOCK
from fastgpt.model import GPT, GPTConfig
from fastgpt.model.reference import ReferenceGPT
from fastgpt.train.parameters import ParameterStore

# 18 and 13 are no multiples of the alignment, so that there are gaps.
CONFIG = GPTConfig(block_size=13, vocab_size=35, n_layer=2, n_head=2, n_embd=18)
DTYPES = [torch.float32, torch.bfloat16]


def build(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    return model, ParameterStore(model, dtype)


def optimizer_of(store, lr=1e-2, weight_decay=0.1, **options):
    groups = store.groups(weight_decay)
    return FusedAdamW(groups, lr, (0.9, 0.95), copies=store.copies(groups), **options)


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(35, (2, 13), generator=generator) for _ in range(2)) for _ in range(n)]


def gaps(store):
    """True where no parameter lies."""
    mask = torch.ones_like(store.master, dtype=torch.bool)
    for view in store.named(mask).values():
        view.fill_(False)
    return mask


def reference_gradients(state, batch_list):
    reference = ReferenceGPT(CONFIG)
    reference.load_state_dict(state)
    for x, y in batch_list:
        reference(x, y).backward()
    return {name: parameter.grad for name, parameter in reference.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_is_a_view_of_one_buffer(dtype):
    model, store = build(dtype)
    storage = store.working.untyped_storage().data_ptr()
    assert store.working.dtype == dtype
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() == storage, name
        assert parameter.dtype == dtype, name
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i + 1)
    for i, parameter in enumerate(model.parameters()):  # none overlaps another
        assert torch.equal(parameter, torch.full_like(parameter, i + 1))
    assert torch.equal(store.working == 0, gaps(store))


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_into_the_store_changes_no_weight(dtype):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = ParameterStore(model, dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].to(dtype)), name
    for name, tensor in store.named(store.master).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name


def test_gradients_accumulate_into_one_buffer():
    model, store = build()
    first, second = batches(2)
    expected = reference_gradients(model.state_dict(), [first, second])
    for x, y in (first, second):
        model(x, y).backward()
    for name, gradient in store.named(store.grad).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_lies_anywhere_else(dtype):
    model, store = build(dtype)
    model(*batches(1)[0]).backward()
    assert store.grad.dtype == torch.float32
    storage = store.grad.untyped_storage().data_ptr()
    for name, parameter in model.named_parameters():
        assert parameter.main_grad.abs().max() > 0, name
        assert parameter.main_grad.untyped_storage().data_ptr() == storage, name
        if parameter.grad is not None:
            assert parameter.grad.untyped_storage().data_ptr() == storage, name


def test_matrices_come_first():
    _, store = build()
    assert [len(slot.shape) >= 2 for slot in store.slots] == sorted(len(s.shape) >= 2 for s in store.slots)[::-1]
    matrices, vectors = store.sections
    assert (matrices.decayed, vectors.decayed) == (True, False)
    assert (matrices.begin, vectors.end) == (0, len(store.master))
    for slot in store.slots:
        section = matrices if len(slot.shape) >= 2 else vectors
        assert section.begin <= slot.offset < slot.end <= section.end


def test_every_parameter_starts_on_a_cache_line_and_on_a_block_of_moments():
    _, store = build()
    assert {slot.offset % MOMENT_BLOCK for slot in store.slots} == {0}
    assert {section.begin % MOMENT_BLOCK for section in store.sections} == {0}
    assert gaps(store).any()  # so that the tests of gaps have some to look at


def test_muons_matrices_come_last_and_adamw_has_no_moments_for_them():
    model = GPT(CONFIG)
    store = ParameterStore(model, muon=True)
    embeddings, vectors, matrices = store.sections
    assert [(s.decayed, s.muon) for s in store.sections] == [(True, False), (False, False), (True, True)]
    of = {name: p for name, p in model.named_parameters() if name.startswith("transformer.h.") and p.dim() == 2}
    moments = store.moments(32)
    assert moments.keys() == {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    assert len(moments["exp_avg"]) == len(moments["exp_avg_sq"]) == vectors.end == matrices.begin
    assert len(moments["momentum_buffer"]) == matrices.end - matrices.begin == len(store.master) - vectors.end
    assert store.named(moments["momentum_buffer"], "momentum_buffer").keys() == of.keys()
    names = store.named(moments["exp_avg"], "exp_avg").keys()
    assert names == {slot.name for slot in store.slots} - of.keys()
    assert {embeddings.begin, *(slot.offset for slot in store.slots)} >= {s.begin for s in store.sections}


def test_muons_groups_are_the_matrices_each_with_its_own_part_of_every_buffer():
    config = GPTConfig(block_size=16, vocab_size=35, n_layer=2, n_head=2, n_embd=32)  # 32 * 32 is whole blocks
    model = GPT(config)
    store = ParameterStore(model, torch.bfloat16, muon=True)
    groups = store.groups(0.1)
    shapes = [tuple(p.shape) for p in groups[2]["params"]]
    assert shapes == [(32, 32)] * 3 + [(32, 32), (128, 32), (32, 128)] + [(32, 32)] * 4 + [(128, 32), (32, 128)]
    copies, moments = store.copies(groups), store.moments(32)
    with torch.no_grad():
        for i, p in enumerate(groups[2]["params"]):
            for part in (p, p.grad, copies[p], store.state_of(p, moments)["momentum_buffer"]):
                assert part.shape == p.shape
                part.fill_(i + 1)
    qkv = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"]
    for named in (qkv, qkv.main_grad, store.named(moments["momentum_buffer"], "momentum_buffer")[
        "transformer.h.0.attn.c_attn.weight"
    ]):  # fmt: skip
        assert [part.unique().tolist() for part in named.split(32)] == [[1.0], [2.0], [3.0]]


def test_only_matrices_decay():
    model, store = build()
    optimizer = optimizer_of(store, lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        store.master[~gaps(store)] += 1.0
    before = store.master.clone()
    optimizer.step(zero_grad=True)  # all gradients are zero: what moves, moves by decay
    for name, parameter in model.named_parameters():
        old = before[parameter.storage_offset() :][: parameter.numel()].view_as(parameter)
        torch.testing.assert_close(parameter.detach(), old * 0.95 if parameter.dim() >= 2 else old, msg=name)


def test_a_model_of_vectors_alone_has_nothing_to_decay():
    model = torch.nn.LayerNorm(7)
    store = ParameterStore(model)
    assert [section.decayed for section in store.sections] == [False]
    assert [group["weight_decay"] for group in store.groups(0.1)] == [0.0]


def test_a_model_of_matrices_alone_decays_whole():
    store = ParameterStore(torch.nn.Linear(3, 5, bias=False))
    assert [section.decayed for section in store.sections] == [True]
    assert [group["weight_decay"] for group in store.groups(0.1)] == [0.1]


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gaps_between_parameters_stay_zero(dtype, state_bits):
    model, store = build(dtype)
    optimizer = optimizer_of(store, max_grad_norm=1.0, state_bits=state_bits)
    empty = gaps(store)
    for x, y in batches(5):
        model(x, y).backward()
        assert store.grad[empty].count_nonzero() == 0
        optimizer.step(zero_grad=True)
        assert store.master[empty].count_nonzero() == 0
        assert store.working[empty].count_nonzero() == 0
        assert store.grad.count_nonzero() == 0


def test_every_parameter_has_its_own_codes_and_scales():
    model, store = build()
    optimizer = optimizer_of(store, state_bits=8)
    moments = store.moments(8)
    for group in optimizer.param_groups:
        (param,) = group["params"]
        optimizer.use_state(param, store.state_of(param, moments))
    name = "transformer.h.1.ln_1.weight"
    dict(model.named_parameters())[name].grad.fill_(1.0)
    optimizer.step()
    for kind, flat in moments.items():
        untouched = flat.amin()  # a scale of zeros is the least there is
        assert [other for other, view in store.named(flat, kind).items() if (view != untouched).any()] == [name], kind


def test_load_puts_every_tensor_in_its_place():
    model, store = build(seed=0)
    other, _ = build(seed=1)
    wanted = {name: tensor + 1 for name, tensor in other.state_dict().items()}
    store.load(wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert store.master[gaps(store)].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_named_gives_load_takes_back(dtype):
    _, store = build(dtype)
    saved = {name: tensor.clone() for name, tensor in store.named(store.master).items()}
    before = store.working.clone()
    with torch.no_grad():
        store.master.mul_(3)
        store.working.mul_(5)
    store.load(saved)
    assert torch.equal(store.working, before)
    assert torch.equal(store.working, store.master.to(dtype))


def test_load_refuses_unknown_and_missing_names_and_other_shapes():
    model, store = build()
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "transformer.h.1.ln_1.bias"
    with pytest.raises(ValueError, match=r"transformer\.extra"):
        store.load({**good, "transformer.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=name):
        store.load({k: v for k, v in good.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name}: expected \(18,\), got \(1, 18\)"):
        store.load({**good, name: torch.zeros(1, 18)})


def test_the_bfloat16_weights_follow_the_master():
    model, store = build(torch.bfloat16)
    optimizer = optimizer_of(store, max_grad_norm=1.0)
    start = store.working.clone()
    for x, y in batches(4):
        model(x, y).backward()
        optimizer.step(zero_grad=True)
        assert torch.equal(store.working, store.master.bfloat16())
    assert not torch.equal(store.working, start)
    # The master holds more than the copy does, or small updates would be lost.
    assert not torch.equal(store.working.float(), store.master)


def test_bfloat16_gradients_accumulate_in_float32():
    model, store = build(torch.bfloat16)
    parts = []
    for x, y in batches(32):
        model(x, y).backward()
        parts.append(store.grad.clone())
        store.grad.zero_()
    for x, y in batches(32):
        model(x, y).backward()
    exact = torch.stack(parts).double().sum(0)
    lossy = torch.zeros_like(store.grad, dtype=torch.bfloat16)
    for part in parts:
        lossy += part.bfloat16()
    for slot in store.slots:
        expected = slot.view(exact)
        error, bf16_error = ((slot.view(t) - expected).norm() / expected.norm() for t in (store.grad, lossy))
        assert error < 1e-5 < 1e-3 < bf16_error, slot.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_lowers_the_loss(dtype):
    model, store = build(dtype)
    optimizer = optimizer_of(store)
    (batch,) = batches(1)
    losses = []
    for _ in range(40):
        loss = model(*batch)
        loss.backward()
        optimizer.step(zero_grad=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_model_fills_the_same_buffer(dtype):
    # aot_eager: the graph as torch.compile takes it apart, without the minute that generating code takes.
    torch._dynamo.reset()
    model, store = build(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x, y in batches(3):
        model(x, y).backward()
    expected = store.grad.clone()
    store.grad.zero_()
    for x, y in batches(3):
        compiled(x, y).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for slot in store.slots:
        eager, gradient = slot.view(expected), slot.view(store.grad)
        assert (gradient - eager).norm() < tolerance * eager.norm(), slot.name
