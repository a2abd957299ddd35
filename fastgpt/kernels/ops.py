"""The seam: every operator's schema and fake, once, and the choice of the backend that runs it.

An operator is declared here in the dispatcher's namespace ``fastgpt::`` and implemented by up to three
backends: ``cpp`` (csrc/, CPU), ``triton`` (NVIDIA GPUs) and ``reference`` (plain PyTorch, any device). The
dispatcher routes by device; :func:`resolve` is what the public functions call, and also honours
``FASTGPT_BACKEND`` and :func:`use_backend`. Triton is imported when an operator first runs on a GPU.

Conventions: B batch, H heads, T sequence, D head size, C width, V vocabulary, N rows. ``lse``, ``mean``,
``rstd`` and losses are fp32 whatever the dtype of the inputs. Every backend of an operator saves the same
tensors for the backward, so a forward on one and a backward on another agree.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import autocast, cpp, reference, slow_path
from fastgpt.kernels.dry_run import stands_for

BACKENDS = ("auto", "triton", "cpp", "reference")

# What the compiled backends take; other dtypes (float64, and float16 on the CPU) run on the reference.
COMPILED_DTYPES = {
    "cpp": frozenset({torch.float32, torch.bfloat16}),
    "triton": frozenset({torch.float32, torch.bfloat16, torch.float16}),
}


@dataclass(frozen=True)
class Operator:
    """``schema`` as the dispatcher writes it; ``fake`` gives the outputs' shapes and strides, no data."""

    schema: str
    fake: Callable[..., Any]


def _row_statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), _row_statistics(x), _row_statistics(x)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _row_statistics(x), _row_statistics(x)


def _layer_norm_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, needs_dbias: bool,
    weight_main_grad: Tensor | None = None, bias_main_grad: Tensor | None = None, dx_sums: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    weight_shape = weight.shape if weight_main_grad is None else (0,)
    bias_shape = weight.shape if needs_dbias and bias_main_grad is None else (0,)
    return x.new_empty(x.shape), weight.new_empty(weight_shape), weight.new_empty(bias_shape)


def _gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, bias_main_grad: Tensor | None = None
) -> tuple[Tensor, ...]:
    bias_shape = (0,) if bias is None or bias_main_grad is not None else bias.shape
    return x.new_empty(x.shape), x.new_empty(bias_shape)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, ...]:
    return reference.empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    return reference.empty_heads(q), reference.empty_heads(k), reference.empty_heads(v)


def _attention_qkv(
    qkv: Tensor, n_head: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, ...]:
    B, T, C3 = qkv.shape
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _attention_qkv_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, ...]:
    return _row_statistics(logits), _row_statistics(logits)


def _cross_entropy_backward(dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, gradient_scale: Tensor | None, needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
    )


