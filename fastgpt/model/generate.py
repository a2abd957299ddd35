"""Sampling from a GPT, one token at a time, with cached keys and values."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.model.gpt import GPT, KVCache


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
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
        temperature: logits are divided by it; 0 takes the most likely token. Values beyond fp32's range count as its
            smallest or largest.
        top_k: draw from the k most likely tokens only; a k beyond the vocabulary is no limit.
        top_p: draw from the most likely tokens only, as few as have this probability together.
        repetition_penalty: makes tokens of the context less likely: positive logits are divided by it, negative ones
            multiplied (Keskar et al., "CTRL", 2019); 1 for none.
        vocab_size: ids from here on are padding and never drawn.
        generator: source of randomness.

    Raises:
        RequestError: the logits are not finite, as those of a model that has diverged.
    """
    block_size = model.config.block_size
    context = prompt[:, -block_size:]
    length = min(block_size, context.shape[1] + max_new_tokens)
    cache = KVCache(model.config, prompt.shape[0], model.transformer.wte.weight, length)
    unread = context
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > block_size:
            context = unread = context[:, -(block_size // 2 or 1) :]
            cache.length = 0
        logits = model(unread, cache=cache)[:, :vocab_size].float()
        if not logits.sum().isfinite():  # one pass over the vocabulary; isfinite takes several
            raise RequestError("the model's logits are not finite: its training has diverged, so it cannot be sampled")
        if repetition_penalty != 1.0:
            logits = _penalised(logits, context, repetition_penalty)
        unread = _draw(logits, temperature, top_k, top_p, generator)
        context = torch.cat((context, unread), dim=1)
        yield unread.squeeze(1)


def _penalised(logits: Tensor, context: Tensor, penalty: float) -> Tensor:
    """(B, V) logits, with those of the tokens in ``context``, (B, T), made less likely."""
    own = logits.gather(1, context)
    return logits.scatter(1, context, torch.where(own > 0, own / penalty, own * penalty))


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B, V) fp32 logits to (B, 1) token ids."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    # The largest becomes 0 first, so that it stays finite whatever it is divided by.
    logits = logits - logits.amax(-1, keepdim=True)
    fp32 = torch.finfo(torch.float32)
    logits = logits / min(max(temperature, fp32.tiny), fp32.max)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # of the more likely tokens; 0 for the first, which always stays
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)
