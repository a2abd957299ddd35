"""FusedAdamW in a training loop of one's own: clipping inside, a schedule outside, state that torch.optim can read.

    python examples/fused_adamw.py

The model learns to add two digits. Nothing else of fastgpt is involved.
"""

import torch
import torch.nn.functional as F

from fastgpt.kernels import FusedAdamW

torch.manual_seed(0)
pairs = torch.cartesian_prod(torch.arange(10), torch.arange(10))
x, targets = F.one_hot(pairs, 10).flatten(1).float(), pairs.sum(1)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 19))
matrices = [p for p in model.parameters() if p.dim() > 1]
vectors = [p for p in model.parameters() if p.dim() == 1]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
optimizer = FusedAdamW(groups, lr=1e-2, betas=(0.9, 0.95), max_grad_norm=1.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
for step in range(201):
    loss = F.cross_entropy(model(x), targets)
    loss.backward()
    optimizer.step(zero_grad=True)  # norm, clip, update and zeroing; optimizer.grad_norm is the norm before clipping
    schedule.step()
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm.item():.3f}")
right = (model(x).argmax(1) == targets).sum().item()
print(f"{right} of {len(pairs)} sums right")
torch.optim.AdamW(groups).load_state_dict(optimizer.state_dict())  # goes on from here
