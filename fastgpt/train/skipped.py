"""Updates that were skipped: how many, why, and where in the data they were."""

from collections.abc import Callable

from fastgpt.data.loader import BatchLoader
from fastgpt.train.metrics import UpdateMetrics
from fastgpt.train.spikes import WINDOW
from fastgpt.units import count_of

POSITIONS_KEPT = 10_000  # of the last updates, where fewer are logged


class SkippedUpdates:
    """Remembers where in the data each update began, until it is known whether the update was skipped.

    Args:
        loader: draws the training batches.
        skipped: updates that have been skipped and reported.
        spikes: those of them that stood out.

    Attributes:
        skipped: updates that have been reported.
        spikes: those of them that stood out.
    """

    def __init__(self, loader: BatchLoader, skipped: int = 0, spikes: int = 0) -> None:
        self._loader = loader
        self.skipped, self.spikes = skipped, spikes
        self._positions: dict[int, dict[str, int]] = {}  # by the update's number

    def begin(self, number: int, position: dict[str, int]) -> None:
        """Note where in the data an update begins.

        Args:
            number: of the update, counted from 1.
            position: the loader's state.
        """
        self._positions[number] = position
        self._positions.pop(number - POSITIONS_KEPT, None)

    def report(
        self, metrics: UpdateMetrics, *, overflows: bool, sigmas: float, micro_batches: Callable[[int], int]
    ) -> tuple[str, list[tuple[str, int]]] | None:
        """What was skipped since the last report: a sentence, and the blocks of the last one.

        Args:
            metrics: of the update that is reported now.
            overflows: whether to report gradients that were not finite.
            sigmas: of ``--skip_spikes``.
            micro_batches: how many are in an update, the first of which is 0.

        Returns:
            ``None`` if there is nothing to report. A block is the shard's file and the first token in it; there are
            none if the update is too long ago.
        """
        spikes = metrics.spikes() - self.spikes
        not_finite = (metrics.skipped() - self.skipped - spikes) * overflows
        self.skipped, self.spikes = metrics.skipped(), metrics.spikes()
        last = metrics.last_skipped()
        position = self._positions.get(last)
        self._positions = {number: place for number, place in self._positions.items() if number > metrics.step}
        reasons = []
        if not_finite:
            reasons.append((not_finite, "gradients were not finite"))
        if spikes:
            limit = f"{sigmas:g} standard deviations above the mean of the last {WINDOW}"
            reasons.append((spikes, f"loss or gradient norm more than {limit}"))
        if not reasons:
            return None
        text = "; ".join(f"{count_of(n, 'update')} up to step {metrics.step} skipped: {why}" for n, why in reasons)
        if position is None:
            return text, []
        blocks = self._loader.places(position, micro_batches(last - 1))
        (shard, token), more = blocks[0], len(blocks) - 1
        text += f". The last one, step {last}, was of {shard} at token {token:,}"
        return text + (f" and {count_of(more, 'other block')}, which metrics.jsonl lists" if more else ""), blocks
