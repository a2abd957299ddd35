"""Updates that stand out of the ones before them, found on the device."""

import math

import torch
from torch import Tensor

WINDOW = 128  # updates, as in llm.c; nothing stands out before there are so many


class SpikeDetector:
    """Compares an update's loss and gradient norm with the mean and standard deviation of the last ``WINDOW`` updates.

    All of it stays on the device, so that it can be recorded in a CUDA graph. Skipped updates count in the window too,
    because a level that lasts is not a spike.

    Args:
        sigmas: standard deviations above the mean from which on an update stands out.
        device: of the losses and norms.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self._sigmas = sigmas
        # Losses and norms, the newest at the end, (2, WINDOW) fp32. NaN where there is none yet.
        self._window = torch.full((2, WINDOW), math.nan, device=device)

    def norm_limit(self, loss: Tensor) -> Tensor:
        """The gradient norm above which to skip an update, 0-dim; -1 if its ``loss`` alone is a reason to skip it."""
        spread, mean = torch.std_mean(self._window, dim=1)
        limits = mean + self._sigmas * spread
        # NaN before the window is full; and without any spread, the smallest rounding error would stand out
        limits = torch.where(spread > 0, limits, math.inf)
        return torch.where(loss > limits[0], -1.0, limits[1])

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Put an update into the window, both 0-dim. One that is not finite would make the window useless."""
        new = torch.stack([loss, norm])[:, None]
        moved = torch.cat([self._window[:, 1:], new], dim=1)
        self._window.copy_(torch.where(new.isfinite().all(), moved, self._window))

    def state_dict(self) -> list[list[float]]:
        """The losses and the norms in the window, ready for JSON."""
        return [[value for value in row if not math.isnan(value)] for row in self._window.tolist()]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Continue with the window that :meth:`state_dict` gave; nothing changes if it is empty.

        Raises:
            ValueError: ``state`` is not what ``state_dict`` gives.
        """
        if not state:
            return
        if len(state) != 2 or len(state[0]) != len(state[1]) or len(state[0]) > WINDOW:
            raise ValueError(f"expected the losses and the norms of up to {WINDOW} updates")
        if state[0]:
            self._window[:, -len(state[0]) :] = torch.tensor(state)
