"""GPT-2 on fastgpt's kernels, and the options of later GPTs, to be read from top to bottom.

GPT-2 has learned positions, pre-norm, tanh GELU, and the token embedding tied to the output layer. ``GPTConfig`` says
what else there is. Names and shapes of the parameters are nanoGPT's.

Every residual add is fused with the layer norm after it. So the residual stream is carried as two tensors: the sum so
far (``residual``), and what the last branch adds to it (``x``).

In training and evaluation ``Block.forward`` calls ``fused.py`` instead of the lines below that call. It runs the same
kernels as one autograd function, with the same bits. The lines below run with a KV cache, under torch.compile and under
autocast. Forward hooks on the parts of a block are called only there.

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary. Keys and values may have fewer heads
than the queries; W = C + 2 n_kv_head D is the width of q, k and v side by side, 3C in GPT-2.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgpt import kernels
from fastgpt.kernels.layer_norm import layer_norm_and_input
from fastgpt.kernels.linear import add_positions
from fastgpt.kernels.rms_norm import rms_norm_and_input
from fastgpt.model import fused
from fastgpt.model.config import NORM_EPS, QK_NORM_EPS, ROTARY_BASE, GPTConfig


class Context(NamedTuple):
    """What the attention of all layers knows of the tokens' positions, each ``None`` if it does not exist."""

    cos: Tensor | None  # (T, D / 2), of rotary positions
    sin: Tensor | None
    documents: Tensor | None  # (B, 2, S) int32, where each token's document begins and ends


class LayerNorm(kernels.LayerNorm):
    """Layer norm of ``x``, or of ``residual + x``. Returns the sum that it normalises too."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return layer_norm_and_input(x, self.weight, self.bias, self.eps)
        return kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(kernels.RMSNorm):
    """RMS norm of ``x``, or of ``residual + x``. Returns the sum that it normalises too."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return rms_norm_and_input(x, self.weight, NORM_EPS)
        return kernels.add_rms_norm(x, residual, self.weight, NORM_EPS)


def make_norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """The norm before each branch, and the last one."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, eps=NORM_EPS)
    return LayerNorm(config.n_embd, eps=NORM_EPS, bias=config.bias)


class KVCache:
    """Keys and values of every layer for the positions seen so far, for generation.

    Args:
        config: of the model.
        batch_size: sequences that are generated at the same time, B.
        like: a tensor on the device and of the dtype to use.
        length: the most positions there will be; ``block_size`` by default.
    """

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor, length: int | None = None) -> None:
        length = length or config.block_size
        # for each layer keys and values; allocated once, for the longest sequence
        shape = (config.n_layer, 2, batch_size, config.kv_heads, length, config.head_size)
        self.store = like.new_empty(shape)
        self.tokens = torch.empty(batch_size, length, dtype=torch.int64, device=like.device)
        self.length = 0  # positions filled so far

    def attend(
        self, layer: int, qkv: Tensor, n_head: int, window: int | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Append the keys and values of ``qkv`` (B, T, W) to ``layer``, and attend over all so far: (B, T, C)."""
        (B, T, _), (n_kv_head, _, D) = qkv.shape, self.store.shape[3:]
        q, k, v = qkv.view(B, T, -1, D).transpose(1, 2).split((n_head, n_kv_head, n_kv_head), dim=1)  # (B, heads, T, D)
        end = self.length + T
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        keys, values = self.store[layer, :, :, :, :end]
        # causal: the queries are the last T positions
        y = kernels.attention(q, keys, values, window=window, documents=documents)
        return y.transpose(1, 2).reshape(B, T, n_head * D)


