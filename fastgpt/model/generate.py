"""Sampling from a GPT, one token at a time, with cached keys and values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.model.gpt import GPT, KVCache


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield ``max_new_tokens`` sampled tokens, each ``(B,)`` int64, as they are drawn.

    A sequence may outgrow ``block_size``: positions being learned, the context is then cut to its last
    half and read anew, once every ``block_size / 2`` tokens.

    Args:
        model: in eval mode.
        prompt: ``(B, T)`` int64, T at least 1; only its last ``block_size`` tokens are read.
        max_new_tokens: how many to draw.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only.
        vocab_size: ids from here on are padding and never drawn.
        generator: source of randomness.
    """
    block_size = model.config.block_size
    context = prompt[:, -block_size:]
    cache = KVCache(model.config, prompt.shape[0], model.transformer.wte.weight)
    unread = context
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > block_size:
            context = unread = context[:, -(block_size // 2 or 1) :]
            cache.length = 0
        logits = model(unread, cache=cache)[:, :vocab_size].float()
        unread = _draw(logits, temperature, top_k, generator)
        context = torch.cat((context, unread), dim=1)
        yield unread.squeeze(1)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B, 1) token ids."""
    if temperature < torch.finfo(logits.dtype).tiny:  # a quotient by 0, or by less than fp32 has, is no logit
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0, so that none overflows to infinity
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
