"""Calls kernels and reads files with random arguments and contents, right ones and wrong ones.

    python -m bench.robustness.fuzz                            # ten minutes of each fuzzer
    python -m bench.robustness.fuzz kernels --minutes 60
    python -m bench.robustness.fuzz --examples 100 --seed 3    # the short form: the same examples every time

:mod:`fuzz_kernels` and :mod:`fuzz_files` say what is drawn and what may come of it; :mod:`corpus` has what once failed
and is checked first. Examples run in a child process, so that a crash, a hang and a lack of memory are seen too. What
fails is printed, as small as Hypothesis can make it, in the form in which it can be added to the corpus.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from bench.records import REPOSITORY
from bench.robustness import corpus, fuzz_files, fuzz_kernels
from fastgpt import limits
from fastgpt.units import GIB

# What a fuzzer draws from and checks with: examples(), and checker(folder), which raises if an example shows a fault.
FUZZERS: dict[str, ModuleType] = {"kernels": fuzz_kernels, "files": fuzz_files}
ROUND = 200  # examples that Hypothesis draws together
HANG = 30.0  # seconds without a new example after which one is taken to hang
MOST_BYTES = GIB  # that an example may take, beside what the process holds before the first
CRASHES = 3  # after so many, a fuzzer ends early


# ---- the child: examples and what is wrong with them ----


def place_of(error: BaseException) -> str:
    """An error's type, and where in fastgpt it comes from: of two errors that agree in these, one is reported."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fastgpt/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


class Search:
    """Checks examples, and prints each kind of failure once.

    Args:
        check: raises if an example shows a fault.
        journal: is overwritten with each example before it is checked.

    Attributes:
        n_examples: that have been checked.
    """

    def __init__(self, check: Callable[[Any], None], journal: Path) -> None:
        self._check = check
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT)
        self._known: set[str] = set()
        self.n_examples = 0

    def _is_new(self, example: Any) -> Exception | None:
        """The error that an example shows, unless one like it has been reported."""
        os.ftruncate(self._journal, 0)
        os.pwrite(self._journal, repr(example).encode(errors="replace"), 0)
        self.n_examples += 1
        try:
            self._check(example)
        except Exception as error:
            return None if place_of(error) in self._known else error
        return None

    def _report(self, example: Any, error: Exception) -> None:
        self._known.add(place_of(error))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "hypothesis" not in frame.filename]
        where = "".join(traceback.format_list(frames[-4:]))
        print(f"FAULT {place_of(error)}\n  {example!r}\n{where}  {str(error)[-1000:]}", flush=True)

    def again(self, examples: Sequence[Any]) -> None:
        """Check these."""
        for example in examples:
            error = self._is_new(example)
            if error is not None:
                self._report(example, error)

    def draw(self, strategy: SearchStrategy[Any], number: int, n_examples: int) -> None:
        """Check so many examples, those of a seed, and as many more as it takes to make one that fails small."""
        smallest: list[tuple[Any, Exception]] = []  # what failed last, at which Hypothesis has arrived

        @seed(number)
        @settings(
            max_examples=n_examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
        )  # fmt: skip
        @given(strategy)
        def holds(example: Any) -> None:
            error = self._is_new(example)
            if error is not None:
                smallest[:] = [(example, error)]
                raise error

        try:
            holds()
        except Exception:
            self._report(*smallest[0])


def search(fuzzer: str, journal: Path, first_seed: int, seconds: float, n_examples: int | None) -> None:
    """What the child does: the corpus, then so many examples, or as many as there is time for."""
    module = FUZZERS[fuzzer]
    with tempfile.TemporaryDirectory() as folder:
        found = Search(module.checker(Path(folder)), journal)
        taken = limits.held() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (taken, taken))
        found.again(corpus.EXAMPLES[fuzzer])
        if n_examples is not None:
            found.draw(module.examples(), first_seed, n_examples)
        end, number = time.monotonic() + seconds, first_seed
        while n_examples is None and time.monotonic() < end:
            found.draw(module.examples(), number, ROUND)
            number += 1
    print(f"DONE {found.n_examples}", flush=True)


# ---- the parent ----


def watch(command: Sequence[str], hang: float = HANG) -> tuple[int, list[str]]:
    """Run a child to its end; how many examples it has checked, and what was found.

    Args:
        command: of the child; the path of a journal is added to it.
        hang: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        journal, output = Path(folder) / "journal", Path(folder) / "output"
        journal.touch()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with output.open("w") as out:
            child = subprocess.Popen(
                [*command, str(journal)], cwd=REPOSITORY, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
            hangs = False
            while child.poll() is None and not hangs:
                time.sleep(0.1)
                state = journal.stat()
                has_begun = state.st_size > 0  # until then a run is made, and more
                hangs = has_begun and time.time() - state.st_mtime > hang
            if hangs:
                child.kill()
                child.wait()
        text, last = output.read_text(errors="replace"), journal.read_text(errors="replace")
    said, _, done = text.partition("DONE ")
    found = [f"FAULT {part.strip()}" for part in said.split("FAULT ")[1:]]
    if hangs:
        found.append(f"HANG for {hang:g} s\n  {last}")
    elif child.returncode:
        found.append(f"CRASH with status {child.returncode}\n  {last}\n{text[-3000:]}")
    return int(done or 0), found


def fuzz(fuzzer: str, first_seed: int, seconds: float, n_examples: int | None) -> list[str]:
    """Run a fuzzer, and again after each crash or hang; what was found."""
    end, total, found = time.monotonic() + seconds, 0, dict[str, str]()  # by the kind of fault and the example
    for crash in range(CRASHES):
        command = [sys.executable, "-m", "bench.robustness.fuzz", fuzzer, "--seed", str(first_seed + 10_000 * crash)]
        command += ["--minutes", str(max(1.0, end - time.monotonic()) / 60)]
        command += [] if n_examples is None else ["--examples", str(n_examples)]
        n, new = watch([*command, "--child"])
        total += n
        found |= {"".join(fault.splitlines()[:2]): fault for fault in new}
        if not new or new[-1].startswith("FAULT") or time.monotonic() > end:
            break
    for fault in found.values():
        print(fault, flush=True)
    print(f"{fuzzer}: {total:,} examples, {len(found)} faults", flush=True)
    return list(found.values())


def main() -> None:
    """Fuzz, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.robustness.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("fuzzers", nargs="*", choices=[[], *FUZZERS], default=[], help="kernels, files (both)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each fuzzer (10)")
    parser.add_argument("--examples", type=int, help="so many examples of each, instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    request = parser.parse_args()
    seconds = 60 * request.minutes
    if request.child:
        search(request.fuzzers[0], request.child, request.seed, seconds, request.examples)
        return
    n_faults = 0
    for fuzzer in request.fuzzers or FUZZERS:
        n_faults += len(fuzz(fuzzer, request.seed, seconds, request.examples))
    sys.exit(n_faults > 0)


if __name__ == "__main__":
    main()
