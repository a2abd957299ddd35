"""Mean cross-entropy of logits against integer targets."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable


class _CrossEntropy(Function):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor, ignore_index: int) -> Any:
        return dispatch.resolve("cross_entropy", logits)(logits, targets, ignore_index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, ctx.ignore_index = inputs
        _, lse = output
        ctx.save_for_backward(logits, targets, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx: Any, dlosses: Tensor | None, *_: Any) -> Any:
        if dlosses is None:
            return ()
        logits, targets, lse = ctx.saved_tensors
        dlogits = dispatch.resolve("cross_entropy_backward", logits)(dlosses, logits, targets, lse, ctx.ignore_index)
        return (dlogits,)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -1) -> Tensor:
    """Return the mean of ``logsumexp(logits) - logits[target]`` over the rows that count, in nats.

    Args:
        logits: ``(N, V)``, any strides, fp32, bf16, fp16 or fp64; sums are taken in fp32, those of fp64 in fp64.
        targets: ``(N,)`` int64 in ``[0, V)``, or ``ignore_index`` for a row that does not count.
        ignore_index: marks rows without a target.

    Returns:
        0-dim fp32 tensor, fp64 for fp64 logits; NaN if no row counts, as in PyTorch.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit.
        RuntimeError: a target lies outside ``[0, V)`` (on a CPU; on a GPU the loss is NaN).
    """
    checks.floating(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected (N, V) with V > 0, got {tuple(logits.shape)}")
    checks.targets(targets, logits.shape[0], logits.device, ignore_index)
    losses, _ = apply(_CrossEntropy, logits, targets, ignore_index)
    return losses.sum() / torch.count_nonzero(targets != ignore_index)
