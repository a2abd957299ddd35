"""Attention's heads: the largest that the kernels take, and how heads lie in memory."""

from torch import Tensor

# Elements of a head that every backend takes. The Triton kernels keep a head's whole row on chip, padded to a power of
# two; at 512 the tiles of a block no longer fit an Ampere GPU's registers and shared memory. FlashAttention-2 has the
# same limit. The C++ kernels have none of their own.
MAX_HEAD_SIZE = 256


def empty_heads(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like ``x``, (B, H, T, D), laid out in memory as (B, T, H, D).

    A GPT's next layer reads this layout as (B, T, C) without a copy.
    """
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def split_heads(packed: Tensor, n_head: int, n: int) -> tuple[Tensor, ...]:
    """Return n views (B, H, T, D) of ``packed``, (B, T, n * C)."""
    B, T, width = packed.shape
    return packed.view(B, T, n, n_head, width // n // n_head).permute(2, 0, 3, 1, 4).unbind(0)
