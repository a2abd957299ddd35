"""The ops of ``bench.kernels``: their inputs, their work in FLOPs or bytes, and their contenders.

Shapes are those of GPT-2 124M. Work is the least that an implementation must do, so a share of the ceiling can be read
as the distance to the best possible kernel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fastgpt.kernels as ours

Function = Callable[..., Any]

SDPA = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


@dataclass(frozen=True)
class Setting:
    """Device, dtype and shapes, which all ops share: GPT-2 124M's, except for the batch. Also draws the tensors.

    The model of the optimizer may have fewer layers, ``L``, and a smaller vocabulary, ``V``.
    """

    device: torch.device
    dtype: torch.dtype
    B: int
    T: int = 1024
    C: int = 768
    H: int = 12
    V: int = 50304
    adamw_L: int = 12
    adamw_V: int = 50304

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.draw(*shape).mul_(scale).requires_grad_()

    def targets(self) -> Tensor:
        return torch.randint(self.V, (self.B * self.T,), device=self.device)


@dataclass(frozen=True)
class Contender:
    """One way to do an op's work.

    Attributes:
        name: starts with "fastgpt" if it is ours.
        function: takes the op's inputs, returns one or more tensors.
        whole: whether it does all of the work. If not, it is timed, but not checked and not a peer.
        main_grad: the tensor with the gradient that autograd does not return, if any.
    """

    name: str
    function: Function
    whole: bool = True
    main_grad: Tensor | None = None


@dataclass(frozen=True)
class Op:
    """An op at one shape.

    Attributes:
        inputs: leaves; each of them gets a gradient. An optimizer has none and uses its own operands.
        douts: gradients of the outputs; ``None`` for a loss.
        contenders: the first is the kernel that the others are compared with.
        eager: the contender that gives the true results; its error at the operands' dtype sets the limit for others.
        work: FLOPs or bytes by pass: ``fwd`` without gradients, ``fwd+bwd``, or ``step`` of an optimizer.
        unit: ``FLOP/s`` or ``B/s``, the unit of work divided by time.
        random: contenders draw random numbers, so their results cannot be compared.
        before: restores operands that a call changes.
    """

    inputs: list[Tensor]
    douts: list[Tensor | None]
    contenders: list[Contender]
    eager: str
    work: dict[str, float]
    unit: str
    random: bool = False
    before: Callable[[], object] = lambda: None


# ---- the ops ----


def sdpa(backend: str, dropout_p: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def sdpa_peers(dropout_p: float = 0.0) -> dict[str, Function]:
    return {"sdpa " + name.split("_")[0].lower(): partial(sdpa, name, dropout_p) for name in SDPA}


def attention_work(s: Setting) -> dict[str, float]:
    """Two products of 2 B T T C FLOPs forward and five backward, half of each above the diagonal."""
    forward = 2.0 * s.B * s.T * s.T * s.C
    return {"fwd": forward, "fwd+bwd": 3.5 * forward}


def attention_qkv(s: Setting, head_size: int = 64, dropout_p: float = 0.0) -> Op:
    """From the packed output of one linear layer, (B, T, 3C), to the input of the next, (B, T, C), as in nanoGPT."""
    n_head = s.C // head_size

    def unpacked(attend: Function, qkv: Tensor) -> Tensor:
        q, k, v = (t.view(s.B, s.T, n_head, head_size).transpose(1, 2) for t in qkv.split(s.C, dim=2))
        return attend(q, k, v).transpose(1, 2).contiguous().view(s.B, s.T, s.C)

    packed = partial(ours.attention_qkv, n_head=n_head, dropout_p=dropout_p)
    on_views = partial(unpacked, partial(ours.attention, dropout_p=dropout_p))
    contenders = [Contender("fastgpt attention_qkv", packed), Contender("fastgpt attention", on_views)]
    if s.device.type == "cuda":  # a CPU has no other backward
        contenders.append(Contender("fastgpt single pass", partial(packed, deterministic=False)))
    contenders += [Contender(name, partial(unpacked, attend)) for name, attend in sdpa_peers(dropout_p).items()]
    inputs, dout = [s.leaf(s.B, s.T, 3 * s.C)], s.draw(s.B, s.T, s.C)
    return Op(inputs, [dout], contenders, "sdpa math", attention_work(s), "FLOP/s", random=dropout_p > 0.0)


def attention(s: Setting) -> Op:
    """Three tensors (B, H, T, D) in, one out, in the layout that the contender chooses."""
    shape = (s.B, s.H, s.T, s.C // s.H)
    peers = [Contender(name, attend) for name, attend in sdpa_peers().items()]
    contenders = [Contender("fastgpt", ours.attention), *peers]
    inputs = [s.leaf(*shape) for _ in range(3)]
    return Op(inputs, [s.draw(*shape)], contenders, "sdpa math", attention_work(s), "FLOP/s")


def local_attention(
    s: Setting, head_size: int = 64, group: int = 1, window: int | None = None, documents: int | None = None,
    softcap: float | None = None,
) -> Op:  # fmt: skip
    """Three tensors in, one out; ``group`` heads read one of keys, and ``documents`` of that length lie side by side.

    The peers get the mask that says the same: SDPA as booleans, FlexAttention as blocks that it leaves out.
    """
    H, positions = s.C // head_size, torch.arange(s.T, device=s.device)
    group = math.gcd(group, H)  # of a small model fewer
    starts = None if documents is None else (positions // documents * documents).int().expand(s.B, s.T)
    distance = positions[:, None] - positions
    mask = (distance >= 0) & (distance < (window or s.T))
    if documents is not None:
        mask &= positions[:, None] // documents == positions // documents
    hides = window is not None or documents is not None

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & mask[query, key]

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * head_size**-0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v

    blocks = create_block_mask(sees, None, None, s.T, s.T, device=str(s.device))
    score = None if softcap is None else capped
    compiled = partial(torch.compile(flex_attention), score_mod=score, block_mask=blocks, enable_gqa=group > 1)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # on a CPU it has no backward, and refuses tensors that ask for one
            q, k, v = (t.detach() for t in (q, k, v))
        return compiled(q, k, v)

    contenders = [
        Contender("fastgpt", partial(ours.attention, window=window, documents=starts, softcap=softcap)),
        Contender("eager", eager),
        Contender("torch.compile", torch.compile(eager)),
        Contender("flex_attention", flex),
    ]
    if softcap is None:
        masked = {"attn_mask": mask} if hides else {"is_causal": True}
        plain = partial(F.scaled_dot_product_attention, **masked, enable_gqa=group > 1)
        contenders.append(Contender("sdpa", plain))
    inputs = [s.leaf(s.B, h, s.T, head_size) for h in (H, H // group, H // group)]
    forward = 4.0 * s.B * s.C * mask.sum().item()
    work = {"fwd": forward, "fwd+bwd": 3.5 * forward}
    return Op(inputs, [s.draw(s.B, H, s.T, head_size)], contenders, "eager", work, "FLOP/s")


def against_eager(
    kernel: Function, eager: Function, inputs: list[Tensor], douts: list[Tensor | None], forward: float, backward: float
) -> Op:
    """An op bound by memory. ``forward``, ``backward``: tensors of the first input's size that are read or written."""
    compiled = torch.compile(eager, dynamic=False)
    contenders = [Contender("fastgpt", kernel), Contender("eager", eager), Contender("torch.compile", compiled)]
    size = float(inputs[0].numel() * inputs[0].element_size())
    work = {"fwd": forward * size, "fwd+bwd": (forward + backward) * size}
    return Op(inputs, douts, contenders, "eager", work, "B/s")


