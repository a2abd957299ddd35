"""The soak and the corruption trial in their short forms, and that they notice what they are there to notice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.robustness import corruption
from bench.robustness.child import Ended


def run(*args):
    return subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits():
    done = run("bench.robustness.soak", "--kills", "5", "--signals", "SIGKILL")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SIGKILL, 5 kills")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_no_damage_is_accepted_in_silence():
    done = run("bench.robustness.corruption", "--trials", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("; 0 false alarms\n")


@pytest.mark.parametrize(
    ("ended", "right", "word"),
    [
        (Ended(None, ""), True, "hang"),
        (Ended(1, "Traceback (most recent call last):\n  meta.json"), False, "traceback"),
        (Ended(0, "Traceback (most recent call last):"), True, "traceback"),
        (Ended(0, "step 26"), False, "silent"),
        (Ended(0, "meta.json is damaged: going on without"), False, "silent"),
        (Ended(0, "step 26"), True, "harmless"),
        (Ended(0, "d/meta.json is damaged: going on without"), True, "told"),
        (Ended(2, "error: d/meta.json is damaged"), False, "refused"),
        (Ended(2, "error: something is wrong"), False, "unnamed"),
        (Ended(2, "error: d/meta.json is damaged\nerror: and more"), False, "unnamed"),
        (Ended(1, "error: d/meta.json is damaged"), False, "unnamed"),
    ],
)
def test_every_end_has_its_word(ended, right, word):
    assert corruption.outcome(ended, right, [Path("d/meta.json")]) == word


@pytest.mark.parametrize("how", corruption.DAMAGES)
def test_every_damage_changes_a_file(how):
    content = random.Random(0).randbytes(10_000)
    changed = [bytes(how(bytearray(content), random.Random(i))) != content for i in range(20)]
    assert sum(changed) >= 18
    assert bytes(how(bytearray(b""), random.Random(1))) is not None  # an empty file can be damaged too
