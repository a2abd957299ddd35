"""Plain PyTorch where PyTorch itself has a fault: the same maths, out of the fault's reach."""

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
