"""The output layer and its loss in one function, chunk by chunk: the ``(tokens, vocab)`` logits never exist as a whole.

A chunk's logits are turned into their gradient in place. The products of the backward are then done in the forward
pass, while the chunk exists, and nothing is recomputed. The idea is Liger-Kernel's ``fused_linear_cross_entropy`` (Hsu
et al., 2024). If the loss of each row is asked for, the gradient that each will get is not known in the forward pass.
The backward then computes the logits again, chunk by chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import autocast, checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.cross_entropy import Options, checked_options, refuse_gradient_of_class_weight
from fastgpt.kernels.dry_run import on_gpu
from fastgpt.kernels.main_grad import main_grad_of
from fastgpt.kernels.matmul import matmul_into
from fastgpt.kernels.ops import statistics_dtype
from fastgpt.kernels.reference import divisor_of_mean

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
    dweight: Tensor | None, options: Options, reduction: str,
) -> Tensor:  # fmt: skip
    """Return the loss; write the gradient of ``x`` to ``dx``, and add that of ``weight`` to ``dweight``.

    Args:
        x: ``(N, C)``.
        weight: ``(V, C)``.
        targets: ``(N,)`` int64.
        ignore_index: marks rows without a target.
        gradient_scale: 0-dim fp32 that the gradients are multiplied by, or ``None`` for 1.
        dx: ``(N, C)`` or ``None`` if not needed.
        dweight: ``(V, C)``, any float dtype, or ``None`` if not needed.
        options: the last arguments of the operators.
        reduction: ``"mean"`` or ``"sum"``.
    """
    total = x.new_zeros((), dtype=statistics_dtype(x.dtype))
    inverse_count = torch.ones_like(total)
    if reduction == "mean":
        inverse_count = divisor_of_mean(targets, ignore_index, options[-1]).to(total.dtype).reciprocal()
    if dx is None and dweight is None:
        for _, losses in chunks_of_losses(x, weight, targets, ignore_index, options):
            total += losses.sum()
    else:
        scale = inverse_count if gradient_scale is None else inverse_count * gradient_scale
        for losses in chunks_of_gradients(x, weight, targets, ignore_index, scale, dx, dweight, options):
            total += losses.sum()
    return total * inverse_count


def chunks_of_losses(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, options: Options
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of each chunk, and the losses of its rows. The arguments are those of :func:`chunked`."""
    rows = chunk_rows(x, weight.shape[0])
    buffer = x.new_empty((rows, weight.shape[0]))
    for start in range(0, x.shape[0], rows):
        chunk, chunk_targets = x[start : start + rows], targets[start : start + rows]
        logits = matmul_into(buffer[: chunk.shape[0]], chunk, weight.T)
        losses, _ = dispatch.resolve("cross_entropy", x)(logits, chunk_targets, ignore_index, *options)
        yield start, losses


def chunks_of_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, scale: Tensor, dx: Tensor | None,
    dweight: Tensor | None, options: Options,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the losses of each chunk, once its gradients are in ``dx`` and ``dweight``.

    They are those of the sum of ``scale * losses``. ``scale`` is 0-dim or ``(N,)``; the other arguments are those of
    :func:`chunked`.
    """
    rows = chunk_rows(x, weight.shape[0])
    buffer = x.new_empty((rows, weight.shape[0]))
    for start in range(0, x.shape[0], rows):
        chunk, chunk_targets = x[start : start + rows], targets[start : start + rows]
        chunk_scale = scale[start : start + rows] if scale.dim() else scale
        logits = matmul_into(buffer[: chunk.shape[0]], chunk, weight.T)
        losses = dispatch.resolve("cross_entropy_", x)(logits, chunk_targets, chunk_scale, ignore_index, *options)
        if dx is not None:
            matmul_into(dx[start : start + rows], logits, weight)
        if dweight is not None:
            matmul_into(dweight, logits.T, chunk, accumulate=True)
        yield losses


def _empty_gradients(x: Tensor, weight: Tensor, needs_dx: bool, needs_dweight: bool) -> tuple[Any, Any]:
    """What the gradients are written to, and added to, by the operators; ``None`` for one that is not needed."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
    # A GPU's product adds to fp32 as fast as to bf16. On a CPU it would need a temporary of the weight's size.
    dtype = torch.float32 if on_gpu(weight) else weight.dtype
    return dx, weight.new_zeros(weight.shape, dtype=dtype) if needs_dweight else None


