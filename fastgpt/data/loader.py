"""Batches of random crops from memory-mapped shards."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastgpt.data.tokenizers import Tokens
from fastgpt.errors import RequestError


class BatchLoader:
    """Draws batches of random crops, as nanoGPT does: independently, with replacement, without epochs.

    Every position at which ``block_size + 1`` tokens follow within one shard is as likely as any other.
    Batches depend only on the shards' lengths, the two sizes and ``seed``.

    Args:
        shards: 1-D uint16 arrays, usually memory-mapped; only the pages that a crop touches are read.
        batch_size: crops in a batch, B.
        block_size: tokens in a crop, T.
        seed: of the generator of crop positions; give each rank and each split its own.
        pin_memory: put batches in page-locked memory, from which a GPU copies without waiting.
        what: names the shards in the error message.

    Raises ``RequestError`` if no shard is long enough for one crop and its next token.
    """

    def __init__(
        self,
        shards: Sequence[Tokens],
        batch_size: int,
        block_size: int,
        seed: int,
        *,
        pin_memory: bool = False,
        what: str = "the dataset",
    ) -> None:
        self.shards = list(shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.pin_memory = pin_memory
        starts = [max(0, len(shard) - block_size) for shard in self.shards]
        # Crop positions are numbered through all shards; these are each shard's first and end.
        self._ends = np.cumsum(starts, dtype=np.int64)
        self._firsts = self._ends - starts
        if not any(starts):
            longest = max(map(len, self.shards), default=0)
            has = "has" if len(self.shards) == 1 else "has no shard longer than"
            raise RequestError(
                f"{what} {has} {longest} tokens, too few for one block of {block_size} + 1 "
                "(the last token's target): lower --block_size or prepare more text"
            )
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch ``(x, y)``: fresh int64 CPU tensors of shape (B, T), ``y`` one token ahead."""
        return self._crops(self._rng.integers(self._ends[-1], size=self.batch_size))

    def evenly_spaced(self, n_batches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``n_batches`` batches whose crops lie evenly over the whole split: for evaluation.

        The same ones at every call and for every seed, so that two evaluations differ by the model alone.
        Takes nothing from the random sequence.
        """
        n_crops = n_batches * self.batch_size
        positions = (np.arange(n_crops) + 0.5) * (self._ends[-1] / n_crops)
        for batch in positions.astype(np.int64).reshape(n_batches, self.batch_size):
            yield self._crops(batch)

    def _crops(self, positions: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch whose crops start at ``positions``, numbered through all shards."""
        shape = (self.batch_size, self.block_size)
        x = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        y = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        x_rows, y_rows = x.numpy(), y.numpy()
        owners = np.searchsorted(self._ends, positions, side="right")
        for row, (position, owner) in enumerate(zip(positions.tolist(), owners.tolist(), strict=True)):
            start = position - int(self._firsts[owner])
            crop = self.shards[owner][start : start + self.block_size + 1]
            x_rows[row] = crop[:-1]
            y_rows[row] = crop[1:]
        return x, y

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands, ready for JSON: what ``load_state_dict`` needs to go on from there."""
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the loader that gave ``state`` stood. It must have had the same arguments."""
        self._rng.bit_generator.state = state["rng"]
