"""LAMBADA and HellaSwag, from local JSONL files, scored as lm-evaluation-harness scores them.

Both ask how likely a continuation is after a context. LAMBADA (Paperno et al., 2016): the last word of a passage.
HellaSwag (Zellers et al., 2019): which of four endings.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT


@dataclass(frozen=True)
class Score:
    """The likelihood of a continuation.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Rate:
    """A share of examples, with its standard error."""

    value: float
    examples: int

    @property
    def error(self) -> float:
        """Of a proportion."""
        return math.sqrt(self.value * (1.0 - self.value) / max(1, self.examples - 1))


def lambada(model: GPT, tokenizer: Tokenizer, path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Accuracy and perplexity of the last word.

    Args:
        model: in eval mode.
        tokenizer: its own.
        path: JSONL; each line an object with ``text``.
        limit: the first so many lines; ``None`` for all.

    Returns:
        ``accuracy``, a :class:`Rate`, and ``perplexity``, exp of minus the mean log-likelihood of the words.

    Raises:
        RequestError: the file is not such a file.
    """
    pairs = []
    for where, line in _lines(path, limit):
        context, space, word = _text(where, line, "text").rpartition(" ")
        if not context or not word:
            raise RequestError(f"{where}: the text has less than two words")
        pairs.append((context, space + word))
    found = list(continuations(model, tokenizer, pairs))
    mean = sum(score.log_likelihood for score in found) / len(found)
    return {
        "accuracy": Rate(sum(score.greedy for score in found) / len(found), len(found)),
        "perplexity": math.exp(min(-mean, 700.0)),
    }


def hellaswag(model: GPT, tokenizer: Tokenizer, path: Path, *, limit: int | None = None) -> dict[str, Any]:
    """How often the right ending is the most likely one.

    Args:
        model: in eval mode.
        tokenizer: its own.
        path: JSONL; each line an object with ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings`` and ``label``.
        limit: the first so many lines; ``None`` for all.

    Returns:
        ``acc``, by the likelihood of the whole ending, and ``acc_norm``, by that over its number of characters; each a
        :class:`Rate`.

    Raises:
        RequestError: the file is not such a file.
    """
    pairs, labels, lengths = [], [], []
    for where, line in _lines(path, limit):
        first, second = _text(where, line, "ctx_a"), _text(where, line, "ctx_b")
        context = _plain(f"{_text(where, line, 'activity_label')}: {first} {second.capitalize()}")
        endings, label = line.get("endings"), line.get("label")
        if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
            raise RequestError(f"{where}: endings is not a list of texts")
        if not str(label).isdecimal() or int(str(label)) >= len(endings):
            raise RequestError(f"{where}: label {label!r} is not the number of an ending")
        plain = [_plain(ending) for ending in endings]
        pairs += [(context, f" {ending}") for ending in plain]
        labels.append(int(str(label)))
        lengths.append([max(1, len(ending)) for ending in plain])
    found = continuations(model, tokenizer, pairs)
    right = right_norm = 0
    for label, sizes in zip(labels, lengths, strict=True):
        likelihoods = [next(found).log_likelihood for _ in sizes]
        norms = [likelihood / size for likelihood, size in zip(likelihoods, sizes, strict=True)]
        right += likelihoods.index(max(likelihoods)) == label
        right_norm += norms.index(max(norms)) == label
    n = len(labels)
    return {"acc": Rate(right / n, n), "acc_norm": Rate(right_norm / n, n)}


def continuations(
    model: GPT, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> Iterator[Score]:
    """The score of each ``(context, continuation)``.

    A context and its continuation are encoded together, and cut where the context alone would end. A context that is
    too long loses its beginning.
    """
    encoded = [_encode(tokenizer, *pair, model.config.block_size) for pair in pairs]
    return scores(model, tokenizer.vocab_size, encoded, batch_size)


@torch.no_grad()
def scores(
    model: GPT, vocab_size: int, encoded: Sequence[tuple[list[int], int]], batch_size: int = 8
) -> Iterator[Score]:
    """The score of the last tokens of each sequence.

    Args:
        model: in eval mode.
        vocab_size: of the tokenizer; ids from here on are padding.
        encoded: the ids of each sequence, at most ``block_size + 1``, and how many of the last are scored: at least one
            fewer than there are.
        batch_size: sequences at a time.
    """
    device = model.output_weight.device
    for i in range(0, len(encoded), batch_size):
        batch = encoded[i : i + batch_size]
        longest = max(len(ids) for ids, _ in batch) - 1
        # What follows a row's last token changes nothing before it, because attention is causal.
        idx = torch.tensor([ids[:-1] + [0] * (longest + 1 - len(ids)) for ids, _ in batch], device=device)
        hidden = model.transformer(idx)  # (B, T, C)
        for x, (ids, n) in zip(hidden, batch, strict=True):
            targets = torch.tensor(ids[-n:], device=device)
            logits = model.logits(x[len(ids) - 1 - n : len(ids) - 1])[:, :vocab_size].float()  # (n, V)
            chosen = logits.log_softmax(-1).gather(1, targets[:, None])
            yield Score(chosen.sum().item(), bool((logits.argmax(-1) == targets).all()))


def _encode(tokenizer: Tokenizer, context: str, continuation: str, T: int) -> tuple[list[int], int]:
    """The last tokens of both that the model can read and predict, and how many of them are the continuation's."""
    whole = tokenizer.encode(context + continuation).tolist()
    n = max(1, len(whole) - len(tokenizer.encode(context)))
    n = min(n, T, len(whole) - 1)
    return whole[-(T + 1) :], n


def _plain(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow's titles, as lm-evaluation-harness cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lines(path: Path, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a JSONL file, with its place."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028, which JSON may have
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    numbered = [(f"{path}, line {i}", line) for i, line in enumerate(lines, start=1) if line.strip()][:limit]
    if not numbered:
        raise RequestError(f"{path} has no lines")
    for where, line in numbered:
        try:
            content = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{where}: {error}") from error
        if not isinstance(content, dict):
            raise RequestError(f"{where}: not an object")
        yield where, content


def _text(where: str, line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}: {name} is missing, or not a text")
    return value
