"""The logits of a patched model's training step: computed if somebody reads them."""

import copy
import gc
import importlib
import io
import os
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F

from fastgpt import kernels

pytest.importorskip("transformers", reason="patch_gpt2 is about a model of transformers")

from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integrations.gpt2 import V, close, labelled, same_gradients, tokens, twins

ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.mm.default)  # of linear; of F.linear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, about its next version


class Products(TorchDispatchMode):
    """Counts the tensors that are allocated for the logits of all tokens."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func in ALLOCATIONS and result.shape[-1:] == (V,) and result.numel() == tokens().numel() * V:
            self.count += 1
        return result


@pytest.fixture
def products(monkeypatch):
    """How many products with the output layer's weight have given the logits of all tokens."""
    module = importlib.import_module("fastgpt.kernels.linear_cross_entropy")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # so that the loss, chunk by chunk, has fewer
    with Products() as products:
        yield products


def trained(model, **kwargs):
    """The output of a training step's forward."""
    ids = tokens()
    return model(ids, labels=labelled(ids), **kwargs)


def pickled(output):
    return pickle.loads(pickle.dumps(output)).logits


def saved(output):
    file = io.BytesIO()
    torch.save(output.logits, file)
    file.seek(0)
    return torch.load(file)


# ---- reading ----


@pytest.mark.parametrize(
    "read",
    [
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output[1],
        lambda output: output[:2][1],
        lambda output: output.to_tuple()[1],
        lambda output: next(value for name, value in output.items() if name == "logits"),
        lambda output: list(output.values())[1],
        lambda output: dict(output)["logits"],
        lambda output: tree_leaves(output)[1],
        pickled,
        saved,
    ],
    ids=["attribute", "key", "index", "slice", "tuple", "items", "values", "dict", "pytree", "pickle", "save"],
)
def test_logits_read_in_any_way_are_those_of_the_original(roughened, read):
    model, ours = twins(roughened)
    logits = read(trained(ours))
    assert isinstance(logits, torch.Tensor)
    assert logits.requires_grad
    close(logits + 0.0, trained(model).logits)


def test_a_tuple_can_be_asked_for_and_unpacked(roughened):
    model, ours = twins(roughened)
    loss, logits = trained(ours, return_dict=False)
    expected, expected_logits, *_ = trained(model, return_dict=False)
    close(loss, expected)
    close(logits.clone(), expected_logits)


def mixed(output):
    return output.loss + output.logits.float().square().mean()


def through_apply(output):
    return Square.apply(output.logits).mean() + output.loss


def changed_in_place(output):
    logits = output.logits
    logits *= 2.0
    return logits.square().mean()


def changed_after_a_copy(output):
    copied = output.logits.clone()
    changed = output.logits.mul_(3.0)
    return copied.square().mean() + changed.mean()


def changed_after_a_cast_of_what_was_read(output):
    total = output.logits.sum()
    cast = output.logits.double()
    changed = output.logits.mul_(3.0)
    return cast.square().mean() + changed.mean() + total


