"""Where the time of a training step goes, by kind of kernel."""

import re
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench.steps import Contender, Request
from bench.timing import synchronise

KINDS = (  # the first pattern that matches a kernel's name decides
    ("attention", r"attention|flash|fmha|sdpa|mha"),
    ("optimizer", r"adam|multi_tensor|squares_kernel|root_kernel|foreach|lpnorm"),
    ("GEMM", r"gemm|cutlass|xmma|nvjet|cublas|matmul|\bmm\b|addmm|s16816|splitk"),
    ("loss", r"cross_entropy|log_softmax|nll_loss|SoftMax"),
    ("norm", r"layer_norm|rms_norm|native_layer_norm|layernorm|GammaBeta|columns_sum"),
    ("activation", r"gelu|silu|relu|glu"),
    ("embedding", r"embedding|indexing_backward|index_put|radix_?sort"),
    ("copy", r"memcpy|memset|copy|fill"),
)

# Inductor names a kernel after everything that it fused, such as the product before a GELU. Its prefix comes first.
INDUCTORS = {"triton_tem_": "GEMM", "triton_for_": "optimizer"}  # templates of products; lists of tensors


def kind_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to, by its name."""
    for start, kind in INDUCTORS.items():
        if kernel.startswith(start):
            return kind
    # a kernel that Inductor generated is a product only if it comes from a template
    kinds = [(k, pattern) for k, pattern in KINDS if k != "GEMM" or not kernel.startswith("triton_")]
    return next((kind for kind, pattern in kinds if re.search(pattern, kernel, re.IGNORECASE)), "other")


def time_budget(contender: Contender, request: Request) -> dict[str, float]:
    """Milliseconds of one update by kind of kernel; ``idle`` is the time without a kernel."""
    if contender.update is None:
        return {}
    batches = next(request.batches())
    synchronise(request.device)
    cuda = request.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        start = time.perf_counter()
        contender.update(batches)
        synchronise(request.device)
        wall = 1e3 * (time.perf_counter() - start)
    budget = {kind: 0.0 for kind, _ in KINDS} | {"other": 0.0}
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue  # an annotation spans kernels that are counted already
        budget[kind_of(event.key)] += us / 1e3
    budget["idle"] = max(0.0, wall - sum(budget.values()))
    return budget
