"""attention with fewer heads of keys, a window, documents and a soft cap, in plain PyTorch."""

import itertools
import math

import torch
import torch.nn.functional as F


def visible(T, S, causal=True, window=None, documents=None, device=None):
    """(T, S) or (B, 1, T, S) booleans, from the definition: one query and one key at a time would give the same."""
    queries, keys = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    mask = keys <= queries if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (keys > queries - window)
    if documents is not None:  # the same document: the same start
        mask = mask & (documents[:, None, S - T :, None] == documents[:, None, None, :])
    return mask


def formula(causal=True, scale=None, window=None, softcap=None, documents=None, factors=None, from_lse=False):
    """Attention as it is written down; the weights are exp(score - logsumexp) if ``from_lse``."""

    def plain(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        T, S = scores.shape[-2:]
        hidden = ~visible(T, S, causal, window, documents, q.device)
        scores = scores.masked_fill(hidden, -math.inf)
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp() if from_lse else scores.softmax(-1)
        return (weights if factors is None else weights * factors.to(weights.dtype)) @ v

    return plain


def sdpa(causal=True, scale=None, window=None, softcap=None, documents=None):
    """PyTorch's own, which like ours recomputes the weights from the logsumexp. With a soft cap, which it has not, a
    formula that does so.
    """
    if softcap is not None:
        return formula(causal, scale, window, softcap, documents, from_lse=True)

    def peer(q, k, v):
        mask = visible(q.shape[2], k.shape[2], causal, window, documents, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    return peer


def starts_of(lengths, S, B=1, device=None):
    """(B, S) int32: documents of these lengths over and over, in each batch entry from another length on."""
    rows = []
    for b in range(B):
        of_row = itertools.cycle(lengths[b % len(lengths) :] + lengths[: b % len(lengths)])
        row = []
        while len(row) < S:
            row += [len(row)] * next(of_row)
        rows.append(row[:S])
    return torch.tensor(rows, dtype=torch.int32, device=device)
