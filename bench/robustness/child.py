"""A small run in a process of its own, forked from one that has imported everything: a tenth of the time."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg  # what a run imports when it draws
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401

from fastgpt import sample
from fastgpt.cli import run
from fastgpt.data import __main__ as data
from fastgpt.train import __main__ as train

COMMANDS = {"train": train.main, "sample": sample.main, "data": data.main}

# Of a small model whose files have every part that those of a large one have.
FLAGS = [
    "--device=cpu", "--dtype=float32", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--gradient_accumulation_steps=2", "--dropout=0.1", "--eval_interval=10", "--eval_iters=2", "--log_interval=1",
    "--warmup_iters=2",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: as a shell gives it, 128 + N for signal N; ``None`` if it had to be killed after ``timeout``.
        output: what it wrote to standard output and standard error.
    """

    status: int | None
    output: str


class Child:
    """``python -m fastgpt.COMMAND ARGS`` in a forked process with one thread.

    Fork only while this process has computed nothing with torch: its threads do not exist in the child.

    Args:
        command: ``train``, ``sample`` or ``data``.
        args: its arguments.
    """

    def __init__(self, command: str, args: Sequence[str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(command, args)

    def _become(self, command: str, args: Sequence[str]) -> None:
        status = 70  # of a child that cannot even begin
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGHUP, signal.SIGINT):  # which a background job of a shell ignores
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for descriptor in (1, 2):
                os.dup2(self._output.fileno(), descriptor)
            try:
                run(COMMANDS[command], args)
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if the child has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 60.0) -> Ended:
        """Wait for its end; kill it after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                return Ended(None, self._text())
            time.sleep(0.002)
        status = os.WEXITSTATUS(code) if os.WIFEXITED(code) else 128 + os.WTERMSIG(code)
        return Ended(status, self._text())

    def _text(self) -> str:
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        self._output.close()
        return text


def finish(command: str, *args: str) -> Ended:
    """Run a command to its end."""
    return Child(command, args).wait()


def prepare(folder: Path) -> Path:
    """A small dataset named ``d``; returns the folder for ``--data_dir``."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}; the quick brown fox\n" for i in range(400)))
    ended = finish(
        "data", "prepare", "text", str(text), "--tokenizer", "char", "--name", "d", "--data_dir", str(folder)
    )
    assert ended.status == 0, ended.output
    return folder
