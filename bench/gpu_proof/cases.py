"""The cases: every operator at small shapes, at shapes of more than 2**31 elements, and in place without data.

A case is called with the operators by name, so that a copy with a planted fault can replace an operator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels.triton import IMPLEMENTATIONS, columns

Ops = dict[str, Callable[..., Any]]
Case = Callable[[Ops], Any]

OPS: Ops = IMPLEMENTATIONS | {"sum_of_shares": columns.sum_of_shares}
BF16, FP32, INT64, UINT8 = torch.bfloat16, torch.float32, torch.int64, torch.uint8


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        name: of the case, or of the planted fault.
        expected: the start of the fault that must be found; empty if there must be none.
        found: the fault that was found; empty if there is none.
        note: what was checked.
    """

    name: str
    expected: str
    found: str
    note: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the outcome is as expected."""
        return self.found.startswith(self.expected) if self.expected else not self.found

    @property
    def verdict(self) -> str:
        """The outcome in one word."""
        if self.expected:
            return "found" if self.good else "MISSED"
        return "quiet" if self.good else "FAULT"


# ---- small: every access to every tensor is checked ----


def _random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def _attention(
    ops: Ops, B: int, H: int, T: int, D: int, dtype: torch.dtype = BF16, causal: bool = True, dropout_p: float = 0.0,
    deterministic: bool = True,
) -> None:  # fmt: skip
    qkv, dout = _random(B, T, 3 * H * D, dtype=dtype), _random(B, T, H * D, dtype=dtype)
    options = H, causal, D**-0.5, dropout_p, torch.tensor(7) if dropout_p else None
    out, lse = ops["attention_qkv"](qkv, *options)
    ops["attention_qkv_backward"](dout, qkv, out, lse, *options, deterministic)


def _attention_across(ops: Ops, T: int, S: int, deterministic: bool = True) -> None:
    """From T queries to S keys, which are a view of a wider tensor."""
    q, k, v = _random(1, 2, T, 40), _random(1, 2, S, 64)[..., :40], _random(1, 2, S, 40)
    out, lse = ops["attention"](q, k, v, False, 0.1, 0.0, None)
    ops["attention_backward"](_random(1, 2, T, 40), q, k, v, out, lse, False, 0.1, 0.0, None, deterministic)


def _local_attention(
    ops: Ops, T: int, S: int, D: int, window: int = 0, softcap: float = 0.0, documents: bool = False,
    deterministic: bool = True,
) -> None:  # fmt: skip
    """Of the last T of S positions; four heads of queries read two of keys. Bounds of documents are at random."""
    q, dout, (k, v) = _random(2, 4, T, D), _random(2, 4, T, D), (_random(2, 2, S, D) for _ in range(2))
    bounds = torch.randint(-9, S + 9, (2, 2, S), dtype=torch.int32) if documents else None
    options, scores = (True, D**-0.5, 0.0, None), (window, softcap, bounds)
    out, lse = ops["attention"](q, k, v, *options, *scores)
    ops["attention_backward"](dout, q, k, v, out, lse, *options, deterministic, *scores)


def _layer_norm(ops: Ops, rows: int, C: int) -> None:
    x, dy, weight = _random(rows, C + 8)[:, :C], _random(rows, C), _random(C)
    _, mean, rstd = ops["layer_norm"](x, weight, None, 1e-5)
    ops["layer_norm_backward"](dy, None, x, weight, mean, rstd, False)


def _add_layer_norm(ops: Ops, rows: int, C: int) -> None:
    """With all optional arguments."""
    x, dy, weight, bias = _random(rows, C + 8)[:, :C], _random(rows, C), _random(C), _random(C)
    _, total, mean, rstd = ops["add_layer_norm"](x, _random(rows, C), weight, bias, 1e-5)
    ops["layer_norm_backward"](dy, x, total, weight, mean, rstd, True)
    main_grads = [torch.zeros(C) for _ in range(3)]
    ops["layer_norm_backward"](dy, x, total, weight, mean, rstd, True, *main_grads)


def _rms_norm(ops: Ops, rows: int, C: int) -> None:
    x, dy = _random(rows, C + 8)[:, :C], _random(rows, C)
    _, rstd = ops["rms_norm"](x, None, 1e-6)
    ops["rms_norm_backward"](dy, None, x, None, rstd)


def _add_rms_norm(ops: Ops, rows: int, C: int) -> None:
    """With all optional arguments."""
    x, dy, weight = _random(rows, C + 8)[:, :C], _random(rows, C), _random(C)
    _, total, rstd = ops["add_rms_norm"](x, _random(rows, C), weight, 1e-6)
    ops["rms_norm_backward"](dy, x, total, weight, rstd)
    ops["rms_norm_backward"](dy, x, total, weight, rstd, torch.zeros(C))


def _gelu(ops: Ops, rows: int, C: int, bias: bool, tanh: bool) -> None:
    x, dy, b = _random(rows, C), _random(rows, C), _random(C) if bias else None
    ops["gelu"](x, b, tanh)
    ops["gelu_backward"](dy, x, b, tanh, torch.zeros(C) if bias else None)
    ops["gelu_backward_recompute_"](dy, x, b, tanh)


def _angles(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (..., T, D/2)."""
    angles = torch.rand(*shape)
    return angles.cos(), angles.sin()


