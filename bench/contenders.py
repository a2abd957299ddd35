"""Who takes part in a measurement of whole training steps: fastgpt's step, and plain PyTorch's in several ways.

A contender is made for a model's shape and then called once an update, with its micro-batches; it gives the mean loss,
on the device. All start from the weights that the seed gives.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.hardware import median_seconds
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
    deterministic: bool = True,
    cuda_graphs: bool = True,
) -> Update:
    """Its GPT, the flat store, FusedAdamW."""
    step = TrainStep(
        GPT(config, recompute, deterministic),
        device=device,
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


def strongest_update(
    config: GPTConfig,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    accumulation: int = 1,
    *,
    mode: str | None = "reduce-overhead",
) -> Update:
    """Plain PyTorch as one who knows it well could have it in an evening.

    Weights in ``dtype`` with fp32 masters, so that nothing is cast on the way; forward and backward one compiled graph
    each, without a break; clipping, AdamW and the cast of the weights compiled into a third; and the faster of
    FlashAttention and cuDNN's attention, where either falling back to something else is an error. Micro-batches add up
    in ``dtype``.
    """
    model = ReferenceGPT(config).to(device, dtype)
    weights = list(model.parameters())
    masters, exp_avgs, exp_avg_sqs = ([], [], [])
    for weight in weights:
        masters.append(weight.detach().float().clone())
        exp_avgs.append(torch.zeros_like(masters[-1]))
        exp_avg_sqs.append(torch.zeros_like(masters[-1]))
    step = torch.zeros((), device=device)
    decays = [1.0 - LR * WEIGHT_DECAY if weight.dim() > 1 else 1.0 for weight in weights]
    beta1, beta2 = BETAS

    def optimize(gradients: list[Tensor]) -> None:
        gradients = [gradient.float() for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, torch.clamp(MAX_GRAD_NORM / (norm + 1e-6), max=1.0))
        step.add_(1.0)
        torch._foreach_lerp_(exp_avgs, gradients, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1.0 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, torch.sqrt(1.0 - beta2**step))
        torch._foreach_add_(denominators, 1e-8)
        changes = torch._foreach_div(exp_avgs, denominators)
        torch._foreach_mul_(changes, -LR / (1.0 - beta1**step))
        torch._foreach_mul_(masters, decays)
        torch._foreach_add_(masters, changes)
        torch._foreach_copy_(weights, masters)

    forward = torch.compile(model, mode=mode, fullgraph=True)
    apply = torch.no_grad()(torch.compile(optimize, fullgraph=True))
    attention = fastest_attention(config, device, dtype)

    def update(batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros((), device=device)
        for x, y in batches:
            with attention():
                loss = forward(x, y)
                (loss / accumulation).backward()
            total += loss.detach() / accumulation
        apply([weight.grad for weight in weights])
        for weight in weights:
            weight.grad = None
        return total

    return update


def fastest_attention(
    config: GPTConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which ``scaled_dot_product_attention`` is one of the fused kernels for this shape, the faster one.

    Raises:
        RuntimeError: no fused kernel takes this shape.
    """
    if device.type != "cuda":
        return nullcontext  # there is one
    shape = 8, config.n_head, config.block_size, config.n_embd // config.n_head
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    seconds: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            seconds[backend] = median_seconds(lambda backend=backend: attend(backend), device, 0.05)
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    if not seconds:
        raise RuntimeError(f"no fused attention for {shape} in {dtype}")
    print(f"strongest: {', '.join(f'{b.name} {1e3 * s:.2f} ms' for b, s in seconds.items())}")
    best = min(seconds, key=lambda backend: seconds[backend])
    return lambda: sdpa_kernel(best)