def layer_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), weight, bias)

    inputs = [s.leaf(B, T, C), s.leaf(C), s.leaf(C)]
    return against_eager(ours.layer_norm, eager, inputs, [s.draw(B, T, C)], 2, 3)


def add_layer_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (C,), weight, bias), total

    inputs = [s.leaf(B, T, C), s.leaf(B, T, C), s.leaf(C), s.leaf(C)]
    return against_eager(ours.add_layer_norm, eager, inputs, [s.draw(B, T, C), s.draw(B, T, C)], 4, 4)


def rms_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (C,), weight, 1e-6)

    return against_eager(ours.rms_norm, eager, [s.leaf(B, T, C), s.leaf(C)], [s.draw(B, T, C)], 2, 3)


def add_rms_norm(s: Setting) -> Op:
    B, T, C = s.B, s.T, s.C

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (C,), weight, 1e-6), total

    inputs = [s.leaf(B, T, C), s.leaf(B, T, C), s.leaf(C)]
    return against_eager(ours.add_rms_norm, eager, inputs, [s.draw(B, T, C), s.draw(B, T, C)], 4, 4)


def gelu(s: Setting, with_bias: bool = False) -> Op:
    shape = (s.B, s.T, 4 * s.C)

    def kernel(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ours.gelu(x, bias=bias)

    def eager(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate="tanh")

    inputs = [s.leaf(*shape)] + ([s.leaf(shape[-1])] if with_bias else [])
    return against_eager(kernel, eager, inputs, [s.draw(*shape)], 2, 3)


def mean_loss(
    logits: Tensor, targets: Tensor, softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """The mean loss, as under autocast, which widens logits of half precision."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if softcap:
        wide = softcap * (wide / softcap).tanh()
    loss = F.cross_entropy(wide, targets, ignore_index=-1, label_smoothing=label_smoothing)
    return loss + z_loss * wide.logsumexp(-1).square().mean() if z_loss else loss  # no target is -1


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation as in transformers' Llama, with cosines and sines of the width of a head, in the dtype of ``x``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def rotary(s: Setting, qk_norm: bool = False) -> Op:
    """Queries and keys, (B, T, H, D), with ``qk_norm`` each head normalised and weighted first, as in Qwen3."""
    D = s.C // s.H
    cos, sin = ours.rotary_tables(s.T, D, device=s.device)
    twice = [torch.cat((t, t), dim=-1).unsqueeze(1) for t in (cos, sin)]  # (T, 1, D)

    def kernel(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if weights:
            return tuple(ours.rms_norm_rotary(x, cos, sin, w) for x, w in zip((q, k), weights, strict=True))
        return ours.rotary(q, cos, sin), ours.rotary(k, cos, sin)

    def eager(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if weights:
            q, k = (F.rms_norm(x, (D,), w, 1e-6) for x, w in zip((q, k), weights, strict=True))
        return turned(q, *twice), turned(k, *twice)

    inputs = [s.leaf(s.B, s.T, s.H, D) for _ in range(2)] + [s.leaf(D) for _ in range(2 * qk_norm)]
    douts: list[Tensor | None] = [s.draw(s.B, s.T, s.H, D) for _ in range(2)]
    # twice the first input forward; backward the same, and with the norm the inputs are read again
    return against_eager(kernel, eager, inputs, douts, 4, 6 if qk_norm else 4)


def rotary_qkv(s: Setting, qk_norm: bool = False) -> Op:
    """Queries and keys in packed (B, T, 3C), with ``qk_norm`` each head normalised first, as in nanochat."""
    D = s.C // s.H
    cos, sin = ours.rotary_tables(s.T, D, device=s.device)
    twice = [torch.cat((t, t), dim=-1).unsqueeze(1) for t in (cos, sin)]  # (T, 1, D)

    def kernel(qkv: Tensor) -> Tensor:
        return ours.rotary_qkv(qkv, s.H, cos, sin, qk_norm=qk_norm)

    def eager(qkv: Tensor) -> Tensor:
        q, k, v = (t.view(s.B, s.T, s.H, D) for t in qkv.split(s.C, dim=2))
        if qk_norm:
            q, k = (F.rms_norm(x, (D,), eps=1e-6) for x in (q, k))
        return torch.cat([t.flatten(2) for t in (turned(q, *twice), turned(k, *twice), v)], dim=2)

    return against_eager(kernel, eager, [s.leaf(s.B, s.T, 3 * s.C)], [s.draw(s.B, s.T, 3 * s.C)], 2, 2 + qk_norm)


def relu2(s: Setting) -> Op:
    def eager(x: Tensor) -> Tensor:
        return F.relu(x).square()

    shape = (s.B, s.T, 4 * s.C)
    return against_eager(ours.relu2, eager, [s.leaf(*shape)], [s.draw(*shape)], 2, 3)


def gated_unit(s: Setting, kernel: Function, activation: Function, packed: bool) -> Op:
    """With H = 8 C / 3, which gives an MLP of three matrices the size of one of two with 4 C."""
    shape, double = (s.B, s.T, 8 * s.C // 3), (s.B, s.T, 2 * (8 * s.C // 3))

    def eager(gate: Tensor, up: Tensor | None = None) -> Tensor:
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        return activation(gate) * up

    inputs = [s.leaf(*double)] if packed else [s.leaf(*shape), s.leaf(*shape)]
    halves = 2 if packed else 1  # of the first input
    return against_eager(kernel, eager, inputs, [s.draw(*shape)], 3 / halves, 5 / halves)


def swiglu(s: Setting, packed: bool = False) -> Op:
    return gated_unit(s, ours.swiglu, F.silu, packed)


def geglu(s: Setting, packed: bool = False) -> Op:
    return gated_unit(s, ours.geglu, partial(F.gelu, approximate="tanh"), packed)


def cross_entropy(s: Setting, **options: float) -> Op:
    targets = s.targets()

    def eager(logits: Tensor) -> Tensor:
        return mean_loss(logits, targets, **options)

    kernel = partial(ours.cross_entropy, targets=targets, **options)
    return against_eager(kernel, eager, [s.leaf(s.B * s.T, s.V)], [None], 1, 2)


def in_place(kernel: Function, main_grad: Tensor) -> Contender:
    """The kernel with the gradient of its weight, the second input, added to ``main_grad``."""

    def function(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        return kernel(x, weight, *others)

    return Contender("fastgpt main_grad", function, main_grad=main_grad)


def linear(s: Setting) -> Op:
    """The first linear layer of GPT-2's MLP. torch.compile has nothing to fuse here."""
    B, T, C = s.B, s.T, s.C
    contenders = [
        Contender("fastgpt", ours.linear),
        in_place(ours.linear, torch.zeros(4 * C, C, device=s.device)),
        Contender("eager", F.linear),
    ]
    inputs = [s.leaf(B, T, C), s.leaf(4 * C, C, scale=0.02), s.leaf(4 * C)]
    forward = 2.0 * B * T * C * 4 * C
    return Op(inputs, [s.draw(B, T, 4 * C)], contenders, "eager", {"fwd": forward, "fwd+bwd": 3 * forward}, "FLOP/s")


def linear_cross_entropy(s: Setting, **options: float) -> Op:
    targets = s.targets()
    kernel = partial(ours.linear_cross_entropy, targets=targets, **options)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return mean_loss(F.linear(x, weight), targets, **options)

    contenders = [
        Contender("fastgpt", kernel),
        in_place(kernel, torch.zeros(s.V, s.C, device=s.device)),
        Contender("eager", eager),
        Contender("torch.compile", torch.compile(eager, dynamic=False)),
    ]
    if hasattr(F, "linear_cross_entropy") and not options:  # torch 2.13; it neither caps logits nor has a z-loss
        theirs = partial(F.linear_cross_entropy, target=targets, ignore_index=-1)
        contenders.append(Contender("F.linear_cross_entropy", theirs))
        if s.device.type == "cuda":  # on a CPU it takes many times as long as all others together
            chunked = partial(theirs, options=torch.nn.LinearCrossEntropyOptions())
            contenders.append(Contender("F.linear_cross_entropy chunks", chunked))
    inputs = [s.leaf(s.B * s.T, s.C), s.leaf(s.V, s.C, scale=0.02)]
    forward = 2.0 * s.B * s.T * s.C * s.V
    return Op(inputs, [None], contenders, "eager", {"fwd": forward, "fwd+bwd": 3 * forward}, "FLOP/s")


def gpt2_shapes(L: int, V: int, T: int, C: int) -> list[tuple[int, ...]]:
    """GPT-2's parameters, matrices before vectors; 124,475,904 numbers at L 12, V 50304, T 1024, C 768."""
    block: list[tuple[int, ...]] = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (3 * C,), (4 * C,), *[(C,)] * 6]
    return sorted([(V, C), (T, C), *block * L, (C,), (C,)], key=len, reverse=True)


def adamw(s: Setting, flat: bool = False, dtype: torch.dtype = torch.float32) -> Op:
    """Clip to norm 1, update the parameters, copy them to bf16 if they are fp32, zero the gradients."""
    shapes = gpt2_shapes(s.adamw_L, s.adamw_V, s.T, s.C)
    n_decayed = sum(len(shape) > 1 for shape in shapes)
    if flat:
        shapes = [(sum(map(math.prod, part)),) for part in (shapes[:n_decayed], shapes[n_decayed:])]
        n_decayed = 1
    first, drawn = ([0.02 * torch.randn(shape, device=s.device, dtype=dtype) for shape in shapes] for _ in range(2))
    params, grads = ([torch.zeros_like(p) for p in first] for _ in range(2))
    copied = params if dtype == torch.float32 else []
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in copied]
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def optimizer(kind: Function, **options: Any) -> Any:
        groups = {0.1: params[:n_decayed], 0.0: params[n_decayed:]}
        parameters = [{"params": part, "weight_decay": decay} for decay, part in groups.items()]
        return kind(parameters, lr=1e-3, betas=(0.9, 0.95), **options)

    fused = optimizer(ours.FusedAdamW, max_grad_norm=1.0, copies=dict(zip(copied, copies, strict=True)))
    plain = optimizer(torch.optim.AdamW, fused=True)
    fused.step()  # creates the state, whose moments both share
    # Each counts its own steps: FusedAdamW would otherwise wait for the device, to read what the other has counted.
    plain.state.update({p: fused.state[p] | {"step": fused.state[p]["step"].clone()} for p in params})

    def before() -> None:
        """Set up the tenth step, with moments as nine steps might have left them."""
        torch._foreach_copy_(params, first)
        torch._foreach_copy_(grads, drawn)
        for p, g in zip(params, drawn, strict=True):
            for each in (fused, plain):
                each.state[p]["step"].data.fill_(9.0)  # by .data, which keeps the version, for the same reason
            fused.state[p]["exp_avg"].copy_(g)
            torch.mul(g, g, out=fused.state[p]["exp_avg_sq"])

    def kernel() -> list[Tensor]:
        fused.step(zero_grad=True)
        return params + copies + grads

    def peer() -> list[Tensor]:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        plain.step()
        if copies:
            torch._foreach_copy_(copies, params)
        torch._foreach_zero_(grads)
        return params + copies + grads

    contenders = [
        Contender("fastgpt", kernel),
        Contender(f"torch fused, clip, {'copy, ' * bool(copies)}zero", peer),
        Contender("torch fused, step only", plain.step, whole=False),
    ]
    # per parameter, the norm reads 1 number, the update reads 4 and writes 3, zeroing writes 1; a copy has 2 bytes
    work = {"step": (9.0 * dtype.itemsize + 2.0 * bool(copies)) * sum(p.numel() for p in params)}
    return Op([], [], contenders, contenders[1].name, work, "B/s", before=before)


