import errno
import io
import json
import math
import os
import re

import pytest
from rich.console import Console

from fastgpt.errors import RequestError
from fastgpt.train.log import RunLog, plot_losses, read_metrics
from fastgpt.units import duration

UPDATE = {
    "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens": 64, "ms": 12.5, "tokens_per_s": 5120.0,
    "tflops": 0.01, "mfu": None,
}  # fmt: skip
EVALUATION = {"step": 1, "train_loss": 2.4, "val_loss": 2.6}


def console(terminal, width=200):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, soft_wrap=True)


def lines_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def log_to(path, terminal=False, max_iters=10, width=200):
    return RunLog(path, max_iters, console(terminal, width))


def test_metrics_have_the_documented_keys(metrics):
    with log_to(metrics) as log:
        log.train(**UPDATE)
        log.evaluate(**EVALUATION)
    train, evaluation = lines_of(metrics)
    assert train == {"kind": "train", **UPDATE}
    assert {"kind", "step", "loss", "lr", "grad_norm", "tokens", "ms", "tokens_per_s", "mfu"} <= train.keys()
    assert evaluation == {"kind": "eval", **EVALUATION}


def test_a_number_that_json_lacks_is_written_as_null(metrics):
    with log_to(metrics) as log:
        log.train(**{**UPDATE, "loss": math.nan, "grad_norm": math.inf})
        log.evaluate(step=1, train_loss=-math.inf, val_loss=math.nan)
    train, evaluation = lines_of(metrics)
    assert (train["loss"], train["grad_norm"]) == (None, None)
    assert (evaluation["train_loss"], evaluation["val_loss"]) == (None, None)


def test_metrics_are_on_the_disk_before_the_run_ends(metrics):
    with log_to(metrics) as log:
        log.train(**UPDATE)
        assert len(lines_of(metrics)) == 1


def test_a_resumed_run_appends_and_its_word_counts(metrics):
    with log_to(metrics) as log:
        for step in (1, 2, 3):
            log.train(**{**UPDATE, "step": step, "loss": float(step)})
        log.evaluate(step=3, train_loss=1.0, val_loss=1.0)
    with log_to(metrics) as log:
        for step in (3, 4):
            log.train(**{**UPDATE, "step": step, "loss": step + 0.5})
        log.evaluate(step=3, train_loss=2.0, val_loss=2.0)
    assert len(lines_of(metrics)) == 7
    records = read_metrics(metrics)
    assert [(r["step"], r["loss"]) for r in records["train"]] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    assert [(r["step"], r["val_loss"]) for r in records["eval"]] == [(3, 2.0)]


# ---- damage ----


DAMAGE = {
    "half a line": b'{"kind": "train", "step": 2, "lo',
    "zeros": b"\0" * 4096,
    "no JSON": b"Killed\n",
    "not UTF-8": b"\xff\xfe\n",
    "a list": b"[1, 2]\n",
    "an unknown kind": b'{"kind": "test", "step": 2}\n',
    "no loss": b'{"kind": "train", "step": 2}\n',
    "a step that is text": b'{"kind": "eval", "step": "2", "train_loss": 1, "val_loss": 1}\n',
    "nested without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lines_are_skipped_and_counted_and_no_line_continues_one(metrics, damage):
    with log_to(metrics) as log:
        log.train(**UPDATE)
    with metrics.open("ab") as file:
        file.write(DAMAGE[damage])
    with log_to(metrics) as log:
        log.train(**{**UPDATE, "step": 3})
    records = read_metrics(metrics)
    assert [record["step"] for record in records["train"]] == [1, 3]
    assert records["eval"] == records["finding"] == []
    assert records["damaged"] == ([] if damage == "zeros" else [{"line": 2}])


def test_a_file_of_metrics_that_cannot_be_read_or_written_is_a_wrong_request(metrics):
    metrics.mkdir()
    with pytest.raises(RequestError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        read_metrics(metrics)
    with pytest.raises(RequestError, match=r"cannot write .*metrics\.jsonl: Is a directory"), log_to(metrics):
        pass


def test_metrics_that_a_full_disk_refuses_are_written_once_there_is_room(metrics, monkeypatch):
    room, write = [], os.write

    def limited(descriptor, data):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: room.pop()])

    with log_to(metrics) as log:
        log.train(**UPDATE)
        monkeypatch.setattr(os, "write", limited)
        room.append(20)  # bytes of the next line
        log.train(**{**UPDATE, "step": 2})
        log.train(**{**UPDATE, "step": 3})
        said = log.console.file.getvalue()
        assert said.count("cannot be written (No space left on device); metrics are kept and written later") == 1
        monkeypatch.undo()
        log.train(**{**UPDATE, "step": 4})
    assert [record["step"] for record in lines_of(metrics)] == [1, 2, 3, 4]


class Deaf(io.StringIO):
    """A stream that cannot be written to."""

    def __init__(self, error):
        super().__init__()
        self.error, self.attempts = error, 0

    def write(self, text):
        self.attempts += 1
        raise self.error

    flush = write


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file")]
)
def test_a_console_that_cannot_be_written_to_costs_nothing_but_its_words(metrics, terminal, error):
    stream = Deaf(error)
    screen = Console(file=stream, force_terminal=terminal, highlight=False, soft_wrap=True)
    with RunLog(metrics, 10, screen) as log:
        log.say("a word")
        log.train(**UPDATE)
        log.evaluate(**EVALUATION)
        log.find(step=1, code="code", text="text")
    assert stream.attempts > 0
    assert [record["kind"] for record in lines_of(metrics)] == ["train", "eval", "finding"]


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(metrics):
    class Good:
        def __init__(self):
            self.steps = []

        def log(self, kind, step, values):
            self.steps.append(step)

        def close(self, failed):
            self.steps.append("closed")

    class Bad(Good):
        def log(self, kind, step, values):
            raise ConnectionError("no route to host")

    good, bad = Good(), Bad()
    screen = console(False)
    with RunLog(metrics, 10, screen, [bad, good]) as log:
        log.train(**UPDATE)
        log.train(**{**UPDATE, "step": 2})
    assert good.steps == [1, 2, "closed"]
    assert bad.steps == []
    assert screen.file.getvalue().count("Bad failed and gets no more metrics: no route to host") == 1


