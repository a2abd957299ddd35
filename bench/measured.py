"""``python -m bench.measured``: hands what was measured of fastgpt's step to the plan.

Collects, from every record of bench.mfu under bench/results, what ``fastgpt.train.predict.roofline`` needs to tell its
error, and writes it to ``fastgpt/train/predict/measured.json``, which is installed with the package.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.mfu import OURS
from bench.timing import REPOSITORY, RESULTS
from fastgpt.cli import Parser, run
from fastgpt.train.predict.roofline import MEASURED

KEYS = (
    "name", "model", "batch_size", "accumulation", "device_type", "dtype", "state_bits", "recompute", "n_sm",
    "gemm_flops", "bandwidth",
)  # fmt: skip


def rows(results: Path) -> list[dict[str, Any]]:
    """One for each record in which fastgpt's step was timed, in the order of their paths."""
    found = []
    for path in sorted(results.glob("*/mfu-*.json")):
        record = json.loads(path.read_text())
        ours = record["contenders"].get(OURS, {})
        if "ms" in ours:
            measured = {"ms": ours["ms"], "peak_bytes": ours["peak_bytes"]}
            place = {"record": path.relative_to(results).as_posix(), "device": record["environment"]["device"]}
            found.append({**place, **{key: record[key] for key in KEYS}, **measured})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    Parser(prog="python -m bench.measured", description=__doc__).parse_args(argv)
    found = rows(RESULTS)
    MEASURED.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} measurements in {MEASURED.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    run(main)
