"""One kernel in a model that is otherwise plain PyTorch: the loss without its logits.

    python examples/one_kernel.py

``linear_cross_entropy`` takes the place of the output layer and ``F.cross_entropy``. The loss and the gradients are
the same; the logits, here 49 MiB and their gradient as much again, are never held.
"""

import torch
import torch.nn.functional as F

from fastgpt.kernels import backends, linear_cross_entropy

N, C, V = 256, 128, 50257  # tokens, width, vocabulary

torch.manual_seed(0)
trunk = torch.nn.Sequential(torch.nn.Linear(C, 4 * C), torch.nn.GELU(), torch.nn.Linear(4 * C, C))
weight = torch.nn.Parameter(torch.randn(V, C) / C**0.5)
x, targets = torch.randn(N, C), torch.randint(V, (N,))


def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
    """Of every parameter."""
    return list(torch.autograd.grad(loss, [*trunk.parameters(), weight]))


plain = F.cross_entropy(trunk(x) @ weight.T, targets)
fused = linear_cross_entropy(trunk(x), weight, targets)
furthest = max((a - b).abs().max().item() for a, b in zip(gradients(plain), gradients(fused), strict=True))
print(f"runs on {backends()['cpu']['cross_entropy_']}")
print(f"loss {plain.item():.6f} in plain PyTorch, {fused.item():.6f} here; gradients differ by at most {furthest:.1e}")
