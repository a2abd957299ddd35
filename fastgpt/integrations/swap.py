"""Modules made fast where they stand: an object's class is exchanged for a subclass with another ``forward``."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn as nn

from fastgpt.kernels import autocast

Model = TypeVar("Model", bound=nn.Module)

# What is to become of a model: each module that changes, and where its new forward comes from.
Plan = Mapping[nn.Module, Any]


@functools.cache
def _subclass(original: Any, mixin: Any) -> Any:
    """``original`` with the ``forward`` of ``mixin``, which may call the original's by ``super()``.

    Name and signature are the original's: others look modules up by the one (``device_map``, output capturing) and
    read the other (transformers' ``generate`` and ``Trainer``).
    """

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """A class made at run time is found by no name: pickle and deepcopy make it anew."""
        reduced: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        return _new, (original, mixin), *reduced[2:]

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        "forward": forward,
        "fastgpt_original": original,
        "fastgpt_arguments": tuple(inspect.signature(original.forward).parameters)[1:],
    }
    return type(original.__name__, (mixin, original), namespace)


def _new(original: Any, mixin: Any) -> nn.Module:
    made = _subclass(original, mixin)
    return made.__new__(made)


def swap(plan: Plan) -> None:
    """Give every module of ``plan`` its new class."""
    for module, mixin in plan.items():
        original: Any = type(module)
        module.__class__ = _subclass(original, mixin)


def unpatch(model: Model) -> Model:
    """Give every module of ``model`` the class back that it had before a patch.

    Args:
        model: one that was patched, or a copy of one; any other is left as it is.

    Returns:
        ``model``.

    Raises:
        ValueError: a module has been made something else since.
    """
    patched = {n: m for n, m in model.named_modules() if is_patched(m)}
    for name, module in patched.items():
        if "fastgpt_original" not in vars(type(module)):
            refuse(name, f"has become a {type(module).__name__} since it was patched; undo that first")
    for module in patched.values():
        module.__class__ = type(module).fastgpt_original
    return model


def is_patched(module: nn.Module) -> bool:
    """Whether a patch has given ``module`` its class, or a parent of its class."""
    return hasattr(type(module), "fastgpt_original")


def named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a patched module was called with, by the names that its original ``forward`` gives it."""
    return dict(zip(module.fastgpt_arguments, args, strict=False), **kwargs)


def replaceable(module: nn.Module, kind: type[nn.Module] = nn.Module) -> bool:
    """Whether to compute what a ``kind`` does is to do all that calling ``module`` would.

    It is not if the module has hooks, or was replaced (a LoRA layer has the ``weight`` of what it wraps).
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return isinstance(module, kind) and not any(hooks) and "forward" not in module.__dict__


def loss_is_fusable(head: Any, kind: type[nn.Module]) -> bool:
    """Whether the output layer ``head`` may be left out in favour of ``linear_cross_entropy``.

    Not in fp16: the gradients come from the forward, before a scaler's factor that keeps them from underflowing.
    """
    if not replaceable(head, kind):
        return False
    device, dtype = head.weight.device.type, head.weight.dtype
    if autocast.enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype != torch.float16


def refuse(name: str, reason: str) -> None:
    """Raise a ``ValueError`` about the module called ``name``."""
    raise ValueError(f"{name or 'model'}: {reason}")


def require(ok: bool, name: str, reason: str) -> None:
    """:func:`refuse` unless ``ok``."""
    if not ok:
        refuse(name, reason)


def require_kind(module: Any, name: str, *kinds: type[nn.Module]) -> None:
    """``module`` is of exactly one of ``kinds``, and nobody has overridden its ``forward``."""
    expected = " or ".join(kind.__name__ for kind in kinds)
    require(type(module) in kinds, name, f"expected {expected}, got {type(module).__name__}")
    require(
        "forward" not in module.__dict__, name, "its forward is overridden (by a device_map, say); patch before that"
    )