class Square(torch.autograd.Function):
    """What a kernel of somebody else's looks like from outside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


@pytest.mark.parametrize(
    "loss_of",
    [
        mixed,
        through_apply,
        changed_in_place,
        changed_after_a_copy,
        changed_after_a_cast_of_what_was_read,
        lambda output: F.cross_entropy(output.logits.flatten(0, 1), tokens().flatten()),
        lambda output: kernels.cross_entropy(output.logits.flatten(0, 1), tokens().flatten()),
        lambda output: kernels.cross_entropy(output.logits[0], tokens()[0]),
        lambda output: output.logits.to(torch.float64).logsumexp(-1).sum(),
        lambda output: torch.cat([output.logits.clone(), output.logits[..., :1]], dim=-1).square().mean(),
    ],
    ids=["mixed", "apply", "in place", "copied", "read", "cross_entropy", "kernel", "slice", "cast", "clone"],
)
def test_a_loss_of_the_logits_has_the_gradients_of_the_original(roughened, loss_of):
    model, ours = twins(roughened)
    expected, got = loss_of(trained(model)), loss_of(trained(ours))
    close(got, expected)
    expected.backward()
    got.backward()
    same_gradients(ours, model)


def grad_of(output):
    return torch.autograd.grad(output.logits.square().mean(), output.logits)[0]


def retained_grad(output):
    output.logits.retain_grad()
    output.logits.square().mean().backward()
    return output.logits.grad


@pytest.mark.parametrize("gradient_of", [grad_of, retained_grad])
def test_the_gradient_of_the_logits_themselves_is_that_of_the_original(roughened, gradient_of):
    model, ours = twins(roughened)
    close(gradient_of(trained(ours)), gradient_of(trained(model)))


def test_logits_are_computed_once(roughened, products):
    _, ours = twins(roughened)
    output = trained(ours)
    assert torch.equal(output.logits + 0.0, output["logits"] + 0.0)
    mixed(output).backward()
    assert products.count == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_have_their_gradient_in_whatever_mode_they_are_first_read(roughened, mode):
    model, ours = twins(roughened)
    output = trained(ours)
    with mode():
        predicted = output.logits.argmax(-1)
        assert output.logits.requires_grad
    assert torch.equal(predicted, trained(model).logits.argmax(-1))
    mixed(output).backward()
    mixed(trained(model)).backward()
    same_gradients(ours, model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradient_gives_logits_without(roughened, mode):
    model, ours = twins(roughened)
    with mode():
        output, expected = trained(ours), trained(model)
        close(output.logits.clone(), expected.logits)
    assert not output.logits.requires_grad
    close(copy.deepcopy(output).logits, expected.logits)


def test_autocast_holds_for_logits_read_outside(roughened):
    model, ours = twins(roughened)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = trained(ours), trained(model)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.clone(), expected.logits, rtol=5e-2, atol=5e-2)
    output.logits.float().square().mean().backward()
    expected.logits.float().square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 3e-2 * b.grad.norm() + 1e-3, name


def test_autocast_where_logits_are_read_changes_nothing(roughened):
    model, ours = twins(roughened)
    output = trained(ours)
    with torch.autocast("cpu", torch.bfloat16):
        logits = output.logits + 0.0
    close(logits, trained(model).logits)


def test_a_gradient_of_the_logits_is_added_to_main_grad(roughened):
    model, ours = twins(roughened)
    head = ours.lm_head.weight
    head.main_grad = torch.zeros_like(head)
    mixed(trained(ours)).backward()
    mixed(trained(model)).backward()
    embedding, both = head.grad, model.lm_head.weight.grad  # which are one weight
    assert (head.main_grad + embedding - both).norm() <= 1e-4 * both.norm()
    assert embedding.norm() < 0.5 * both.norm()


def test_what_reads_memory_gets_the_logits(roughened):
    model, ours = twins(roughened)
    with torch.no_grad():
        logits, expected = trained(ours).logits, trained(model).logits
    assert logits.data_ptr() == logits.data_ptr() != 0
    close(torch.from_numpy(logits.numpy()), expected)
    close(torch.tensor(logits.tolist()), expected)
    assert repr(logits).startswith("tensor([[[")
    assert logits.is_contiguous()
    assert logits.stride() == expected.stride()


def test_a_compiled_loss_of_the_logits_is_that_of_the_original(roughened):
    model, ours = twins(roughened)
    loss_of = torch.compile(lambda logits: F.cross_entropy(logits.flatten(0, 1), tokens().flatten()), backend="eager")
    close(loss_of(trained(ours).logits), loss_of(trained(model).logits))


# ---- not reading ----


def cast_as_accelerate_does(output):
    """``accelerate.utils.convert_to_fp32``, which Trainer applies to every output in bf16."""
    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return type(output)({name: value.float() for name, value in tensors.items()})


def hooked_as_fsdp_does(output):
    for tensor in tree_leaves(output):
        if tensor.requires_grad and tensor._base is None:
            tensor.register_hook(lambda gradient: None)
    return output


@pytest.mark.parametrize(
    "use",
    [
        lambda output: output,
        lambda output: (output.logits.shape, output.logits.dtype, output.logits.device, output.logits.grad_fn),
        lambda output: (output[0], output["loss"], output.to_tuple()[0], dict(output)["loss"]),
        cast_as_accelerate_does,
        hooked_as_fsdp_does,
        lambda output: [tensor.clone() for tensor in tree_leaves(output)],
    ],
    ids=["none", "metadata", "loss", "cast", "hooks", "clones"],
)
def test_nobody_who_does_not_read_the_logits_has_them_computed(roughened, products, use):
    _, ours = twins(roughened)
    with torch.autocast("cpu", torch.bfloat16):
        output = trained(ours)
    use(output)
    output.loss.backward()
    trained(ours, return_dict=False)[0].backward()
    assert products.count == 0


def test_a_cast_of_all_outputs_passes_on_logits_and_gradient(roughened):
    model, ours = twins(roughened)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = (cast_as_accelerate_does(trained(m)) for m in (ours, model))
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits + 0.0, expected.logits, rtol=5e-2, atol=5e-2)
    mixed(output).backward()
    mixed(expected).backward()
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 3e-2 * b.grad.norm() + 1e-3, name


def test_hooks_on_saved_tensors_do_not_get_what_only_logits_need(roughened):
    _, ours = twins(roughened)
    needed = [ours.lm_head.weight.data_ptr()]
    ours.transformer.register_forward_hook(lambda *call: needed.append(call[-1].last_hidden_state.data_ptr()))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        trained(ours)
    assert len(needed) == 2
    assert {tensor.data_ptr() for tensor in packed}.isdisjoint(needed)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of find_unused_parameters, where none are unused
@pytest.mark.parametrize("flags", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel_has_no_logits_computed_and_passes_their_gradient(
    roughened, products, process_group, flags
):
    model, ours = twins(roughened)
    wrapped = DistributedDataParallel(ours, **flags)
    trained(wrapped).loss.backward()
    assert products.count == 0
    ours.zero_grad()
    mixed(trained(wrapped)).backward()
    assert products.count == 1
    mixed(trained(model)).backward()
    same_gradients(ours, model)


def test_hidden_states_live_as_long_as_the_output_and_no_longer(roughened):
    _, ours = twins(roughened)
    hidden = []
    ours.transformer.register_forward_hook(lambda *call: hidden.append(weakref.ref(call[-1].last_hidden_state)))
    gc.disable()
    try:
        output = trained(ours)
        output.loss.backward()
        logits = weakref.ref(output.logits)
        assert hidden[0]() is not None
        assert logits() is not None
        loss = output.loss
        del output
        assert hidden[0]() is None
        assert logits() is None
        trained(ours).logits.sum().backward()
        assert hidden[1]() is None
        assert loss.isfinite()
    finally:
        gc.enable()


# ---- what cannot be ----


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, kernels.FusedAdamW])
def test_logits_of_weights_that_have_changed_are_an_error_and_not_wrong(roughened, optimizer):
    _, ours = twins(roughened)
    read, unread = trained(ours), trained(ours)
    before = read.logits + 0.0
    loss = read.logits.square().mean()
    unread.loss.backward()
    optimizer(ours.parameters()).step()
    assert torch.equal(read.logits + 0.0, before)
    assert unread.logits.shape == before.shape
    with pytest.raises(RuntimeError, match=r"^logits: .* lm_head.weight are no longer those of the forward"):
        unread.logits.argmax(-1)
    with pytest.raises(RuntimeError, match="no longer those of the forward"):
        loss.backward()


@pytest.mark.parametrize(
    "use", [lambda output: output.logits.sum(), through_apply, lambda output: output.logits.clone()]
)
def test_logits_that_were_changed_in_place_are_an_error_and_their_gradient_not_wrong(roughened, use):
    _, ours = twins(roughened)
    output = trained(ours)
    output.logits.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"^logits: have been changed in place; use the tensor that"):
        use(output)


def test_logits_of_another_output_layer_are_an_error(roughened):
    _, ours = twins(roughened)
    output = trained(ours)
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="no longer those of the forward"):
        output.logits.sum()


def test_compiled_and_functional_models_and_replicas_of_data_parallel_give_the_loss_alone(roughened):
    model, ours = twins(roughened)
    output = trained(torch.compile(ours, fullgraph=True, backend="eager"))
    assert output.logits is None
    close(output.loss, trained(model).loss)

    def loss_of(parameters):
        output = torch.func.functional_call(ours, parameters, (), {"input_ids": tokens(), "labels": tokens()})
        assert output.logits is None
        return output.loss

    gradient = torch.func.grad(loss_of)(dict(ours.named_parameters()))
    assert gradient["transformer.wte.weight"].norm() > 0.0
    replica = ours.lm_head._replicate_for_data_parallel()
    replica.weight = ours.lm_head.weight
    ours.lm_head = replica
    output = trained(ours)
    assert output.logits is None
    close(output.loss, trained(model).loss)