def _rotary(ops: Ops, B: int, T: int, H: int, D: int, dtype: torch.dtype = BF16, interleaved: bool = False) -> None:
    """Every operator, on heads that lie in packed tensors or one after the other."""
    x, dy = (
        _random(B, T, (H + 2) * D, dtype=dtype).unflatten(2, (H + 2, D))[:, :, 1:-1],
        _random(B, T, H, D, dtype=dtype),
    )
    weight, main_grad = _random(D, dtype=dtype), torch.zeros(D)
    for turns in (_angles(T, D // 2), _angles(B, T, D // 2), (None, None)):
        _, rstd = ops["rms_norm_rotary"](x, weight, *turns, 1e-6, interleaved)
        ops["rms_norm_rotary_backward"](dy, x, weight, *turns, rstd, interleaved, main_grad)
        ops["rms_norm_rotary_backward"](
            dy.transpose(1, 2).contiguous().transpose(1, 2), x, None, *turns, rstd, interleaved
        )
        ops["rms_norm_rotary_backward_"](dy, x, *turns, rstd, interleaved)
        ops["rms_norm_rotary_"](x, *turns, 1e-6, interleaved)
    cos, sin = _angles(T, D // 2)
    ops["rotary"](x, cos, sin, interleaved, False)
    ops["rotary_"](x, cos, sin, interleaved, True)


def _rotary_qkv(ops: Ops, B: int, T: int, heads: tuple[int, int], D: int, qk_norm: bool, interleaved: bool) -> None:
    n_head, n_kv_head = heads
    qkv, dout = _random(B, T, (n_head + 2 * n_kv_head) * D), _random(B, T, (n_head + 2 * n_kv_head) * D + 8)[..., :-8]
    turns = _angles(T, D // 2)
    out, rstd = ops["rotary_qkv"](qkv, *heads, *turns, qk_norm, 1e-6, interleaved)
    result = (out, rstd) if qk_norm else (None, None)
    ops["rotary_qkv_backward"](dout, *result, *heads, *turns, interleaved)


def _relu2(ops: Ops, rows: int, C: int) -> None:
    x, dy = _random(rows, C), _random(rows, C)
    ops["relu2"](x)
    ops["relu2_backward"](dy, x)
    ops["relu2_backward_recompute_"](dy, x)


def _glu(ops: Ops, rows: int, C: int, packed: bool) -> None:
    """Of halves of a packed tensor, with their gradients likewise; or of two tensors."""
    gate, up = _random(rows, 2 * C).split(C, -1) if packed else (_random(rows, C), _random(rows, C))
    dgate, dup = _random(rows, 2 * C).split(C, -1) if packed else (_random(rows, C), _random(rows, C))
    for activation in range(3):
        y = ops["glu"](gate, up, activation)
        ops["glu_backward_"](dgate, dup, _random(rows, C), gate, up, activation)
        ops["glu_backward_"](dgate, dup, _random(rows, C), gate, up, activation, y)


def _column_sums(ops: Ops, rows: int, C: int) -> None:
    ops["add_column_sums_"](torch.zeros(C), _random(rows, C + 8)[:, :C])


def _embedding(ops: Ops, rows: int, C: int) -> None:
    """Half of the rows have the same token, so that its run fills whole blocks."""
    tokens = torch.randint(0, 9, (rows,))
    tokens[: rows // 2] = 4
    ops["embedding_backward_"](torch.zeros(9, C), _random(rows, C), tokens)


def _cross_entropy(ops: Ops, rows: int, V: int, dtype: torch.dtype = BF16) -> None:
    logits, targets = _random(rows, V + 3, dtype=dtype)[:, :V], torch.randint(0, V, (rows,))
    targets[0] = -1
    _, lse = ops["cross_entropy"](logits, targets, -1)
    ops["cross_entropy_backward"](torch.ones(()).expand(rows), logits, targets, lse, -1)
    ops["cross_entropy_"](_random(rows, V, dtype=dtype), targets, torch.tensor(0.5), -1)


def _cross_entropy_with_options(ops: Ops, rows: int, V: int, weighted: bool) -> None:
    logits, targets = _random(rows, V + 3)[:, :V], torch.randint(0, V, (rows,))
    targets[0] = -1
    options = 30.0, 1e-4, 0.1, torch.rand(2 * V)[::2] if weighted else None
    _, lse = ops["cross_entropy"](logits, targets, -1, *options)
    ops["cross_entropy_backward"](torch.ones(()).expand(rows), logits, targets, lse, -1, *options)
    ops["cross_entropy_"](_random(rows, V), targets, torch.rand(2 * rows)[::2], -1, *options)


def _adamw(ops: Ops, sizes: tuple[int, ...], grad_dtype: torch.dtype = FP32) -> None:
    params, grads, exp_avgs, exp_avg_sqs, copies = (
        [torch.rand(size).to(dtype) for size in sizes] for dtype in (FP32, grad_dtype, FP32, FP32, BF16)
    )
    norm = ops["grad_norm"](grads)
    ops["adamw_"](
        params, grads, exp_avgs, exp_avg_sqs, copies, torch.tensor(1.0), torch.tensor(1e-3), norm,
        0.9, 0.95, 1e-8, 0.1, True, torch.tensor(0.0),
    )  # fmt: skip


def _adamw_8bit(ops: Ops, sizes: tuple[int, ...], coded: bool) -> None:
    moments = UINT8 if coded else BF16
    params, grads, exp_avgs, exp_avg_sqs, copies = (
        [torch.rand(size).to(dtype) for size in sizes] for dtype in (BF16, BF16, moments, moments, BF16)
    )
    scales = [[torch.ones(-(-size // 256)) for size in sizes if coded] for _ in range(2)]
    ops["adamw_8bit_"](
        params, grads, exp_avgs, exp_avg_sqs, *scales, copies, torch.tensor(1.0), torch.tensor(1e-3),
        torch.tensor(1.0), torch.tensor(3), 0.9, 0.95, 1e-8, 0.1, True, True, torch.tensor(0.0),
    )  # fmt: skip


def _sum_of_shares(ops: Ops) -> None:
    ops["sum_of_shares"](_random(2, 3, 70, dtype=FP32), FP32, [None, None])


SMALL: dict[str, Case] = {
    "attention bf16 D64": partial(_attention, B=2, H=2, T=150, D=64),
    "attention bf16 D48 full": partial(_attention, B=1, H=2, T=77, D=48, causal=False),
    "attention bf16 D128 dropout": partial(_attention, B=1, H=2, T=70, D=128, dropout_p=0.1),
    "attention fp32 D32": partial(_attention, B=1, H=2, T=70, D=32, dtype=FP32),
    "attention across, views": partial(_attention_across, T=33, S=145),
    "attention single pass": partial(_attention, B=2, H=2, T=150, D=64, deterministic=False),
    "attention single pass, dropout": partial(_attention, B=1, H=1, T=70, D=128, dropout_p=0.1, deterministic=False),
    "attention single pass, fp32": partial(_attention, B=1, H=2, T=70, D=32, dtype=FP32, deterministic=False),
    "attention single pass, across": partial(_attention_across, T=77, S=145, deterministic=False),
    "attention, shared keys": partial(_local_attention, T=70, S=70, D=64),
    "attention, window": partial(_local_attention, T=150, S=150, D=64, window=40),
    "attention, documents": partial(_local_attention, T=77, S=145, D=64, documents=True, softcap=5.0),
    "attention single pass, window": partial(_local_attention, T=77, S=145, D=64, window=40, deterministic=False),
    "attention single pass, documents": partial(
        _local_attention, T=150, S=150, D=64, documents=True, softcap=5.0, deterministic=False
    ),
    "layer_norm C100": partial(_layer_norm, rows=70, C=100),
    "add_layer_norm C96": partial(_add_layer_norm, rows=37, C=96),
    "add_layer_norm C768": partial(_add_layer_norm, rows=19, C=768),
    "rms_norm C100": partial(_rms_norm, rows=70, C=100),
    "add_rms_norm C96": partial(_add_rms_norm, rows=37, C=96),
    "add_rms_norm C768": partial(_add_rms_norm, rows=19, C=768),
    "gelu": partial(_gelu, rows=7, C=301, bias=False, tanh=True),
    "gelu exact": partial(_gelu, rows=4, C=512, bias=False, tanh=False),
    "gelu bias": partial(_gelu, rows=150, C=301, bias=True, tanh=True),
    "rotary D64": partial(_rotary, B=2, T=9, H=6, D=64),
    "rotary D34 interleaved": partial(_rotary, B=1, T=7, H=3, D=34, interleaved=True),
    "rotary fp32 D2": partial(_rotary, B=2, T=5, H=1, D=2, dtype=FP32),
    "rotary D256 interleaved": partial(_rotary, B=1, T=3, H=2, D=256, interleaved=True),
    "rotary_qkv": partial(_rotary_qkv, B=2, T=9, heads=(3, 3), D=34, qk_norm=False, interleaved=False),
    "rotary_qkv normed": partial(_rotary_qkv, B=2, T=7, heads=(6, 2), D=32, qk_norm=True, interleaved=True),
    "relu2": partial(_relu2, rows=7, C=301),
    "glu": partial(_glu, rows=7, C=301, packed=False),
    "glu packed": partial(_glu, rows=7, C=1301, packed=True),
    "linear bias": partial(_column_sums, rows=150, C=301),
    "linear bias, few rows": partial(_column_sums, rows=13, C=301),
    "embedding": partial(_embedding, rows=170, C=301),
    "cross_entropy V65": partial(_cross_entropy, rows=5, V=65),
    "cross_entropy V9000": partial(_cross_entropy, rows=3, V=9000),
    "cross_entropy fp32 V4096": partial(_cross_entropy, rows=3, V=4096, dtype=FP32),
    "cross_entropy options": partial(_cross_entropy_with_options, rows=5, V=65, weighted=False),
    "cross_entropy options, weights": partial(_cross_entropy_with_options, rows=3, V=9000, weighted=True),
    "adamw": partial(_adamw, sizes=(3000, 17, 4096)),
    "adamw aligned": partial(_adamw, sizes=(2048, 4112), grad_dtype=BF16),
    "adamw_8bit 8 bits": partial(_adamw_8bit, sizes=(1500, 300), coded=True),
    "adamw_8bit bf16": partial(_adamw_8bit, sizes=(1024, 2064), coded=False),
    "sum_of_shares": _sum_of_shares,
}


# ---- large: a sample of the programs runs, on memory that is reserved but never touched ----


def _untouched(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _large_attention(ops: Ops) -> None:
    B = 2**31 // (16 * 64) + 5
    qkv, lse = _untouched(B, 16, 3 * 64), _untouched(B, 1, 16, dtype=FP32)
    out, _ = ops["attention_qkv"](qkv, 1, True, 0.125, 0.0, None)
    for deterministic in (True, False):
        ops["attention_qkv_backward"](out, qkv, out, lse, 1, True, 0.125, 0.0, None, deterministic)


def _wide_attention(ops: Ops) -> None:
    """Positions with the largest distance for which no copy is made."""
    q = _untouched(1, 400, 1, 2**23 - 16)[..., :64].transpose(1, 2)
    out, lse = ops["attention"](q, q, q, True, 0.125, 0.0, None)
    for deterministic in (True, False):
        ops["attention_backward"](out, q, q, q, out, lse, True, 0.125, 0.0, None, deterministic)


def _large_layer_norm(ops: Ops) -> None:
    rows, C = 2**31 // 8192 + 9, 8192
    x, weight, each = _untouched(rows, C), _untouched(C), _untouched(rows, dtype=FP32)
    ops["add_layer_norm"](x, x, weight, weight, 1e-5)
    ops["layer_norm_backward"](x, x, x, weight, each, each, True)


def _large_rms_norm(ops: Ops) -> None:
    rows, C = 2**31 // 8192 + 9, 8192
    x, weight, each = _untouched(rows, C), _untouched(C), _untouched(rows, dtype=FP32)
    ops["add_rms_norm"](x, x, weight, 1e-6)
    ops["rms_norm_backward"](x, x, x, weight, each)


def _far_rows(ops: Ops) -> None:
    """Few rows, 2**29 elements apart."""
    x, weight, each = _untouched(9, 2**29)[:, :64], _untouched(64), _untouched(9, dtype=FP32)
    ops["layer_norm"](x, weight, weight, 1e-5)
    ops["layer_norm_backward"](x, x, x, weight, each, each, True)
    ops["rms_norm"](x, weight, 1e-6)
    ops["rms_norm_backward"](x, x, x, weight, each)
    ops["glu"](x, x, 0)
    ops["glu_backward_"](_untouched(9, 2**29)[:, :64], _untouched(9, 2**29)[:, :64], x, x, x, 0)
    ops["gelu"](x, weight, True)
    ops["gelu_backward"](x, x, weight, True)
    ops["add_column_sums_"](torch.zeros(64), x)
    ops["embedding_backward_"](torch.zeros(9, 64), x, torch.arange(9))
    ops["cross_entropy"](x, torch.zeros(9, dtype=INT64), -1)


def _large_gelu(ops: Ops) -> None:
    x = _untouched(2**31 + 5)
    ops["gelu"](x, None, True)
    ops["gelu_backward_recompute_"](x, x, None, False)


def _large_relu2(ops: Ops) -> None:
    x = _untouched(2**31 + 5)
    ops["relu2"](x)
    ops["relu2_backward_recompute_"](x, x)


def _large_glu(ops: Ops) -> None:
    """A long row, and many short ones."""
    for packed in (_untouched(2 * (2**31 + 5)), _untouched(2**15 + 3, 2**17)):
        H = packed.shape[-1] // 2
        halves, y = packed.split(H, -1), _untouched(*packed.shape[:-1], H)
        ops["glu"](*halves, 0)
        ops["glu_backward_"](*_untouched(*packed.shape).split(H, -1), y, *halves, 0)


def _large_bias(ops: Ops) -> None:
    x, bias = _untouched(2**17, 2**14 + 1), _untouched(2**14 + 1)
    ops["gelu"](x, bias, True)
    ops["gelu_backward_recompute_"](x, x, bias, True)
    ops["add_column_sums_"](torch.zeros(2**14 + 1), x)


def _tall_gelu(ops: Ops) -> None:
    """256 sequences of 1024."""
    ops["gelu"](_untouched(2**18, 64), _untouched(64), True)


def _large_rotary(ops: Ops) -> None:
    B, T, H, D = 2**31 // (1024 * 8 * 256) + 3, 1024, 8, 256
    x, weight, angles = _untouched(B, T, H, D), _untouched(D), [_untouched(B, T, D // 2, dtype=FP32)] * 2
    _, rstd = ops["rms_norm_rotary"](x, weight, *angles, 1e-6, False)
    ops["rms_norm_rotary_backward"](x, x, None, *angles, rstd, False)  # a weight's many shares would take minutes
    ops["rms_norm_rotary_backward_"](x, x, *angles, rstd, True)
    ops["rotary_"](x, *angles, True, False)


def _far_heads(ops: Ops) -> None:
    """Sequences, positions, heads or the elements of a head far apart."""
    shape, angles = (3, 5, 2, 8), [_untouched(5, 4, dtype=FP32)] * 2
    for d, far in enumerate((2**30, 2**29, 2**31, 2**29)):
        strides = [far if i == d else stride for i, stride in enumerate((80, 16, 8, 1))]
        x = _untouched((shape[d] - 1) * far + 240).as_strided(shape, strides)
        _, rstd = ops["rms_norm_rotary"](x, None, *angles, 1e-6, d % 2 > 0)
        ops["rms_norm_rotary_backward"](x, x, None, *angles, rstd, d % 2 > 0)


def _large_embedding(ops: Ops) -> None:
    rows, C = 2**31 // 8192 + 9, 8192
    ops["embedding_backward_"](_untouched(rows, C, dtype=FP32), _untouched(rows, C), torch.arange(rows))


def _large_cross_entropy(ops: Ops) -> None:
    V = 50304
    rows = 2**31 // V + 3
    logits, targets, each = _untouched(rows, V), torch.full((rows,), V - 1), _untouched(rows, dtype=FP32)
    ops["cross_entropy"](logits, targets, -1)
    ops["cross_entropy_backward"](each, logits, targets, each, -1)
    ops["cross_entropy_"](logits, targets, torch.tensor(0.5), -1)


def _large_cross_entropy_with_options(ops: Ops) -> None:
    """The scale of each row lies far from the next one's."""
    V = 50304
    rows = 2**31 // V + 3
    logits, targets, each = _untouched(rows, V), torch.full((rows,), V - 1), _untouched(rows, dtype=FP32)
    far = _untouched(rows, 2**31 // rows + 1, dtype=FP32)[:, 0]
    options = 30.0, 1e-4, 0.1, _untouched(V, dtype=FP32)
    ops["cross_entropy"](logits, targets, -1, *options)
    ops["cross_entropy_backward"](far, logits, targets, each, -1, *options)
    ops["cross_entropy_"](logits, targets, far, -1, *options)


def _large_adamw(ops: Ops) -> None:
    n, scalar = 2**31 + 4099, torch.tensor(1.0)
    lists = [[_untouched(n, dtype=dtype)] for dtype in (FP32, BF16, BF16, BF16, BF16)]
    ops["grad_norm"](lists[1])
    ops["adamw_"](*lists, scalar, scalar, scalar, 0.9, 0.95, 1e-8, 0.1, True)


def _large_adamw_8bit(ops: Ops) -> None:
    n, scalar = 2**31 + 4099, torch.tensor(1.0)
    lists = [[_untouched(n, dtype=dtype)] for dtype in (BF16, BF16, UINT8, UINT8)]
    scales = [[_untouched(-(-n // 256), dtype=FP32)] for _ in range(2)]
    ops["adamw_8bit_"](*lists, *scales, [], scalar, scalar, scalar, torch.tensor(3), 0.9, 0.95, 1e-8, 0.1, True, True)


LARGE: dict[str, Case] = {
    "attention, 2**31 elements": _large_attention,
    "attention, positions 2**23 - 16 apart": _wide_attention,
    "layer_norm, 2**31 elements": _large_layer_norm,
    "rms_norm, 2**31 elements": _large_rms_norm,
    "all that take rows, far apart": _far_rows,
    "gelu, 2**31 elements": _large_gelu,
    "relu2, 2**31 elements": _large_relu2,
    "glu, 2**31 elements": _large_glu,
    "gelu and linear bias, 2**31 elements": _large_bias,
    "gelu bias, 2**18 rows": _tall_gelu,
    "rotary, 2**31 elements": _large_rotary,
    "rotary, far apart": _far_heads,
    "embedding, 2**31 elements": _large_embedding,
    "cross_entropy, 2**31 elements": _large_cross_entropy,
    "cross_entropy options, 2**31 elements": _large_cross_entropy_with_options,
    "adamw, 2**31 elements": _large_adamw,
    "adamw_8bit, 2**31 elements": _large_adamw_8bit,
}


# ---- in place: these are compiled, for tensors without data ----


def _no_data(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cross_entropy_in_place(ops: Ops, V: int, dtype: torch.dtype) -> None:
    ops["cross_entropy_"](_no_data(64, V, dtype=dtype), _no_data(64, dtype=INT64), _no_data(dtype=FP32), -1)


def _options_in_place(ops: Ops, V: int, weighted: bool) -> None:
    options = 30.0, 1e-4, 0.1, _no_data(V, dtype=FP32) if weighted else None
    ops["cross_entropy_"](_no_data(64, V), _no_data(64, dtype=INT64), _no_data(64, dtype=FP32), -1, *options)


def _gelu_in_place(ops: Ops, rows: int, C: int, bias: bool) -> None:
    dy, x = _no_data(rows, C), _no_data(rows, C)
    main_grad = _no_data(C, dtype=FP32) if bias else None
    ops["gelu_backward_recompute_"](dy, x, _no_data(C) if bias else None, True, main_grad)


def _rotary_in_place(ops: Ops, D: int, dtype: torch.dtype, interleaved: bool, turns: bool) -> None:
    heads = _no_data(2, 64, 9 * D, dtype=dtype).unflatten(2, (9, D))[:, :, :6]
    angles = [_no_data(64, D // 2, dtype=FP32)] * 2 if turns else [None, None]
    rstd = ops["rms_norm_rotary_"](heads, *angles, 1e-6, interleaved)
    ops["rms_norm_rotary_backward_"](heads, _no_data(2, 64, 6, D, dtype=dtype), *angles, rstd, interleaved)
    if turns:
        ops["rotary_"](heads, *angles, interleaved, False)


def _relu2_in_place(ops: Ops, C: int) -> None:
    ops["relu2_backward_recompute_"](_no_data(64, C), _no_data(64, C))


def _sums_in_place(ops: Ops, rows: int, C: int) -> None:
    ops["add_column_sums_"](_no_data(C, dtype=FP32), _no_data(rows, C))


def _embedding_in_place(ops: Ops, C: int) -> None:
    ops["embedding_backward_"](_no_data(50304, C, dtype=FP32), _no_data(512, C), _no_data(512, dtype=INT64))


def _adamw_in_place(ops: Ops, n: int, param: torch.dtype, grad: torch.dtype, copy: bool) -> None:
    """With moments in the parameter's dtype."""
    lists = [[_no_data(n, dtype=dtype)] for dtype in (param, grad, param, param)]
    scalar = _no_data(dtype=FP32)
    ops["adamw_"](*lists, [_no_data(n)] if copy else [], scalar, scalar, scalar, 0.9, 0.95, 1e-8, 0.1, True, scalar)


def _compact_in_place(ops: Ops, n: int, param: torch.dtype, grad: torch.dtype, moment: torch.dtype) -> None:
    """With a bf16 copy of fp32 parameters."""
    lists = [[_no_data(n, dtype=dtype)] for dtype in (param, grad, moment, moment)]
    scales = [[_no_data(-(-n // 256), dtype=FP32)] if moment == UINT8 else [] for _ in range(2)]
    scalar, copies = _no_data(dtype=FP32), [_no_data(n)] if param == FP32 else []
    ops["adamw_8bit_"](
        *lists, *scales, copies, scalar, scalar, scalar, _no_data(dtype=INT64), 0.9, 0.95, 1e-8, 0.1, True, True,
        scalar,
    )  # fmt: skip


def _named(word: str, run: Callable[..., None], *choices: dict[str, Any]) -> dict[str, Case]:
    return {f"{word} {' '.join(str(v).removeprefix('torch.') for v in c.values())}": partial(run, **c) for c in choices}


SIZES = (4096, 4099)  # aligned to 16 bytes, and not
IN_PLACE: dict[str, Case] = {
    **_named(
        "cross_entropy", _cross_entropy_in_place,
        *({"V": V, "dtype": dtype} for V in (65, 9000, 50304) for dtype in (BF16, FP32)),
    ),
    **_named(
        "cross_entropy options", _options_in_place,
        *({"V": V, "weighted": weighted} for V in (65, 50304) for weighted in (False, True)),
    ),
    **_named(
        "gelu", _gelu_in_place,
        *({"rows": 64, "C": C, "bias": bias} for C in (3072, 301) for bias in (True, False)),
    ),
    **_named(
        "rotary", _rotary_in_place,
        *(
            {"D": D, "dtype": dtype, "interleaved": interleaved, "turns": turns}
            for D, dtype, interleaved, turns in (
                (34, BF16, False, True), (34, BF16, True, True), (64, BF16, False, True), (64, BF16, True, True),
                (64, BF16, False, False), (128, FP32, False, True), (256, FP32, True, True),
            )
        ),
    ),
    **_named("relu2", _relu2_in_place, {"C": 3072}, {"C": 301}),
    **_named("linear bias", _sums_in_place, *({"rows": rows, "C": C} for rows in (8, 512) for C in (768, 301))),
    **_named("embedding", _embedding_in_place, {"C": 768}, {"C": 301}),
    **_named(
        "adamw", _adamw_in_place,
        *(
            {"n": n, "param": param, "grad": grad, "copy": copy}
            for n in SIZES
            for param, grad, copy in (
                (FP32, FP32, True), (FP32, BF16, True), (FP32, FP32, False), (BF16, BF16, False), (BF16, FP32, False),
            )
        ),
    ),
    **_named(
        "adamw_8bit", _compact_in_place,
        *(
            {"n": n, "param": param, "grad": grad, "moment": moment}
            for n in SIZES
            for param, grad, moment in (
                (BF16, BF16, UINT8), (FP32, FP32, UINT8), (FP32, BF16, BF16), (BF16, FP32, BF16), (BF16, BF16, BF16),
            )
        ),
    ),
}  # fmt: skip
