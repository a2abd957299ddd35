"""Every Triton kernel in every shipped configuration, compiled for five architectures; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt.kernels.triton import launch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 86, 89, 90, 120)
# bytes of shared memory that a block may have: NVIDIA's CUDA programming guide, compute capabilities
LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the compiler made of them, in a process of its own: this one may run Triton's interpreter."""
    path = tmp_path_factory.mktemp("ahead_of_time") / "rows.json"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.ahead_of_time", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def described(row):
    return f"sm_{row['arch']} {row['kernel']}, {row['case']}, {row['config']}"


# fp32 heads of 128, three tf32 products for each, on sm_120: every block shape that was tried spills a little.
MAY_SPILL = {(120, "attention fp32 D128"), (120, "attention fp32 D128 dropout")}


def test_no_kernel_spills_registers(rows):
    spills = [row for row in rows if row["stack"]]
    assert [described(row) for row in spills if (row["arch"], row["case"]) not in MAY_SPILL] == []
    assert [described(row) for row in spills if row["stack"] > 16] == []


def test_every_kernel_fits_the_shared_memory_of_a_block(rows):
    assert [described(row) for row in rows if row["shared"] > LIMITS[row["arch"]]] == []


def test_an_sm_holds_at_least_one_block_of_every_kernel(rows):
    assert [described(row) for row in rows if row["blocks_per_sm"] < 1] == []


def test_every_product_runs_on_the_tensor_cores(rows):
    products = [row for row in rows if row["has_dot"]]
    assert {row["kernel"] for row in products} == {"attention forward", "attention dq", "attention dk_dv"}
    assert [described(row) for row in products if not row["tensor"]] == []


def test_every_kernel_is_compiled_for_every_architecture(rows):
    import fastgpt.kernels.triton as kernels

    modules = (kernels.adamw, kernels.attention, kernels.columns, kernels.cross_entropy, kernels.gelu)
    expected = {
        f"{module.__name__.rpartition('.')[2]} {name.strip('_').removesuffix('_kernel')}"
        for module in (*modules, kernels.layer_norm)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    for arch in ARCHITECTURES:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == expected


def test_every_shipped_configuration_is_compiled(rows):
    shipped = launch._shipped()
    for arch in ARCHITECTURES:
        compiled = [row["config"] for row in rows if row["arch"] == arch]
        for kernel, table in (shipped[0] | shipped[arch]).items():
            if kernel == "shared_memory":
                continue
            for kind, config in table.items():
                config = {name: value for name, value in config.items() if name != "programs_per_sm"}
                assert any(config.items() <= c.items() for c in compiled), f"sm_{arch} {kernel} {kind}"
