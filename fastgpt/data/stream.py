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
    temperature: float = 0.8, top_k: int = 200, top_p: float | None = None, repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
) -> int:  # fmt: skip
    """Print a sample as it is generated, the prompt (at least one token) first; returns how many tokens were drawn.

    Args:
        model: any mode.
        tokenizer: its own.
        prompt: token ids.
        max_new_tokens: how many to draw at most.
        seed: of the draws.
        temperature: as in :func:`generate`, as are the next three.
        top_k: see there.
        top_p: see there.
        repetition_penalty: see there.
        stop: texts before which the sample ends.

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
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    drawn = 0

    def ids() -> Iterator[int]:
        nonlocal drawn
        for token in tokens:
            drawn += 1
            yield int(token)

    def generated() -> Iterator[str]:
        for text in decode_stream(tokenizer, itertools.chain(prompt, ids())):
            if drawn:
                yield text
            else:
                sys.stdout.write(text)  # of the prompt, where nothing stops

    try:
        for text in until(generated(), stop):
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        print()  # an error or Ctrl-C ends the line too
        model.train(training)
    return drawn


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of the texts in ``stop``. What may become one of them is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for text in stop if (place := held.find(text)) >= 0]
        if found:
            yield held[: min(found)]
            return
        kept = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


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
