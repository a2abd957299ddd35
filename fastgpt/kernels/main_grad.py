"""Gradients accumulated in place: the ``main_grad`` convention.

A parameter may carry an attribute ``main_grad``, an fp32 tensor of its shape. Functions of fastgpt that own
the product behind a weight gradient (``linear``, ``embedding``, ``linear_cross_entropy``) then add that
gradient into ``main_grad`` as they compute it and give autograd none: no temporary of the weight's size, no
second pass to add it up, and fp32 accumulation for a bf16 weight. The name and the idea are Megatron-LM's
(``gradient_accumulation_fusion``). Without the attribute, gradients flow through autograd as usual.
"""

import torch
from torch import Tensor


def main_grad_of(parameter: Tensor) -> Tensor | None:
    """The buffer to accumulate this parameter's gradient into, or ``None`` for autograd's usual way.

    Under ``torch.compile`` always ``None``: a traced graph returns its gradients.
    """
    if torch.compiler.is_compiling() or not (parameter.requires_grad and torch.is_grad_enabled()):
        return None
    return getattr(parameter, "main_grad", None)
