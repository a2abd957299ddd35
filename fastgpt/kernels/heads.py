"""Attention's heads: the largest that the kernels take, and how heads lie in memory."""

from torch import Tensor

# The largest head, in elements, that attention takes on every backend. The Triton kernels keep whole rows of a head on
# chip, padded to a power of two. At 256 the backward already uses 96 of the 99 KiB of shared memory that a block may
# have on sm_86, 89 and 120, so 512 would not fit. FlashAttention-2 has the same limit. The C++ kernels have none.
MAX_HEAD_SIZE = 256


def empty_heads(x: Tensor) -> Tensor:
    """Return an uninitialised tensor like ``x``, (B, H, T, D), laid out in memory as (B, T, H, D).

    A GPT's next layer reads this layout as (B, T, C) without a copy.
    """
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def split_qkv(packed: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, ...]:
    """Return q, (B, n_head, T, D), k and v, (B, n_kv_head, T, D): views of ``packed``, where they lie side by side."""
    B, T, width = packed.shape
    heads = packed.view(B, T, n_head + 2 * n_kv_head, width // (n_head + 2 * n_kv_head)).transpose(1, 2)
    return heads.split((n_head, n_kv_head, n_kv_head), dim=1)


def split_heads(packed: Tensor, n_head: int, n: int) -> tuple[Tensor, ...]:
    """Return n views (B, H, T, D) of ``packed``, (B, T, n * C)."""
    B, T, width = packed.shape
    return packed.view(B, T, n, n_head, width // n // n_head).permute(2, 0, 3, 1, 4).unbind(0)