OPERATORS: dict[str, Operator] = {
    # out = a @ b + bias and row_sums = a.sum(1); or accumulating out += a @ b and row_sums += a.sum(1). Both may be
    # wider than a and b: fp32.
    "matmul_": Operator(
        "(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool accumulate, Tensor(b!)? row_sums) -> ()",
        lambda out, a, b, bias, accumulate, row_sums: None,
    ),
    # sums += x.sum(0), added up in fp32; sums is fp32
    "add_column_sums_": Operator("(Tensor(a!) sums, Tensor x) -> ()", lambda sums, x: None),
    # main_grad[index] += dy, each sum in fp32 and in an order that depends on index alone: (V, C) fp32, (N, C), (N)
    "embedding_backward_": Operator(
        "(Tensor(a!) main_grad, Tensor dy, Tensor index) -> ()", lambda main_grad, dy, index: None
    ),
    "layer_norm": Operator(
        "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        _layer_norm,
    ),
    "add_layer_norm": Operator(
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
        _add_layer_norm,
    ),
    # A gradient is added to its main_grad (fp32) where there is one, unrounded; an empty tensor is returned for it.
    # dx_sums (fp32) += dx.sum(0) over all rows, dx unrounded.
    "layer_norm_backward": Operator(
        "(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool needs_dbias,"
        " Tensor(a!)? weight_main_grad=None, Tensor(b!)? bias_main_grad=None, Tensor(c!)? dx_sums=None)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        _layer_norm_backward,
    ),
    "gelu": Operator("(Tensor x, Tensor? bias, bool tanh) -> Tensor", lambda x, bias, tanh: x.new_empty(x.shape)),
    "gelu_backward": Operator(
        "(Tensor dy, Tensor x, Tensor? bias, bool tanh, Tensor(a!)? bias_main_grad=None) -> (Tensor dx, Tensor dbias)",
        _gelu_backward,
    ),
    # Turns a contiguous dy into dx, in place; returns the forward's result too, which need not have been kept.
    "gelu_backward_recompute_": Operator(
        "(Tensor(a!) dy, Tensor x, Tensor? bias, bool tanh, Tensor(b!)? bias_main_grad=None)"
        " -> (Tensor y, Tensor dbias)",
        _gelu_backward,
    ),
    "attention": Operator(
        "(Tensor q, Tensor k, Tensor v, bool causal, float scale, float dropout_p, Tensor? seed)"
        " -> (Tensor out, Tensor lse)",
        _attention,
    ),
    # deterministic=False permits sums in an order that no one chose
    "attention_backward": Operator(
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale,"
        " float dropout_p, Tensor? seed, bool deterministic=True) -> (Tensor dq, Tensor dk, Tensor dv)",
        _attention_backward,
    ),
    "attention_qkv": Operator(
        "(Tensor qkv, int n_head, bool causal, float scale, float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)",
        _attention_qkv,
    ),
    "attention_qkv_backward": Operator(
        "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, bool causal, float scale,"
        " float dropout_p, Tensor? seed, bool deterministic=True) -> Tensor",
        _attention_qkv_backward,
    ),
    "cross_entropy": Operator(
        "(Tensor logits, Tensor targets, int ignore_index) -> (Tensor losses, Tensor lse)",
        _cross_entropy,
    ),
    "cross_entropy_backward": Operator(
        "(Tensor dlosses, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
        _cross_entropy_backward,
    ),
    # Turns contiguous logits into the gradient of scale * sum(losses), in place.
    "cross_entropy_": Operator(
        "(Tensor(a!) logits, Tensor targets, Tensor scale, int ignore_index) -> Tensor losses",
        lambda logits, targets, scale, ignore_index: _row_statistics(logits),
    ),
    # The gradients of the mean loss, times the scale (fp32, 0-dim), come with it; one not needed is an empty tensor.
    "linear_cross_entropy": Operator(
        "(Tensor x, Tensor weight, Tensor targets, int ignore_index, Tensor? gradient_scale, bool needs_dx,"
        " bool needs_dweight)"
        " -> (Tensor loss, Tensor dx, Tensor dweight)",
        _linear_cross_entropy,
    ),
    "grad_norm": Operator("(Tensor[] grads) -> Tensor", lambda grads: grads[0].new_empty((), dtype=torch.float32)),
    # step: fp32, lr: fp64, grad_scale: fp32, each 0-dim on the parameters' device, so that a captured
    # CUDA graph reads the current values. copies: bf16 twins that receive the new parameters, or none.
    "adamw_": Operator(
        "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
        " Tensor(e!)[] copies, Tensor step, Tensor lr, Tensor? grad_scale, float beta1, float beta2,"
        " float eps, float weight_decay, bool zero_grad) -> ()",
        lambda *args: None,
    ),
    # The same with moments of 8 bits where there are scales (uint8 codes, and fp32 scales for each 256 elements),
    # and with all that is bf16 rounded stochastically where asked. seed: int64, 0-dim, on the device.
    "adamw_8bit_": Operator(
        "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
        " Tensor(e!)[] exp_avg_scales, Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] copies, Tensor step, Tensor lr,"
        " Tensor? grad_scale, Tensor seed, float beta1, float beta2, float eps, float weight_decay, bool zero_grad,"
        " bool stochastic_rounding) -> ()",
        lambda *args: None,
    ),
}

_library = torch.library.Library("fastgpt", "DEF")
for _name, _operator in OPERATORS.items():
    _library.define(_name + _operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{_name}", _operator.fake, lib=_library)


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register ``function`` as operator ``name`` on one kind of device (``"CPU"``, ``"CUDA"``)."""
    _library.impl(name, function, dispatch_key)


# The operators of fastgpt/kernels/triton/. matmul_ stays with cuBLAS; linear_cross_entropy is made of others.
TRITON_OPERATORS = tuple(name for name in OPERATORS if name not in ("matmul_", "linear_cross_entropy"))


def _on_triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return importlib.import_module("fastgpt.kernels.triton").IMPLEMENTATIONS[name](*args)

    return run


_triton: dict[str, Callable[..., Any]] = {name: _on_triton(name) for name in TRITON_OPERATORS}
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
if _TRITON_INSTALLED:
    for _name, _run in _triton.items():
        implement(_name, "CUDA", _run)

_overloads: dict[str, Any] = {name: getattr(torch.ops.fastgpt, name).default for name in OPERATORS}
_references: dict[str, Callable[..., Any]] = {name: getattr(reference, name) for name in OPERATORS}


def _backend_from_environment() -> str:
    name = os.environ.get("FASTGPT_BACKEND", "auto")
    if name in BACKENDS:
        return name
    warnings.warn(f"FASTGPT_BACKEND={name} is none of {', '.join(BACKENDS)}; using auto", stacklevel=2)
    return "auto"


_choice = _backend_from_environment()
EXTENSION = cpp.load() if _choice in ("auto", "cpp") else cpp.Extension(None, f"FASTGPT_BACKEND={_choice}")

# What a compiled backend leaves to plain PyTorch, and why.
_left_to_torch: dict[str, dict[str, str]] = {
    "triton": {"matmul_": "cuBLAS"},
    "cpp": {"add_column_sums_": "products sum rows on the way"}
    | ({} if EXTENSION.products else {"matmul_": "PyTorch's is faster on this CPU"}),
    "reference": {},
}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on ``name``: ``auto``, ``triton``, ``cpp`` or ``reference``.

    Process-wide, not per thread, because autograd runs backward passes on threads of its own. A tensor
    that a forced backend cannot take (its device or dtype) is a ``RuntimeError`` at the call.

    Raises:
        ValueError: ``name`` is no backend.
    """
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"name: '{name}' is none of {', '.join(BACKENDS)}")
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


