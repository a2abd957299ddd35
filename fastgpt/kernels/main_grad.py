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
