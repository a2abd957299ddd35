"""What a run says cannot end it: readers that go away, disks that are full, consoles without the characters."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt.data.prepare import prepare
from fastgpt.train import checkpoint
from fastgpt.train.log import read_metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes and signals as on Linux")

FLAGS = [
    "--dataset=words", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
    "--warmup_iters=1", "--eval_interval=20", "--eval_iters=2", "--log_interval=1", "--device=cpu",
]  # fmt: skip
SHORT = ["--max_iters=20", "--lr_decay_iters=20"]
ENDLESS = ["--max_iters=1000000", "--lr_decay_iters=1000000", "--eval_interval=1000000"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    rng = random.Random(0)
    (folder / "words.txt").write_text(" ".join(rng.choices(["to", "bé", "or", "not"], k=3000)))
    prepare("text", [folder / "words.txt"], tokenizer="char", data_dir=folder)
    return folder


@pytest.fixture
def command(data_dir, tmp_path):
    """Starts a training run in a process of its own, in the folder ``run``."""
    processes = []

    def start(*flags, stdout=subprocess.PIPE, **environment):
        line = [
            sys.executable,
            "-m",
            "fastgpt.train",
            *FLAGS,
            f"--data_dir={data_dir}",
            f"--out_dir={tmp_path / 'run'}",
        ]
        inherited = os.environ | {"OMP_NUM_THREADS": "1", "FASTGPT_BACKEND": "reference"}
        processes.append(
            subprocess.Popen([*line, *flags], stdout=stdout, stderr=subprocess.PIPE, env=inherited | environment)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def assert_whole(run):
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records["train"]] == list(range(1, 21))
    assert checkpoint.newest(run).name == "step-0000020"


def test_a_run_whose_reader_goes_away_runs_to_its_end(command, tmp_path):
    process = command(*SHORT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0, process.stderr.read()
    assert process.stderr.read() == b""
    assert_whole(tmp_path / "run")


def test_a_run_whose_output_has_no_room_on_its_disk_runs_to_its_end(command, tmp_path):
    with Path("/dev/full").open("w") as full:
        process = command(*SHORT, stdout=full)
        assert process.wait(120) == 0, process.stderr.read()
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252:strict"},
     {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "cp1252", "C"],
)  # fmt: skip
def test_a_console_without_some_characters_ends_no_run(command, tmp_path, environment):
    process = command(*SHORT, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert b"sample, continued from" in out
    assert_whole(tmp_path / "run")


def started(process, run):
    """Wait until the run has logged an update."""
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and b'"train"' in metrics.read_bytes()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_ctrl_c_that_ends_the_reader_too_leaves_a_checkpoint(command, tmp_path):
    """As in ``train … | tee log``: the signal goes to both."""
    process = command(*ENDLESS)
    started(process, tmp_path / "run")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert b"Traceback" not in process.stderr.read()
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).step >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_signals_that_end_a_run_leave_a_checkpoint(command, tmp_path, number):
    hears = signal.signal(number, signal.SIG_DFL)  # if these tests run under nohup; the process inherits it
    try:
        process = command(*ENDLESS, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(number, hears)
    started(process, tmp_path / "run")
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).step >= 1


def test_nohup_keeps_a_run_going_when_its_terminal_is_closed(command, tmp_path):
    hears = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the process inherits it
    try:
        process = command(*ENDLESS, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, hears)
    started(process, tmp_path / "run")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # the run would have stopped by the first one
    assert process.wait(60) == 128 + signal.SIGTERM


def test_usr1_saves_a_checkpoint_and_goes_on_and_the_file_stop_ends_the_run(command, tmp_path):
    run = tmp_path / "run"
    process = command(*ENDLESS, stdout=subprocess.DEVNULL)
    started(process, run)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not checkpoint.steps(run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    assert process.poll() is None
    first = checkpoint.steps(run)[-1]
    (run / "STOP").touch()
    assert process.wait(60) == 0
    assert checkpoint.steps(run)[-1] > first
    assert not (run / "STOP").exists()  # or the resumed run would stop at once


def test_a_run_in_use_is_refused_to_others_until_its_owner_is_gone(command, tmp_path):
    run = tmp_path / "run"
    process = command(*ENDLESS, stdout=subprocess.DEVNULL)
    started(process, run)
    process.send_signal(signal.SIGUSR1)
    while not checkpoint.steps(run):
        time.sleep(0.02)
    for flag in ("--init_from=resume", "--overwrite"):
        second = command(*ENDLESS, flag)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"is in use by process {process.pid} on".encode() in err
    assert process.poll() is None
    process.kill()
    process.wait()
    resumed = command("--init_from=resume", "--max_iters=1000001", *ENDLESS[1:], "--max_hours=1e-9")
    assert resumed.wait(60) == 0, resumed.stderr.read()
