"""Replaces the class of a module by a subclass with another ``forward``. The object stays the same."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn as nn

from fastgpt.kernels import autocast

Model = TypeVar("Model", bound=nn.Module)

# For each module that changes, the class that its new forward comes from.
Plan = Mapping[nn.Module, Any]


@functools.cache
def _subclass(original: Any, mixin: Any) -> Any:
    """A subclass of ``original`` with the ``forward`` of ``mixin``, which may call the original's by ``super()``.

    It has the original's name, by which ``device_map`` and output capturing find modules, and the original's signature,
    which transformers' ``generate`` and ``Trainer`` read.
    """

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Pickle and deepcopy build the class anew, because a class made at run time cannot be found by name."""
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
    """Give each module in ``plan`` its new class."""
    for module, mixin in plan.items():
        original: Any = type(module)
        module.__class__ = _subclass(original, mixin)


def unpatch(model: Model) -> Model:
    """Undo a patch: give each module of ``model`` its original class.

    Args:
        model: a patched model or a copy of one. Any other model is left unchanged.

    Returns:
        ``model``.

    Raises:
        ValueError: the class of a module has been changed again since.
    """
    patched = {n: m for n, m in model.named_modules() if is_patched(m)}
    for name, module in patched.items():
        if "fastgpt_original" not in vars(type(module)):
            refuse(name, f"has become a {type(module).__name__} since it was patched; undo that first")
    for module in patched.values():
        module.__class__ = type(module).fastgpt_original
    return model


def is_patched(module: nn.Module) -> bool:
    """Whether the class of ``module``, or a parent of its class, comes from a patch."""
    return hasattr(type(module), "fastgpt_original")


def named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a patched module was called with, by their names in its original ``forward``."""
    return dict(zip(module.fastgpt_arguments, args, strict=False), **kwargs)


def replaceable(module: nn.Module, kind: type[nn.Module] = nn.Module) -> bool:
    """Whether the computation of a ``kind`` can replace a call of ``module``.

    It cannot if the module has hooks or is of another class. (A LoRA layer has the ``weight`` of the layer it wraps.)
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return isinstance(module, kind) and not any(hooks) and "forward" not in module.__dict__


def loss_is_fusable(head: Any, kind: type[nn.Module]) -> bool:
    """Whether ``linear_cross_entropy`` can replace a call of the output layer ``head``.

    It cannot in fp16: it computes gradients in the forward, before GradScaler scales the loss, so they may underflow.
    """
    if not replaceable(head, kind):
        return False
    device, dtype = head.weight.device.type, head.weight.dtype
    if autocast.enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype != torch.float16


def refuse(name: str, reason: str) -> None:
    """Raise a ``ValueError`` about the module with that name."""
    raise ValueError(f"{name or 'model'}: {reason}")


def require(ok: bool, name: str, reason: str) -> None:
    """:func:`refuse` unless ``ok``."""
    if not ok:
        refuse(name, reason)


def require_kind(module: Any, name: str, *kinds: type[nn.Module]) -> None:
    """Refuse a module unless its class is one of ``kinds`` and its ``forward`` is not overridden."""
    expected = " or ".join(kind.__name__ for kind in kinds)
    require(type(module) in kinds, name, f"expected {expected}, got {type(module).__name__}")
    require(
        "forward" not in module.__dict__,
        name,
        "its forward is overridden, for example by a device_map; patch the model before that",
    )
