"""Tensors without data that stand for those of a device.

Code that runs on meta tensors inside ``with rehearse("cuda"):`` takes the paths that it takes on a GPU, and every
operator gives the shape of its result without computing it. So what a training step allocates and calls can be
counted where there is no GPU, and before anything runs; and code that would wait for the GPU to tell a value fails,
because there is none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_stands_for: str | None = None


@contextmanager
def rehearse(device_type: str) -> Iterator[None]:
    """Inside the block, tensors of the device ``meta`` count as ``"cpu"`` or ``"cuda"``."""
    global _stands_for
    previous, _stands_for = _stands_for, device_type
    try:
        yield
    finally:
        _stands_for = previous


def rehearsed(device_type: str) -> str:
    """The type of device that ``device_type`` counts as."""
    return _stands_for if device_type == "meta" and _stands_for is not None else device_type


def on_gpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU, or stands for one that is."""
    return rehearsed(tensor.device.type) == "cuda"
