"""What the autograd functions of all ops share: only the required gradients, and no second derivative."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``backward`` of an autograd function that has no second derivative.

    ``backward`` returns the gradients of the function's first inputs. Gradients that are not required are dropped, and
    the remaining inputs get ``None``. Under ``create_graph`` the gradients raise an error when differentiated again.
    ``torch.autograd.function.once_differentiable`` raises only if the incoming gradient has a graph of its own, and not
    if ``torch.autograd.grad`` is given its inputs: the second derivative is then wrong, without an error.

    Args:
        op: the public function's name, for the error message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            needed = ctx.needs_input_grad
            gradients = tuple(g if need else None for g, need in zip(gradients, needed, strict=False))
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                gradients = _refusing(op, gradients, (*ctx.saved_tensors, *grads))
            return gradients + (None,) * (len(needed) - len(gradients))

        return wrapper

    return decorate


def apply(function: type[Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, without binding the arguments to its signature, or without autograd at all.

    ``Function.apply`` binds them only for functorch, and that takes longer than a small op. So does the rest of it,
    which nobody needs where nothing is differentiated, as while text is generated.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    forward_takes_no_context = function.setup_context is not Function.setup_context
    differentiating = torch.is_grad_enabled() or forward_ad._current_level >= 0  # forward mode ignores torch.no_grad
    if forward_takes_no_context and not differentiating:
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def distinct(tensor: Tensor, *others: Tensor) -> Tensor:
    """Return ``tensor``, or while tracing a view of it if it is also one of ``others``.

    Dynamo cannot trace an autograd function that gets one tensor twice.
    """
    if torch.compiler.is_compiling() and any(tensor is other for other in others):
        return tensor.view_as(tensor)
    return tensor


def _refusing(
    op: str, gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Connect ``gradients`` to their ``sources`` by a function that raises when differentiated."""
    present = [g for g in gradients if g is not None]
    connected = iter(apply(_NoSecondDerivative, op, len(present), *present, *(s for s in sources if s is not None)))
    return tuple(None if g is None else next(connected) for g in gradients)


class _NoSecondDerivative(Function):
    generate_vmap_rule = True  # torch.func.jacrev maps over backward

    @staticmethod
    def forward(op: str, n_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:n_gradients])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: cannot be differentiated twice; plain PyTorch can")
