"""The shape of a GPT and what follows from it: parameters and FLOPs."""

from dataclasses import dataclass

from fastgpt.kernels.heads import MAX_HEAD_SIZE

# Of anything that a GPT has: no computer holds a matrix of this width, and a number beyond it is a slip of the hand.
LARGEST_SIZE = 2**24


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2's architecture. The defaults are GPT-2 124M with its vocabulary padded for the GEMMs.

    Raises:
        ValueError: a size is not from 1 to ``LARGEST_SIZE``, ``n_head`` does not divide ``n_embd``, or ``dropout`` is
            no probability.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

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

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters each part has; the output layer shares the token embedding's."""
        C, L, bias = self.n_embd, self.n_layer, int(self.bias)
        return {
            "token embedding": self.vocab_size * C,
            "positions": self.block_size * C,
            "attention": L * (4 * C * C + bias * 4 * C),
            "MLP": L * (8 * C * C + bias * 5 * C),
            "norms": (2 * L + 1) * (1 + bias) * C,
        }

    @property
    def n_params_of_blocks(self) -> int:
        """Parameters in the matrices of the blocks, which Muon updates."""
        return self.n_layer * 12 * self.n_embd * self.n_embd

    @property
    def n_params(self) -> int:
        """All parameters."""
        return sum(self.parameters_by_part.values())

    @property
    def n_params_without_positions(self) -> int:
        """Parameters that take part in a matrix product: position embeddings do not."""
        return self.n_params - self.block_size * self.n_embd

    @property
    def flops_per_token(self) -> int:
        """Forward and backward at full context: 6 N + 12 L C T.

        N without position embeddings, attention counted in full though causality halves it, as in PaLM
        (Chowdhery et al. 2022, appendix B) and nanoGPT.
        """
        return 6 * self.n_params_without_positions + 12 * self.n_layer * self.n_embd * self.block_size


GPT2_VOCABULARY = 50257


def padded_vocab_size(vocab_size: int) -> int:
    """Vocabularies of a thousand and more are rounded up to a multiple of 128, which GEMMs like: 50257 to 50304."""
    return vocab_size if vocab_size < 1000 else -(-vocab_size // 128) * 128
