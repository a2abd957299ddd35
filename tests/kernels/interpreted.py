"""``python -m tests.kernels.interpreted``: notes with which sources all cases of Triton's interpreter have passed.

What the interpreter computes depends on sources and versions alone, and it is slow. ``make test-all`` runs all of its
cases and then this, which writes a digest for each file of tests into ``interpreted.json``. As long as the digest is
the same, a run of the tests takes one case in ``SAMPLE``, others every day; where it is not, all of them.
"""

import datetime
import hashlib
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
import triton

HERE = Path(__file__).parent
RECORD = HERE / "interpreted.json"
KERNELS = HERE.parents[1] / "fastgpt" / "kernels"
SHARED = [HERE.parent / "conftest.py", HERE / "conftest.py", HERE / "interpreter.py"]
SAMPLE = 8

# Chosen once a run: the processes that share the tests must choose alike.
DAY = os.environ.setdefault("FASTGPT_TEST_DAY", datetime.date.today().isoformat())


def digest(tests: Path) -> str:
    """Of all that decides what the interpreter computes in a file of tests."""
    sources = [*sorted(KERNELS.rglob("*.py")), *sorted(KERNELS.rglob("*.json")), *SHARED, tests]
    everything = [triton.__version__, torch.__version__, numpy.__version__, *(path.read_text() for path in sources)]
    return hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]


def recorded() -> dict[str, str]:
    """Digests by the names of files."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record() -> None:
    """Write the digests of all files of tests as they are now."""
    found = {path.name: digest(path) for path in sorted(HERE.glob("test_*.py"))}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


def left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those interpreted cases that this run need not repeat."""
    if torch.cuda.is_available() or "FASTGPT_TEST_ALL" in os.environ:
        return []
    interpreted = [item for item in items if item.path.parent == HERE and _backend(item) == "triton"]
    known = recorded()
    passed = {path for path in {item.path for item in interpreted} if known.get(path.name) == digest(path)}
    return [item for item in interpreted if item.path in passed and not in_sample(item.nodeid, DAY)]


def in_sample(nodeid: str, day: str) -> bool:
    """Whether it is this case's day."""
    return int(hashlib.sha256(f"{day} {nodeid}".encode()).hexdigest(), 16) % SAMPLE == 0


def _backend(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend") if callspec else None


if __name__ == "__main__":
    record()
    print(f"{RECORD.name} written")
