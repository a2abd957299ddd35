"""GPT-2 on fastgpt's kernels, to be read from top to bottom.

Learned positions, pre-norm, tanh GELU, token embedding tied to the output layer. Names and shapes of the parameters
are nanoGPT's.

Every residual add is fused with the layer norm after it. So the residual stream is carried as two tensors: the sum so
far (``residual``), and what the last branch adds to it (``x``).

In training and evaluation ``Block.forward`` calls ``fused.py`` instead of the lines below that call. It runs the same
kernels as one autograd function, with the same bits. The lines below run with a KV cache, under torch.compile and under
autocast. Forward hooks on the parts of a block are called only there.

Shapes: B sequences, T tokens, C width (n_embd), H heads, D = C / H, V vocabulary.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt import kernels
from fastgpt.kernels.layer_norm import layer_norm_and_input
from fastgpt.kernels.linear import add_positions
from fastgpt.model import fused
from fastgpt.model.config import GPTConfig


class LayerNorm(kernels.LayerNorm):
    """Layer norm of ``x``, or of ``residual + x``. Returns the sum that it normalises too."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return layer_norm_and_input(x, self.weight, self.bias, self.eps)
        return kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class KVCache:
    """Keys and values of every layer for the positions seen so far, for generation.

    Args:
        config: of the model.
        batch_size: sequences that are generated at the same time, B.
        like: a tensor on the device and of the dtype to use.
        length: the most positions there will be; ``block_size`` by default.
    """

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor, length: int | None = None) -> None:
        D = config.n_embd // config.n_head
        # for each layer keys and values; allocated once, for the longest sequence
        shape = (config.n_layer, 2, batch_size, config.n_head, length or config.block_size, D)
        self.store = like.new_empty(shape)
        self.length = 0  # positions filled so far

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Append the keys and values of ``qkv`` (B, T, 3C) to ``layer``, and attend over all so far: (B, T, C)."""
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        end = self.length + T
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        keys, values = self.store[layer, :, :, :, :end]
        y = kernels.attention(q, keys, values)  # causal: the queries are the last T positions
        return y.transpose(1, 2).reshape(B, T, C3 // 3)


class Attention(nn.Module):
    """Causal self-attention. One projection makes q, k and v side by side, which the kernel reads as they lie."""

    def __init__(self, config: GPTConfig, layer: int, deterministic: bool) -> None:
        super().__init__()
        self.c_attn = kernels.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        # rows of q, k and v: three matrices to an optimizer
        self.c_attn.weight.stacked = (config.n_embd,) * 3  # type: ignore[attr-defined]
        self.c_proj = kernels.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.deterministic = deterministic

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C)
        if cache is not None:
            y = cache.attend(self.layer, qkv, self.n_head)
        else:
            dropout = self.dropout if self.training else 0.0
            y = kernels.attention_qkv(qkv, self.n_head, dropout_p=dropout, deterministic=self.deterministic)
        return fused.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide in the middle."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = kernels.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = kernels.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        # The first bias is added by GELU, which reads and writes the widest activation anyway.
        hidden = kernels.gelu(kernels.linear(x, self.c_fc.weight), bias=self.c_fc.bias)  # (B, T, 4C)
        return fused.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm."""

    def __init__(self, config: GPTConfig, layer: int, recompute: str, deterministic: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer, deterministic)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, residual: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """Take and return ``(x, residual)``: what the last branch adds, and the sum before it; each (B, T, C)."""
        if cache is None and fused.available(x):
            return fused.block(self, x, residual)  # the lines below as one autograd function, with the same bits
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.attn(x, cache), residual)
        return self.mlp(x), residual


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm: token ids to hidden states."""

    def __init__(self, config: GPTConfig, recompute: str, deterministic: bool) -> None:
        super().__init__()
        self.wte = kernels.Embedding(config.vocab_size, config.n_embd)
        self.wpe = kernels.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, recompute, deterministic) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 to (B, T, C)."""
        start = 0 if cache is None else cache.length
        end = start + idx.shape[1]
        x = add_positions(self.wte(idx), self.wpe.weight, start)  # (B, T, C)
        x, residual = fused.dropout(x, self.dropout, self.training), None
        for block in self.h:
            x, residual = block(x, residual, cache)
        if cache is not None:
            cache.length = end
        return self.ln_f(x, residual)[0]


class GPT(nn.Module):
    """GPT-2: the loss if there are targets, otherwise the logits of the last position.

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
        initialise(self, config)

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
        output = self.transformer.wte.weight  # (V, C), tied
        if targets is None:
            return kernels.linear(x[:, -1], output)
        # the (B T, V) logits are the largest tensor of a step; this never holds all of them
        return kernels.linear_cross_entropy(x.flatten(0, 1), output, targets.flatten(), gradient_scale=gradient_scale)


@torch.no_grad()
def initialise(model: nn.Module, config: GPTConfig) -> None:
    """GPT-2's initialisation: weights N(0, 0.02), biases 0.

    Projections into the residual stream are scaled by 1 / sqrt(2 n_layer), so that the variance of the sum over all
    2 n_layer branches does not grow with depth.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(0.0, 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
        elif name.endswith(".bias"):
            parameter.zero_()
