"""Philox-4x32-10, the counter-based generator that dropout and the optimizers draw from, the same on every backend.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011. A generator without state: a key
and a counter of four 32-bit words give four random words. A kernel therefore redraws in the backward what it drew in
the forward, in any order. csrc/philox.h and Triton's ``tl.philox`` compute the same words.

Dropout:  key = seed, counter = (column // 4, row, batch * n_head + head, 0), output word column % 4.
AdamW:    key = seed + step, counter = (element // 4, number of the tensor, purpose, 0), output word element % 4;
          the purpose is 0 for moments and 1 for parameters. Each word gives two numbers of 16 bits: the upper half
          rounds exp_avg, the lower half exp_avg_sq or the parameter.
Muon:     key = seed + step, counter = (element // 8, number of the tensor, 2, 0); two elements take the halves of a
          word, the first of them the upper one.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(seed: Tensor, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return 32-bit random words, one for each (head, row, column), as int64 in [0, 2**32).

    Args:
        seed: 0-dim int64, the key.
        heads: int64; its shape and those of ``rows`` and ``columns`` broadcast together.
        rows: int64.
        columns: int64.
    """
    words = philox_4x32(seed, *torch.broadcast_tensors(columns // 4, rows, heads))
    return words.gather(0, (columns % 4).expand_as(words[0]).unsqueeze(0)).squeeze(0)


def philox_4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Return all four words of each counter (c0, c1, c2, 0), (4, …) int64 in [0, 2**32), for counters (…) int64."""
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves exact
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the multipliers of the paper
        c0, c2 = ((p1 >> 32) & MASK) ^ c1 ^ key0, ((p0 >> 32) & MASK) ^ c3 ^ key1
        c1, c3 = p1 & MASK, p0 & MASK
        key0, key1 = (key0 + 0x9E3779B9) & MASK, (key1 + 0xBB67AE85) & MASK  # golden ratio, sqrt(3) - 1
    return torch.stack((c0, c1, c2, c3))


def dropout_threshold(dropout_p: float) -> int:
    """Return the 32-bit word from which on a weight is kept: a word is below it with probability ``dropout_p``."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def dropout_factors(seed: Tensor, dropout_p: float, B: int, H: int, n_query: int, n_key: int) -> Tensor:
    """Return (B, H, n_query, n_key) of 0 and 1 / (1 - p): the dropout that every backend draws for ``seed``."""
    device = seed.device
    heads = torch.arange(B * H, device=device).view(B, H, 1, 1)
    rows = torch.arange(n_query, device=device).view(1, 1, n_query, 1)
    columns = torch.arange(n_key, device=device).view(1, 1, 1, n_key)
    kept = philox(seed, heads, rows, columns) >= dropout_threshold(dropout_p)
    return kept / (1.0 - dropout_p)
