"""Cross-entropy of logits against integer targets, and the variants of it that large models are trained with."""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastgpt.kernels import checks, dispatch
from fastgpt.kernels.autograd import apply, once_differentiable
from fastgpt.kernels.ops import statistics_dtype
from fastgpt.kernels.reference import divisor_of_mean

# The last arguments of the operators: softcap, z_loss, label_smoothing, class_weight. ops.py has the formula.
Options = tuple[float, float, float, Tensor | None]


class _CrossEntropy(Function):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor, ignore_index: int, *options: Any) -> Any:
        return dispatch.resolve("cross_entropy", logits)(logits, targets, ignore_index, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, ctx.ignore_index, *ctx.numbers, class_weight = inputs
        _, lse = output
        ctx.save_for_backward(logits, targets, lse, class_weight)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable("cross_entropy")
    def backward(ctx: Any, dlosses: Tensor | None, *_: Any) -> Any:
        refuse_gradient_of_class_weight("weight", ctx)
        if dlosses is None:
            return ()
        logits, targets, lse, class_weight = ctx.saved_tensors
        backward = dispatch.resolve("cross_entropy_backward", logits)
        return (backward(dlosses, logits, targets, lse, ctx.ignore_index, *ctx.numbers, class_weight),)


def refuse_gradient_of_class_weight(name: str, ctx: Any) -> None:
    """Raise if autograd asks for the gradient of a function's last input, the class weights: there is none."""
    if ctx.needs_input_grad[-1]:
        raise RuntimeError(f"{name}: class weights have no gradient, as in PyTorch; detach them")


def checked_options(
    softcap: float | None, z_loss: float, label_smoothing: float, name: str, class_weight: Tensor | None,
    logits: Tensor, n_classes: int,
) -> Options:  # fmt: skip
    """Check the options and return them as the operators take them.

    Args:
        softcap: as in :func:`cross_entropy`, like the next two.
        z_loss: a factor.
        label_smoothing: a share.
        name: what ``class_weight`` is called.
        class_weight: as the ``weight`` of :func:`cross_entropy`.
        logits: a tensor with the dtype and the device of the logits.
        n_classes: V.
    """
    checks.loss_options(softcap, z_loss, label_smoothing)
    if class_weight is not None:
        checks.class_weight(name, class_weight, n_classes, logits.dtype, logits.device)
        class_weight = class_weight.to(statistics_dtype(logits.dtype))
    return 0.0 if softcap is None else float(softcap), float(z_loss), float(label_smoothing), class_weight


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
    """Return the mean of ``logsumexp(logits) - logits[target]`` over the rows that count, in nats.

    The options can be combined. In a row, with ``z`` the capped logits, ``lse = logsumexp(z)``, ``w`` the class weights
    and ``s`` the label smoothing, the loss is ``(1 - s) * w[target] * (lse - z[target]) + s / V * sum(w * (lse - z)) +
    z_loss * lse**2``.

    Args:
        logits: ``(N, V)``, any strides, fp32, bf16, fp16 or fp64; sums are taken in fp32, those of fp64 in fp64.
        targets: ``(N,)`` int64 in ``[0, V)``, or ``ignore_index`` for a row that does not count.
        ignore_index: marks rows without a target.
        weight: ``(V,)`` class weights, fp32 or of the dtype of ``logits``, or ``None`` for 1 each. They have no
            gradient.
        reduction: ``"mean"``: the sum divided by the number of rows that count, or with ``weight`` by the sum of the
            weights of their targets, as in PyTorch. ``"sum"``. ``"none"``: the loss of each row, 0 if it does not
            count.
        label_smoothing: share of a label, in [0, 1], that is spread over all classes alike (Szegedy et al., 2016).
        softcap: logits are first capped to ``softcap * tanh(logits / softcap)``, as in Gemma 2 (2024); more than 0.
        z_loss: factor of ``lse**2``, which keeps logits near 0 (PaLM, Chowdhery et al., 2022, takes 1e-4). Class
            weights do not multiply it.

    Returns:
        0-dim fp32 tensor, with ``reduction="none"`` ``(N,)``; fp64 for fp64 logits. If no row counts, the mean is NaN
        and the sum 0, as in PyTorch.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or an option does not fit.
        RuntimeError: a target lies outside ``[0, V)`` (on a CPU; on a GPU the loss is NaN).
    """
    checks.floating(logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected (N, V) with V > 0, got {tuple(logits.shape)}")
    checks.targets(targets, logits.shape[0], logits.device, ignore_index)
    checks.reduction(reduction)
    options = checked_options(softcap, z_loss, label_smoothing, "weight", weight, logits, logits.shape[1])
    losses, _ = apply(_CrossEntropy, logits, targets, ignore_index, *options)
    if reduction == "none":
        return losses
    return losses.sum() / divisor_of_mean(targets, ignore_index, options[-1]) if reduction == "mean" else losses.sum()
