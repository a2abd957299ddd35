"""Output that never ends a run: for consoles that lack characters, readers that go away, and full disks."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 200  # characters of a table in a file or a pipe


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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table. On a terminal that is too narrow for it, each row becomes a list of names and values."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    whole = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        whole.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        whole.add_row(*row)
    if Measurement.get(console, console.options.update(max_width=10_000), whole).maximum <= console.width:
        console.print(whole)
        return
    if title is not None:
        console.print(title)
    for row in rows:
        facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        facts.add_column(overflow="fold")
        facts.add_column(overflow="fold")
        for name, value in zip(columns, row, strict=True):
            facts.add_row(name, value)
        console.print(facts)
        console.print()
