"""Batches of random blocks from memory-mapped shards, each block once an epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastgpt.data.tokenizers import Tokens
from fastgpt.errors import RequestError

ORDER = 2  # the version of the order that follows from a seed; a run resumes only in the same one


class BatchLoader:
    """Draws batches of random blocks without replacement.

    An epoch cuts each shard into blocks of ``block_size`` tokens, from a random offset on, and visits all of them in
    random order. The next one has another offset and another order. So no token is seen twice in an epoch, and none is
    left out but the less than ``block_size`` at either end of a shard. A batch may begin in one epoch and end in the
    next. Batches depend only on the shards' lengths, the two sizes and ``seed``: not on the version of NumPy.

    The order takes 4 bytes a block of memory: 39 MB for ten billion tokens in blocks of 1024.

    Args:
        shards: 1-D uint16 arrays, usually memory-mapped; only the pages that a block touches are read.
        batch_size: blocks in a batch, B.
        block_size: tokens in a block, T.
        seed: of each epoch's offsets and order.
        pin_memory: put batches in page-locked memory, from which a GPU copies without waiting.
        what: names the split in error messages.
        names: of the shards, for error messages; ``None`` for their numbers.
        vocab_size: ids must be smaller; ``None`` for any.

    Raises ``RequestError`` if no shard is long enough for one block and its next token, and when a batch is drawn that
    has an id outside the vocabulary.
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
        names: Sequence[str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.shards = list(shards)
        self.batch_size = batch_size
        self.block_size = block_size
        self.pin_memory = pin_memory
        self.names = list(names) if names is not None else [f"shard {i} of {what}" for i in range(len(self.shards))]
        self._vocab_size = vocab_size
        self._starts = np.array([max(0, len(shard) - block_size) for shard in self.shards], dtype=np.int64)
        # Positions at which a block may start are numbered through all shards; these are each shard's first and end.
        self._ends = np.cumsum(self._starts)
        self._firsts = self._ends - self._starts
        if not self._starts.any():
            longest = max(map(len, self.shards), default=0)
            has = "has" if len(self.shards) == 1 else "has no shard longer than"
            raise RequestError(
                f"{what} {has} {longest} tokens, too few for one block of {block_size} + 1 "
                "(the last token's target): lower --block_size or prepare more text"
            )
        self._seed = seed
        self._tokens_drawn = 0
        self._begin(epoch=0)

    @property
    def epochs(self) -> float:
        """How often the split has been seen so far: tokens drawn by its tokens."""
        return self._tokens_drawn / sum(map(len, self.shards))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch ``(x, y)``: fresh int64 CPU tensors of shape (B, T), ``y`` one token ahead."""
        self._tokens_drawn += self.batch_size * self.block_size
        return self._blocks_at(self._draw())

    def places(self, state: dict[str, Any], n_batches: int) -> list[tuple[str, int]]:
        """Where the blocks of the ``n_batches`` batches after ``state`` lie: the shard's name, and the first token."""
        now = self.state_dict()
        self.load_state_dict(state)
        positions = np.concatenate([self._draw() for _ in range(n_batches)])
        self.load_state_dict(now)
        owners = np.searchsorted(self._ends, positions, side="right")
        starts = positions - self._firsts[owners]
        return [(self.names[owner], start) for owner, start in zip(owners.tolist(), starts.tolist(), strict=True)]

    def _draw(self) -> npt.NDArray[np.int64]:
        """The positions of the blocks of the next batch, numbered through all shards."""
        parts: list[npt.NDArray[np.int64]] = []
        missing = self.batch_size
        while missing:
            if self._visited >= len(self._order):
                self._begin(self._epoch + 1)
            blocks = self._order[self._visited : self._visited + missing].astype(np.int64)
            owners = np.searchsorted(self._block_ends, blocks, side="right")
            parts.append(self._origins[owners] + blocks * self.block_size)
            self._visited += len(blocks)
            missing -= len(blocks)
        return np.concatenate(parts)

    def _begin(self, epoch: int) -> None:
        """Cut the shards anew and shuffle the blocks: all of it follows from the seed and the epoch."""
        # RandomState, because NumPy never changes what it draws; what default_rng() draws may change in any version.
        rng = np.random.RandomState([self._seed & 0xFFFFFFFF, self._seed >> 32, epoch])
        # A shard shorter than two blocks leaves fewer offsets at which it holds one.
        offsets = rng.randint(np.clip(self._starts, 1, self.block_size), dtype=np.int64)
        n_blocks = (self._starts - offsets + self.block_size - 1) // self.block_size
        self._block_ends = np.cumsum(n_blocks)
        # Where a shard's block 0 would start if the blocks of the shards before it were its own.
        self._origins = self._firsts + offsets - (self._block_ends - n_blocks) * self.block_size
        total = int(self._block_ends[-1])
        self._order = np.arange(total, dtype=np.min_scalar_type(total))
        rng.shuffle(self._order)
        self._epoch, self._visited = epoch, 0

    def evenly_spaced(self, n_batches: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``n_batches`` batches of ``batch_size`` blocks that lie evenly over the whole split: for evaluation.

        The same ones at every call and for every seed, so that two evaluations differ by the model alone.
        Leaves the epoch where it stands.
        """
        n_blocks = n_batches * batch_size
        positions = (np.arange(n_blocks) + 0.5) * (self._ends[-1] / n_blocks)
        for batch in positions.astype(np.int64).reshape(n_batches, batch_size):
            yield self._blocks_at(batch)

    def _blocks_at(self, positions: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch whose blocks start at ``positions``, numbered through all shards."""
        shape = (len(positions), self.block_size)
        x = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        y = torch.empty(shape, dtype=torch.int64, pin_memory=self.pin_memory)
        x_rows, y_rows = x.numpy(), y.numpy()
        owners = np.searchsorted(self._ends, positions, side="right")
        for row, (position, owner) in enumerate(zip(positions.tolist(), owners.tolist(), strict=True)):
            start = position - int(self._firsts[owner])
            block = self.shards[owner][start : start + self.block_size + 1]
            if self._vocab_size is not None and block.max() >= self._vocab_size:
                raise RequestError(
                    f"{self.names[owner]} has the token {block.max()} at position {start + int(block.argmax()):,}, "
                    f"outside the vocabulary of {self._vocab_size}"
                )
            x_rows[row] = block[:-1]
            y_rows[row] = block[1:]
        return x, y

    def state_dict(self) -> dict[str, Any]:
        """The place in the order, ready for JSON: what ``load_state_dict`` needs to go on from there."""
        return {
            "order": ORDER,
            "seed": self._seed,
            "epoch": self._epoch,
            "visited": self._visited,
            "tokens_drawn": self._tokens_drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the loader that gave ``state`` stood. It must have had the same shards and sizes.

        Raises:
            RequestError: ``state`` is not what ``state_dict`` gives.
        """
        if state.keys() != self.state_dict().keys() or state["order"] != ORDER:
            raise RequestError(
                "cannot resume: the checkpoint does not tell which batches were drawn, because another version of "
                "fastgpt wrote it; start anew with --init_from scratch"
            )
        if min(state.values()) < 0:
            raise RequestError(f"cannot resume: the checkpoint states a position in the data that is none, {state}")
        if (state["seed"], state["epoch"]) != (self._seed, self._epoch):  # shuffling ten million blocks takes 0.6 s
            self._seed = state["seed"]
            self._begin(state["epoch"])
        if state["visited"] > len(self._order):
            raise RequestError(f"cannot resume: of the {len(self._order)} blocks, {state['visited']} have been drawn")
        self._visited, self._tokens_drawn = state["visited"], state["tokens_drawn"]
