"""Gated linear units: SwiGLU and GEGLU. Shazeer, "GLU Variants Improve Transformer", 2020."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import Function

from fastgpt.kernels import checks, dispatch, reference
from fastgpt.kernels.autograd import apply, distinct, once_differentiable
from fastgpt.kernels.ops import GELU_EXACT, GELU_TANH, SILU


class _Glu(Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, activation: int) -> Any:
        return dispatch.resolve("glu", gate)(gate, up, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @once_differentiable("swiglu and geglu")
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if _mapped():
            return reference.glu_gradients(dy, gate, up, ctx.activation)
        dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        dispatch.resolve("glu_backward_", gate)(dgate, dup, dy, gate, up, ctx.activation)
        return dgate, dup


class _PackedGlu(Function):
    @staticmethod
    def forward(packed: Tensor, activation: int) -> Any:
        return dispatch.resolve("glu", packed)(*halves(packed), activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        packed, ctx.activation = inputs
        ctx.save_for_backward(packed)

    @staticmethod
    @once_differentiable("swiglu and geglu")
    def backward(ctx: Any, dy: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        if _mapped():
            return (torch.cat(reference.glu_gradients(dy, *halves(packed), ctx.activation), -1),)
        dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format)
        dispatch.resolve("glu_backward_", packed)(*halves(dpacked), dy, *halves(packed), ctx.activation)
        return (dpacked,)


def _mapped() -> bool:
    """Whether vmap is at work, as in jacrev: it does not map over an operator that only writes in place."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(transform.key() == TransformType.Vmap for transform in get_interpreter_stack() or ())


def halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gate and the other factor of a packed ``(..., 2H)``, two views ``(..., H)``."""
    H = packed.shape[-1] // 2
    return packed[..., :H], packed[..., H:]


def _glu(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    checks.floating(gate=gate)
    checks.floating_if_given(up=up)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"gate: expected (..., 2H) without up, got {tuple(gate.shape)}")
        return apply(_PackedGlu, gate, activation)
    checks.same("gate", gate=gate, up=up)
    checks.shape("up", up, tuple(gate.shape))
    return apply(_Glu, gate, distinct(up, gate), activation)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up``, with ``silu(z) = z * sigmoid(z)``.

    Only the product is rounded to the inputs' dtype. The halves of a packed tensor are read where they are, and its
    gradient is written as one tensor, without a concatenation.

    Args:
        gate: any shape and strides, fp32, bf16 or fp16; without ``up`` packed ``(..., 2H)``, the gate first.
        up: shape, dtype and device of ``gate``, or ``None``.

    Returns:
        The shape of ``gate``, or ``(..., H)`` if it is packed; its dtype; contiguous.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``gate``.
        ValueError: a shape or device does not fit, or the last dimension of a packed tensor is odd.
    """
    return _glu(gate, up, SILU)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Return ``gelu(gate) * up``.

    Only the product is rounded to the inputs' dtype. The halves of a packed tensor are read where they are, and its
    gradient is written as one tensor, without a concatenation.

    Args:
        gate: any shape and strides, fp32, bf16 or fp16; without ``up`` packed ``(..., 2H)``, the gate first.
        up: shape, dtype and device of ``gate``, or ``None``.
        approximate: ``"tanh"`` for the approximation by tanh, ``"none"`` for the exact (erf) form.

    Returns:
        The shape of ``gate``, or ``(..., H)`` if it is packed; its dtype; contiguous.

    Raises:
        TypeError: a dtype is not a float or differs from that of ``gate``.
        ValueError: ``approximate`` has another value, a shape or device does not fit, or the last dimension of a packed
            tensor is odd.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate: expected 'tanh' or 'none', got {approximate!r}")
    return _glu(gate, up, GELU_TANH if approximate == "tanh" else GELU_EXACT)
