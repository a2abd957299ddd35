"""What a preparation says while it works, with a clock that the tests move."""

import io
import re
import sys

import pytest
from rich.console import Console

from fastgpt.data import progress as module
from fastgpt.data.__main__ import main
from fastgpt.data.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def work(progress, clock, *, pieces=4, total=400):
    """Four pieces of 100 characters and 50 tokens, one every ten seconds."""
    for _ in progress.watch(range(pieces), "training split", total, lambda piece: 100):
        clock.now += 10
        progress.add(50)


def test_without_a_terminal_a_line_comes_now_and_then(capsys):
    clock = Clock()
    with Progress(Console(file=io.StringIO()), clock) as progress:
        work(progress, clock)
    # the first tokens come after 10 s and before their piece is counted; each further piece takes 10 s
    assert capsys.readouterr().err.splitlines() == [
        "training split: 25%  100 tokens  5 tokens/s  30s left",
        "training split: 75%  200 tokens  5 tokens/s  10s left",
    ]


def test_what_takes_a_moment_says_nothing(capsys):
    clock = Clock()
    with Progress(clock=clock) as progress:
        for _ in progress.watch(range(10), "reading", None, lambda piece: 1):
            clock.now += 1
    assert capsys.readouterr().err == ""


def test_a_terminal_has_one_line_that_is_rewritten_and_goes_away():
    clock, shown = Clock(), io.StringIO()
    with Progress(Console(file=shown, force_terminal=True, width=100, _environ={"TERM": "xterm"}), clock) as progress:
        work(progress, clock)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "training split: 75%  200 tokens  5 tokens/s  10s left" in text
    assert shown.getvalue().rstrip().endswith("\x1b[2K")  # the last line is erased


def test_the_part_that_is_done_is_of_the_goal_where_that_is_nearer(capsys):
    clock = Clock()
    with Progress(Console(file=io.StringIO()), clock) as progress:
        progress.goal = 200
        work(progress, clock, total=100_000)
    assert capsys.readouterr().err.splitlines()[-1] == "training split: 100%  200 tokens  5 tokens/s  0s left"


def test_what_another_process_has_made_counts_but_not_for_the_speed(capsys):
    clock = Clock()
    with Progress(Console(file=io.StringIO()), clock) as progress:
        progress.taken_over = 1_000
        work(progress, clock)
    assert "1,100 tokens  5 tokens/s" in capsys.readouterr().err
    assert progress.summary() == "prepared 200 tokens in 40 s: 5 tokens/s"


def test_characters_are_counted_where_the_total_is_unknown(capsys):
    clock = Clock()
    with Progress(Console(file=io.StringIO()), clock) as progress:
        for _ in progress.watch(range(2), "reading", None, lambda piece: 2_000_000):
            clock.now += 20
    assert capsys.readouterr().err == "reading: 2.0M characters\nreading: 4.0M characters\n"


def test_a_terminal_that_is_closed_ends_nothing():
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError("closed")

    clock = Clock()
    with Progress(Console(file=Closed(), force_terminal=True), clock) as progress:
        work(progress, clock)
    assert progress.tokens == 200


def test_a_signal_is_not_taken_for_a_broken_pipe():
    """Both are SystemExit: of rich, and of the command's handler while a line is drawn."""

    class Signalled(io.StringIO):
        code = 1

        def write(self, text):
            raise SystemExit(self.code)

    file, clock = Signalled(), Clock()
    progress = Progress(Console(file=file, force_terminal=True), clock)
    work(progress, clock)
    file.code = 128 + 15
    with pytest.raises(SystemExit):
        work(progress, clock)


def test_the_command_ends_with_tokens_seconds_and_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("a text of some words\n" * 50)
    assert main(["prepare", "text", "book.txt"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"prepared 1,050 tokens in [\d.]+ m?s: [\d,]+ tokens/s\n", said.err)
    assert said.out.count("\n") == 1


def test_the_command_shows_both_splits_and_the_reading(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0)
    (tmp_path / "book.txt").write_text("a text of some words\n" * 50)
    assert main(["prepare", "text", "book.txt", "--tokenizer=byte"]) == 0
    said = capsys.readouterr().err
    assert "reading: 1,050 characters\n" in said
    assert re.search(r"^training split: 100%  945 tokens", said, re.MULTILINE)
    assert re.search(r"^validation split: 100%  1,050 tokens", said, re.MULTILINE)


def test_preparing_data_does_not_wait_for_pytorch():
    import subprocess

    code = "import sys, fastgpt.data.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
