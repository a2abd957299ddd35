"""``python -m bench.measured``: gives the measured steps of fastgpt to the plan.

Collects, from every record of bench.mfu under bench/results, what ``fastgpt.train.predict.roofline`` needs to compute
its error, and writes it to ``fastgpt/train/predict/measured.json``, which is installed with the package.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contenders import OURS
from bench.records import REPOSITORY, RESULTS, collect
from fastgpt.cli import Parser, run
from fastgpt.train.predict.roofline import MEASURED

SIZES = "batch_size", "accumulation"  # of a comparison's shapes; the others are the model's


def rows(results: Path) -> list[dict[str, Any]]:
    """One row for each comparison with a prediction in which fastgpt's step was timed, in the order of the paths."""
    found = []
    for path, record in collect(results, "steps"):
        for comparison in record["comparisons"]:
            ours = comparison["contenders"].get(OURS, {})
            if "predicted" in comparison and "ms" in ours:
                shapes = comparison["shapes"]
                found.append(
                    {
                        "record": path.relative_to(results).as_posix(),
                        "device": record["device"]["name"],
                        "name": comparison["name"],
                        "model": {name: size for name, size in shapes.items() if name not in SIZES},
                        **{name: shapes[name] for name in SIZES},
                        "device_type": record["device"]["type"],
                        "dtype": record["dtype"],
                        "state_bits": comparison["state_bits"],
                        "recompute": comparison["recompute"],
                        "n_sm": record["device"]["n_sm"],
                        "gemm_flops": comparison["ceilings"]["gemm_flops"],
                        "bandwidth": comparison["ceilings"]["bandwidth"],
                        "ms": ours["ms"],
                        "peak_bytes": ours["peak_bytes"],
                    }
                )
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
