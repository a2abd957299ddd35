"""``python -m fastgpt.sweep``."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastgpt import sweep
from fastgpt.cli import run
from fastgpt.errors import RequestError
from fastgpt.train import __main__ as train
from tests.conftest import TINY


@pytest.fixture
def flags(data_dir, tmp_path):
    """Of a small run, without what is varied."""
    fixed = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_embd")}
    given = {"dataset": "words", "data_dir": data_dir, "out_dir": tmp_path / "sweep", **fixed}
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture
def trained(monkeypatch):
    """The command lines that were trained, in this process and not in one each."""
    commands = []

    def here(command):
        commands.append(command[3:])
        with pytest.raises(SystemExit) as ended:
            run(train.main, command[3:])
        return ended.value.code

    monkeypatch.setattr(sweep, "launch", here)
    return commands


def names(*argv):
    plans, _ = sweep.plan(argv, "--together" in argv)
    return [one.name for one in plans]


def test_every_combination_is_a_run_or_with_together_every_place_in_the_lists(flags):
    assert names(*flags, "--n_layer", "1,2", "--n-embd=8,16") == [
        "n_layer-1_n_embd-8", "n_layer-1_n_embd-16", "n_layer-2_n_embd-8", "n_layer-2_n_embd-16"
    ]  # fmt: skip
    plans, folder = sweep.plan([*flags, "--n_layer=1,2", "--n_embd=8,16"], together=True)
    assert [one.values for one in plans] == [{"n_layer": "1", "n_embd": "8"}, {"n_layer": "2", "n_embd": "16"}]
    assert {one.run_dir.parent for one in plans} == {folder}
    assert all(f"--out_dir={one.run_dir}" in one.argv and "--init_from=auto" in one.argv for one in plans)


def test_any_flag_may_vary(flags):
    assert names(*flags, "--learning_rate=1e-3,1e-2", "--n_layer=1") == ["learning_rate-1e-3", "learning_rate-1e-2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no flag has a list of values"),
        (["--n_layers=1,2"], "unknown flag --n_layers; did you mean --n_layer?"),
        (["--n_layer=1,x"], "expected a whole number, not 'x'"),
        (["--n_layer=1,1"], "a value stands twice"),
        (["--n_embd=16,17"], "n_embd=17 is not divisible"),
        (["--n_layer=1,2", "--init_from=resume"], "--init_from has no place in a sweep"),
        (["here", "--n_layer=1,2"], "unexpected argument 'here'"),
        (["--n_layer=1,2", "--prompt="], "--prompt is empty"),
        (["--n_layer=1,2", "--max_new_tokens=0"], "--max_new_tokens must be at least 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(flags, trained, argv, message):
    with pytest.raises(RequestError, match=message):
        sweep.main([*argv, *flags])
    assert trained == []


def test_lists_that_go_together_are_of_one_length(flags):
    with pytest.raises(RequestError, match="needs lists of one length"):
        sweep.plan([*flags, "--n_layer=1,2", "--n_embd=8,16,32"], together=True)


def test_a_sweep_leaves_a_table_plots_and_samples_and_repeats_nothing(flags, trained, tmp_path, capsys):
    argv = [*flags, "--n_layer=1,2", "--prompt=sea", "--max_new_tokens=5"]
    assert sweep.main(argv) == 0
    assert len(trained) == 2
    said = capsys.readouterr().out
    folder = tmp_path / "sweep"
    table = json.loads((folder / "sweep.json").read_text())
    small, large = table["rows"]
    assert table["varied"] == ["n_layer"]
    assert small["parameters"] < large["parameters"]
    for row in (small, large):
        assert (row["steps"], row["tokens"]) == (8, 8 * 4 * 16)
        assert row["ms"] > 0
        assert row["peak_bytes"] > 50e6
        assert f"{row['val_loss']:.4f} ± {row['val_loss_error']:.4f}" in said
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    samples = (folder / "samples.txt").read_text()
    assert samples.count("==== n_layer-") == samples.count("\nsea") == 2
    assert samples in said

    assert sweep.main(argv) == 0
    assert len(trained) == 2
    assert capsys.readouterr().out.count("is complete") == 2
    assert sweep.main([*argv, "--max_iters=9"]) == 0  # goes on
    assert len(trained) == 4
    assert [row["steps"] for row in json.loads((folder / "sweep.json").read_text())["rows"]] == [9, 9]


def test_a_run_that_fails_leaves_the_others_and_the_status_tells(flags, trained, tmp_path, capsys):
    assert sweep.main([*flags, "--n_layer=1", "--dataset=words,none"]) == 1
    captured = capsys.readouterr()
    assert "failed: dataset-none" in captured.err
    (row,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert row["values"] == {"dataset": "words"}


def test_a_run_that_cannot_be_sampled_leaves_the_others(flags, trained, tmp_path, capsys):
    assert sweep.main([*flags, "--n_layer=1,2", "--prompt=Ж"]) == 0
    samples = (tmp_path / "sweep" / "samples.txt").read_text()
    assert samples.count("no sample: the character 'Ж' is not among") == 2
    assert "table: " in capsys.readouterr().out


def test_a_report_of_nothing_leaves_nothing(flags, tmp_path):
    with pytest.raises(RequestError, match=r"no run in .* has been evaluated yet"):
        sweep.main(["--report", *flags, "--n_layer=1,2"])
    assert not (tmp_path / "sweep").exists()


def test_a_signal_ends_the_sweep_with_the_table_of_what_is_there(flags, trained, tmp_path, monkeypatch, capsys):
    here = sweep.launch
    monkeypatch.setattr(sweep, "launch", lambda command: 130)
    assert sweep.main([*flags, "--n_layer=1,2"]) == 130
    monkeypatch.setattr(sweep, "launch", lambda command: here(command) or 130)  # after the first run
    assert sweep.main([*flags, "--n_layer=1,2"]) == 130
    assert len(trained) == 1
    rows = json.loads((tmp_path / "sweep" / sweep.TABLE).read_text())["rows"]
    assert [row["name"] for row in rows] == ["n_layer-1"]
    assert f"table so far: {tmp_path / 'sweep' / sweep.TABLE}" in capsys.readouterr().out


# Saves for a second after a signal, and notes then that it has.
SAVES = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1.0)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
pathlib.Path("ready").touch()
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM)],
    ids=["Ctrl-C", "kill", "kill of the group"],
)
def test_a_run_that_is_told_to_stop_may_save(tmp_path, send, number):
    launched = f"sweep.launch([sys.executable, '-c', {SAVES!r}])"
    code = f"import sys; from fastgpt import cli, sweep; cli.run(lambda _: {launched})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    send(process.pid, number)
    assert process.wait(60) == 128 + number
    assert (tmp_path / "saved").exists()
