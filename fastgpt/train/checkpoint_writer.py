"""Checkpoints written while training goes on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastgpt import hardware
from fastgpt.errors import RequestError
from fastgpt.train import checkpoint
from fastgpt.train.checkpoint import State
from fastgpt.train.memory import ran_out
from fastgpt.train.parameters import ParameterStore


class CheckpointWriter:
    """Writes checkpoints in a thread, from a copy of the tensors: the training loop waits for the copy only.

    One checkpoint is written at a time. Where memory has no room for the copy, the loop waits for the disk too.

    Args:
        run_dir: folder of the run.

    Attributes:
        step: of the checkpoint that was begun last.
    """

    def __init__(self, run_dir: Path) -> None:
        self.step = 0
        self._run_dir = run_dir
        self._thread: threading.Thread | None = None
        self._written: State | None = None
        self._error: BaseException | None = None
        self._copying = True
        self._copies: dict[str, Tensor] = {}  # by kind; kept, because fresh memory costs as much time as the copy

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._thread is None or not self._thread.is_alive()

    def start(
        self,
        state: State,
        store: ParameterStore,
        moments: dict[str, Tensor],
        keep: int | None,
        best_before: int | None,
        before_writing: Callable[[], None],
    ) -> None:
        """Begin to write a checkpoint; the tensors may change as soon as this returns.

        Call :meth:`wait` first: it tells what has become of the one before.

        Args:
            state: what is saved besides tensors.
            store: has the parameters.
            moments: flat buffers by kind.
            keep: how many of the newest checkpoints remain, see :func:`checkpoint.save`.
            best_before: the step whose checkpoint was the best until this one.
            before_writing: is called in the thread; if it raises, nothing is written.
        """
        assert self.idle
        self.step = state.step
        flats = {"master": store.master, **moments}
        copies = self._copies_of(flats)
        random = checkpoint.random_state()

        def write() -> None:
            try:
                before_writing()
                named = {kind: store.named(flat, kind) for kind, flat in (copies or flats).items()}
                parameters = named.pop("master")
                checkpoint.save(self._run_dir, state, parameters, named, keep, random, best_before)
            except (RequestError, checkpoint.NotSaved) as error:  # for the thread that waits
                self._error = error
            except Exception as error:  # such as no memory for a file's head: the run can go on without this one
                self._error = checkpoint.NotSaved(f"{type(error).__name__}: {error}")
            else:
                self._written = state

        if copies:
            # A daemon: when the process is told to end at once, an unfinished checkpoint has a name that nobody reads.
            thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            with suppress(RuntimeError):  # the system gives no more threads
                thread.start()
                self._thread = thread
                return
        write()

    def wait(self) -> State | None:
        """Wait until the checkpoint is on the disk; its state, or ``None`` if there was nothing to wait for.

        Raises:
            NotSaved: the disk did not take it.
            RequestError: raised by ``before_writing``.
        """
        if self._thread is not None:
            self._thread.join()
        written, error = self._written, self._error
        self._thread = self._written = self._error = None
        if error is not None:
            raise error
        return written

    @property
    def has_copies(self) -> bool:
        """Whether memory is held for the copies."""
        return bool(self._copies)

    def free_copies(self) -> bool:
        """Give up the memory of the copies for good; whether there was any. Training waits for the disk from now on."""
        had = bool(self._copies)
        if self._thread is not None:
            self._thread.join()  # it reads them
        self._copying, self._copies = False, {}
        return had

    def _copies_of(self, flats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU by kind; none if they would take more than half of the memory that is free."""
        if not self._copying:
            return {}
        if not self._copies:
            n_bytes = sum(flat.numel() * flat.element_size() for flat in flats.values())
            free, _ = hardware.memory(torch.device("cpu"))
            if n_bytes > free.amount // 2:
                return {}
            try:
                self._copies = {kind: torch.empty_like(flat, device="cpu") for kind, flat in flats.items()}
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                return {}
        for kind, flat in flats.items():
            self._copies[kind].copy_(flat)
        return self._copies
