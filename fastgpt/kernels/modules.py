"""The functions as modules with the names, defaults and ``state_dict`` of ``torch.nn``: either loads the other's.

An argument of torch.nn that the kernels do not support, such as ``padding_idx``, is an error in the constructor.
``ignore_index`` is -100 as in torch.nn; the functions default to -1.
"""

from functools import wraps
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.kernels import checks
from fastgpt.kernels.attention import attention_qkv
from fastgpt.kernels.cross_entropy import cross_entropy
from fastgpt.kernels.gelu import gelu
from fastgpt.kernels.glu import geglu, swiglu
from fastgpt.kernels.heads import MAX_HEAD_SIZE
from fastgpt.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt.kernels.linear import embedding, linear
from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt.kernels.relu2 import relu2
from fastgpt.kernels.rms_norm import add_rms_norm, rms_norm
from fastgpt.kernels.rotary import rotary, rotary_tables


class Linear(nn.Linear):
    """``nn.Linear`` on :func:`linear`; gradients are added to a parameter's ``main_grad``, if any."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` on :func:`embedding`; the gradient is added to the weight's ``main_grad``, if any.

    Raises:
        ValueError: ``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """

    @wraps(nn.Embedding.__init__)  # type: ignore[misc]  # its signature, which nn.utils.skip_init looks at
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse("padding_idx", self.padding_idx is not None)
        _refuse("max_norm", self.max_norm is not None)
        _refuse("scale_grad_by_freq", self.scale_grad_by_freq)
        _refuse("sparse", self.sparse)

    def forward(self, input: Tensor) -> Tensor:
        """int64 or int32 of any shape to ``(*input.shape, embedding_dim)``."""
        return embedding(input, self.weight)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, on :func:`layer_norm`.

    Raises:
        ValueError: ``normalized_shape`` has several dimensions.
    """

    @wraps(nn.LayerNorm.__init__)  # type: ignore[misc]  # its signature, which nn.utils.skip_init looks at
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: expected one dimension, got {tuple(self.normalized_shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class AddLayerNorm(LayerNorm):
    """:class:`LayerNorm` fused with the residual add before it, on :func:`add_layer_norm`."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two ``(..., C)`` to the norm of their sum, and the sum."""
        return add_layer_norm(input, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension, on :func:`rms_norm`. It also loads the weight of transformers' norms.

    With ``eps=None``, the default, eps is that of the arithmetic: of fp32, or of fp64 for fp64.

    Raises:
        ValueError: ``normalized_shape`` has several dimensions.
    """

    @wraps(nn.RMSNorm.__init__)  # type: ignore[misc]  # its signature, which nn.utils.skip_init looks at
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: expected one dimension, got {tuple(self.normalized_shape)}")

    def _eps(self, x: Tensor) -> float:
        in_float64 = isinstance(x, Tensor) and x.dtype == torch.float64
        default = torch.finfo(torch.float64 if in_float64 else torch.float32).eps
        return default if self.eps is None else self.eps

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return rms_norm(x, self.weight, self._eps(x))


class AddRMSNorm(RMSNorm):
    """:class:`RMSNorm` fused with the residual add before it, on :func:`add_rms_norm`."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Two ``(..., C)`` to the norm of their sum, and the sum."""
        return add_rms_norm(x, residual, self.weight, self._eps(x))


class GELU(nn.GELU):
    """``nn.GELU`` on :func:`gelu`: exact by default; ``approximate="tanh"`` is GPT-2's form."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return gelu(input, self.approximate)


class ReLU2(nn.Module):
    """The squared ReLU, on :func:`relu2`."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return relu2(input)


class SwiGLU(nn.Module):
    """The gated unit with SiLU, on :func:`swiglu`; the products before and after it are the caller's."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Two tensors of any shape to one, or a packed ``(..., 2H)``, gate first, to ``(..., H)``."""
        return swiglu(gate, up)


class GEGLU(nn.Module):
    """The gated unit with GELU, on :func:`geglu`; the products before and after it are the caller's.

    Args:
        approximate: ``"tanh"`` or ``"none"``, as :func:`geglu` takes it.

    Raises:
        ValueError: ``approximate`` has another value.
    """

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        if approximate not in ("tanh", "none"):
            raise ValueError(f"approximate: expected 'tanh' or 'none', got {approximate!r}")
        self.approximate = approximate

    def extra_repr(self) -> str:
        """The constructor's argument, for ``repr``."""
        return f"approximate={self.approximate!r}"

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Two tensors of any shape to one, or a packed ``(..., 2H)``, gate first, to ``(..., H)``."""
        return geglu(gate, up, self.approximate)


class CausalSelfAttention(nn.Module):
    """Self-attention with a causal mask and the parameters of ``nn.MultiheadAttention``.

    One product computes the queries, keys and values of all heads, :func:`attention_qkv` reads them in place, and one
    product computes the output.

    Args:
        embed_dim: width, C.
        num_heads: number of heads, each of ``embed_dim / num_heads`` elements, at most ``heads.MAX_HEAD_SIZE``.
        dropout: probability of dropping an attention weight in training.
        bias: whether both products have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``num_heads`` does not divide ``embed_dim`` into such heads, or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.size("embed_dim", embed_dim)
        checks.size("num_heads", num_heads)
        checks.heads("num_heads", num_heads, "embed_dim", embed_dim)
        checks.probability("dropout", dropout)
        checks.boolean("bias", bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, **factory)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, **factory)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"bias={self.in_proj_bias is not None}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, C)`` to ``(B, T, C)``."""
        checks.floating(x=x)
        if x.dim() != 3 or 0 in x.shape[1:] or x.shape[2] != self.embed_dim:
            raise ValueError(f"x: expected (B, T, {self.embed_dim}), only B may be 0, got {tuple(x.shape)}")
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attention_qkv(qkv, self.num_heads, dropout_p=self.dropout if self.training else 0.0))