class Attention(nn.Module):
    """Causal self-attention. One projection makes q, k and v side by side, which the kernel reads as they lie."""

    def __init__(self, config: GPTConfig, layer: int, deterministic: bool) -> None:
        super().__init__()
        C, kv_width = config.n_embd, config.kv_width
        self.c_attn = kernels.Linear(C, C + 2 * kv_width, bias=config.bias)
        # rows of q, k and v: three matrices to an optimizer
        self.c_attn.weight.stacked = (C, kv_width, kv_width)  # type: ignore[attr-defined]
        self.c_proj = kernels.Linear(C, C, bias=config.bias)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.n_kv_head = config.kv_heads if config.kv_heads != config.n_head else None
        self.kv_width, self.qk_norm = kv_width, config.qk_norm
        self.window = config.window_of(layer) or None
        self.deterministic = deterministic

    def forward(
        self, x: Tensor, context: Context, value_embedding: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, W)
        if value_embedding is not None:
            qk, v = qkv.split((qkv.shape[-1] - self.kv_width, self.kv_width), dim=-1)
            qkv = torch.cat((qk, v + value_embedding), dim=-1)
        if self.qk_norm or context.cos is not None:
            qkv = kernels.rotary_qkv(
                qkv, self.n_head, context.cos, context.sin, n_kv_head=self.n_kv_head, qk_norm=self.qk_norm,
                eps=QK_NORM_EPS,
            )  # fmt: skip
        if cache is not None:
            y = cache.attend(self.layer, qkv, self.n_head, self.window, context.documents)
        else:
            y = kernels.attention_qkv(
                qkv, self.n_head, n_kv_head=self.n_kv_head, window=self.window, documents=context.documents,
                dropout_p=self.dropout if self.training else 0.0, deterministic=self.deterministic,
            )  # fmt: skip
        return fused.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, about four times as wide in the middle, with a GELU, squared ReLU or SwiGLU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, width = config.n_embd, config.mlp_width
        n_stacked = 2 if config.mlp == "swiglu" else 1  # the gate and what it lets through, side by side
        self.c_fc = kernels.Linear(C, n_stacked * width, bias=config.bias)
        self.c_fc.weight.stacked = (width,) * n_stacked  # type: ignore[attr-defined]
        self.c_proj = kernels.Linear(width, C, bias=config.bias)
        self.kind, self.dropout = config.mlp, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            # The first bias is added by GELU, which reads and writes the widest activation anyway.
            hidden = kernels.gelu(kernels.linear(x, self.c_fc.weight), bias=self.c_fc.bias)  # (B, T, 4C)
        else:
            hidden = (kernels.relu2 if self.kind == "relu2" else kernels.swiglu)(self.c_fc(x))
        return fused.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm."""

    def __init__(self, config: GPTConfig, layer: int, recompute: str, deterministic: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, layer, deterministic)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, value_embedding: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Take and return ``(x, residual)``: what the last branch adds, and the sum before it; each (B, T, C)."""
        if cache is None and fused.available(x):
            # the lines below as one autograd function, with the same bits
            return fused.block(self, x, residual, context, value_embedding)
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.attn(x, context, value_embedding, cache), residual)
        return self.mlp(x), residual


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm: token ids to hidden states."""

    def __init__(self, config: GPTConfig, recompute: str, deterministic: bool) -> None:
        super().__init__()
        V, C, layers = config.vocab_size, config.n_embd, range(config.n_layer)
        self.wte = kernels.Embedding(V, C)
        self.wpe = kernels.Embedding(config.block_size, C) if config.positions == "learned" else None
        with_values = [layer for layer in layers if config.has_value_embedding(layer)]
        self.ve = nn.ModuleDict({str(layer): kernels.Embedding(V, config.kv_width) for layer in with_values})
        self.h = nn.ModuleList(Block(config, layer, recompute, deterministic) for layer in layers)
        self.ln_f = make_norm(config)
        self.config = config
        self._tables: tuple[Tensor, Tensor] | None = None  # of rotary positions; fp32 whatever the parameters are

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 to (B, T, C)."""
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        if cache is not None:
            cache.tokens[:, start:end] = idx
        context = self._context(idx if cache is None else cache.tokens[:, :end], start)
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = add_positions(x, self.wpe.weight, start)
        x, residual = fused.dropout(x, self.config.dropout, self.training), None
        for layer, block in enumerate(self.h):
            value_embedding = self.ve[str(layer)](idx) if str(layer) in self.ve else None  # (B, T, n_kv_head D)
            x, residual = block(x, residual, context, value_embedding, cache)
        if cache is not None:
            cache.length = end
        return self.ln_f(x, residual)[0]

    def _context(self, tokens: Tensor, start: int) -> Context:
        """What attention knows of ``tokens`` (B, S) int64, of which those from ``start`` on are queries."""
        cos = sin = documents = None
        if self.config.positions == "rotary":
            if self._tables is None or self._tables[0].device != tokens.device:
                D = self.config.head_size
                self._tables = kernels.rotary_tables(self.config.block_size, D, ROTARY_BASE, device=tokens.device)
            cos, sin = (table[start : tokens.shape[1]] for table in self._tables)
        if self.config.end_of_text >= 0:
            documents = kernels.document_bounds(kernels.document_starts(tokens, self.config.end_of_text))
        return Context(cos, sin, documents)


