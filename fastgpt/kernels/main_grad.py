"""Gradients accumulated in place: the ``main_grad`` convention.

A parameter may carry an attribute ``main_grad``, a contiguous fp32 tensor of its shape. Functions of fastgpt that
compute the gradient of a parameter (``linear``, ``embedding``, the norms, ``gelu``, ``linear_cross_entropy``) then
add it to ``main_grad`` as they compute it and return no gradient to autograd. This needs no temporary of the weight's
size and no second pass to add it, and it accumulates in fp32 for a bf16 weight. The name and the idea are Megatron-LM's
(``gradient_accumulation_fusion``). Without the attribute, gradients flow through autograd as usual.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import dispatch


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """Return the buffer to accumulate this parameter's gradient into, or ``None`` if autograd accumulates it.

    Under ``torch.compile`` it is always ``None``: a traced graph returns its gradients.
    """
    if torch.compiler.is_compiling() or not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    return getattr(parameter, "main_grad", None)


def main_grads_of(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return :func:`main_grad_of` for each parameter, and ``None`` for each ``None``."""
    return tuple(None if p is None else main_grad_of(p) for p in parameters)


def for_autograd(gradients: Sequence[Any], main_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients, with ``None`` in the place of those that were added to a ``main_grad``."""
    return tuple(g if m is None else None for g, m in zip(gradients, main_grads, strict=True))


class HandedOn:
    """A bias whose gradient is summed by the layer norm that reads the projection's result.

    The gradient of the bias of ``y = x @ weight.T + bias`` is the sum of ``dy`` over its rows. To compute it, the
    projection has to read ``dy`` again. In a pre-norm transformer ``y`` goes into ``add_layer_norm(y, residual,
    ...)``, whose backward computes ``dy`` and has it in registers: summed there, it costs nothing. The contract, for
    biases that carry a ``main_grad``:

    - The projection (``linear``, the branches of a GPT) ties such an object to its result, as an attribute of that
      tensor. A function that returns another tensor, such as dropout, does not pass it on.
    - ``add_layer_norm``, given that tensor as ``x``, adds the column sums of the gradient that it returns for ``x`` to
      ``main_grad``, and notes the gradient with :meth:`note`.
    - The projection's backward runs afterwards and calls :meth:`settle` with the gradient that reaches it. If that is
      the gradient that was summed, nothing is left to do. If none was summed, the projection sums its own. If the
      result was also used elsewhere, or a hook has replaced the gradient, the sums of the difference are added.
    """

    def __init__(self, main_grad: Tensor) -> None:
        self.main_grad = main_grad
        self.summed: list[tuple[Tensor, int]] = []  # gradients, and their versions when they were summed

    def note(self, dx: Tensor) -> None:
        """Remember that the column sums of ``dx`` have been added to ``main_grad``."""
        self.summed.append((dx, dx._version))

    def settle(self, dy: Tensor) -> bool:
        """Whether the bias has its gradient, for ``dy``, the gradient of the projection's result.

        Raises:
            RuntimeError: a gradient was changed in place after it was summed, so the difference is unknown.
        """
        summed, self.summed = self.summed, []
        if not summed:
            return False
        if any(dx._version != version for dx, version in summed):
            raise RuntimeError(
                "linear: a hook changed the gradient of its result in place, after add_layer_norm had summed it for "
                "the bias; return a new tensor from the hook"
            )
        only = summed[0][0]
        if len(summed) > 1 or dy.shape != only.shape or dy.data_ptr() != only.data_ptr():
            for dx, _ in summed:
                dy = dy - dx
            dispatch.resolve("add_column_sums_", dy)(self.main_grad, dy.reshape(-1, dy.shape[-1]))
        return True


def to_hand_on(bias: Tensor | None) -> HandedOn | None:
    """Return what to tie to the result of a projection with this bias, or ``None`` if it has no ``main_grad``."""
    if bias is None or torch._C._are_functorch_transforms_active():
        return None
    main_grad = main_grad_of(bias)
    return None if main_grad is None else HandedOn(main_grad)


def tied(result: Tensor, handed_on: HandedOn | None) -> Tensor:
    """Return ``result``, carrying ``handed_on``."""
    if handed_on is not None:
        result.handed_on = handed_on  # type: ignore[attr-defined]
    return result


def handed_on_with(x: Tensor) -> HandedOn | None:
    """Return what ``x`` carries, or ``None`` if it is not the result of a projection."""
    return None if torch.compiler.is_compiling() else getattr(x, "handed_on", None)
