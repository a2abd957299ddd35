"""What a run says: ``metrics.jsonl``, a live line on a terminal or plain lines elsewhere, and the loss plot."""

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fastgpt import output
from fastgpt.errors import RequestError
from fastgpt.train.trackers import Tracker
from fastgpt.units import SHORT_DTYPES, dtype_name, duration


class RunLog:
    """Shows what a run says, and writes its metrics to a file as they come. Open inside ``with``.

    Nothing here raises because words cannot be delivered. A console that nobody reads any more is given up. Metrics
    that a full disk refuses are kept and written when there is room again. A tracker that fails is dropped.

    Args:
        path: ``metrics.jsonl``; appended to.
        max_iters: the last step, for the time left.
        console: where to show; standard output by default.
        trackers: get every record too, and are closed with the log.
        work: done by the updates before a step, in any unit; all updates are alike if it is not given.
    """

    def __init__(
        self, path: Path, max_iters: int, console: Console | None = None, trackers: Sequence[Tracker] = (),
        work: Callable[[int], float] = float,
    ) -> None:  # fmt: skip
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.trackers = trackers
        self._path = path
        self._file: int | None = None  # descriptor
        self._unwritten = b""  # lines, or the rest of one, that the disk had no room for
        self._shown = True  # until nobody reads the console any more
        self._max_iters = max_iters
        self._n_logged = 0  # updates
        self._ms = 0.0  # of a unit of work, running mean
        self._work = work
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "RunLog":
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RequestError(f"cannot write {self._path}: {error.strerror}") from error
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._unwritten = b"\n"  # a killed run left half a line, which no new one may continue
        if self.console.is_terminal:
            self._show(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(self._live.stop)
        if self._file is not None:
            self._write(b"")
            os.close(self._file)
            self._file = None
        for tracker in self.trackers:
            self._track(tracker, partial(tracker.close, failed=error is not None))

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._show(lambda: self.console.print(Text(text)))

    def train(self, **values: Any) -> None:
        """One update's metrics: step, loss, lr, grad_norm, tokens, ms, tokens_per_s, tflops, mfu."""
        self._record("train", values)
        line = self._progress(values)
        if self.console.is_terminal:
            self._show(lambda: self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True))
        else:
            self.say(line)

    def evaluate(self, **values: Any) -> None:
        """One evaluation's metrics: step, train_loss, val_loss, val_loss_error (its standard error, or ``None``)."""
        self._record("eval", values)
        error = values.get("val_loss_error")
        give = f" ± {error:.4f}" if error is not None else ""
        self.say(
            f"step {values['step']}: train loss {values['train_loss']:.4f}, val loss {values['val_loss']:.4f}{give}"
        )

    def note(self, kind: str, **values: Any) -> None:
        """Write down what is not shown: the ``start`` or ``end`` of a process, or a ``sample`` of the model's text."""
        self._write(_line(kind, values))

    def find(self, **values: Any) -> None:
        """A finding: step, code, text."""
        self._record("finding", values)
        self.say(values["text"])

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        self._write(_line(kind, values))
        numbers = {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
        for tracker in list(self.trackers):
            self._track(tracker, partial(tracker.log, kind, values["step"], numbers))

    def _write(self, line: bytes) -> None:
        """Append a line to the file, after what it had no room for before."""
        assert self._file is not None, "metrics are written inside `with log:`"
        had_room = self._unwritten in (b"", b"\n")
        self._unwritten += line
        try:
            while self._unwritten:  # a disk that fills up takes a part of a line first
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if had_room:
                self.say(f"{self._path} cannot be written ({error.strerror}); metrics are kept and written later")

    def _show(self, draw: Callable[[], object]) -> None:
        """Write to the console, if anybody reads it."""
        if not self._shown:
            return
        try:
            draw()
        except UnicodeEncodeError:
            output.make_safe()
        except (BrokenPipeError, SystemExit):  # rich would end the program
            self._shown = False
            output.abandon()
        except (OSError, ValueError):  # a terminal that was closed, a disk that is full, a stream that was closed
            pass

    def _track(self, tracker: Tracker, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.trackers = [other for other in self.trackers if other is not tracker]
            self.say(f"{type(tracker).__name__} failed and gets no more metrics: {error}")

    def _progress(self, values: dict[str, Any]) -> str:
        step = values["step"]
        # Over the last ten logged updates or so: steady to read, and soon right after a change. The first time includes
        # compilation, so the second replaces it.
        self._n_logged += 1
        ms = values["ms"] / (self._work(step) - self._work(step - 1))
        self._ms = ms if self._n_logged <= 2 else 0.9 * self._ms + 0.1 * ms
        left = self._ms / 1e3 * (self._work(self._max_iters) - self._work(step))  # without evaluations
        speed = f"MFU {values['mfu']:.1%}" if values["mfu"] is not None else f"{values['tflops']:.3g} TFLOP/s"
        return (
            f"step {step}/{self._max_iters}  loss {values['loss']:.4f}  {values['ms']:.1f} ms  "
            f"{values['tokens_per_s']:,.0f} tokens/s  {speed}  {duration(left)} left"
        )


def _line(kind: str, values: dict[str, Any]) -> bytes:
    """A record as a line of JSON, which has no word for infinity and NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"kind": kind, **finite}).encode() + b"\n"


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of ``metrics.jsonl`` by kind: ``train``, ``eval``, ``finding``, ``start``, ``end``,
    ``sample``.

    Where a step was logged twice, before and after a resume, the later record counts. Every process that trained has a
    ``start``, and if it was not killed an ``end``. Lines that are damaged, such as
    half of one that a killed run left, are skipped; ``damaged`` has an entry for each.

    Raises:
        RequestError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    records: dict[str, dict[Any, dict[str, Any]]] = {kind: {} for kind in _REQUIRED}
    damaged = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is not None:
            same = record["step"], record.get("code", ""), record.get("time", "")
            records[record["kind"]][same] = record
        elif line.strip(b"\0 \t"):  # a power cut may leave a block of zeros
            damaged.append({"line": number})
    return {kind: [found[key] for key in sorted(found)] for kind, found in records.items()} | {"damaged": damaged}


# What a record of each kind must have to be read, and of which type.
_NUMBER = (int, float, type(None))
_REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "train": {"step": (int,), "loss": _NUMBER, "lr": (int, float), "grad_norm": _NUMBER},
    "eval": {"step": (int,), "train_loss": _NUMBER, "val_loss": _NUMBER},
    "finding": {"step": (int,), "code": (str,), "text": (str,)},
    "start": {"step": (int,), "time": (str,)},
    "end": {"step": (int,), "time": (str,), "status": (int,), "reason": (str,)},
    "sample": {"step": (int,), "prompt": (str,), "text": (str,)},
}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's record, or ``None`` if it is damaged."""
    try:
        record = json.loads(line)
        required = _REQUIRED[record["kind"]]
        good = all(isinstance(record[name], types) for name, types in required.items()) and record["step"] >= 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if good else None


def plot_losses(metrics: Path, image: Path, title: str) -> None:
    """Draw the training and validation loss over steps into ``image``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [r for r in records["train"] if r["loss"] is not None]
    evaluations = [r for r in records["eval"] if r["val_loss"] is not None]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(
        [r["step"] for r in train],
        [r["loss"] for r in train],
        color="#9bb7d4",
        lw=1,
        label="training, each batch",
    )
    axes.plot(
        [r["step"] for r in evaluations], [r["val_loss"] for r in evaluations], color="#c0392b", marker="o", ms=4,
        label="validation",
    )  # fmt: skip
    if evaluations:
        last = evaluations[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}", (last["step"], last["val_loss"]), textcoords="offset points", xytext=(0, 8),
            ha="center", color="#c0392b",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(image)


A100 = 312e12  # FLOP/s, dense bf16: what nanoGPT divides by


def mfu_sentence(flops_per_second: float, peak: float | None, device: str, dtype: torch.dtype) -> str:
    """The MFU with the peak that it refers to, and the MFU that nanoGPT would print.

    Args:
        flops_per_second: reached.
        peak: the device's dense peak in FLOP/s; ``None`` if unknown.
        device: its name.
        dtype: of the matrix products.
    """
    reached = f"{flops_per_second / 1e12:.3g} TFLOP/s"
    kind = SHORT_DTYPES.get(dtype, dtype_name(dtype))
    if peak is None:
        return f"{reached} on {device} in {kind}, whose peak is unknown: no MFU"
    text = f"MFU {flops_per_second / peak:.1%}: {reached} of the {device}'s {peak / 1e12:.4g} TFLOP/s, dense {kind}"
    if abs(peak / A100 - 1) > 0.02:
        text += f" (nanoGPT, which divides by an A100's 312 on any device, would say {flops_per_second / A100:.1%})"
    return text
