"""Reasons to stop a run before its end: a signal, the time limit, or a file named STOP in its folder."""

import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; kill and schedulers; a terminal that was closed; ulimit -t. Windows has the first two only.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU") if hasattr(signal, name))
SAVING = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))
FILE = "STOP"
SECONDS_BETWEEN_LOOKS = 1.0  # at the file system, which may be a slow one
# A second Ctrl-C within this time is taken for the same one: torchrun and others pass on what the terminal also sends.
SAME_CTRL_C = 0.5  # seconds


class Interrupted(Exception):
    """The run was told to stop in the middle of an update or of an evaluation, which is abandoned."""


def _ignored_by_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """Hears signals while it is entered, knows the time limit, and looks for the file.

    The first signal is noticed between micro-batches and between the batches of an evaluation, so that a checkpoint can
    be saved. Later ones change nothing, except that a second Ctrl-C raises ``KeyboardInterrupt`` at once. SIGUSR1 asks
    for a checkpoint only. If nohup has started the process, SIGHUP stays ignored. The handlers from before are restored
    at the end.

    Args:
        run_dir: folder of the run.
        max_hours: the time limit, counted from ``with``; 0 for none.
    """

    def __init__(self, run_dir: Path, max_hours: float) -> None:
        self._file = run_dir / FILE
        self._seconds = max_hours * 3600 or math.inf
        self._deadline = self._next_look = math.inf
        self._signal: int | None = None
        self._signal_time = 0.0
        self._found_file = False
        self._save = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        now = time.monotonic()
        self._deadline, self._next_look = now + self._seconds, now
        numbers = [number for number in STOPPING if not _ignored_by_nohup(number)]
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        self._previous |= {number: signal.signal(number, self._note_save) for number in SAVING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the run is to stop."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            # os.path.exists, because Path.exists raises where a network file system has hiccups
            self._found_file = self._found_file or os.path.exists(self._file)
        return self._signal is not None or self._found_file or now > self._deadline

    @property
    def reason(self) -> str:
        """``SIGTERM``, ``the file …`` or ``the time limit``."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return f"the file {self._file}" if self._found_file else "the time limit"

    @property
    def exit_status(self) -> int:
        """128 + N for signal N, as shells have it; otherwise 0."""
        return 0 if self._signal is None else 128 + self._signal

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal or the file asks to stop; the time limit can wait for an update."""
        if self.requested and (self._signal is not None or self._found_file):
            raise Interrupted

    def take_save_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def remove_file(self) -> None:
        """Remove the file, which has been obeyed: a resumed run would stop at once."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if number == signal.SIGINT and time.monotonic() - self._signal_time > SAME_CTRL_C:
                raise KeyboardInterrupt
            return
        self._signal, self._signal_time = number, time.monotonic()
        with suppress(OSError, ValueError, RuntimeError):  # nobody may be there to read it, or a print be under way
            print("\nstopping with a checkpoint; Ctrl-C once more stops at once, without one", file=sys.stderr)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
