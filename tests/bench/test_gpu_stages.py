"""``python -m bench.gpu``: a stage that fails does not affect others. ``make gpu-rehearsal`` runs the real stages."""

import json
import time

import pytest

from bench import gpu, kernels, mfu
from bench.gpu import Command
from fastgpt.errors import RequestError

SLEEP = ("-n1", "-r1", "import time; time.sleep(60)")


def command(name, module="timeit", flags=("-n1", "-r1", "pass"), seconds=20.0):
    return Command(name, module, flags, seconds, small=flags)


@pytest.fixture
def stages(monkeypatch):
    """One stage of each kind."""
    found = {
        "dies": (command("no-module", "nosuchmodule"),),
        "hangs": (command("sleep", flags=SLEEP, seconds=1.0),),
        "passes": (command("quick"), Command("for-a-gpu", "nosuchmodule", (), 1.0, small=None)),
    }
    monkeypatch.setattr(gpu, "STAGES", found)
    return list(found)


def run(stages, folder, seconds=60.0):
    (folder / "gpu").mkdir()
    notes = []
    outcomes = gpu.run_stages(stages, folder, seconds, True, 1, 16, lambda outcomes: notes.append(len(outcomes)))
    assert notes == [1, 2, 3]
    return {outcome.command: outcome for outcome in outcomes}


def test_a_command_that_dies_or_hangs_does_not_affect_the_others(stages, tmp_path):
    outcomes = run(stages, tmp_path)
    assert {name: o.status for name, o in outcomes.items()} == {
        "no-module": "failed", "sleep": "stopped", "quick": "passed",
    }  # fmt: skip
    assert outcomes["sleep"].seconds < 1.0 + gpu.GRACE_SECONDS + 5
    words = gpu.summary(list(outcomes.values()), tmp_path)
    assert "No module named nosuchmodule" in words
    assert words.endswith("next: fix no-module, then run python -m bench.gpu --stages dies")


def test_without_time_left_a_command_does_not_run(stages, tmp_path):
    outcomes = run(stages, tmp_path, seconds=0.0)
    assert {o.status for o in outcomes.values()} == {"no time"}


def test_the_children_of_a_stopped_command_are_stopped(monkeypatch, tmp_path):
    """As Inductor's compiling processes would."""
    late = "import time; time.sleep(3); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    assert gpu.execute([gpu.sys.executable, "-c", code], tmp_path / "out.txt", 1.0) == "stopped"
    time.sleep(3.0)
    assert not (tmp_path / "late").exists()


def measured(contenders):
    return {"comparisons": [{"contenders": contenders}]}


def record(*losses, failure=None):
    plain = {"failure": None, "ms": 1.0, "losses": [5.0, 4.0]}
    return measured({"fastgpt, no graphs": plain, "fastgpt": {**plain, "failure": failure, "losses": losses}})


@pytest.mark.parametrize(
    ("found", "work"),
    [
        (None, True),  # stopped before it wrote anything
        ({"comparisons": []}, True),
        (measured({}), True),
        (measured({"fastgpt, no graphs": {"failure": None, "losses": [5.0, 4.0]}}), True),
        (record(5.0, failure="RuntimeError: capture"), False),
        (measured({"fastgpt": {"failure": "RuntimeError: capture", "losses": []}}), False),
        (record(5.0, 4.0), True),
        (record(5.0, 4.000001), True),
        (record(5.0, 4.5), False),
        (record(5.0, float("nan")), False),
    ],
)
def test_graphs_are_not_used_only_if_they_failed_or_changed_the_losses(found, work):
    """A stage that was stopped before it ran them says nothing about graphs."""
    assert gpu.graphs_work(found) == work


def test_a_record_that_was_cut_off_is_skipped(tmp_path):
    (tmp_path / "mfu-a.json").write_text('{"version": 1}')
    (tmp_path / "mfu-b.json").write_text('{"cut')
    assert gpu.newest(tmp_path, "mfu-*.json", 0.0) == {"version": 1}
    assert gpu.newest(tmp_path, "mfu-*.json", time.time() + 10) is None


def test_a_first_stage_that_was_stopped_does_not_turn_graphs_off(monkeypatch, tmp_path):
    step = command("mfu", flags=("-n1", "-r1", "pass", "fastgpt"))
    monkeypatch.setattr(gpu, "STAGES", {"first": (command("first-step", flags=SLEEP, seconds=1.0),), "step": (step,)})
    lines = []
    arguments = gpu.arguments
    monkeypatch.setattr(gpu, "arguments", lambda *args: lines.append(arguments(*args)) or lines[-1])
    (tmp_path / "gpu").mkdir()
    gpu.run_stages(["first", "step"], tmp_path, 60.0, True, 1, 16, lambda outcomes: None)
    assert "fastgpt" in lines[1]


