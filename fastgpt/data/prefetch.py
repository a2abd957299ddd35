"""Batches on the device before they are asked for."""

from typing import Any

import torch
from torch import Tensor

from fastgpt.data.loader import BatchLoader
from fastgpt.errors import RequestError


class Prefetcher:
    """A loader's random batches on a device, on a GPU always one ahead.

    While the GPU works on one batch the next is drawn, and copied from page-locked memory on a stream of its own; so
    the work never waits for the disk nor for the bus.

    Args:
        loader: on a GPU one with ``pin_memory``.
        device: where batches are wanted.
    """

    def __init__(self, loader: BatchLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[tuple[Tensor, Tensor], torch.cuda.Event] | RequestError | None = None
        self._state: dict[str, Any] | None = None  # of the loader, before it drew the batch ahead

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch ``(x, y)``, (B, T) int64 on the device, good until the one after it is asked for."""
        if self._stream is None:
            return self.loader.next()
        if isinstance(self._ahead, RequestError):
            raise self._ahead
        batch, copied = self._ahead or self._fetch(self._stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch:
            tensor.record_stream(current)  # so that its memory is not written again before the work has read it
        self._state = self.loader.state_dict()
        try:
            self._ahead = self._fetch(self._stream)
        except RequestError as error:  # the batch ahead has a bad id: for whoever asks for it, if anybody does
            self._ahead = error
        return batch

    def _fetch(self, stream: torch.cuda.Stream) -> tuple[tuple[Tensor, Tensor], torch.cuda.Event]:
        x, y = self.loader.next()
        with torch.cuda.stream(stream):
            batch = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        return batch, copied

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands but for the batch ahead, which nobody has seen."""
        return self._state or self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where the one that gave ``state`` stood."""
        self._ahead = self._state = None
        self.loader.load_state_dict(state)
