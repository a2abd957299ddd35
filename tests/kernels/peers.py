"""Plain PyTorch that several tests compare with: without a fault of PyTorch's own, or of several functions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, in bf16 on operands that end in zeros up to a multiple of 32 in both of their dimensions.

    On CPUs with AMX PyTorch's product of bf16 reads past the ends of shorter rows, forward of ``x`` and backward of the
    incoming gradient, and is NaN where it finds a NaN there.
    """
    if x.dtype.itemsize != 2:
        return F.linear(x, weight, bias)
    C_out, C_in = weight.shape
    tall, wide = -C_out % 32, -C_in % 32
    bias = None if bias is None else F.pad(bias, (0, tall))
    return F.linear(F.pad(x, (0, wide)), F.pad(weight, (0, wide, 0, tall)), bias)[..., :C_out]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` with a soft cap before it and a z-loss behind it, in fp32 or, of fp64 logits, in fp64."""
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    if weight is not None:
        weight = weight.to(z.dtype)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(z, targets, reduction=reduction, **options)
    if not z_loss:
        return loss
    counted = targets != ignore_index
    penalty = torch.where(counted, z_loss * z.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return loss + penalty
    if reduction == "sum":
        return loss + penalty.sum()
    return loss + penalty.sum() / (counted.sum() if weight is None else weight[targets[counted]].sum())
