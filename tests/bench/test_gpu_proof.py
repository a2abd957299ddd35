"""``python -m bench.gpu_proof`` finds planted faults. ``make gpu-proof`` checks all kernels and compiles them."""

import subprocess
import sys
from dataclasses import replace

import pytest

from bench.gpu_proof.cases import Outcome
from bench.gpu_proof.plants import BARRIER_PLANTS, KERNELS, LARGE_PLANTS, SMALL_PLANTS, CannotPlant, source_with
from bench.records import REPOSITORY

PLANTS = SMALL_PLANTS + LARGE_PLANTS + BARRIER_PLANTS
CASES = ["layer_norm C100", "adamw", "attention across, views"]
RUN_TWO_CASES = f"""
import sys
from bench.gpu_proof import __main__ as proof
proof.SMALL = {{name: proof.SMALL[name] for name in {CASES}}}
sys.exit(proof.main(sys.argv[1:]))
"""


def test_planted_faults_are_found_and_the_kernels_have_none():
    """In its own process, because it changes the interpreter."""
    command = [sys.executable, "-c", RUN_TWO_CASES, "--only", "plants", "kernels"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    expected = [expected for _, expected, _ in KERNELS] + [plant.expected for plant in SMALL_PLANTS] + [""] * len(CASES)
    assert [line.split()[0] for line in rows[:-2]] == ["found" if fault else "quiet" for fault in expected]
    n_faults = sum(map(bool, expected))
    assert rows[-1].startswith(f"as expected: {n_faults} planted faults found, {len(expected) - n_faults} cases quiet")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_the_text_that_a_plant_changes_is_in_the_source(plant):
    compile(source_with(plant), plant.name, "exec")


def test_a_plant_without_its_text_is_a_failure():
    with pytest.raises(CannotPlant, match=r"gelu no longer has: gone") as error:
        source_with(replace(PLANTS[3], changes={"gone": ""}))
    outcome = Outcome("gelu", PLANTS[3].expected, str(error.value), "", 0.0)
    assert not outcome.good
    assert outcome.verdict == "MISSED"


def test_only_the_expected_fault_counts_as_found():
    assert Outcome("plant", "race", "race: program 1 reads", "", 0.0).good
    assert not Outcome("plant", "race", "bounds: reads", "", 0.0).good
    assert not Outcome("plant", "race", "", "", 0.0).good
    assert Outcome("case", "", "race", "", 0.0).verdict == "FAULT"
