"""FusedAdamW on parameters that ``fully_shard`` has made DTensors, in two processes, beside torch.optim.AdamW."""

import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastgpt.kernels import FusedAdamW

PROCESSES = 2
PATIENCE = timedelta(seconds=60)  # with a process that has failed
MESHES = {"sharded": (2,), "replicated shards": (2, 1), "shards in two dimensions of a mesh": (1, 2)}
HYPERPARAMETERS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
MAX_NORM = 0.05  # below every norm that occurs, so that gradients are clipped

CHECKS = {}


def check(function):
    """Register what both processes run."""
    CHECKS[function.__name__] = function
    return function


def sharded(mesh=(2,), dtype=torch.float32, width=5, **options):
    """A model whose rows do not divide evenly: one process has an empty shard of the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 1)).to(dtype)
    names = ("replicate", "shard")[-len(mesh) :]
    return fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names), **options)


def backward(model, step):
    """The gradient of a batch that each process has its own of."""
    generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
    dtype = next(model.parameters()).dtype
    model(torch.randn(3, 8, generator=generator).to(dtype)).square().mean().backward()


def train(model, optimizer, steps, clip=False):
    """Take steps and return the norms before clipping."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        if clip:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).full_tensor())
        optimizer.step()
        if isinstance(optimizer, FusedAdamW):
            norms.append(optimizer.grad_norm)
    return norms


def shards(model):
    return [p.to_local().detach().clone() for p in model.parameters()]


def same_bits(ours, theirs):
    assert all(map(torch.equal, ours, theirs))


def agrees_with_pytorch(mesh, **options):
    ours, theirs = sharded(mesh, **options), sharded(mesh, **options)
    norms = train(ours, FusedAdamW(ours.parameters(), max_grad_norm=MAX_NORM, **HYPERPARAMETERS), range(8))
    expected = train(theirs, torch.optim.AdamW(theirs.parameters(), **HYPERPARAMETERS), range(8), clip=True)
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(shards(ours), shards(theirs))


for _name, _mesh in MESHES.items():
    CHECKS[f"agrees_with_pytorch_{_name.replace(' ', '_')}"] = lambda folder, mesh=_mesh: agrees_with_pytorch(mesh)


@check
def agrees_with_pytorch_where_columns_are_sharded(folder):
    agrees_with_pytorch((2,), width=6, shard_placement_fn=lambda p: Shard(p.dim() - 1))


@check
def the_norm_counts_all_shards_and_replicas_once(folder):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    values = [torch.randn(5, 3), torch.randn(4), torch.randn(6)]
    placed = [distribute_tensor(values[0], mesh, [Shard(0)]), distribute_tensor(values[1], mesh, [Replicate()])]
    params = [
        nn.Parameter(tensor.clone()) for tensor in (*placed, values[2])
    ]  # the last in every process, as all ignored are
    for p in params:
        p.grad = p.detach().clone()
    optimizer = FusedAdamW(params, max_grad_norm=MAX_NORM)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.cat([v.flatten() for v in values]).norm())


@check
def a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_all(folder):
    model = sharded()
    optimizer = FusedAdamW(model.parameters(), skip_nonfinite=True)
    before = shards(model)
    backward(model, 0)
    if dist.get_rank() == 1:
        model[0].weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step(zero_grad=True)
    assert optimizer.found_inf == 1.0
    same_bits(shards(model), before)
    assert all((p.grad.to_local() == 0.0).all() for p in model.parameters())


@check
def a_distributed_checkpoint_resumes_to_the_same_bits(folder):
    model = sharded()
    optimizer = FusedAdamW(model.parameters(), max_grad_norm=MAX_NORM, **HYPERPARAMETERS)
    train(model, optimizer, range(3))
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    resumed = sharded()
    other = FusedAdamW(resumed.parameters(), max_grad_norm=MAX_NORM, **HYPERPARAMETERS)
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(state, checkpoint_id=folder)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    same_bits(shards(resumed), shards(model))
    assert other.state[resumed[0].weight]["step"] == 3.0
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    same_bits(shards(resumed), shards(model))


@check
def state_dicts_go_to_pytorchs_adamw_and_back(folder):
    ours, theirs = sharded(), sharded()
    optimizer = FusedAdamW(ours.parameters(), max_grad_norm=MAX_NORM, **HYPERPARAMETERS)
    peer = torch.optim.AdamW(theirs.parameters(), **HYPERPARAMETERS)
    train(ours, optimizer, range(3))
    train(theirs, peer, range(3), clip=True)
    saved = optimizer.state_dict(), peer.state_dict()
    optimizer.load_state_dict(saved[1])
    peer.load_state_dict(saved[0])
    train(ours, optimizer, range(3, 6))
    train(theirs, peer, range(3, 6), clip=True)
    torch.testing.assert_close(shards(ours), shards(theirs))


@check
def replicas_stay_equal_under_stochastic_rounding(folder):
    model = sharded((2, 1), torch.bfloat16)
    torch.manual_seed(dist.get_rank())  # as in a program that seeds each process differently
    train(model, FusedAdamW(model.parameters(), stochastic_rounding=True, lr=1e-4), range(5))
    for shard in shards(model):
        copies = [torch.empty_like(shard) for _ in range(PROCESSES)]
        dist.all_gather(copies, shard)
        assert torch.equal(*copies)


@check
def what_cannot_be_sharded_is_refused(folder):
    model = sharded()
    with pytest.raises(ValueError, match=r"^state_bits: 8 is not supported for a DTensor"):
        FusedAdamW(model.parameters(), state_bits=8)
    optimizer = FusedAdamW(model.parameters())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].full_tensor()
    with pytest.raises(ValueError, match=r"^state_dict: expected exp_avg .*set_optimizer_state_dict"):
        optimizer.load_state_dict(saved)
    p = model[0].weight
    p.grad = p.detach().redistribute(placements=[Replicate()])
    with pytest.raises(RuntimeError, match=r"^grad: not placed as its parameter"):
        optimizer.step()


def run(rank, folder):
    """All checks in one process; a file for each says what went wrong."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=PATIENCE)
    for name, function in CHECKS.items():
        try:
            function(os.path.join(folder, name))
            said = ""
        except Exception:
            said = traceback.format_exc()
        with open(os.path.join(folder, f"{name}.{rank}.txt"), "w", encoding="utf-8") as file:
            file.write(said)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, (os.fspath(folder),), nprocs=PROCESSES)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(results, name):
    for rank in range(PROCESSES):
        said = (results / f"{name}.{rank}.txt").read_text()
        assert not said, f"process {rank}:\n{said}"
