"""The output layer and its loss in one function, chunk by chunk: the ``(tokens, vocab)`` logits never exist as a whole.

A chunk's logits are turned into their gradient in place. The products of the backward are then done in the forward
pass, while the chunk exists, and nothing is recomputed. The idea is Liger-Kernel's ``fused_linear_cross_entropy`` (Hsu
et al., 2024).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.dry_run import on_gpu
from fastgpt.kernels.main_grad import main_grad_of
from fastgpt.kernels.matmul import matmul_into
from fastgpt.kernels.ops import statistics_dtype

# Bytes of logits that exist at a time on a CPU: 330 rows of fp32 at GPT-2's vocabulary. Each chunk reads the weight
# twice and adds to its gradient once; with 160 rows a step takes a tenth longer.
CHUNK_BYTES = 64 << 20

# Rows of logits that exist at a time on a GPU. Each chunk reads and writes the fp32 weight gradient once. At GPT-2's
# widths on an RTX 4070 this takes a ninth of the time of the product that does it, and half the rows would double it.
CHUNK_ROWS_GPU = 4096


def chunk_rows(x: Tensor, n_classes: int) -> int:
    """Return how many rows of ``x`` have their logits in memory at a time.

    The division into chunks is as even as multiples of 16 rows, a product's tile, allow.
    """
    most = CHUNK_ROWS_GPU if on_gpu(x) else max(16, CHUNK_BYTES // (n_classes * x.element_size()) // 16 * 16)
    chunks = max(1, -(-x.shape[0] // most))
    rows = -(-x.shape[0] // chunks)
    return max(1, min(x.shape[0], -(-rows // 16) * 16))


def chunked(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, dx: Tensor | None,
    dweight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the mean loss; write the gradient of ``x`` to ``dx``, and add that of ``weight`` to ``dweight``.

    Args:
        x: ``(N, C)``.
        weight: ``(V, C)``.
        targets: ``(N,)`` int64.
        ignore_index: marks rows without a target.
        gradient_scale: 0-dim fp32 that the gradients are multiplied by, or ``None`` for 1.
        dx: ``(N, C)`` or ``None`` if not needed.
        dweight: ``(V, C)``, any float dtype, or ``None`` if not needed.
    """
    N, V = x.shape[0], weight.shape[0]
    total = x.new_zeros((), dtype=statistics_dtype(x.dtype))
    inverse_count = torch.count_nonzero(targets != ignore_index).to(total.dtype).reciprocal()
    scale = inverse_count if gradient_scale is None else inverse_count * gradient_scale
    rows = chunk_rows(x, V)
    buffer = x.new_empty((rows, V))
    with_gradient = dx is not None or dweight is not None
    for start in range(0, N, rows):
        chunk, chunk_targets = x[start : start + rows], targets[start : start + rows]
        logits = matmul_into(buffer[: chunk.shape[0]], chunk, weight.T)
        if not with_gradient:
            losses, _ = dispatch.resolve("cross_entropy", x)(logits, chunk_targets, ignore_index)
            total += losses.sum()
            continue
        losses = dispatch.resolve("cross_entropy_", x)(logits, chunk_targets, scale, ignore_index)
        total += losses.sum()
        if dx is not None:
            matmul_into(dx[start : start + rows], logits, weight)
        if dweight is not None:
            matmul_into(dweight, logits.T, chunk, accumulate=True)
    return total * inverse_count


def chunked_operator(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`chunked` with the signature of the operator ``linear_cross_entropy``."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    # A GPU's product adds to fp32 as fast as to bf16. On a CPU it would need a temporary of the weight's size.
    dtype = torch.float32 if on_gpu(weight) else weight.dtype
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs_dweight else None
    loss = chunked(x, weight, targets, ignore_index, gradient_scale, dx, dweight)
    return (
        loss,
        x.new_empty(0) if dx is None else dx,
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


dispatch.implement("linear_cross_entropy", "CPU", chunked_operator)
dispatch.implement("linear_cross_entropy", "CUDA", chunked_operator)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
        needs_dweight: bool,
    ) -> Any:  # fmt: skip
        operator = dispatch.resolve("linear_cross_entropy", x)
        return operator(x, weight, targets, ignore_index, gradient_scale, needs_dx, needs_dweight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dx, dweight = output
        ctx.save_for_backward(dx, dweight)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
        if dloss is None:
            return ()
        dx, dweight = ctx.saved_tensors
        return dx * dloss, dweight * dloss


class _LinearCrossEntropyInPlace(Function):
    """The forward adds the weight's gradient to ``main_grad``, for an upstream gradient of exactly 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None,
        main_grad: Tensor,
    ) -> Tensor:  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        loss = chunked(x, weight, targets, ignore_index, gradient_scale, dx, main_grad)
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> Any:
        rule = "linear_cross_entropy: with weight.main_grad the loss must be the root of backward()"
        if on_gpu(dloss):  # checked on the GPU: reading the value here would wait for it
            torch._assert_async(dloss == 1.0, rule)
        elif dloss.device.type == "cpu" and dloss.item() != 1.0:
            raise RuntimeError(
                f"{rule}; the loss got a gradient of {dloss.item()}, but weight.main_grad was computed for 1"
            )
        return ctx.saved_tensors


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, *, gradient_scale: Tensor | None = None
) -> Tensor:
    """Return ``cross_entropy(x @ weight.T, targets)`` without ever holding all logits.

    Peak memory beyond inputs and gradients is one chunk of logits: 64 MiB on a CPU, 4096 rows on a GPU. Gradients are
    computed in this call, for the inputs that require them; ``backward`` multiplies them by the loss's gradient.

    If ``weight`` carries a ``main_grad`` (see ``main_grad.py``), its gradient is added there in this call, for an
    upstream gradient of 1. Call ``backward()`` on the loss itself, and apply any scale, for example that of gradient
    accumulation, in the optimizer.

    Args:
        x: ``(N, C)``, any strides, fp32, bf16, fp16 or fp64.
        weight: ``(V, C)``, dtype and device of ``x``.
        targets: ``(N,)`` int64 in ``[0, V)``, or ``ignore_index`` for a row that does not count.
        ignore_index: marks rows without a target.
        gradient_scale: 0-dim fp32 tensor that both gradients are multiplied by, for loss scaling. The gradients of
            the logits are rounded to fp16 in this call, so a scale applied to the loss would come too late.

    Returns:
        0-dim fp32 tensor, fp64 for fp64 inputs: the mean loss in nats; NaN if no row counts, as in PyTorch.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit.
        RuntimeError: a target lies outside ``[0, V)`` (on a CPU; on a GPU the loss is NaN).
    """
    checks.floating(x=x, weight=weight)
    main_grad = main_grad_of(weight)  # of the parameter itself, before autocast casts it
    x, weight = autocast.in_autocast_dtype(x, weight)
    checks.same("x", x=x, weight=weight)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected (N, C) with C > 0, got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected (V, {x.shape[1]}) with V > 0, got {tuple(weight.shape)}")
    checks.targets(targets, x.shape[0], x.device, ignore_index)
    if gradient_scale is not None:
        checks.scalar("gradient_scale", gradient_scale, torch.float32, x.device)
    if main_grad is not None:
        return apply(_LinearCrossEntropyInPlace, x, weight, targets, ignore_index, gradient_scale, main_grad)
    gradients = torch.is_grad_enabled()
    return apply(
        _LinearCrossEntropy,
        x,
        weight,
        targets,
        ignore_index,
        gradient_scale,
        gradients and x.requires_grad,
        gradients and weight.requires_grad,
    )[0]