MFU = [one for commands in gpu.STAGES.values() for one in commands if one.module == "bench.mfu"]


@pytest.mark.parametrize("one", MFU, ids=lambda one: one.name)
def test_if_graphs_fail_every_stage_has_the_contender_without_them(tmp_path, one):
    line = gpu.arguments(one, False, False, tmp_path, 1, 16)
    assert "fastgpt" not in line
    assert line.count("fastgpt, no graphs") == 1
    request = mfu.parse(line[3:])
    assert "fastgpt, no graphs" in request.contenders
    others = set(mfu.parse(gpu.arguments(one, False, True, tmp_path, 1, 16)[3:]).contenders) - {"fastgpt"}
    assert set(request.contenders) == others | {"fastgpt, no graphs"}


def test_no_command_replaces_the_record_of_another(tmp_path):
    requests = [mfu.parse(gpu.arguments(one, False, True, tmp_path, 1, 16)[3:]) for one in MFU]
    names = [(r.preset, r.n_layer, r.label) for r in requests]
    assert len(set(names)) == len(names) == 5


def test_a_record_does_not_say_where_the_repository_lies():
    folder = gpu.REPOSITORY / "bench" / "results" / "a-gpu"
    line = gpu.arguments(MFU[0], False, True, folder, 1, 16)
    assert line[line.index("--out") + 1] == "bench/results/a-gpu"


@pytest.mark.parametrize(
    ("gib", "sequences"),
    [(79.2, 16), (39.4, 16), (23.5, 8), (19.6, 8), (15.6, 4), (11.99, 2), (7.6, 2)],  # as cards of 80 GB … report
)
def test_a_small_card_gets_a_small_micro_batch(tmp_path, gib, sequences):
    size = gpu.micro_batch(int(gib * 2**30))
    assert size == sequences
    for stage, name, expected in (("step", "mfu", size), ("kernels", "kernels", max(8, size))):
        one = next(one for one in gpu.STAGES[stage] if one.name == name)
        line = gpu.arguments(one, False, True, tmp_path, 1, size)
        assert line[line.index("--batch_size") + 1] == str(expected)


def test_every_command_is_accepted_by_its_module(tmp_path):
    parsers = {"bench.mfu": mfu.parse, "bench.kernels": kernels.parse}
    parsed = 0
    for commands in gpu.STAGES.values():
        for one in commands:
            for rehearsal in (False, True):
                if one.module in parsers and not (rehearsal and one.small is None):
                    parsers[one.module](gpu.arguments(one, rehearsal, True, tmp_path, 1, 4)[3:])
                    parsed += 1
    assert parsed == 9


def test_the_tests_that_it_runs_exist():
    named = [flag for commands in gpu.STAGES.values() for one in commands for flag in one.flags if "tests/" in flag]
    assert len(named) >= 5
    assert [path for path in named if not (gpu.REPOSITORY / path).exists()] == []


def test_the_time_limits_of_the_first_stages_fit_the_default():
    first = sum(c.seconds for stage in ("first", "operators", "step", "kernels") for c in gpu.STAGES[stage])
    assert first <= 9.5 * 60 - 60  # and the rest has a minute at least


def test_the_record_is_written_and_the_exit_status_is_right(stages, tmp_path, capsys):
    flags = ["--rehearse", "--out", str(tmp_path / "out")]
    assert gpu.main([*flags, "--stages", "passes"]) == 0
    found = json.loads((tmp_path / "out" / "gpu" / "stages.json").read_text())
    assert [o["status"] for o in found["outcomes"]] == ["passed"]
    assert found["rehearsal"] is True
    assert "all passed; the records" in capsys.readouterr().out
    assert "all passed; the records" in (tmp_path / "out" / "gpu" / "summary.txt").read_text()
    assert gpu.main([*flags, "--stages", "dies"]) == 1


def test_a_machine_that_is_taken_away_leaves_the_summary_so_far(stages, tmp_path, monkeypatch):
    def execute(line, output, limit):
        if output.stem == "taken-away":
            raise SystemExit
        return "passed"

    monkeypatch.setattr(gpu, "STAGES", {"passes": (command("quick"), command("taken-away"))})
    monkeypatch.setattr(gpu, "execute", execute)
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path / "out"), "--stages", "passes"])
    words = (tmp_path / "out" / "gpu" / "summary.txt").read_text()
    assert "quick" in words
    assert "all passed so far" in words


@pytest.mark.skipif(gpu.torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RequestError, match="--rehearse"):
        gpu.main([])
