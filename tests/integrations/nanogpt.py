"""A model of nanoGPT's shape: the same modules under the same names, written for these tests."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    block_size: int = 32
    vocab_size: int = 131
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 48
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    """With a bias or without one."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """All heads in one projection."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout

    def heads(self, x):
        """Queries, keys and values, each (B, H, T, D)."""
        return (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))

    def forward(self, x):
        q, k, v = self.heads(x)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each behind its norm and beside the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(config.n_embd, config.bias), LayerNorm(config.n_embd, config.bias)
        self.attn, self.mlp = CausalSelfAttention(config), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NewGELU(nn.Module):
    """GELU's tanh form, as llm.c's model has it."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class GPT(nn.Module):
    """Logits and loss, the output layer tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, idx):
        """(B, T) to (B, T, C)."""
        parts = self.transformer
        x = parts.drop(parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device)))
        for block in parts.h:
            x = block(x)
        return parts.ln_f(x)

    def forward(self, idx, targets=None):
        assert idx.shape[1] <= self.config.block_size, "too long"
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class WithoutDropout(GPT):
    """As build-nanogpt writes it: no dropout, the norms of torch, and the loss ignores what PyTorch ignores."""

    def __init__(self, config):
        super().__init__(config)
        del self.transformer["drop"]
        self.transformer["ln_f"] = nn.LayerNorm(config.n_embd)
        for block in self.transformer.h:
            block.ln_1, block.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
            block.mlp.gelu = nn.GELU("tanh")
            del block.attn.attn_dropout, block.attn.resid_dropout, block.attn.dropout, block.mlp.dropout
            block.attn.__class__, block.mlp.__class__ = AttentionWithoutDropout, MLPWithoutDropout

    def hidden(self, idx):
        parts = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in parts.h:
            x = block(x)
        return parts.ln_f(x)

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.hidden(idx))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class AttentionWithoutDropout(CausalSelfAttention):
    """The heads of the class above."""

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLPWithoutDropout(MLP):
    """Likewise."""

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class WithReturnLogits(WithoutDropout):
    """As llm.c writes it: a GELU of its own, and logits on request."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.gelu = NewGELU()

    def forward(self, idx, targets=None, return_logits=True):
        logits = self.lm_head(self.hidden(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits if return_logits else None, loss
