"""The shape of a GPT and what follows from it: parameters and FLOPs."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fastgpt.kernels.heads import MAX_HEAD_SIZE

# Of anything that a GPT has: no computer holds a matrix of this width, and a number beyond it is a slip of the hand.
LARGEST_SIZE = 2**24


NORM_EPS = 1e-5  # added to the variance, or the mean square, of a norm's input
QK_NORM_EPS = 1e-6
ROTARY_BASE = 10000.0  # RoFormer's

# Of layers with a window, every so-manieth sees the whole context, and the last one too.
FULL_EVERY = 4


def _later(default: Any) -> Any:
    """A field that GPT-2 needs not, and that configurations saved by earlier versions lack."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class GPTConfig:
    """A GPT's architecture. The defaults are GPT-2 124M with its vocabulary padded for the GEMMs.

    Attributes:
        block_size: the longest context, T.
        vocab_size: V.
        n_layer: blocks.
        n_head: of the queries.
        n_embd: width, C.
        dropout: in training, on attention weights, branches and the embedding.
        bias: whether linear layers and layer norms have one.
        positions: an embedding of each position, or rotation of queries and keys.
        norm: layer norm, or RMS norm.
        qk_norm: whether queries and keys are RMS-normalised head by head.
        mlp: what stands between the MLP's two layers.
        n_kv_head: heads of keys and values, which groups of query heads share; 0 for ``n_head``.
        tied: whether the output layer is the token embedding.
        softcap: c of c tanh(logits / c), which keeps logits small; 0 for none.
        window: how many positions attention sees, its own included; 0 for all. One layer in ``FULL_EVERY`` and the last
            one see all.
        end_of_text: the token that ends a document. Attention does not look across it; -1 for no such token.
        zero_init: whether the last layer of each branch begins at zero.
        value_embeddings: whether every other layer adds an embedding of the token to the values.

    Raises:
        ValueError: a size is not from 1 to ``LARGEST_SIZE``, ``n_head`` does not divide ``n_embd``, ``n_kv_head`` does
            not divide ``n_head``, ``dropout`` is no probability, or options contradict each other.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    positions: Literal["learned", "rotary"] = _later("learned")
    norm: Literal["layer", "rms"] = _later("layer")
    qk_norm: bool = _later(False)
    mlp: Literal["gelu", "relu2", "swiglu"] = _later("gelu")
    n_kv_head: int = _later(0)
    tied: bool = _later(True)
    softcap: float = _later(0.0)
    window: int = _later(0)
    end_of_text: int = _later(-1)
    zero_init: bool = _later(False)
    value_embeddings: bool = _later(False)

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
            if size > LARGEST_SIZE:
                raise ValueError(f"{name} must be at most {LARGEST_SIZE:,}, got {size:,}")
        if self.n_embd % self.n_head:
            nearest = max(d for d in range(1, min(self.n_head, self.n_embd) + 1) if self.n_embd % d == 0)
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"n_head={nearest} or n_embd={round(self.n_embd / self.n_head) * self.n_head or self.n_head} would do"
            )
        if self.n_embd // self.n_head > MAX_HEAD_SIZE:
            raise ValueError(
                f"n_embd={self.n_embd} over n_head={self.n_head} makes heads of {self.n_embd // self.n_head}; "
                f"the attention kernels take up to {MAX_HEAD_SIZE}: n_head={-(-self.n_embd // MAX_HEAD_SIZE)} or more"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.n_kv_head <= self.n_head or self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need heads of an even size, and n_embd over n_head is {self.head_size}")
        if not 0.0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be a number of at least 0, got {self.softcap}")
        if self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}")
        if not -1 <= self.end_of_text < self.vocab_size:
            raise ValueError(f"end_of_text={self.end_of_text} is no token of {self.vocab_size}")

    @property
    def beyond_gpt2(self) -> list[str]:
        """What the architecture has that GPT-2's has not, by name; how the weights begin does not count."""
        later = [f for f in fields(self) if f.metadata.get("later") and f.name != "zero_init"]
        return [f.name for f in later if getattr(self, f.name) != f.default]

    @property
    def head_size(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def kv_width(self) -> int:
        """The width of all keys, and of all values."""
        return self.kv_heads * self.head_size

    @property
    def mlp_width(self) -> int:
        """The width between the MLP's two layers.

        SwiGLU's first layer has two matrices, so two thirds of the width take as many parameters.
        """
        return -(-8 * self.n_embd // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.n_embd

    def window_of(self, layer: int) -> int:
        """How many positions the attention of this layer sees; 0 for all."""
        sees_all = (layer + 1) % FULL_EVERY == 0 or layer == self.n_layer - 1
        return 0 if sees_all or self.window >= self.block_size else self.window

    def has_value_embedding(self, layer: int) -> bool:
        """Whether this layer adds an embedding of the token to its values: every other one, the last one among them."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters each part has; a tied output layer shares the token embedding's."""
        C, L, V, bias = self.n_embd, self.n_layer, self.vocab_size, int(self.bias)
        qkv, hidden = C + 2 * self.kv_width, self.mlp_width
        inner = 2 * hidden if self.mlp == "swiglu" else hidden
        parts = {
            "token embedding": V * C,
            "positions": self.block_size * C if self.positions == "learned" else 0,
            "value embeddings": sum(map(self.has_value_embedding, range(L))) * V * self.kv_width,
            "output layer": 0 if self.tied else V * C,
            "attention": L * (C * qkv + C * C + bias * (qkv + C)),
            "MLP": L * (C * inner + hidden * C + bias * (inner + C)),
            "norms": (2 * L + 1) * (1 + (bias if self.norm == "layer" else 0)) * C,
        }
        gpt2s = ("token embedding", "positions", "attention", "MLP", "norms")
        return {name: n for name, n in parts.items() if n or name in gpt2s}

    @property
    def n_params_of_blocks(self) -> int:
        """Parameters in the matrices of the blocks, which Muon updates."""
        C, hidden = self.n_embd, self.mlp_width
        inner = 2 * hidden if self.mlp == "swiglu" else hidden
        return self.n_layer * (C * (C + 2 * self.kv_width) + C * C + C * inner + hidden * C)

    @property
    def n_params(self) -> int:
        """All parameters."""
        return sum(self.parameters_by_part.values())

    @property
    def n_params_without_positions(self) -> int:
        """Parameters without position embeddings, by which models are called."""
        return self.n_params - self.parameters_by_part["positions"]

    @property
    def flops_per_token(self) -> int:
        """Forward and backward at full context: 6 N + 12 L C T, as in PaLM (Chowdhery et al. 2022, appendix B).

        N counts parameters that take part in a matrix product: not the embeddings of positions and values, and not that
        of tokens unless it is the output layer too. Attention is counted in full though causality halves it, as in
        nanoGPT; in a layer with a window, T is the window.
        """
        parts = self.parameters_by_part
        embeddings = parts["positions"] + parts.get("value embeddings", 0)
        embeddings += 0 if self.tied else parts["token embedding"]
        seen = sum(self.window_of(layer) or self.block_size for layer in range(self.n_layer))
        return 6 * (self.n_params - embeddings) + 12 * self.n_embd * seen


GPT2_VOCABULARY = 50257


def padded_vocab_size(vocab_size: int) -> int:
    """Vocabularies of a thousand and more are rounded up to a multiple of 128, which GEMMs like: 50257 to 50304."""
    return vocab_size if vocab_size < 1000 else -(-vocab_size // 128) * 128
