"""The examples run, and print what they claim."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name):
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"fused_adamw", "one_kernel", "patch_gpt2"}


def test_one_kernel_gives_the_loss_and_the_gradients_of_plain_pytorch():
    line = output("one_kernel").splitlines()[-1]
    plain, fused = map(float, re.findall(r"(\d+\.\d+)(?= in| here)", line))
    assert abs(plain - fused) < 1e-5
    assert float(line.split()[-1]) < 1e-6


def test_fused_adamw_learns_to_add_two_digits():
    lines = output("fused_adamw").splitlines()
    losses = [float(x) for line in lines if (x := line.partition("loss ")[2].partition(",")[0])]
    assert losses[-1] < losses[0] / 20
    assert lines[-1] == "100 of 100 sums right"


def test_a_patched_gpt2_trains_to_the_losses_of_the_plain_one():
    pytest.importorskip("transformers", reason="the example needs the optional extra")
    lines = output("patch_gpt2").splitlines()
    losses = [tuple(map(float, re.findall(r"loss (\S+)", line))) for line in lines]
    assert len(losses) == 6
    assert all(plain == pytest.approx(patched, abs=2e-4) for plain, patched in losses)
    assert losses[-1][0] < losses[0][0] - 0.5
