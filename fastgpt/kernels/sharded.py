"""Tensors sharded over processes: ``torch.distributed.tensor.DTensor``, which ``fully_shard`` makes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor; asked without importing torch.distributed, which a plain tensor needs not."""
    return type(tensor) is not Tensor and type(tensor) is not Parameter and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """What of ``tensor`` lies in this process: a DTensor's shard, or all of any other."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def placed_alike(tensor: Any, param: Any) -> bool:
    """Whether ``tensor`` has the elements of ``param`` in the same processes."""
    if not is_dtensor(param):
        return not is_dtensor(tensor)
    return is_dtensor(tensor) and tensor.device_mesh == param.device_mesh and tensor.placements == param.placements


def shards_fit(param: Any, grad: Any, moment: Any) -> bool:
    """Whether what lies here of the three are contiguous tensors of the same elements."""
    return (
        placed_alike(grad, param)
        and placed_alike(moment, param)
        and local(param).is_contiguous()
        and local(grad).is_contiguous()
    )


def sharding(param: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of ``param`` and the dimensions of it that shard; ``None`` if all of it lies in this process."""
    if not is_dtensor(param):
        return None
    dims = tuple(i for i, placement in enumerate(param.placements) if not placement.is_replicate())
    return (param.device_mesh, dims) if dims else None


def over_shards(norm: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:
    """The norm of what has the norm ``norm`` in this process."""
    square = norm.square()
    for dim in dims:
        torch.distributed.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()


def common_seed(params: Iterable[Any]) -> int:
    """A seed from torch's generator; one for all processes that share the parameters, so that replicas stay equal."""
    seed = torch.randint(2**62, (), device="cpu")
    for mesh in {p.device_mesh: None for p in params if is_dtensor(p)}:
        seed = seed.to(mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.broadcast(seed, group=mesh.get_group(dim), group_src=0)
    return int(seed)
