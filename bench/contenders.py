"""Who takes part in a measurement of whole training steps: fastgpt's step, and plain PyTorch's in several ways.

A contender is made for a model's shape. It is then called once per update, with the micro-batches, and returns the mean
loss, on the device. All contenders start from the weights that the seed gives and train on the same tokens, so that
their losses can be compared (:func:`differences`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.hardware import median_seconds
from fastgpt.model import GPT
from fastgpt.model.config import GPTConfig
from fastgpt.model.reference import ReferenceGPT
from fastgpt.train.memory import keep_freed_memory
from fastgpt.train.step import Batch, TrainStep
from fastgpt.units import dtype_name, seconds

Update = Callable[[Sequence[Batch]], Tensor]

LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0  # nanoGPT's, but for the constant rate


# ---- whether losses agree ----

# The largest relative difference of two losses. In half precision it is a few roundings of the weights (2**-8 in bf16).
AGREE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}
# Only the first losses are compared: every update multiplies a difference of rounding. After 50 updates of GPT-2 124M
# on an H200, plain PyTorch's own losses in bf16 and in fp32 are 5e-3 apart in the mean of ten.
COMPARED = 20


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the first ``COMPARED`` losses of two sequences, as far as both go.

    Infinite if any loss is not finite, or if there are none.
    """
    pairs = list(zip(ours, theirs, strict=False))
    if not pairs or not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in pairs[:COMPARED])


def agree(ours: Sequence[float], theirs: Sequence[float], dtype: str) -> bool:
    """Whether two sequences of losses are the same, up to the rounding of a dtype."""
    return difference(ours, theirs) <= AGREE[dtype]


def differences(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The difference of each contender's losses from those of plain PyTorch.

    If plain PyTorch does not take part, the losses are compared with those of fastgpt, or else of the first contender.
    Contenders with another arithmetic (``INEXACT``) are left out.
    """
    exact = {name: values for name, values in losses.items() if name not in INEXACT}
    truth = next((exact[name] for name in ("eager", OURS) if name in exact), next(iter(exact.values()), ()))
    return {name: difference(values, truth) for name, values in exact.items()}


# ---- the contenders ----


class ChunkedReferenceGPT(ReferenceGPT):
    """Plain PyTorch with its own linear + cross-entropy, which computes the logits in chunks."""

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
    """The step of fastgpt: GPT, the flat store, FusedAdamW."""
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
    """Plain PyTorch as nanoGPT uses it: fp32 weights, autocast, ``scaled_dot_product_attention``, fused AdamW.

    ``mode`` is that of ``torch.compile``, or ``None`` for eager. With ``chunked_loss`` the loss is
    ``F.linear_cross_entropy``, which never holds all logits.
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
    """Plain PyTorch, tuned as far as an expert could tune it in an evening.

    Weights are in ``dtype`` with fp32 masters, so that the step casts nothing. Forward and backward are one compiled
    graph each, without a break. Clipping, AdamW and the cast of the weights are compiled into a third graph. Attention
    is the faster of FlashAttention and cuDNN's; falling back to anything else is an error. Micro-batches are summed in
    ``dtype``.
    """
    model = ReferenceGPT(config).to(device, dtype)
    weights = list(model.parameters())  # what the forward pass reads, in dtype
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
        # clip_grad_norm_, with its epsilon; on the device, because a CUDA graph cannot wait for the norm
        torch._foreach_mul_(gradients, torch.clamp(MAX_GRAD_NORM / (norm + 1e-6), max=1.0))
        step.add_(1.0)
        # AdamW: m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2; w -= lr (m / bias1) / (sqrt(v / bias2) + eps)
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
    """A context in which ``scaled_dot_product_attention`` uses the faster of the two fused kernels for this shape.

    Raises:
        RuntimeError: no fused kernel takes this shape.
    """
    if device.type != "cuda":
        return nullcontext  # a CPU has only one
    shape = 8, config.n_head, config.block_size, config.n_embd // config.n_head
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    found: dict[SDPBackend, float] = {}  # seconds
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            found[backend] = median_seconds(lambda backend=backend: attend(backend), device, 0.05)
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    if not found:
        raise RuntimeError(f"no fused attention for {shape} in {dtype_name(dtype)}")
    print(f"strongest: {', '.join(f'{backend.name} {seconds(s)}' for backend, s in found.items())}")
    best = min(found, key=lambda backend: found[backend])
    return lambda: sdpa_kernel(best)


# ---- on a CPU: in a process each, where malloc can be set for one contender alone ----


def fastgpt_memory_kept(config: GPTConfig, device: torch.device, dtype: torch.dtype, state_bits: int = 32) -> Update:
    """The step of fastgpt, with malloc as the trainer sets it.

    The trainer sets it once the model is in the flat store, so that the memory of the model before that is returned.
    """
    update = fastgpt_update(config, device, dtype, state_bits=state_bits)
    keep_freed_memory()
    return update


def plain_memory_kept(config: GPTConfig, device: torch.device, dtype: torch.dtype, mode: str | None = None) -> Update:
    """Plain PyTorch with malloc kept from returning memory, which a user can do without changing code."""
    keep_freed_memory()
    return plain_update(config, device, dtype, mode=mode)


# ---- the tables ----

OURS, NO_GRAPHS = "fastgpt", "fastgpt, no graphs"

# Side by side in one process. A contender that could leave a GPU unusable for the others comes after the simpler ones.
CONTENDERS: dict[str, Callable[..., Update]] = {
    "eager": plain_update,
    NO_GRAPHS: partial(fastgpt_update, cuda_graphs=False),
    OURS: fastgpt_update,
    "fastgpt, single pass": partial(fastgpt_update, deterministic=False),
    "compile": partial(plain_update, mode="default"),
    "compile, chunked loss": partial(plain_update, mode="default", chunked_loss=True),
    "compile, max-autotune": partial(plain_update, mode="max-autotune"),
    "strongest": strongest_update,
    "strongest, max-autotune": partial(strongest_update, mode="max-autotune"),
}
# A CPU has no CUDA graphs and no atomics, and max-autotune changes nothing of the strongest there.
GPU_ONLY = (NO_GRAPHS, "fastgpt, single pass", "strongest, max-autotune")
# torch.compile records CUDA graphs for these, in one memory pool for all of them that only a reset returns.
RECORDED = ("compile, max-autotune", "strongest", "strongest, max-autotune")

# On a CPU, each in a process of its own.
ALONE: dict[str, Callable[..., Update]] = {
    OURS: fastgpt_memory_kept,
    "eager": plain_update,
    "compile": partial(plain_update, mode="default"),
    "eager, memory kept": plain_memory_kept,
    "compile, memory kept": partial(plain_memory_kept, mode="default"),
    "fastgpt, 8-bit moments": partial(fastgpt_memory_kept, state_bits=8),
}
INEXACT = ("fastgpt, 8-bit moments",)  # another arithmetic: the losses are recorded but need not agree
