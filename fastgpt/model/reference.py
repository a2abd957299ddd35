"""The same GPT in plain PyTorch, on nothing of fastgpt's kernels: the oracle and the benchmarks' baseline.

nanoGPT's architecture on ``scaled_dot_product_attention``, with GPT-2's tanh GELU, and every option of
:class:`GPTConfig`. Same parameter names and initialisation as ``gpt.py``, so state dicts move between the two.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastgpt.model.config import NORM_EPS, QK_NORM_EPS, ROTARY_BASE, GPTConfig
from fastgpt.model.gpt import initialise


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, or RMS norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.rms = config.norm == "rms"
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


def rotated(x: Tensor) -> Tensor:
    """Queries or keys (B, H, T, D), each pair of channels (i, i + D / 2) turned by an angle t / base**(2 i / D)."""
    T, D = x.shape[-2:]
    frequencies = ROTARY_BASE ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angles = torch.arange(T, dtype=torch.float64, device=x.device).unsqueeze(1) * frequencies  # (T, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def visible(idx: Tensor, window: int, end_of_text: int) -> Tensor:
    """Which keys each query sees, (B, 1, T, T): not later ones, none beyond the window, none of other documents."""
    T = idx.shape[1]
    position = torch.arange(T, device=idx.device)
    distance = position.unsqueeze(1) - position
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    document = F.pad((idx == end_of_text).cumsum(1), (1, -1))  # an end belongs to the document that it ends
    return (seen & (document.unsqueeze(2) == document.unsqueeze(1))).unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * config.kv_width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.config, self.window = config, config.window_of(layer)

    def forward(self, x: Tensor, idx: Tensor, value_embedding: Tensor | None) -> Tensor:
        c, (B, T, C) = self.config, x.shape
        q, k, v = self.c_attn(x).split((C, c.kv_width, c.kv_width), dim=2)
        if value_embedding is not None:
            v = v + value_embedding
        q, k, v = (t.view(B, T, -1, c.head_size).transpose(1, 2) for t in (q, k, v))
        if c.qk_norm:
            q, k = (F.rms_norm(t, (c.head_size,), eps=QK_NORM_EPS) for t in (q, k))
        if c.positions == "rotary":
            q, k = rotated(q), rotated(k)
        plain = not self.window and c.end_of_text < 0
        y = F.scaled_dot_product_attention(
            q, k, v, None if plain else visible(idx, self.window, c.end_of_text), is_causal=plain,
            dropout_p=c.dropout if self.training else 0.0, enable_gqa=c.kv_heads != c.n_head,
        )  # fmt: skip
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return F.dropout(self.c_proj(y), c.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU, a squared ReLU or a SwiGLU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = 2 * config.mlp_width if config.mlp == "swiglu" else config.mlp_width
        self.c_fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.kind, self.dropout = config.mlp, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if self.kind == "gelu":
            hidden = F.gelu(hidden, approximate="tanh")
        elif self.kind == "relu2":
            hidden = F.relu(hidden).square()
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, idx: Tensor, value_embedding: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), idx, value_embedding)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Token ids to normalised hidden states."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.ve = nn.ModuleDict(
            {
                str(layer): nn.Embedding(config.vocab_size, config.kv_width)
                for layer in range(config.n_layer)
                if config.has_value_embedding(layer)
            }
        )
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.dropout = config.dropout

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        x = F.dropout(x, self.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, idx, self.ve[str(layer)](idx) if str(layer) in self.ve else None)
        return self.ln_f(x)


class ReferenceGPT(nn.Module):
    """A GPT in plain PyTorch; ``forward`` as in :class:`fastgpt.model.GPT`, without a cache."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        initialise(self, config)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.transformer(idx)
        output = self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight
        if targets is None:
            return self._capped(F.linear(x[:, -1], output))
        logits = self._capped(F.linear(x, output).float())
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits
