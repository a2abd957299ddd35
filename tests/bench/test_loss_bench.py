"""bench.loss on tiny models and on made-up runs; its statistics on values that are known."""

import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from itertools import combinations
from statistics import fmean

import pytest
import torch

from bench import loss, records, significance
from fastgpt.cli import run
from fastgpt.data.dataset import open_dataset
from fastgpt.errors import RequestError
from fastgpt.train import __main__ as train
from fastgpt.train.log import read_metrics
from fastgpt.train.trainer import Trainer

SMALL = {
    "preset": "nanogpt", "dataset": "words", "gradient_accumulation_steps": 1, "batch_size": 4, "block_size": 16,
    "n_layer": 1, "n_head": 2, "n_embd": 16, "dtype": "float32", "eval_iters": 2,
}  # fmt: skip
UPDATES = 20


@pytest.fixture
def study(monkeypatch):
    """A study of tiny models: two options, of which modern has one, and two seeds. The best rate is the middle one."""
    monkeypatch.setattr(loss, "COMMON", SMALL)
    monkeypatch.setattr(loss, "OPTIONS", {"relu2": {"mlp": "relu2"}, "wsd": {"schedule": "wsd", "floor": 0.0}})
    monkeypatch.setattr(loss, "RECIPES", {"baseline": (), "modern": ("relu2",)})
    monkeypatch.setattr(loss, "SEEDS", (1, 2))
    monkeypatch.setattr(loss, "RATE", 1e-2)
    monkeypatch.setattr(loss, "RATE_FACTOR", 10.0)
    monkeypatch.setattr(loss, "EVALUATIONS", 2)


@pytest.fixture
def argv(data_dir, tmp_path):
    """The flags that keep all files of a study in ``tmp_path``."""
    places = [f"--work={tmp_path / 'work'}", f"--data_dir={data_dir}", f"--results={tmp_path / 'loss'}"]
    return [*places, f"--updates={UPDATES}", "--device=cpu"]


@pytest.fixture
def launched(monkeypatch):
    """The command lines that were trained, in this process and not in one each."""
    commands = []

    def here(command, stdout):
        commands.append(command[3:])
        said = io.TextIOWrapper(stdout, write_through=True)
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
            run(train.main, command[3:])
        said.detach()
        return ended.value.code

    monkeypatch.setattr(loss, "launch", here)
    for name in ("_plot", "_sample"):  # they take longer than such a run
        monkeypatch.setattr(Trainer, name, lambda self: None)
    return commands


def a_run(recipe="baseline", seed=1, updates=UPDATES, rate=1e-2):
    return loss.Run(recipe, loss.RECIPES[recipe], rate, updates, seed)


def session(data_dir, tmp_path):
    dataset = open_dataset("words", data_dir)
    rows = loss.Rows(tmp_path / "loss", dataset.identity)
    return loss.Session(rows, dataset, tmp_path / "work", data_dir, torch.device("cpu"), [])


# ---- statistics ----


def test_five_runs_that_are_all_better_than_five_others_have_the_least_p_of_the_exact_test():
    better, worse = [3.0, 3.1, 3.2, 3.3, 3.4], [3.5, 3.6, 3.7, 3.8, 3.9]
    assert significance.permutation_p(better, worse) == significance.permutation_p(worse, better) == 2 / 252


@pytest.mark.parametrize(("a", "b"), [([1.0, 4.0, 2.5], [3.0, 5.0, 4.5, 2.0]), ([1.0, 1.0], [1.0, 1.0, 1.0])])
def test_p_is_the_share_of_divisions_that_are_as_far_apart(a, b):
    values = [*a, *b]
    apart = []
    for chosen in combinations(range(len(values)), len(a)):
        rest = [x for i, x in enumerate(values) if i not in chosen]
        apart.append(abs(fmean(values[i] for i in chosen) - fmean(rest)))
    extreme = sum(x >= abs(fmean(a) - fmean(b)) - 1e-9 for x in apart)
    assert significance.permutation_p(a, b) == extreme / len(apart)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (4, 2.776), (8, 2.306), (30, 2.042)])