class GPT(nn.Module):
    """A GPT: the loss if there are targets, otherwise the logits of the last position.

    Args:
        config: the architecture.
        recompute: what the backward recomputes instead of keeping it in memory: ``none``, ``cheap`` or ``block`` (see
            ``fused.py``). The bits of the results are the same.
        deterministic: whether the gradients have the same bits in every run. ``False`` lets attention use atomic adds
            on a GPU (see ``kernels.attention_qkv``).
    """

    def __init__(self, config: GPTConfig, recompute: str = "cheap", deterministic: bool = True) -> None:
        super().__init__()
        if recompute not in fused.RECOMPUTE:
            raise ValueError(f"recompute: '{recompute}' is none of {', '.join(fused.RECOMPUTE)}")
        self.config = config
        self.transformer = Transformer(config, recompute, deterministic)
        self.lm_head = None if config.tied else kernels.Linear(config.n_embd, config.vocab_size, bias=False)
        initialise(self, config)

    @property
    def output_weight(self) -> Tensor:
        """(V, C), the output layer's."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
        gradient_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mean loss against ``targets``, or without targets the logits of the next token.

        Args:
            idx: ``(B, T)`` int64 token ids, T at most ``block_size`` (less what ``cache`` holds).
            targets: ``(B, T)`` int64, -1 for positions without a loss.
            cache: keys and values of the tokens before ``idx``; those of ``idx`` are appended.
            gradient_scale: 0-dim fp32, a factor of the gradients, but not of the loss.

        Returns:
            0-dim fp32 loss in nats, or logits ``(B, vocab_size)``.

        Raises:
            ValueError: the sequence is longer than ``block_size``, or than ``cache`` has room for.
        """
        length = idx.shape[1] + (cache.length if cache is not None else 0)
        if length > self.config.block_size:
            raise ValueError(f"idx: {length} positions, but block_size is {self.config.block_size}")
        if cache is not None and length > cache.store.shape[4]:
            raise ValueError(f"cache: it has room for {cache.store.shape[4]} positions, and {length} are asked for")
        x = self.transformer(idx, cache)  # (B, T, C)
        if targets is None:
            return self.logits(x[:, -1])
        return self.loss(x.flatten(0, 1), targets.flatten(), gradient_scale)

    def loss(self, x: Tensor, targets: Tensor, gradient_scale: Tensor | None = None) -> Tensor:
        """The output layer and the mean loss: (N, C) hidden states and (N,) targets to 0-dim fp32.

        The (N, V) logits are the largest tensor of a step; this never holds all of them.
        """
        return kernels.linear_cross_entropy(
            x, self.output_weight, targets, gradient_scale=gradient_scale, softcap=self.config.softcap or None
        )

    def logits(self, x: Tensor) -> Tensor:
        """The output layer: (…, C) hidden states to (…, V)."""
        logits, cap = kernels.linear(x, self.output_weight), self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits


_DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _WithoutDraws(TorchFunctionMode):
    """Leaves out random numbers. On the device ``meta`` nobody sees them, and PyTorch imports its compiler for them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func in _DRAWS else func(*args, **(kwargs or {}))


def on_meta(config: GPTConfig, recompute: str = "cheap", deterministic: bool = True) -> GPT:
    """A GPT on the device ``meta``: parameters that have shapes, but neither memory nor values."""
    with torch.device("meta"), _WithoutDraws():
        return GPT(config, recompute, deterministic)


@torch.no_grad()
def initialise(model: nn.Module, config: GPTConfig) -> None:
    """GPT-2's initialisation: weights N(0, 0.02), biases 0.

    Projections into the residual stream are scaled by 1 / sqrt(2 n_layer), so that the variance of the sum over all
    2 n_layer branches does not grow with depth. With ``zero_init`` they are 0: each block begins as the identity.
    """
    for name, parameter in model.named_parameters():
        residual = name.endswith("c_proj.weight")
        if residual and config.zero_init:
            parameter.zero_()
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        elif name.endswith(".bias"):
            parameter.zero_()
