"""TensorBoard and Weights & Biases are stood in for: the tests need neither."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastgpt.errors import RequestError
from fastgpt.train.log import RunLog
from fastgpt.train.run_folder import METRICS

PACKAGES = ("tensorboard", "wandb")


class Writer:
    """A ``SummaryWriter`` that remembers."""

    made: list["Writer"]

    def __init__(self, log_dir, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = log_dir, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


class Board:
    """What ``wandb.init`` gives."""

    def __init__(self, **options):
        self.options = options
        self.id = options["id"] or f"new{options['dir'].count('/')}"
        self.records, self.axes, self.exit_code = [], {}, None

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, record):
        self.records.append(record)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def writers(monkeypatch):
    """The writers that were made."""
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


@pytest.fixture
def wandb(monkeypatch):
    """The package, and in ``boards`` what it was asked for."""
    boards = []

    def init(**options):
        boards.append(Board(**options))
        return boards[-1]

    package = SimpleNamespace(init=init, login=lambda: True, Error=type("Error", (Exception,), {}), boards=boards)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return package


def records(run):
    """What trackers get too: not what a process writes about itself."""
    found = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [record for record in found if record["kind"] not in ("start", "end", "sample")]


# ---- what they are told ----


def numbers(record):
    return {name: value for name, value in record.items() if name not in ("kind", "step") and value is not None}


def test_tensorboard_gets_every_number_of_every_record_at_its_step(trainer, writers, tmp_path):
    assert trainer(tensorboard=True).train() == 0
    (writer,) = writers
    assert writer.folder == str(tmp_path / "run" / "tensorboard")
    assert writer.closed
    expected = [
        (f"{record['kind']}/{name}", value, record["step"])
        for record in records(tmp_path / "run")
        for name, value in numbers(record).items()
    ]
    assert writer.scalars == expected
    assert {"train/loss", "train/lr", "eval/val_loss"} <= {name for name, _, _ in writer.scalars}


def test_wandb_gets_every_number_of_every_record_over_its_step(trainer, wandb, tmp_path):
    assert trainer(wandb=True).train() == 0
    (board,) = wandb.boards
    assert board.axes == {"*": "step"}
    assert board.exit_code == 0
    assert board.records == [
        {"step": record["step"], **{f"{record['kind']}/{name}": value for name, value in numbers(record).items()}}
        for record in records(tmp_path / "run")
    ]


def test_a_wandb_run_is_named_and_configured_as_the_run(trainer, wandb, tmp_path):
    trainer(wandb=True, max_iters=1).train()
    options = wandb.boards[0].options
    assert (options["project"], options["name"], options["dir"]) == ("fastgpt", "run", str(tmp_path / "run"))
    assert options["config"] == json.loads((tmp_path / "run" / "config.json").read_text())["train"]


def test_the_wandb_project_may_come_from_the_environment(trainer, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "other")
    trainer(wandb=True, max_iters=1).train()
    assert wandb.boards[0].options["project"] == "other"


def test_what_is_not_known_is_not_forwarded_and_what_is_no_number_is(tmp_path):
    told = []
    tracker = SimpleNamespace(log=lambda *record: told.append(record), close=lambda failed: None)
    with RunLog(tmp_path / METRICS, 10, trackers=[tracker]) as log:
        log.train(step=1, loss=math.inf, ms=1.0, tokens_per_s=1.0, tflops=0.0, mfu=None)
    assert told == [("train", 1, {"loss": math.inf, "ms": 1.0, "tokens_per_s": 1.0, "tflops": 0.0})]


def test_a_run_that_breaks_off_is_marked_as_failed(trainer, wandb, writers):
    one = trainer(wandb=True, tensorboard=True)
    one.update = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.train()
    assert wandb.boards[0].exit_code == 1
    assert writers[0].closed


def test_without_the_flags_nothing_is_imported_or_told(trainer, writers, wandb):
    trainer(max_iters=1).train()
    assert writers == wandb.boards == []


def test_training_imports_neither_package_unless_asked():
    code = (
        "import sys, fastgpt.train.trainer; "
        "sys.exit(any(m.split('.')[0] in ('tensorboard', 'wandb') or m == 'torch.utils.tensorboard' "
        "for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- resumed and replaced runs ----


def test_a_resumed_run_goes_on_under_its_id(trainer, wandb):
    trainer(wandb=True, max_iters=3).train()
    trainer(wandb=True, init_from="resume").train()
    first, second = wandb.boards
    assert first.options["id"] is None
    assert second.options["id"] == first.id
    assert second.options["resume"] == "allow"
    assert second.options["allow_val_change"] is True


def test_a_resumed_run_that_wandb_does_not_know_is_new_there(trainer, wandb):
    trainer(max_iters=3).train()
    trainer(wandb=True, init_from="resume").train()
    assert wandb.boards[0].options["id"] is None


def test_a_run_that_replaces_another_is_new_to_wandb(trainer, wandb):
    trainer(wandb=True, max_iters=1).train()
    trainer(wandb=True, max_iters=1, overwrite=True).train()
    assert [board.options["id"] for board in wandb.boards] == [None, None]


def test_tensorboard_forgets_what_is_done_again_after_a_resume(trainer, writers):
    trainer(tensorboard=True, max_iters=3).train()
    trainer(tensorboard=True, init_from="resume").train()
    assert [writer.purge_step for writer in writers] == [None, 4]


def test_overwriting_removes_the_events_of_the_earlier_run(trainer, writers, tmp_path):
    events = tmp_path / "run" / "tensorboard" / "events.out.tfevents.1"
    trainer(tensorboard=True, max_iters=1).train()
    events.parent.mkdir()
    events.write_text("")
    trainer(max_iters=1, overwrite=True).train()
    assert not events.exists()


# ---- what is not there ----


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_a_wrong_request_before_anything_is_written(trainer, monkeypatch, tmp_path, package):
    for name in (*PACKAGES, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError) as caught:
        trainer(**{package: True})
    assert str(caught.value) == f"--{package} needs the package {package}: pip install fastgpt[{package}]"
    assert not (tmp_path / "run").exists()


def test_a_folder_called_wandb_is_no_package(trainer, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that it is put back
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    with pytest.raises(RequestError, match="--wandb needs the package wandb"):
        trainer(wandb=True)


def test_nobody_logged_in_is_a_wrong_request_before_anything_is_written(trainer, wandb, tmp_path):
    def login():
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    wandb.login = login
    with pytest.raises(RequestError, match=r"^--wandb: No API key configured"):
        trainer(wandb=True)
    assert not (tmp_path / "run").exists()