def test_students_t_is_that_of_the_tables(degrees, t):
    assert significance.t_quantile(degrees) == pytest.approx(t, abs=6e-4)


def test_intervals_are_those_of_students_t():
    found = significance.mean([1.0, 2.0, 3.0])
    assert (found.value, found.high - found.value) == (2.0, pytest.approx(4.303 / math.sqrt(3), abs=1e-3))
    found = significance.difference([1.0, 3.0], [5.0, 7.0])  # both of variance 2
    assert (found.value, found.high - found.value) == (-4.0, pytest.approx(4.303 * math.sqrt(2), abs=1e-3))
    assert significance.ratio([2.0, 2.0], [4.0, 4.0]) == significance.Interval(*[pytest.approx(0.5)] * 3)
    assert significance.mean([1.0]) == significance.Interval(1.0, None, None)
    assert significance.ratio([1.0], [2.0, 3.0]).low is None


@pytest.mark.parametrize(
    ("target", "step"), [(3.0, 15.0), (4.0, 10.0), (9.0, 0.0), (2.0, 20.0), (1.9, None), (5.0, 5.0)]
)
def test_a_curve_reaches_a_loss_between_its_points(target, step):
    assert significance.crossing([[0, 6.0], [10, 4.0], [20, 2.0], [30, 2.5]], target) == step


# ---- which runs ----


def test_a_recipe_is_its_options_and_the_schedule_of_its_updates():
    flags = loss.Run("modern", ("muon", "wsd"), 2e-3, 1000, 3).flags
    wanted = {
        "optimizer": "muon", "schedule": "wsd", "cooldown": 0.5, "min_lr": 0.0, "learning_rate": 2e-3, "seed": 3,
        "max_iters": 1000, "lr_decay_iters": 1000, "warmup_iters": 50,
    }  # fmt: skip
    assert wanted.items() <= flags.items()
    assert "floor" not in flags
    assert loss.Run("baseline", (), 2e-3, 1000, 3).flags["min_lr"] == pytest.approx(2e-4)
    train.parse([f"--{name}={value}" for name, value in flags.items()], train.PRESETS)  # the trainer knows them all


def test_the_flags_decide_whether_two_runs_are_the_same():
    one = loss.Run("modern", ("muon",), 2e-3, 1000, 3)
    assert one.key == loss.Run("another name", ("muon",), 2e-3, 1000, 3).key
    others = [("modern", (), 2e-3, 1000, 3), ("modern", ("muon",), 2e-3, 999, 3), ("modern", ("muon",), 2e-3, 1000, 4)]
    assert one.key not in {loss.Run(*other).key for other in others}


def measure_grids(rows, losses, updates=UPDATES):
    """Add rows until the grids are complete; ``losses`` are by recipe and k."""
    for _ in range(100):
        runs = loss.next_rate_runs(updates, rows)
        if not runs:
            return
        for one in runs:
            k = round(math.log(one.rate / loss.RATE, loss.RATE_FACTOR))
            rows.add(one, made_up(one, losses(one.recipe, k), rows.digest))
    raise AssertionError("the grids never end")


