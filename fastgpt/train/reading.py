"""What an update came to, read from the device without stopping it."""

import time

import torch

from fastgpt.train.step import TrainStep


class Moment:
    """When a device is done with all that it has been given so far.

    Args:
        device: which.
        step: updates done by then.
    """

    def __init__(self, device: torch.device, step: int) -> None:
        self.step = step
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time = time.perf_counter()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds from ``earlier``; waits until this moment has come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


class Reading:
    """Loss and gradient norm of the last update, copied while the device goes on.

    Args:
        train_step: has just been called.
        step: number of that update.
        tokens: seen by then.
        lr: its learning rate.
        since: the moment from which the time of an update is counted.
    """

    def __init__(self, train_step: TrainStep, step: int, tokens: int, lr: float, since: Moment) -> None:
        self.step, self.tokens, self.lr = step, tokens, lr
        norm = train_step.grad_norm
        self._loss = train_step.loss.to("cpu", non_blocking=True, copy=True)
        self._grad_norm = None if norm is None else norm.to("cpu", non_blocking=True, copy=True)
        self._since, self.end = since, Moment(train_step.loss.device, step)

    def seconds(self) -> float:
        """Mean time of an update since the moment given; waits until this one is done."""
        return self.end.seconds_since(self._since) / (self.end.step - self._since.step)

    def loss(self) -> float:
        """Mean loss of the update's micro-batches; to be read after :meth:`seconds`."""
        return self._loss.item()

    def grad_norm(self) -> float | None:
        """Gradient norm before clipping, ``None`` without; to be read after :meth:`seconds`."""
        return None if self._grad_norm is None else self._grad_norm.item()
