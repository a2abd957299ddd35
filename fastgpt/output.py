"""Standard output that costs no work: characters that a console lacks, readers that go away, disks that are full."""

import os
import sys
from contextlib import suppress


def make_safe() -> None:
    """Print ``?`` for a character that the console's encoding lacks, and nothing where there is no console at all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a stand-in of a test may not have it
            stream.reconfigure(errors="replace")


def abandon() -> None:
    """Send the rest of standard output nowhere: whoever read it has gone.

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
    """Print a line on standard error, where nobody need read it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Flush standard output; what cannot be written is lost, and nothing else."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        abandon()