def made_up(one, final, digest="d" * 64, device="some-cpu-2-threads", ms=100.0, diverged=False):
    """The record of a run that never was."""
    record = records.begin("loss", "bench.loss", [], torch.device("cpu"), "float32")
    record["run"] = {
        "recipe": one.recipe, "options": list(one.options), "key": one.key, "flags": one.flags, "seed": one.seed,
        "updates": one.updates, "tokens": one.updates * 64, "parameters": 5_836_032, "device": device,
        "dataset": {"digest": digest, "tokens": 10**6, "val_tokens": 12_345, "vocab_size": 256}, "diverged": diverged,
        "curve": [[0, 6.0]] if diverged else [[0, 6.0], [one.updates // 2, final + 1.0], [one.updates, final + 0.01]],
        "final_loss": final, "final_error": 0.01,
        "seconds": one.updates * ms / 1e3, "wall_seconds": one.updates * ms / 900, "ms": ms,
    }  # fmt: skip
    return record


def test_grids_grow_until_the_best_rates_lie_inside_and_they_have_as_many_points(study, tmp_path):
    rows = loss.Rows(tmp_path, "d" * 64)
    best = {"baseline": 4.2, "modern": 0.9}
    measure_grids(rows, lambda recipe, k: 3.0 + (k - best[recipe]) ** 2)
    grids = {recipe: sorted(loss.grid(recipe, UPDATES, rows)) for recipe in loss.RECIPES}
    assert grids == {"baseline": [0, 1, 2, 3, 4, 5], "modern": [-2, -1, 0, 1, 2, 3]}
    assert loss.best_rate("baseline", UPDATES, rows) == loss.RATE * loss.RATE_FACTOR**4


def test_a_rate_that_diverges_is_never_the_best(study, tmp_path):
    rows = loss.Rows(tmp_path, "d" * 64)
    for recipe in loss.RECIPES:
        for k in (0, 1, 2):
            one = loss.rate_run(recipe, k, UPDATES)
            rows.add(one, made_up(one, None, diverged=True) if k else made_up(one, 3.0))
    assert [one.rate for one in loss.next_rate_runs(UPDATES, rows)] == [loss.RATE / loss.RATE_FACTOR] * 2


def test_nothing_is_compared_before_the_rates_are_tuned(study, argv, launched):
    for command in ("compare", "ablate"):
        with pytest.raises(RequestError, match="the learning rates have to be tuned first"):
            loss.main([command, *argv])
    assert launched == []


# ---- running ----


def test_a_study_leaves_a_row_for_each_run_and_repeats_none(study, argv, launched, tmp_path, capsys):
    for command in ("rates", "compare", "ablate"):
        assert loss.main([command, *argv]) == 0
    made = len(launched)
    files = list((tmp_path / "loss" / "runs").glob("*.json"))
    assert len(files) == made >= 2 * 3 + 2 * 2 + 3
    row = json.loads(files[0].read_text())
    assert row["run"]["updates"] in (UPDATES, round(loss.SHARE * UPDATES))
    assert row["run"]["curve"][-1][0] == row["run"]["updates"]
    assert 0 < row["run"]["seconds"] <= row["run"]["wall_seconds"]
    assert {"commit", "versions", "device", "date"} <= row.keys()
    assert row["run"]["dataset"]["digest"] == open_dataset("words", argv[1].partition("=")[2]).identity
    assert not list((tmp_path / "work").glob("*/checkpoints"))  # 70 MB each
    for command in ("rates", "compare", "ablate"):
        assert loss.main([command, *argv]) == 0
    assert len(launched) == made
    assert "the best rate is 0.10" in capsys.readouterr().out
    assert loss.main(["show", *argv]) == 0
    said = capsys.readouterr().out
    assert "exact permutation test of the means, two-sided: p = " in said
    assert "## What each option is worth" in said
    assert list(records.collect(tmp_path)) == []  # not records of a device


def test_the_final_loss_is_that_of_the_whole_validation_split(study, data_dir, launched, tmp_path, monkeypatch):
    monkeypatch.setattr(loss.shutil, "rmtree", lambda *args, **kwargs: None)
    one, here = a_run(), session(data_dir, tmp_path)
    assert here.take([one]) == 0
    model = loss.open_model(str(next((tmp_path / "work").iterdir()))).model
    tokens = torch.from_numpy(open_dataset("words", data_dir).val[0].astype("int64"))
    n = (len(tokens) - 1) // 16 * 16
    last = model(tokens[n - 16 : n][None], tokens[n - 15 : n + 1][None]).item()
    assert here.rows.of(one)["run"]["final_loss"] == pytest.approx(last, rel=0.5)
    with torch.no_grad():
        whole = model(tokens[:n].view(-1, 16), tokens[1 : n + 1].view(-1, 16)).item()
    assert here.rows.of(one)["run"]["final_loss"] == pytest.approx(whole, rel=1e-3)


def test_a_run_that_was_interrupted_goes_on_and_has_the_bits_of_one_that_was_not(study, data_dir, launched, tmp_path):
    one = a_run(updates=200)
    whole = session(data_dir, tmp_path / "whole")
    assert whole.take([one]) == 0

    here = session(data_dir, tmp_path)
    metrics = tmp_path / "work" / one.stem(here.rows.digest) / "metrics.jsonl"

    def interrupt():
        while not metrics.exists() or b'"train"' not in metrics.read_bytes():
            time.sleep(1e-3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert here.take([one]) == 128 + signal.SIGINT
    thread.join()
    assert here.rows.of(one) is None
    assert here.take([one]) == 0
    assert [start["step"] > 0 for start in read_metrics(metrics)["start"]].count(True) == 1
    interrupted, undisturbed = here.rows.of(one)["run"], whole.rows.of(one)["run"]
    for name in ("final_loss", "curve", "tokens", "updates"):
        assert interrupted[name] == undisturbed[name]
    assert interrupted["seconds"] > 0


def test_a_time_limit_ends_a_run_with_a_checkpoint_from_which_it_goes_on(study, data_dir, launched, tmp_path):
    one, here = a_run(), session(data_dir, tmp_path)
    assert here.make(one, left=1e-6) == 0
    assert here.rows.of(one) is None
    (found,) = (tmp_path / "work").glob("*/checkpoints/step-*")
    assert found.name < f"step-{UPDATES:07d}"
    assert here.take([one]) == 0
    assert here.rows.of(one)["run"]["updates"] == UPDATES
    assert ["--max_hours=0" in argv for argv in launched] == [False, True]


def test_when_the_time_is_over_no_run_begins_and_what_is_left_is_told(study, argv, data_dir, launched, capsys):
    assert loss.main(["rates", "--minutes=1e-9", *argv]) == 0
    assert launched == []
    assert "the time is over: 6 runs left; none has finished on this device" in capsys.readouterr().out


def test_what_is_left_is_estimated_from_runs_on_the_same_device(study, data_dir, tmp_path):
    here = session(data_dir, tmp_path)
    for device, ms in (("another", 9000.0), (loss.device_key(here.device), 90_000.0)):
        one = a_run(seed=int(ms))
        here.rows.add(one, made_up(one, 3.0, here.rows.digest, device, ms))
    assert here.estimate([a_run(seed=1), a_run("modern", updates=10)]) == "2 runs left, about 50m 00s"


def test_a_run_that_diverges_has_a_row_that_says_so(study, data_dir, launched, tmp_path, capsys):
    one, here = a_run(rate=1e30), session(data_dir, tmp_path)
    assert here.take([one]) == 0
    row = here.rows.of(one)["run"]
    assert (row["diverged"], row["final_loss"], row["seconds"]) == (True, None, None)
    assert "diverged after" in capsys.readouterr().out
    assert loss.final_loss(here.rows.of(one)) == math.inf
    assert here.take([one]) == 0
    assert len(launched) == 1


@pytest.mark.parametrize("status", [1, 2])
def test_a_run_that_fails_ends_the_study_and_names_its_output(study, data_dir, tmp_path, monkeypatch, status):
    monkeypatch.setattr(loss, "launch", lambda command, stdout: status)
    with pytest.raises(RequestError, match=rf"has failed with status {status}; its output is .*output.txt"):
        session(data_dir, tmp_path).take([a_run()])
    assert not (tmp_path / "loss").exists()


def test_updates_that_two_machines_have_timed_have_no_time(study, data_dir, launched, tmp_path, monkeypatch):
    one, here = a_run(), session(data_dir, tmp_path)
    metrics = tmp_path / "work" / one.stem(here.rows.digest) / "metrics.jsonl"
    real = loss.launch

    def elsewhere(command, stdout):
        status = real(command, stdout)
        lines = metrics.read_text().splitlines()
        other = json.loads(lines[0]) | {"device": "another", "time": "2026-01-01T00:00:00+00:00"}
        metrics.write_text("\n".join([json.dumps(other), *lines]) + "\n")
        return status

    monkeypatch.setattr(loss, "launch", elsewhere)
    assert here.take([one]) == 0
    row = here.rows.of(one)["run"]
    assert (row["seconds"], row["ms"]) == (None, None)
    assert row["final_loss"] > 0


def test_a_run_is_a_process_of_its_own(study, data_dir, tmp_path):
    one, here = a_run(), session(data_dir, tmp_path)
    assert here.take([one]) == 0
    assert "val loss" in (tmp_path / "work" / one.stem(here.rows.digest) / "output.txt").read_text()
    assert here.rows.of(one)["run"]["final_loss"] < math.log(256)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rate"], "invalid choice: 'rate'"),
        ([], "the following arguments are required: command"),
        (["rates", "--minutes=0"], "--minutes must be above 0"),
        (["rates", "--updates=1"], "--updates must be at least 2"),
        (["rates", "--data_dir=/nowhere"], "no dataset 'words' in /nowhere.* python -m bench.loss data"),
        (["show", "--results=/nowhere"], "/nowhere has no runs of a study of 500 updates"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(study, argv, message):
    with pytest.raises(RequestError, match=message):
        loss.main(argv)


def test_runs_that_would_see_the_text_twice_are_refused(study, argv):
    with pytest.raises(RequestError, match=r"the runs would see text twice; at most \d+ updates"):
        loss.main(["rates", *argv, "--updates=100000"])


# ---- showing ----


@pytest.fixture
def rows(study, tmp_path):
    """A whole study that never was: modern is better by 0.1, and 1.1 times as slow an update."""
    rows = loss.Rows(tmp_path, "d" * 64)
    measure_grids(rows, lambda recipe, k: 3.0 + 0.1 * abs(k - 1))
    for one in loss.compare_runs(UPDATES, rows):
        modern = one.recipe == "modern"
        rows.add(one, made_up(one, 3.0 + 0.01 * one.seed - 0.1 * modern, ms=110.0 if modern else 100.0))
    for recipe, table in loss.ablation_runs(UPDATES, rows).items():
        for runs in table.values():
            for one in runs:
                if rows.of(one) is None:
                    rows.add(one, made_up(one, 3.2 - 0.1 * (recipe == "modern")))
    return rows


def test_the_page_has_the_figures_of_the_runs(rows, tmp_path, capsys):
    assert loss.main(["show", f"--results={tmp_path}", f"--updates={UPDATES}"]) == 0
    said = capsys.readouterr().out
    share = round(loss.SHARE * UPDATES) / UPDATES
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert summary["loss_difference"]["value"] == pytest.approx(-0.1)
    assert summary["p"] == pytest.approx(2 / 6)  # two seeds
    assert f"After {share:.2f} of the updates, modern's final loss is baseline's - 0.1000" in said
    (times,) = summary["times"].values()
    assert times["ratio"]["value"] == pytest.approx(share * 1.1)
    assert "2 of 2" in said
    relu2, wsd = summary["ablation"]
    assert (relu2["in_modern"], wsd["in_modern"]) == (True, False)
    # of seed 1; modern without relu2 is the baseline with as few updates
    assert relu2["modern"]["loss"] == relu2["baseline"]["loss"] == pytest.approx(3.2 - 2.91)
    assert (wsd["baseline"]["loss"], wsd["modern"]["loss"]) == (pytest.approx(0.0), pytest.approx(2.91 - 3.1))
    assert relu2["modern"]["time"] == pytest.approx(1.1)
    assert "| relu2 | yes | +0.2900 | +10.0% | +0.2900 | +10.0% |" in said
    assert "**3.0000**" in said  # of the best rate
    (page,) = tmp_path.glob("*.md")
    assert page.read_text() in said
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_of_two_datasets_are_not_compared(rows, tmp_path, capsys):
    one = a_run(seed=9)
    loss.Rows(tmp_path, "e" * 64).add(one, made_up(one, 1.0, "e" * 64))
    argv = ["show", f"--results={tmp_path}", f"--updates={UPDATES}"]
    with pytest.raises(RequestError, match=r"several datasets.*dddddddd: \d+ runs, eeeeeeee: 1 run.*--digest"):
        loss.main(argv)
    assert loss.main([*argv, "--digest=dddd"]) == 0
    assert "1 run of other datasets left out" in capsys.readouterr().out
    with pytest.raises(RequestError, match="--digest f is that of 0 datasets"):
        loss.main([*argv, "--digest=f"])


def test_times_of_two_devices_are_not_compared(rows, tmp_path, capsys):
    for one in loss.compare_runs(UPDATES, rows):
        rows.add(one, made_up(one, 3.0 + 0.01 * one.seed, device=f"the-cpu-of-{one.recipe}"))
    assert loss.main(["show", f"--results={tmp_path}", f"--updates={UPDATES}"]) == 0
    said = capsys.readouterr().out
    assert "No device has timed both recipes, so their times cannot be compared." in said
    assert "p = " in said  # losses are compared all the same


def test_a_recipe_that_diverged_has_no_p(rows, tmp_path, capsys):
    one = loss.compare_runs(UPDATES, rows)[0]
    rows.add(one, made_up(one, None, diverged=True))
    assert loss.main(["show", f"--results={tmp_path}", f"--updates={UPDATES}"]) == 0
    said = capsys.readouterr().out
    assert "1 diverged" in said
    assert "p = " not in said


def test_a_study_is_shown_as_far_as_it_is(study, tmp_path, capsys):
    rows = loss.Rows(tmp_path, "d" * 64)
    one = loss.rate_run("baseline", 0, UPDATES)
    rows.add(one, made_up(one, 3.0))
    assert loss.main(["show", f"--results={tmp_path}", f"--updates={UPDATES}"]) == 0
    said = capsys.readouterr().out
    assert "No seeds have been compared yet." in said
    assert "The grids are not complete." in said


def test_a_row_that_is_cut_off_is_named(study, tmp_path):
    path = tmp_path / "runs" / "a.json"
    path.parent.mkdir()
    path.write_text('{"version": 1, ')
    with pytest.raises(RequestError, match=r"a\.json is damaged: remove it, and its run is repeated"):
        loss.Rows(tmp_path, None)


def test_the_picture_needs_matplotlib_and_the_page_does_not(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert loss.main(["show", f"--results={tmp_path}", f"--updates={UPDATES}"]) == 0
    assert "no picture: " in capsys.readouterr().out
    assert list(tmp_path.glob("*.md"))
    assert not list(tmp_path.glob("*.png"))


# ---- the text ----


def test_the_dataset_has_each_source_once_whatever_the_names_and_the_order_of_files(study, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "PACKAGES", ())
    monkeypatch.setattr(loss, "VOCABULARY", 300)
    monkeypatch.setattr(loss, "VAL_FRACTION", 0.3)
    found = []
    for name, places in (("one", ("a.py", "b.py", "sub/c.py")), ("other", ("z.py", "y.py", "x/w.py", "copy.py"))):
        library = tmp_path / name
        (library / "sub").mkdir(parents=True)
        (library / "x").mkdir()
        texts = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(3)]
        for place, text in zip(places, [*texts, texts[0]], strict=False):
            (library / place).write_text(text)
        (library / "site-packages").mkdir()
        (library / "site-packages" / "own.py").write_text(f"# only {name}'s\n" * 99)
        (library / "_sysconfigdata_x.py").write_text(f"built = {name!r}\n" * 99)
        (library / "latin.py").write_bytes(b"# \xe9\n")
        monkeypatch.setattr(loss.sysconfig, "get_path", lambda key, library=library: str(library))
        assert loss.main(["data", f"--work={tmp_path}", f"--data_dir={tmp_path / name / 'data'}"]) == 0
        found.append(open_dataset("words", tmp_path / name / "data").identity)
    assert found[0] == found[1]


def test_a_package_of_the_text_that_is_missing_is_named(study, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "PACKAGES", ("no_such_package",))
    with pytest.raises(RequestError, match="the sources of no_such_package, which is not installed"):
        loss.main(["data", f"--work={tmp_path}", f"--data_dir={tmp_path}"])