class RotaryEmbedding(nn.Module):
    """The tables of :func:`rotary_tables` as buffers, and :func:`rotary` with them.

    The buffers ``cos`` and ``sin``, ``(n_positions, head_size / 2)``, move with the module, and stay fp32 when it is
    cast by ``.to(torch.bfloat16)`` or ``.half()``. They are not in the ``state_dict``, which is empty, and are
    computed when a module leaves the device ``meta``. The other functions take them too, and for positions that differ
    between sequences there is ``rotary(x, module.cos[positions], module.sin[positions])`` with positions ``(B, T)``.

    Args:
        head_size: D, elements of a head; even, at most ``heads.MAX_HEAD_SIZE``.
        n_positions: the most positions that an input may have.
        base: as in :func:`rotary_tables`.
        interleaved: as in :func:`rotary`.
        device: of the tables.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``head_size`` is odd or too large, or another number is too small.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_size: int,
        n_positions: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        checks.size("head_size", head_size)
        if head_size > MAX_HEAD_SIZE:
            raise ValueError(f"head_size: expected at most {MAX_HEAD_SIZE}, got {head_size}")
        checks.boolean("interleaved", interleaved)
        cos, sin = rotary_tables(n_positions, head_size, base, device=device)
        self.head_size, self.n_positions, self.base, self.interleaved = head_size, n_positions, base, interleaved
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return f"{self.head_size}, n_positions={self.n_positions}, base={self.base}, interleaved={self.interleaved}"

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        """What ``.to()``, ``.half()``, ``to_empty()`` call: the tables change their device, not dtype or contents."""
        before = self.cos, self.sin
        super()._apply(fn, recurse)
        device = self.cos.device
        if before[0].is_meta and device.type != "meta":
            before = rotary_tables(self.n_positions, self.head_size, self.base, device=device)
        self.cos, self.sin = (t.to(device) for t in before)
        return self

    def forward(self, input: Tensor, start: int = 0) -> Tensor:
        """``(B, T, H, D)`` to the same, turned by the angles of the positions from ``start`` on.

        Raises:
            TypeError: ``start`` is not an int.
            ValueError: the shape does not fit, or the positions lie outside of the tables.
        """
        checks.floating(input=input)
        checks.integer("start", start)
        if input.dim() != 4 or input.shape[3] != self.head_size:
            raise ValueError(f"input: expected (B, T, H, {self.head_size}), got {tuple(input.shape)}")
        end = start + input.shape[1]
        if start < 0 or end > self.n_positions:
            raise ValueError(
                f"start: positions {start} to {end - 1} lie outside of the {self.n_positions} of the tables"
            )
        return rotary(input, self.cos[start:end], self.sin[start:end], interleaved=self.interleaved)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` of ``(N, V)`` logits and class indices, on :func:`cross_entropy`.

    Args:
        weight: as in ``nn.CrossEntropyLoss``, like all that follow up to ``label_smoothing``.
        size_average: deprecated.
        ignore_index: marks rows without a target.
        reduce: deprecated.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        softcap: as in :func:`cross_entropy`.
        z_loss: as in :func:`cross_entropy`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a value that makes no loss.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        checks.floating_if_given(weight=weight)
        checks.reduction(reduction)
        checks.loss_options(softcap, z_loss, label_smoothing)
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.softcap, self.z_loss = softcap, z_loss

    def extra_repr(self) -> str:
        """The arguments that torch.nn's does not have, if they are set, for ``repr``."""
        return ", ".join(_set_options(softcap=self.softcap, z_loss=self.z_loss))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``(N, V)`` and ``(N,)`` int64 to an fp32 loss, 0-dim or, with ``reduction="none"``, ``(N,)``."""
        return cross_entropy(
            input, target, self.ignore_index, weight=self.weight, reduction=self.reduction,
            label_smoothing=self.label_smoothing, softcap=self.softcap, z_loss=self.z_loss,
        )  # fmt: skip


class LinearCrossEntropyLoss(nn.Module):
    """An output layer and its loss in one module, on :func:`linear_cross_entropy`: no logits in memory.

    Its ``state_dict`` is that of ``torch.nn.LinearCrossEntropyLoss``: ``linear.weight``, and ``weight`` if there are
    class weights. To tie the layer's weight to a token embedding, set ``loss.linear.weight = embedding.weight``. To get
    logits, before the soft cap, call ``loss.linear``.

    Args:
        in_features: width, C.
        num_classes: size of the vocabulary, V.
        out_features: only ``()``; this and the next are arguments of ``torch.nn.LinearCrossEntropyLoss``.
        bias: only ``False``.
        device: of the output layer's weight.
        dtype: of the output layer's weight.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(V,)`` class weights, or ``None``.
        ignore_index: marks positions without a target; ``None`` for -100.
        label_smoothing: in [0, 1].
        options: only ``None``.
        softcap: as in :func:`cross_entropy`.
        z_loss: as in :func:`cross_entropy`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: ``in_features`` or ``num_classes`` is less than 1, or an argument has a value that is not supported.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        checks.size("in_features", in_features)
        checks.size("num_classes", num_classes)
        _refuse("out_features", out_features != ())
        _refuse("bias", bias)
        _refuse("options", options is not None)
        checks.reduction(reduction)
        checks.loss_options(softcap, z_loss, label_smoothing)
        if weight is not None:
            checks.floating(weight=weight)
            checks.shape("weight", weight, (num_classes,))
        ignore_index = -100 if ignore_index is None else ignore_index
        checks.integer("ignore_index", ignore_index)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.softcap, self.z_loss = softcap, z_loss
        self.linear = Linear(in_features, num_classes, bias=False, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """The arguments that the inner layer does not show, for ``repr``."""
        options = {"label_smoothing": self.label_smoothing, "softcap": self.softcap, "z_loss": self.z_loss}
        reduction = [] if self.reduction == "mean" else [f"reduction={self.reduction}"]
        return ", ".join([f"ignore_index={self.ignore_index}", *reduction, *_set_options(**options)])

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``(..., C)`` and int64 ``(...)`` to an fp32 loss, 0-dim or, with ``reduction="none"``, ``(...)``.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: the last dimension of ``input`` is not C, or ``target`` does not have the shape of the others.
        """
        checks.floating(input=input)
        if input.shape[-1:] != (self.linear.in_features,):
            raise ValueError(f"input: expected (..., {self.linear.in_features}), got {tuple(input.shape)}")
        checks.indices("target", target, input.device)
        checks.shape("target", target, tuple(input.shape[:-1]))
        loss = linear_cross_entropy(
            input.reshape(-1, input.shape[-1]), self.linear.weight, target.reshape(-1), self.ignore_index,
            class_weight=self.weight, reduction=self.reduction, label_smoothing=self.label_smoothing,
            softcap=self.softcap, z_loss=self.z_loss,
        )  # fmt: skip
        return loss.view(target.shape) if self.reduction == "none" else loss


def _set_options(**options: float | None) -> list[str]:
    """``name=value`` of the options that are neither ``None`` nor 0."""
    return [f"{name}={value}" for name, value in options.items() if value]


def _refuse(argument: str, is_set: bool) -> None:
    if is_set:
        raise ValueError(f"{argument}: fastgpt's kernels do not support it; use torch.nn")
