"""Logits of a training step whose loss was computed without them: they are computed if somebody reads them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from fastgpt import kernels
from fastgpt.kernels import autocast
from fastgpt.kernels.autograd import once_differentiable
from fastgpt.kernels.main_grad import main_grad_of
from fastgpt.kernels.matmul import matmul_into, weight_and_bias_gradient

aten = torch.ops.aten

# What is known without the numbers.
_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "nbytes", "itemsize", "is_cpu",
    "is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized", "_base",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "register_hook",
)  # fmt: skip

# What frameworks do to every output of a model: Accelerate casts it, DistributedDataParallel clones it. The result is
# lazy too.
_COPIES = ("clone", "float", "half", "bfloat16", "double", "to")
_COPYING_OPERATORS = (aten.clone.default, aten._to_copy.default)

_UNREAD = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES] + [getattr(Tensor, name) for name in _METHODS + _COPIES]
)


class LazyTensor(Tensor):
    """A tensor whose numbers are computed when a function first needs them.

    Shape, dtype and device are known before, and so is its place in the autograd graph. A function that is called with
    it gets an ordinary tensor in its place, the same one each time.
    """

    _compute: Callable[[], Tensor]
    _ordinary: Tensor | None

    @staticmethod
    def __new__(
        cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]
    ) -> "LazyTensor":
        made: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(made)  # C++ that asks for its memory is told that it has none
        made._compute, made._ordinary = compute, None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _UNREAD:
            args, kwargs = tree_map_only(cls, cls.read, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What comes here has not passed through ``__torch_function__``: copies, and calls from C++ and ``apply``."""
        kwargs = kwargs or {}
        source: LazyTensor = args[0]
        if func in _COPYING_OPERATORS and kwargs.keys() <= {"dtype", "memory_format"} and source._ordinary is None:
            compute = source._compute  # not source.read: what that returns may be changed before the copy is read
            dtype = kwargs.get("dtype") or source.dtype
            return cls(source.shape, dtype, source.device, lambda: func(compute(), **kwargs))
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """Return the ordinary tensor that stands for this one, with its gradient, whatever mode it is read in.

        Raises:
            RuntimeError: it has been changed in place. Its gradient goes through that change, but that of an autograd
                function whose argument is this tensor would not.
        """
        if self._ordinary is None:
            with torch.set_grad_enabled(self.requires_grad):
                self._ordinary = _Read.apply(self)
        elif not self._ordinary.is_inference() and self._ordinary._version > 0:
            raise RuntimeError("logits: have been changed in place; use the tensor that the change returned")
        return self._ordinary


class _Read(Function):
    """The identity. A gradient goes the way of the lazy tensor, with its hooks."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyTensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return lazy._compute()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Product:
    """``hidden @ head.weight.T``, not computed yet."""

    def __init__(self, hidden: Tensor, head: Any) -> None:
        self.hidden, self.head, self.weight = hidden, head, head.weight
        self.dtype = autocast.in_autocast_dtype(hidden.detach()[:0])[0].dtype
        self.main_grad = main_grad_of(self.weight)
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in (self.hidden, self.weight)]

    def operands(self) -> tuple[Tensor, Tensor]:
        """Return both, in the dtype of the product.

        Raises:
            RuntimeError: one has changed since.
        """
        if self.head.weight is not self.weight or self._versions() != self.versions:
            raise RuntimeError(
                "logits: the hidden states or lm_head.weight are no longer those of the forward; read logits before "
                "the optimizer's step, and with FSDP before the backward"
            )
        return self.hidden.to(self.dtype), self.weight.to(self.dtype)

    def __call__(self) -> Tensor:
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = kernels.linear(*self.operands()).contiguous()
        return logits.data  # no view, because autograd allows no change in place of a function's result that is one


class _Logits(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, product: _Product) -> Tensor:
        # not save_for_backward: hooks that move saved tensors elsewhere would move these, whether read or not
        ctx.product = product
        return LazyTensor(torch.Size((*hidden.shape[:-1], weight.shape[0])), product.dtype, hidden.device, product)

    @staticmethod
    @once_differentiable("logits")
    def backward(ctx: Any, gradient: Tensor) -> Any:
        product: _Product = ctx.product
        hidden, weight = product.operands()
        rows, x = gradient.flatten(0, -2), hidden.flatten(0, -2)
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dx = matmul_into(x.new_empty(x.shape), rows, weight).view(hidden.shape) if needs_dx else None
        dweight, _ = weight_and_bias_gradient(rows, x, weight, (product.main_grad, None), needs_dweight, False)
        return dx, dweight


def lazy_logits(hidden: Tensor, head: Any) -> Tensor | None:
    """Return ``head(hidden)``, to be computed when it is read; ``None`` where it could only be computed at once.

    That is under ``torch.compile`` and ``torch.func``, and in a replica of ``torch.nn.DataParallel``, which reads every
    output to gather it.

    Args:
        hidden: ``(B, T, C)``, kept in memory as long as the result is.
        head: a linear layer without bias.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or getattr(head, "_is_replica", False)
    ):
        return None
    return _Logits.apply(hidden, head.weight, _Product(hidden, head))
