"""``python -m bench.gpu``: a stage that fails takes nothing with it. ``make gpu-rehearsal`` runs the real stages."""

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
    outcomes = gpu.run_stages(stages, folder, seconds, True, 1, lambda outcomes: notes.append(len(outcomes)))
    assert notes == [1, 2, 3]
    return {outcome.command: outcome for outcome in outcomes}


def test_one_that_dies_or_hangs_takes_nothing_with_it(stages, tmp_path):
    outcomes = run(stages, tmp_path)
    assert {name: o.status for name, o in outcomes.items()} == {
        "no-module": "failed", "sleep": "stopped", "quick": "passed",
    }  # fmt: skip
    assert outcomes["sleep"].seconds < 1.0 + gpu.GRACE_SECONDS + 5
    words = gpu.summary(list(outcomes.values()), tmp_path)
    assert "No module named nosuchmodule" in words
    assert words.endswith("next: mend the first that failed, and run python -m bench.gpu --stages dies")


def test_the_last_ones_get_what_time_is_left(stages, tmp_path):
    outcomes = run(stages, tmp_path, seconds=0.0)
    assert {o.status for o in outcomes.values()} == {"no time"}


def test_nothing_that_a_stopped_command_has_started_goes_on(monkeypatch, tmp_path):
    """As Inductor's compiling processes would."""
    late = "import time; time.sleep(3); open('late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    monkeypatch.setattr(gpu, "REPOSITORY", tmp_path)
    assert gpu.execute([gpu.sys.executable, "-c", code], tmp_path / "out.txt", 1.0) == "stopped"
    time.sleep(3.0)
    assert not (tmp_path / "late").exists()


def record(*losses, failure=None):
    plain = {"failure": None, "ms": 1.0, "losses": [5.0, 4.0]}
    return {"contenders": {"fastgpt, no graphs": plain, "fastgpt": {**plain, "failure": failure, "losses": losses}}}


@pytest.mark.parametrize(
    ("found", "work"),
    [
        (None, False),  # it crashed
        ({"contenders": {}}, False),
        (record(5.0, failure="RuntimeError: capture"), False),
        (record(5.0, 4.0), True),
        (record(5.0, 4.000001), True),
        (record(5.0, 4.5), False),
        (record(5.0, float("nan")), False),
    ],
)
def test_graphs_work_where_they_give_the_losses_of_a_step_without(found, work):
    assert gpu.graphs_work(found) == work


def test_a_record_that_was_cut_off_is_passed_over(tmp_path):
    (tmp_path / "mfu-a.json").write_text('{"whole": 1}')
    (tmp_path / "mfu-b.json").write_text('{"cut')
    assert gpu.newest(tmp_path, "mfu-*.json", 0.0) == {"whole": 1}
    assert gpu.newest(tmp_path, "mfu-*.json", time.time() + 10) is None


def test_without_graphs_the_contenders_are_those_without(tmp_path):
    step, _ = gpu.STAGES["step"]
    line = gpu.arguments(step, False, False, tmp_path, 1)
    assert "fastgpt" not in line
    assert "fastgpt, no graphs" in line


def test_every_command_is_one_that_its_module_takes(tmp_path):
    parsers = {"bench.mfu": mfu.parse, "bench.kernels": kernels.parse}
    parsed = 0
    for commands in gpu.STAGES.values():
        for one in commands:
            for flags in (one.flags, one.small):
                if one.module in parsers and flags is not None:
                    parsers[one.module](list(flags))
                    parsed += 1
    assert parsed == 9


def test_all_of_it_takes_less_than_the_device_is_lent_for():
    first = sum(c.seconds for stage in ("first", "operators", "step", "kernels") for c in gpu.STAGES[stage])
    assert first <= 9.5 * 60 - 60  # and the rest has a minute at least


def test_the_record_is_written_and_the_status_tells(stages, tmp_path, capsys):
    flags = ["--rehearse", "--out", str(tmp_path / "out")]
    assert gpu.main([*flags, "--stages", "passes"]) == 0
    found = json.loads((tmp_path / "out" / "gpu" / "stages.json").read_text())
    assert [o["status"] for o in found["outcomes"]] == ["passed"]
    assert found["rehearsal"] is True
    assert "all passed" in capsys.readouterr().out
    assert gpu.main([*flags, "--stages", "dies"]) == 1


@pytest.mark.skipif(gpu.torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RequestError, match="--rehearse"):
        gpu.main([])