def _as_results(x: Tensor, weight: Tensor, dx: Tensor | None, dweight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients as an operator returns them."""
    return (
        x.new_empty(0) if dx is None else dx,
        weight.new_empty(0) if dweight is None else dweight.to(weight.dtype),
    )


def chunked_operator(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None, reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`chunked` with the signature of the operator ``linear_cross_entropy``."""
    options = softcap, z_loss, label_smoothing, class_weight
    if reduction == "none":
        losses = x.new_empty(x.shape[:1], dtype=statistics_dtype(x.dtype))
        for start, part in chunks_of_losses(x, weight, targets, ignore_index, options):
            losses[start : start + part.shape[0]] = part
        return losses, x.new_empty(0), weight.new_empty(0)
    dx, dweight = _empty_gradients(x, weight, needs_dx, needs_dweight)
    loss = chunked(x, weight, targets, ignore_index, gradient_scale, dx, dweight, options, reduction)
    return loss, *_as_results(x, weight, dx, dweight)


def chunked_backward_operator(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_dx: bool,
    needs_dweight: bool, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`chunks_of_gradients` with the signature of the operator ``linear_cross_entropy_backward``."""
    options = softcap, z_loss, label_smoothing, class_weight
    dx, dweight = _empty_gradients(x, weight, needs_dx, needs_dweight)
    for _ in chunks_of_gradients(x, weight, targets, ignore_index, dlosses, dx, dweight, options):
        pass
    return _as_results(x, weight, dx, dweight)


for _key in ("CPU", "CUDA"):
    dispatch.implement("linear_cross_entropy", _key, chunked_operator)
    dispatch.implement("linear_cross_entropy_backward", _key, chunked_backward_operator)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
        needs_dweight: bool, reduction: str, *options: Any,
    ) -> Any:  # fmt: skip
        operator = dispatch.resolve("linear_cross_entropy", x)
        return operator(x, weight, targets, ignore_index, gradient_scale, needs_dx, needs_dweight, *options, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dx, dweight = output
        ctx.save_for_backward(dx, dweight)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
        refuse_gradient_of_class_weight("class_weight", ctx)
        if dloss is None:
            return ()
        dx, dweight = ctx.saved_tensors
        return dx * dloss, dweight * dloss


class _LinearCrossEntropyInPlace(Function):
    """The forward adds the weight's gradient to ``main_grad``, for an upstream gradient of exactly 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None,
        main_grad: Tensor, reduction: str, *options: Any,
    ) -> Tensor:  # fmt: skip
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        loss = chunked(x, weight, targets, ignore_index, gradient_scale, dx, main_grad, options, reduction)
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor) -> Any:
        refuse_gradient_of_class_weight("class_weight", ctx)
        rule = "linear_cross_entropy: with weight.main_grad the loss must be the root of backward()"
        if on_gpu(dloss):  # checked on the GPU: reading the value here would wait for it
            torch._assert_async(dloss == 1.0, rule)
        elif dloss.device.type == "cpu" and dloss.item() != 1.0:
            raise RuntimeError(
                f"{rule}; the loss got a gradient of {dloss.item()}, but weight.main_grad was computed for 1"
            )
        return ctx.saved_tensors


class _LinearCrossEntropyOfRows(Function):
    """The loss of each row. The backward computes the logits again, and adds to ``main_grad`` if there is one."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None,
        main_grad: Tensor | None, *options: Any,
    ) -> Tensor:  # fmt: skip
        operator = dispatch.resolve("linear_cross_entropy", x)
        return operator(x, weight, targets, ignore_index, None, False, False, *options, "none")[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, targets, ctx.ignore_index, gradient_scale, ctx.main_grad, *ctx.numbers, class_weight = inputs
        ctx.save_for_backward(x, weight, targets, gradient_scale, class_weight)

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dlosses: Tensor) -> Any:
        refuse_gradient_of_class_weight("class_weight", ctx)
        x, weight, targets, gradient_scale, class_weight = ctx.saved_tensors
        scale = dlosses if gradient_scale is None else dlosses * gradient_scale
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        options = *ctx.numbers, class_weight
        if ctx.main_grad is None:
            operator = dispatch.resolve("linear_cross_entropy_backward", x)
            return operator(scale, x, weight, targets, ctx.ignore_index, needs_dx, needs_dweight, *options)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else None
        for _ in chunks_of_gradients(x, weight, targets, ctx.ignore_index, scale, dx, ctx.main_grad, options):
            pass
        return dx, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    *,
    gradient_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Return ``cross_entropy(x @ weight.T, targets)`` without ever holding all logits.

    Peak memory beyond inputs and gradients is one chunk of logits: 64 MiB on a CPU, 4096 rows on a GPU. Gradients are
    computed in this call, for the inputs that require them; ``backward`` multiplies them by the loss's gradient. With
    ``reduction="none"`` this call computes the losses alone, because the gradient of each is not known yet, and
    ``backward`` computes the logits again: one product more.

    If ``weight`` carries a ``main_grad`` (see ``main_grad.py``), its gradient is added there in this call, for an
    upstream gradient of 1. Call ``backward()`` on the loss itself, and apply any scale, for example that of gradient
    accumulation, in the optimizer. With ``reduction="none"`` it is added in ``backward``, for any gradient.

    Args:
        x: ``(N, C)``, any strides, fp32, bf16, fp16 or fp64.
        weight: ``(V, C)``, dtype and device of ``x``.
        targets: ``(N,)`` int64 in ``[0, V)``, or ``ignore_index`` for a row that does not count.
        ignore_index: marks rows without a target.
        gradient_scale: 0-dim fp32 tensor that both gradients are multiplied by, for loss scaling. The gradients of
            the logits are rounded to fp16 in this call, so a scale applied to the loss would come too late.
        class_weight: ``(V,)``, fp32 or the dtype of ``x``: the ``weight`` of :func:`cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in :func:`cross_entropy`, like the options that follow.
        label_smoothing: share of a label, in [0, 1], that is spread over all classes.
        softcap: what logits are capped to; more than 0, or ``None``.
        z_loss: factor of the square of the logsumexp.

    Returns:
        0-dim fp32 tensor, with ``reduction="none"`` ``(N,)``; fp64 for fp64 inputs. If no row counts, the mean is NaN
        and the sum 0, as in PyTorch.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or an option does not fit.
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
    checks.reduction(reduction)
    options = checked_options(softcap, z_loss, label_smoothing, "class_weight", class_weight, x, weight.shape[0])
    arguments = x, weight, targets, ignore_index, gradient_scale
    if reduction == "none":
        return apply(_LinearCrossEntropyOfRows, *arguments, main_grad, *options)
    if main_grad is not None:
        return apply(_LinearCrossEntropyInPlace, *arguments, main_grad, reduction, *options)
    gradients = torch.is_grad_enabled()
    needs = gradients and x.requires_grad, gradients and weight.requires_grad
    return apply(_LinearCrossEntropy, *arguments, *needs, reduction, *options)[0]
