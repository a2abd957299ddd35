"""Dry runs: a step on tensors without data, which stand for tensors on a CPU or a GPU.

Inside ``with dry_run("cuda"):``, code that gets meta tensors takes the path that it takes on a GPU, and every operator
returns the shape of its result without computing it. This counts what a training step allocates and calls before
anything runs, on a machine without a GPU. Code that reads a value from the device raises an error, because there is no
value.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_stands_for: str | None = None


@contextmanager
def dry_run(device_type: str) -> Iterator[None]:
    """Inside the block, tensors of the device ``meta`` count as ``"cpu"`` or ``"cuda"``."""
    global _stands_for
    previous, _stands_for = _stands_for, device_type
    try:
        yield
    finally:
        _stands_for = previous


def stands_for(device_type: str) -> str:
    """The type of device that ``device_type`` counts as."""
    return _stands_for if device_type == "meta" and _stands_for is not None else device_type


def on_gpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU, or stands for a tensor on a GPU."""
    return stands_for(tensor.device.type) == "cuda"
