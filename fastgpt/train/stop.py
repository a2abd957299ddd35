"""Reasons to stop a run before its end: a signal, or the time limit."""

import math
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Hears signals while it is entered, and knows the time limit. The loop asks for it between updates.

    The first signal lets the update finish, so that a checkpoint can be saved. A second one of either kind raises
    ``KeyboardInterrupt`` at once. The handlers from before are restored at the end.

    Args:
        max_hours: the time limit, counted from ``with``; 0 for none.
    """

    def __init__(self, max_hours: float) -> None:
        self._seconds = max_hours * 3600 or math.inf
        self._deadline = math.inf
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._deadline = time.monotonic() + self._seconds
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        return self._signal is not None or time.monotonic() > self._deadline

    @property
    def reason(self) -> str:
        """``SIGTERM`` or ``the time limit``."""
        return "the time limit" if self._signal is None else signal.Signals(self._signal).name

    @property
    def exit_status(self) -> int:
        """0 for the time limit; 128 + N for signal N, as shells have it."""
        return 0 if self._signal is None else 128 + self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        print("\nstopping after this step; once more stops at once, without a checkpoint", file=sys.stderr)
