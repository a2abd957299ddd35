"""A model's text, printed as it is generated."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

import torch

from fastgpt.data.tokenizers import Tokenizer
from fastgpt.model import GPT
from fastgpt.model.generate import generate


def show(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], *, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int = 200,
) -> None:  # fmt: skip
    """Print a sample as it is generated, the prompt (at least one token) first.

    Raises:
        RequestError: as :func:`generate`.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    try:
        for text in decode_stream(tokenizer, itertools.chain(prompt, (int(token) for token in tokens))):
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        print()  # an error or Ctrl-C ends the line too
        model.train(training)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text as soon as it is complete. A character of several tokens is yielded after the last of them."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            pending.clear()
        elif len(pending) == 4:  # a character has at most 4 bytes, so the first byte is not part of one
            yield tokenizer.decode(pending[:1])
            pending.pop(0)
    yield tokenizer.decode(pending)
