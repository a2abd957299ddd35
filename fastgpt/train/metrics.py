"""The metrics of an update, read from the device without making it wait."""

import time

import torch

from fastgpt.train.step import TrainStep


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

    Args:
        train_step: has just been called.
        step: number of that update, counted from 1.
        tokens: trained on so far.
        lr: learning rate of that update.
        since: the timestamp that the time of an update is counted from.
    """

    def __init__(self, train_step: TrainStep, step: int, tokens: int, lr: float, since: Timestamp) -> None:
        self.step, self.tokens, self.lr = step, tokens, lr
        loss, norm = train_step.loss, train_step.grad_norm
        self._has_norm = norm is not None
        # One copy of its own for all: the next update overwrites these tensors before anybody reads them.
        values = [loss, loss if norm is None else norm, train_step.skipped, train_step.most_in_a_row]
        self._values = torch.stack(values).to("cpu", non_blocking=True)
        self._since, self.end = since, Timestamp(train_step.loss.device, step)

    def seconds(self) -> float:
        """Mean time of an update since ``since``. Waits until this update is finished."""
        return self.end.seconds_since(self._since) / (self.end.step - self._since.step)

    def loss(self) -> float:
        """Mean loss of the update's micro-batches. Valid only after :meth:`seconds`, which waits for the copy."""
        return self._values[0].item()

    def grad_norm(self) -> float | None:
        """Gradient norm before clipping; ``None`` in fp16 without clipping. Valid only after :meth:`seconds`."""
        return self._values[1].item() if self._has_norm else None

    def skipped(self) -> int:
        """Updates that were skipped so far. Valid only after :meth:`seconds`."""
        return int(self._values[2].item())

    def most_in_a_row(self) -> int:
        """The longest row of them so far. Valid only after :meth:`seconds`."""
        return int(self._values[3].item())