# For each op, the function that builds it, and the largest number of rounds.
OPS: dict[str, tuple[Callable[[Setting], Op], int]] = {
    "attention_qkv": (attention_qkv, 100),
    "attention_qkv_d32": (partial(attention_qkv, head_size=32), 30),
    "attention_qkv_d128": (partial(attention_qkv, head_size=128), 30),
    "attention_qkv_dropout": (partial(attention_qkv, dropout_p=0.1), 30),
    "attention": (attention, 100),
    "attention_shared": (partial(local_attention, group=3), 30),
    "attention_window": (partial(local_attention, window=128), 30),
    "attention_documents": (partial(local_attention, documents=128), 30),
    "attention_softcap": (partial(local_attention, softcap=50.0), 30),
    "layer_norm": (layer_norm, 100),
    "add_layer_norm": (add_layer_norm, 100),
    "rms_norm": (rms_norm, 100),
    "add_rms_norm": (add_rms_norm, 100),
    "gelu": (gelu, 100),
    "gelu_bias": (partial(gelu, with_bias=True), 100),
    "rotary": (rotary, 100),
    "rms_norm_rotary": (partial(rotary, qk_norm=True), 100),
    "rotary_qkv": (rotary_qkv, 100),
    "rotary_qkv_norm": (partial(rotary_qkv, qk_norm=True), 100),
    "relu2": (relu2, 100),
    "swiglu": (swiglu, 100),
    "swiglu_packed": (partial(swiglu, packed=True), 100),
    "geglu": (geglu, 100),
    "cross_entropy": (cross_entropy, 100),
    "cross_entropy_smoothed": (partial(cross_entropy, label_smoothing=0.1), 30),
    "linear": (linear, 100),
    "linear_cross_entropy": (linear_cross_entropy, 100),
    "linear_cross_entropy_capped": (partial(linear_cross_entropy, softcap=30.0, z_loss=1e-4), 30),
    "adamw_flat": (partial(adamw, flat=True), 50),
    "adamw_list": (adamw, 50),
    "adamw_bf16": (partial(adamw, dtype=torch.bfloat16), 50),
}
