"""Gradients accumulated in place: the ``main_grad`` convention.

A parameter may carry an attribute ``main_grad``, a contiguous fp32 tensor of its shape. Functions of fastgpt that
compute the gradient of a parameter (``linear``, ``embedding``, ``layer_norm``, ``gelu``, ``linear_cross_entropy``)
then add it into ``main_grad`` as they compute it and give autograd none: no temporary of the weight's size, no
second pass to add it up, and fp32 accumulation for a bf16 weight. The name and the idea are Megatron-LM's
(``gradient_accumulation_fusion``). Without the attribute, gradients flow through autograd as usual.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import dispatch


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """The buffer to accumulate this parameter's gradient into, or ``None`` for autograd's usual way.

    Under ``torch.compile`` always ``None``: a traced graph returns its gradients.
    """
    if torch.compiler.is_compiling() or not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    return getattr(parameter, "main_grad", None)


def main_grads_of(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """:func:`main_grad_of` for each, ``None`` for none."""
    return tuple(None if p is None else main_grad_of(p) for p in parameters)


def for_autograd(gradients: Sequence[Any], main_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The gradients that have not gone into a ``main_grad``, and ``None`` in the place of those that have."""
    return tuple(g if m is None else None for g, m in zip(gradients, main_grads, strict=True))


class HandedOn:
    """A bias whose gradient is summed by the layer norm that reads the projection's result.

    The gradient of the bias of ``y = x @ weight.T + bias`` is the sum of ``dy`` over its rows, for which the projection
    has to read ``dy`` once more. In a pre-norm transformer ``y`` goes into ``add_layer_norm(y, residual, ...)``, whose
    backward computes ``dy`` and has it in registers: summed there, it costs nothing. The contract, for biases that
    carry a ``main_grad``:

    - Whoever projects (``linear``, the branches of a GPT) ties such an object to the result, an attribute of that very
      tensor. Whatever makes another tensor of it, as dropout does, ends it there.
    - ``add_layer_norm``, given that tensor as ``x``, adds the column sums of the gradient that it returns for it into
      ``main_grad``, and notes the gradient in ``summed``.
    - The projection's backward, which comes after, asks :meth:`settle` with the gradient that reaches it. Nothing is
      left to do if that is the one that has been summed; everything if none has. If the result was used elsewhere
      too, or a hook has put another gradient in its place, the sums of the difference are added.
    """

    def __init__(self, main_grad: Tensor) -> None:
        self.main_grad = main_grad
        self.summed: list[Tensor] = []

    def settle(self, dy: Tensor) -> bool:
        """Whether the bias has its gradient, ``dy`` being that of the projection's result."""
        summed, self.summed = self.summed, []
        if not summed:
            return False
        if len(summed) > 1 or dy.shape != summed[0].shape or dy.data_ptr() != summed[0].data_ptr():
            for dx in summed:
                dy = dy - dx
            dispatch.resolve("add_column_sums_", dy)(self.main_grad, dy.reshape(-1, dy.shape[-1]))
        return True


def to_hand_on(bias: Tensor | None) -> HandedOn | None:
    """What to tie to the result of a projection with this bias, if it has a ``main_grad``."""
    if bias is None or torch._C._are_functorch_transforms_active():
        return None
    main_grad = main_grad_of(bias)
    return None if main_grad is None else HandedOn(main_grad)


def tied(result: Tensor, handed_on: HandedOn | None) -> Tensor:
    """``result``, which then carries ``handed_on``."""
    if handed_on is not None:
        result.handed_on = handed_on  # type: ignore[attr-defined]
    return result


def handed_on_with(x: Tensor) -> HandedOn | None:
    """What ``x`` carries, if it is the result of a projection."""
    return None if torch.compiler.is_compiling() else getattr(x, "handed_on", None)
