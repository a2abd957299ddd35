"""The loss of a model on a text: in nats a token, as perplexity, and in bits a byte.

Bits a byte compare models with different tokenizers, since they count the text and not the tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.tokenizers import Tokens
from fastgpt.errors import RequestError
from fastgpt.model import GPT

IGNORED = -1  # a target that has no loss

# The first token, the end, and the last token that has been predicted already. Targets are one token ahead.
Window = tuple[int, int, int]


@dataclass(frozen=True)
class Loss:
    """A loss over a text.

    Attributes:
        nats: mean over tokens.
        error: standard error of that mean; ``None`` for a single window. Windows are taken for independent of each
            other, which neighbours in a document are not quite.
        tokens: that were predicted.
        n_bytes: of their text; ``None`` if unknown. The first token is never predicted, and not all windows need be
            taken: so these are the bytes of the whole text, in the proportion of tokens.
    """

    nats: float
    error: float | None
    tokens: int
    n_bytes: float | None

    @property
    def perplexity(self) -> float:
        """Exp of the loss: comparable between models with the same tokenizer only."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between all models; ``None`` if the bytes are unknown."""
        return self.nats * self.tokens / self.n_bytes / math.log(2) if self.n_bytes else None

    @property
    def bits_per_byte_error(self) -> float | None:
        """Standard error of the bits a byte."""
        return self.error * self.tokens / self.n_bytes / math.log(2) if self.error and self.n_bytes else None


def text_loss(
    model: GPT, tokens: Tokens, n_bytes: int | None, *, stride: int | None = None, n_windows: int | None = None,
    batch_size: int = 8,
) -> Loss:  # fmt: skip
    """The loss of every token but the first.

    Args:
        model: in eval mode.
        tokens: of the text, 1-D.
        n_bytes: of the text, in UTF-8; ``None`` if unknown.
        stride: tokens from one window to the next; ``None`` for windows side by side. With a smaller one each token
            has at least ``block_size - stride`` tokens before it, which costs more time and lowers the loss.
        n_windows: take so many windows, evenly spaced; ``None`` for all.
        batch_size: windows at a time.

    Raises:
        RequestError: there are less than two tokens, or the stride is not from 1 to ``block_size``.
    """
    T = model.config.block_size
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise RequestError(f"--stride must be from 1 to the model's context of {T}, got {stride}")
    if len(tokens) < 2:
        raise RequestError(f"a text of {len(tokens)} tokens has no token to predict")
    windows = list(_windows(len(tokens), T, stride))
    everything = len(windows)
    if n_windows is not None and n_windows < everything:
        windows = [windows[int((i + 0.5) * everything / n_windows)] for i in range(n_windows)]
    found: list[tuple[float, int]] = []
    for same in _of_equal_length(windows, batch_size):
        found.extend(_window_losses(model, *_batch(tokens, same)))
    sums, counts = np.array(found).T
    nats = float(sums.sum() / counts.sum())
    error = None
    if len(sums) > 1:  # of a ratio of two sums, by the delta method
        residuals = sums - nats * counts
        error = math.sqrt(len(sums) / (len(sums) - 1) * float(residuals @ residuals)) / float(counts.sum())
    total = int(counts.sum())
    return Loss(nats, error, total, n_bytes and n_bytes * total / len(tokens))


def _windows(n: int, T: int, stride: int) -> Iterator[Window]:
    """The windows over n tokens."""
    start = done = 0
    while done < n - 1:
        end = min(start + T, n - 1)
        yield start, end, done
        done = end
        start += stride


def _of_equal_length(windows: Sequence[Window], most: int) -> Iterator[list[Window]]:
    """The windows in batches of up to ``most`` of equal length; only the last ones are shorter."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == most or window[1] - window[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _batch(tokens: Tokens, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """``idx`` and ``targets``, (B, T) int64, of windows of equal length."""
    idx = torch.from_numpy(np.stack([tokens[start:end] for start, end, _ in windows]).astype(np.int64))
    targets = torch.from_numpy(np.stack([tokens[start + 1 : end + 1] for start, end, _ in windows]).astype(np.int64))
    for row, (start, _, done) in enumerate(windows):
        targets[row, : done - start] = IGNORED
    return idx, targets


@torch.no_grad()
def _window_losses(model: GPT, idx: Tensor, targets: Tensor) -> Iterator[tuple[float, int]]:
    """Sum of losses and number of targets of each row."""
    device = model.output_weight.device
    hidden = model.transformer(idx.to(device))  # (B, T, C)
    for x, row in zip(hidden, targets.to(device), strict=True):
        count = int((row != IGNORED).sum())
        yield model.loss(x, row).item() * count, count
