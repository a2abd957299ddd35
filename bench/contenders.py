"""Who takes part in a measurement of whole training steps: fastgpt's step, and plain PyTorch's in several ways.

A contender is made for a model's shape and then called once an update, with its micro-batches; it gives the mean loss,
on the device. All start from the weights that the seed gives.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.model import GPT
from fastgpt.model.config import GPTConfig
from fastgpt.model.reference import ReferenceGPT
from fastgpt.train.step import Batch, TrainStep

Update = Callable[[Sequence[Batch]], Tensor]

LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0

AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}  # largest relative difference of two losses


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of two sequences of losses; infinite where one is no number."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


class ChunkedReferenceGPT(ReferenceGPT):
    """Plain PyTorch with its own linear + cross-entropy, which holds a chunk of the logits at a time."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(idx)
        x, output = self.transformer(idx).flatten(0, 1), self.transformer.wte.weight
        return F.linear_cross_entropy(x, output.to(x.dtype), targets.flatten(), ignore_index=-1)


def fastgpt_update(
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    accumulation: int = 1,
    *,
    state_bits: int = 32,
    recompute: str = "cheap",
    cuda_graphs: bool = True,
) -> Update:
    """Its GPT, the flat store, FusedAdamW."""
    step = TrainStep(
        GPT(config, recompute).to(device),
        dtype=dtype,
        accumulation=accumulation,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        state_bits=state_bits,
        cuda_graphs=cuda_graphs,
    )

    def update(batches: Sequence[Batch]) -> Tensor:
        step(iter(batches).__next__, LR)
        return step.loss.clone()

    return update


def plain_update(
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    accumulation: int = 1,
    *,
    mode: str | None = None,
    chunked_loss: bool = False,
) -> Update:
    """Plain PyTorch as nanoGPT has it: fp32 weights, autocast, ``scaled_dot_product_attention``, fused AdamW.

    ``mode`` is that of ``torch.compile``, ``None`` for none; ``chunked_loss`` takes ``F.linear_cross_entropy`` in place
    of whole logits.
    """
    model = (ChunkedReferenceGPT if chunked_loss else ReferenceGPT)(config).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    forward = model if mode is None else torch.compile(model, mode=mode)

    def update(batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), device=device)
        for x, y in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = forward(x, y)
            (loss / accumulation).backward()
            total += loss.detach() / accumulation
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return update
