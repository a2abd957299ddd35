"""Output that never ends a run: for consoles that lack characters, readers that go away, and full disks."""

import os
import sys
from contextlib import suppress


def make_safe() -> None:
    """Print ``?`` for characters that the console's encoding lacks, and print nothing if there is no console."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a stand-in of a test may not have it
            stream.reconfigure(errors="replace")


def abandon() -> None:
    """Discard the rest of standard output, because its reader has gone.

    Without this, Python's own flush at exit fails on what is still buffered, and turns the exit status into 120.
    """
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no stream, a stand-in, or closed
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def note(text: str) -> None:
    """Print a line on standard error. If that fails, the line is lost."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Flush standard output. What cannot be written is lost; no error is raised."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        abandon()
