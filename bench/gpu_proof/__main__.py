"""``python -m bench.gpu_proof``: looks for illegal accesses and races in the GPU's kernels, without a GPU.

    python -m bench.gpu_proof                          # everything, in about a minute and a half
    python -m bench.gpu_proof --only plants kernels    # the interpreter at small shapes, in seconds

Plants faults and must find them, then must find none in the kernels as they are: accesses outside a tensor, races,
overflow of int32, reads of unwritten memory, grids that are too large, missing barriers. Exit status: 0 all as
expected; 1 not as expected; 2 the request was wrong. bench/gpu_proof/__init__.py says what is not checked.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from bench.gpu_proof.cases import LARGE, OPS, SMALL, Case, Ops, Outcome
from bench.gpu_proof.memory import Pair
from bench.gpu_proof.plants import KERNELS, LARGE_PLANTS, SMALL_PLANTS, CannotPlant, Plant, planted
from bench.gpu_proof.watch import fault_of
from bench.records import REPOSITORY
from fastgpt.cli import Parser, run
from tests.kernels import interpreter

PARTS = ("plants", "kernels", "large", "barriers")


def look(
    name: str, expected: str, case: Case, ops: Ops = OPS, large: bool = False, seen: dict[Pair, bool] | None = None
) -> Outcome:
    """Run a case in the interpreter; ``seen`` collects what its kernels overwrite, for the barriers."""
    began = time.monotonic()
    found, watch = fault_of(case, ops, large)
    if seen is not None:
        seen |= {pair: alike and seen.get(pair, True) for pair, alike in watch.overwritten.items()}
    note = f"{watch.launches} launches, {watch.accesses:,} accesses"
    return Outcome(name, expected, found, note, time.monotonic() - began)


def look_at_plants(plants: Sequence[Plant], folder: Path, large: bool) -> Iterator[Outcome]:
    """Run copies of the kernels with planted faults; ``folder`` is where they are written."""
    for plant in plants:
        try:
            _, ops = planted(plant, folder)
        except CannotPlant as error:
            yield Outcome(plant.name, plant.expected, str(error), "", 0.0)
        else:
            yield look(plant.name, plant.expected, plant.case, ops, large)


def look_at_barriers(overwritten: dict[Pair, bool], folder: Path) -> Iterator[Outcome]:
    """Run bench/gpu_proof/barriers.py in another process, which compiles.

    Args:
        overwritten: the pairs of loads and stores that the interpreter has seen.
        folder: for the pairs, the planted copies and Triton's cache. The usual cache may have kernels of another
            checkout, with other line numbers.
    """
    began, path = time.monotonic(), folder / "pairs.json"
    path.write_text(json.dumps([(*pair, alike) for pair, alike in sorted(overwritten.items())]))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "compiled")}
    command = [sys.executable, "-m", "bench.gpu_proof.barriers", str(path), str(folder)]
    with subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield Outcome(**json.loads(line))
    if process.returncode:
        fault = f"the process that compiles ended with status {process.returncode}"
        yield Outcome("barriers", "", fault, "", time.monotonic() - began)


def outcomes(parts: Sequence[str], folder: Path) -> Iterator[Outcome]:
    """The outcomes of the parts, one after the other."""
    overwritten: dict[Pair, bool] = {}
    if "plants" in parts:
        for name, expected, case in KERNELS:
            yield look(name, expected, case)
        yield from look_at_plants(SMALL_PLANTS, folder, large=False)
    if "kernels" in parts or "barriers" in parts:
        for name, case in SMALL.items():
            yield look(name, "", case, seen=overwritten)
    if "large" in parts:
        yield from look_at_plants(LARGE_PLANTS, folder, large=True)
        for name, case in LARGE.items():
            yield look(name, "", case, large=True)
    if "barriers" in parts:
        yield from look_at_barriers(overwritten, folder)


def row(outcome: Outcome) -> str:
    """A line of the table."""
    return f"{outcome.verdict:<7}{outcome.name:<43}{outcome.seconds:5.1f} s  {outcome.found or outcome.note}"


def verdict(all_outcomes: Sequence[Outcome], seconds: float) -> str:
    """The last line, below the table."""
    if bad := [outcome.name for outcome in all_outcomes if not outcome.good]:
        return f"not as expected: {'; '.join(bad)}"
    n_found = sum(bool(outcome.expected) for outcome in all_outcomes)
    n_quiet = len(all_outcomes) - n_found
    return f"as expected: {n_found} planted faults found, {n_quiet} cases quiet, in {seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and print the table."""
    parser = Parser(prog="python -m bench.gpu_proof", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="barriers runs kernels too")
    flags = parser.parse_args(argv)
    interpreter.mend()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(flags.only, Path(folder)):
            print(row(outcome), flush=True)
            rows.append(outcome)
    print(f"\n{verdict(rows, time.monotonic() - began)}")
    return int(not all(outcome.good for outcome in rows))


if __name__ == "__main__":
    run(main)
