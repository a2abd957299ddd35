"""The metrics of an update, read from the device without making it wait."""

import time

import torch

from fastgpt.train.step import TrainStep

READ = ("loss", "grad_norm", "skipped", "spikes", "last_skipped", "most_in_a_row")  # attributes of the step


class Timestamp:
    """The time at which a device has finished all work queued so far.

    Args:
        device: the device.
        step: number of updates queued so far.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self.step = step
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            # The host runs ahead of the GPU, so its clock says nothing about the GPU's work; an event does.
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time = time.perf_counter()

    def seconds_since(self, earlier: "Timestamp") -> float:
        """Seconds from ``earlier`` to this one. Waits until the device has reached this one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3  # CUDA gives milliseconds


class UpdateMetrics:
    """Loss, gradient norm, time and skipped updates after the last update, copied while the device goes on working.

    All methods but :meth:`seconds` are valid only after it, because it waits for the copy.

    Args:
        train_step: has just been called.
        step: number of that update, counted from 1.
        tokens: trained on so far.
        lr: learning rate of that update.
        since: the timestamp that the time of an update is counted from.

    Attributes:
        first: number of updates before those that the time is the mean of.
    """

    def __init__(self, train_step: TrainStep, step: int, tokens: int, lr: float, since: Timestamp) -> None:
        self.step, self.tokens, self.lr = step, tokens, lr
        # One copy of its own for all: the next update overwrites these tensors before anybody reads them.
        self._values = torch.stack([getattr(train_step, name) for name in READ]).to("cpu", non_blocking=True)
        self.first = since.step
        self._since, self.end = since, Timestamp(train_step.loss.device, step)

    def seconds(self) -> float:
        """Mean time of an update since ``since``. Waits until this update is finished."""
        return self.end.seconds_since(self._since) / (self.end.step - self._since.step)

    def loss(self) -> float:
        """Mean loss of the update's micro-batches."""
        return self._read("loss")

    def grad_norm(self) -> float:
        """Gradient norm before clipping."""
        return self._read("grad_norm")

    def skipped(self) -> int:
        """Updates that were skipped so far."""
        return int(self._read("skipped"))

    def spikes(self) -> int:
        """Those of them that were skipped because they stood out."""
        return int(self._read("spikes"))

    def last_skipped(self) -> int:
        """The number of the last of them, counted from 1; 0 for none."""
        return int(self._read("last_skipped"))

    def most_in_a_row(self) -> int:
        """The longest row of updates so far whose gradients were not finite."""
        return int(self._read("most_in_a_row"))

    def _read(self, name: str) -> float:
        return self._values[READ.index(name)].item()
