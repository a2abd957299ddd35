"""``pytest bench/ --benchmark-only`` times every op and PyTorch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.ops import OPS

ROOT = Path(__file__).parents[2]
RUN_SMALL = """
import sys, pytest
from bench import kernels
Setting = kernels.Setting
small = {"C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}
kernels.Setting = lambda *args, **sizes: Setting(*args, **{**sizes, **small})
sys.exit(pytest.main(sys.argv[1:]))
"""
ONE_ROUND = ["--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0"]


def test_every_op_and_pytorchs_are_timed_in_fp32_and_bf16(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, "-c", RUN_SMALL, "bench", *ONE_ROUND, f"--benchmark-json={record}"]
    # pytest-benchmark would take the child for a worker of xdist's, where it does not time
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment = {**inherited, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    tables = {}
    for row in json.loads(record.read_text())["benchmarks"]:
        tables.setdefault(row["group"], set()).add(row["name"].startswith("fastgpt"))
    optimizers = {name for name in OPS if name.startswith("adamw")}
    others = {f"{name} {dtype}" for name in OPS.keys() - optimizers for dtype in ("float32", "bfloat16")}
    assert tables == {table: {True, False} for table in optimizers | others}