def test_the_plot_is_a_png(metrics, tmp_path):
    with log_to(metrics) as log:
        for step in range(1, 5):
            log.train(**{**UPDATE, "step": step, "loss": math.nan if step == 2 else 3.0 / step})
            log.evaluate(step=step, train_loss=2.0, val_loss=math.nan if step == 4 else 2.0)
    plot_losses(metrics, tmp_path / "loss.png", title="100 % of $tokens_")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 5000


def test_a_run_without_an_evaluation_can_be_plotted(metrics, tmp_path):
    with log_to(metrics) as log:
        log.train(**UPDATE)
    plot_losses(metrics, tmp_path / "loss.png", title="")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_no_terminal_gets_a_plain_line_for_each_update(metrics):
    log = log_to(metrics)
    with log:
        log.say("hello")
        log.train(**UPDATE)
        log.train(**{**UPDATE, "step": 2})
        log.evaluate(**EVALUATION)
    text = log.console.file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[0] == "hello"
    assert lines[1].startswith("step 1/10  loss 2.5000  12.5 ms  5,120 tokens/s")
    assert lines[3] == "step 1: train loss 2.4000, val loss 2.6000"


def test_plain_lines_are_never_folded(metrics):
    log = log_to(metrics, width=20)
    with log:
        log.train(**UPDATE)
    assert len(log.console.file.getvalue().splitlines()) == 1


def test_a_terminal_gets_one_live_line_that_goes_away_at_the_end(metrics):
    log = log_to(metrics, terminal=True)
    with log:
        log.train(**UPDATE)
        log.train(**{**UPDATE, "step": 2})
        log.evaluate(**EVALUATION)
    text = log.console.file.getvalue()
    assert "step 1/10" in text
    assert "step 2/10" in text
    assert "\x1b[2K" in text  # the line is erased and drawn anew
    assert "\x1b[?25h" in text.rpartition("step 1: train loss")[2]  # the cursor is back


@pytest.mark.parametrize("width", [40, 8])
def test_a_narrow_terminal_cuts_the_live_line_short(metrics, width):
    log = log_to(metrics, terminal=True, width=width)
    with log:
        for step in (1, 2, 3):
            log.train(**{**UPDATE, "step": step})
        log.evaluate(**EVALUATION)
    text = log.console.file.getvalue()
    plain = re.split(r"[\r\n]", re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", text))
    live = [line for line in plain if line.startswith("step") and "train loss" not in line]
    assert {line[:6] for line in live} == {"step 1", "step 2", "step 3"}
    assert {(len(line), line[-1]) for line in live} == {(width, "…")}
    assert text.count("\x1b[1A") == 1  # one line high: only its end climbs, and by that line alone


def test_brackets_in_what_is_said_are_no_markup(metrics):
    log = log_to(metrics)
    with log:
        log.say("data [red]/x[/red]")
    assert log.console.file.getvalue() == "data [red]/x[/red]\n"


def test_mfu_stands_where_the_peak_is_known_and_flops_where_it_is_not(metrics):
    log = log_to(metrics)
    with log:
        log.train(**UPDATE)
        log.train(**{**UPDATE, "step": 2, "mfu": 0.456})
    unknown, known = log.console.file.getvalue().splitlines()
    assert "0.01 TFLOP/s" in unknown
    assert "MFU" not in unknown
    assert "MFU 45.6%" in known
    assert "TFLOP/s" not in known


def test_the_time_left_is_that_of_the_steps_to_come(metrics):
    log = log_to(metrics, max_iters=100)
    with log:
        log.train(**{**UPDATE, "step": 92, "ms": 10_000.0})  # 10 seconds a step, 8 to go
    assert "1m 20s left" in log.console.file.getvalue()


def test_the_time_left_counts_the_work_of_updates_that_differ(metrics):
    """Five updates of one unit and five of four; the first two have been logged, each took a second."""
    screen = console(False)
    with RunLog(metrics, 10, screen, work=lambda step: step + 3 * max(0, step - 5)) as log:
        for step in (1, 2):
            log.train(**{**UPDATE, "step": step, "ms": 1000.0})
        log.train(**{**UPDATE, "step": 6, "ms": 4000.0})
    lines = screen.file.getvalue().splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["24s left", "23s left", "16s left"]


def test_the_time_left_soon_forgets_the_first_updates_which_compile(metrics):
    log = log_to(metrics, max_iters=100)
    with log:
        for step, ms in ((10, 60_000.0), (20, 1000.0), (30, 2000.0)):
            log.train(**{**UPDATE, "step": step, "ms": ms})
    lines = log.console.file.getvalue().splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == ["1h 30m left", "1m 20s left", "1m 17s left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.4, "0s"), (42, "42s"), (59.6, "1m 00s"), (60, "1m 00s"), (185, "3m 05s"), (3599.7, "1h 00m"),
        (3600, "1h 00m"), (7 * 3600 + 12 * 60 + 59, "7h 12m"), (86399, "23h 59m"), (86400, "1d 00h"),
        (4 * 86400 + 3 * 3600, "4d 03h"), (100 * 86400, "100d 00h"),
    ],
)  # fmt: skip
def test_a_duration_reads_in_its_two_largest_units(seconds, text):
    assert duration(seconds) == text
