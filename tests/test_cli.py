import argparse
import errno
import os
import signal
import subprocess
import sys

import pytest

from fastgpt import __version__
from fastgpt.cli import Parser, parse_bool, run
from fastgpt.errors import RequestError, did_you_mean


@pytest.fixture
def parser():
    parser = Parser(prog="program")
    parser.add_argument("--max_iters", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--prompt", default="")
    parser.add_argument("file", nargs="?")
    return parser


@pytest.mark.parametrize("argv", [["--max_iters", "5"], ["--max-iters", "5"], ["--max_iters=5"], ["--max-iters=5"]])
def test_a_flag_declared_with_underscores_is_found_under_either_spelling(parser, argv):
    assert parser.parse_args(argv).max_iters == 5


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_flag_declared_with_dashes_is_found_under_either_spelling(parser, flag):
    assert parser.parse_args([flag]).dry_run


def test_a_value_keeps_its_spelling(parser):
    assert parser.parse_args(["--prompt=--max-iters=a_b-c"]).prompt == "--max-iters=a_b-c"
    assert parser.parse_args(["--prompt", "a_b-c"]).prompt == "a_b-c"
    assert parser.parse_args(["some-file_name"]).file == "some-file_name"


def test_the_command_line_is_read_where_nothing_is_given(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--max-iters", "9"])
    assert parser.parse_args().max_iters == 9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_iter", "5"], "unknown flag --max_iter; did you mean --max_iters? (see program --help)"),
        (["--max-itres=5"], "unknown flag --max-itres; did you mean --max_iters? (see program --help)"),
        (["--qqq"], "unknown flag --qqq (see program --help)"),
        (["a", "b"], "unexpected argument 'b' (see program --help)"),
        (["--max_iters", "five"], "argument --max_iters: invalid int value: 'five' (see program --help)"),
    ],
)
def test_an_error_is_one_line_with_the_nearest_name(parser, argv, message):
    with pytest.raises(RequestError) as caught:
        parser.parse_args(argv)
    assert str(caught.value) == message


def test_the_nearest_name_is_suggested_only_if_it_is_near():
    assert did_you_mean("trian", ["train", "data"]) == "; did you mean train?"
    assert did_you_mean("zzz", ["train", "data"]) == ""
    assert did_you_mean("train", []) == ""


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "yes"])
def test_yes_is_spelt_in_these_ways(text):
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["False", "false", "FALSE", "0", "no"])
def test_no_is_spelt_in_these_ways(text):
    assert parse_bool(text) is False


@pytest.mark.parametrize("text", ["", "2", "maybe", "Truee"])
def test_anything_else_is_neither(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected True or False"):
        parse_bool(text)


def status_of(main, argv=()):
    with pytest.raises(SystemExit) as caught:
        run(main, argv)
    return caught.value.code


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_the_status_is_what_the_entry_point_returns(returned, status, capsys):
    assert status_of(lambda argv: returned) == status
    assert capsys.readouterr() == ("", "")


def test_the_entry_point_gets_the_arguments():
    seen = []
    status_of(seen.append, ["a", "--b"])
    assert seen == [["a", "--b"]]


def test_a_wrong_request_exits_with_2_and_one_line(capsys):
    assert status_of(raising(RequestError("no such thing; try another"))) == 2
    assert capsys.readouterr() == ("", "error: no such thing; try another\n")


def test_the_line_stays_one_and_does_nothing_to_a_terminal_whatever_it_quotes(capsys):
    assert status_of(raising(RequestError("no file 'a\nb\r\x1b[2Jé\udcff'"))) == 2
    assert capsys.readouterr().err == "error: no file 'a\\nb\\r\\x1b[2Jé\\udcff'\n"


def test_an_interrupt_exits_with_130(capsys):
    assert status_of(raising(KeyboardInterrupt())) == 128 + signal.SIGINT == 130
    assert capsys.readouterr().err == ""


STOPPED_TWICE = """
import os, sys, time
from fastgpt.cli import run
def main(argv):
    number = int(argv[0])
    try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        print("cleaned up")
run(main, sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_entry_point_clean_up(number):
    before = signal.signal(number, signal.SIG_DFL)  # even if nohup has started the tests
    try:
        done = subprocess.run([sys.executable, "-c", STOPPED_TWICE, f"{number}"], capture_output=True, text=True)
    finally:
        signal.signal(number, before)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "cleaned up\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert status_of(lambda argv: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "output: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "run/config.json"), "run/config.json: Permission denied"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_refuses_exits_with_1_and_one_line(capsys, error, said):
    assert status_of(raising(error)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_any_other_exception_is_a_failure_of_ours_and_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))


def test_a_process_ends_with_the_status_of_its_request():
    for argv, status, said in (
        (["train", "--no_such_flag", "1"], 2, "error: unknown flag --no_such_flag"),
        (["trian"], 2, "error: unknown verb 'trian'; did you mean train?"),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "fastgpt", *argv],
            capture_output=True,
            text=True,
            env={**os.environ, "FASTGPT_BACKEND": "reference"},
            check=False,
        )
        assert process.returncode == status
        assert process.stdout == ""
        assert process.stderr.startswith(said)
        assert process.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("argv", [["fastgpt", "--help"], ["fastgpt"], ["fastgpt.plan", "--points"]])
def test_output_that_cannot_be_written_is_told_in_one_line(argv):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", *argv], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes as on POSIX")
@pytest.mark.parametrize("argv", [["fastgpt", "--help"], ["fastgpt.plan", "--points"], ["fastgpt.doctor", "--quick"]])
def test_a_reader_that_goes_away_is_no_failure(argv):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *argv], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("program", ["fastgpt", "fastgpt.train", "fastgpt.plan", "fastgpt.doctor"])
def test_every_command_tells_the_version(program):
    done = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastgpt {__version__}\n")