def _natural_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The best backend for such tensors, and the reason in a few words."""
    device_type = stands_for(device.type)
    if device_type == "cpu":
        if EXTENSION.library is None:
            return "reference", EXTENSION.reason
        if dtype not in COMPILED_DTYPES["cpp"]:
            return "reference", f"the C++ kernels take float32 and bfloat16, not {dtype}"
        return "cpp", EXTENSION.reason
    if device_type != "cuda":
        return "reference", f"no compiled kernels for {device_type}"
    if device.type == "meta":
        return "triton", "as on an NVIDIA GPU"
    if not _TRITON_INSTALLED:
        return "reference", "Triton is not installed"
    if dtype not in COMPILED_DTYPES["triton"]:
        return "reference", f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    if torch.version.hip is not None:
        return "reference", "no compiled kernels for AMD's GPUs"
    # while compiling it is assumed to be new enough; the kernels' launch says so if it is not
    known = not torch.compiler.is_compiling() and torch.cuda.is_available()
    if known and torch.cuda.get_device_capability(device) < (8, 0):
        return "reference", "the Triton kernels need compute capability 8.0 (Ampere) or newer"
    return "triton", "NVIDIA GPU"


def backend_of(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that an operator on such tensors runs on, and the reason in a few words."""
    device = torch.device(device)
    device_type = stands_for(device.type)
    natural, reason = _natural_backend(device, dtype)
    if _choice in ("auto", natural):
        return natural, reason
    if _choice == "reference":
        return "reference", "chosen"
    if _choice == "triton" and device_type == "cpu" and dtype in COMPILED_DTYPES["triton"] and _interpreted():
        return "triton", "Triton's interpreter"
    if _choice == "triton" and device_type != "cuda":
        reason = "it needs an NVIDIA GPU"
    raise RuntimeError(f"backend '{_choice}' cannot run {dtype} on {device_type}: {reason}")


def _interpreted() -> bool:
    """Whether Triton kernels run on the CPU, one program after the other: very slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve(name: str, tensor: Tensor) -> Callable[..., Any]:
    """The implementation of operator ``name`` for tensors such as ``tensor``."""
    device_type = tensor.device.type
    backend, reason = backend_of(tensor.device, tensor.dtype)
    if backend == "reference" and _choice == "auto" and device_type != "meta":
        slow_path.warn(reason)
    if name == "linear_cross_entropy" and device_type == "cuda":
        function = _overloads[name]  # chunks, whatever each of them runs on: all logits at once may not fit a GPU
    elif backend == "reference" or name in _left_to_torch[backend]:
        function = _references[name]
    elif backend == "triton" and device_type == "cpu":  # interpreted: the dispatcher would take the C++ kernel
        function = _triton.get(name, _overloads[name])
    else:
        function = _overloads[name]
    return autocast.outside(device_type, function) if autocast.enabled(device_type) else function


def backends() -> dict[str, dict[str, str]]:
    """What each operator runs on: ``{device: {operator: "backend (why)"}}`` for float32 tensors."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    table = {}
    for device in devices:
        try:
            backend, reason = backend_of(device, torch.float32)
        except RuntimeError as error:  # another device's backend was chosen
            table[device] = dict.fromkeys(OPERATORS, f"none ({error})")
            continue
        table[device] = dict.fromkeys(OPERATORS, f"{backend} ({reason})")
        table[device] |= {name: f"reference ({why})" for name, why in _left_to_torch[backend].items()}
    return table
