"""Every Triton kernel in every shipped configuration, compiled for five architectures; needs no GPU.

What the compiler made of those whose sources have not changed is read from bench/results/ahead_of_time/rows.json, a few
of them apart, which are compiled and compared; ``FASTGPT_TEST_ALL=1`` compiles all.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastgpt.kernels.triton import launch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 86, 89, 90, 120)
OPS = {
    "attention", "layer_norm", "rms_norm", "gelu", "relu2", "glu", "linear", "embedding", "cross_entropy", "adamw",
    "rotary",
}  # fmt: skip
# bytes of shared memory that a block may have: NVIDIA's CUDA programming guide, compute capabilities
LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the compiler made of them, in a process of its own: this one may run Triton's interpreter."""
    path = tmp_path_factory.mktemp("ahead_of_time") / "rows.json"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.ahead_of_time", "--json", str(path)]
    if "FASTGPT_TEST_ALL" in os.environ:
        command.append("--all")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def described(row):
    return f"sm_{row['arch']} {row['kernel']}, {row['case']}, {row['config']}"


# fp32 heads of 128, three tf32 products for each, on sm_120: every block shape that was tried spills a little.
# Heads of 48 in the block of 64: a configuration without a spill there costs heads of 64 a tenth of their bound.
MAY_SPILL = {
    (120, "attention fp32 D128"), (120, "attention fp32 D128 dropout"), (80, "attention bf16 D40, copied"),
}  # fmt: skip


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
    assert {row["kernel"] for row in products} == {
        "attention forward", "attention dq", "attention dk_dv", "attention single_pass",
    }  # fmt: skip
    assert [described(row) for row in products if not row["tensor"]] == []


def test_on_hopper_products_do_not_wait_for_each_other(rows):
    assert any(row["arch"] == 90 and row["has_dot"] for row in rows)
    assert [described(row) for row in rows if row["serialised"]] == []


def test_every_kernel_is_compiled_for_every_architecture(rows):
    import fastgpt.kernels.triton as kernels

    modules = (kernels.adamw, kernels.attention, kernels.columns, kernels.cross_entropy, kernels.gelu, kernels.glu)
    others = (kernels.embedding, kernels.layer_norm, kernels.linear, kernels.relu2, kernels.rms_norm, kernels.rotary)
    expected = {
        f"{module.__name__.rpartition('.')[2]} {name.strip('_').removesuffix('_kernel')}"
        for module in (*modules, *others)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    for arch in ARCHITECTURES:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == expected


def test_every_shipped_configuration_is_compiled(rows):
    shipped = launch.shipped()
    for arch in ARCHITECTURES:
        compiled = [row["config"] for row in rows if row["arch"] == arch]
        for kernel, table in (shipped[0] | shipped[arch]).items():
            if kernel == "shared_memory":
                continue
            for kind, config in table.items():
                config = {name: value for name, value in config.items() if name != "programs_per_sm"}
                assert any(config.items() <= c.items() for c in compiled), f"sm_{arch} {kernel} {kind}"


# ---- the record ----


def in_a_process(code):
    """What ``code`` prints; the module cannot be imported where Triton's interpreter was."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


READ_OTHERWISE = "read = inspect.getsource; inspect.getsource = lambda f: read(f) + '#' * (f is {})"
CHANGES = {
    "a kernel": ("append(attention._forward_kernel)", {"attention"}, ARCHITECTURES),
    "what a kernel calls": ("append(activations._exponential)", {"gelu", "glu"}, ARCHITECTURES),
    "a configuration": (
        "launch.shipped()[89]['attention_forward']['16-bit D32']['BLOCK_M'] *= 2",
        {"attention"},
        (89,),
    ),
    "a card": ("a.GPUS[89] = dataclasses.replace(a.GPUS[89], boost_mhz=1)", OPS, (89,)),
    "a limit of all cards": ("a.bounds.SPECIAL *= 2", OPS, ARCHITECTURES),
    "the work of an op": (READ_OTHERWISE.format("a.bounds._linear"), {"linear"}, ARCHITECTURES),
    "the reader": (READ_OTHERWISE.format("a.bounds._looped"), OPS, ARCHITECTURES),
    "nothing": ("", set(), ()),
}


@pytest.mark.parametrize("changed", list(CHANGES))
def test_a_change_is_a_change_of_whatever_it_can_change(changed):
    statement, ops, architectures = CHANGES[changed]
    code = f"""
import dataclasses
import inspect
from bench import ahead_of_time as a
from fastgpt.kernels.triton import activations, attention, gelu, glu, launch

def append(function):
    function._unsafe_update_src(function.src + "    # changed")
    for module in (activations, gelu, glu):
        for kernel in vars(module).values():
            if hasattr(kernel, "hash"):
                kernel.hash = None  # Triton computes it once

cases = {{case.split()[0].removesuffix("_8bit"): case for case in reversed(a.CASES)}}  # the first of each op
jobs = [(op, arch) for op in cases for arch in a.GPUS]
before = {{(op, arch): a.digest(cases[op], arch) for op, arch in jobs}}
{statement}
a._reader.cache_clear()
other = [(op, arch) for op, arch in jobs if a.digest(cases[op], arch) != before[op, arch]]
print(sorted({{op for op, _ in other}}), sorted({{arch for _, arch in other}}))
"""
    done = in_a_process(code)
    assert done.stdout.strip() == f"{sorted(ops)} {sorted(architectures)}", done.stderr


def test_a_record_that_is_wrong_is_found_by_a_sample(tmp_path):
    code = f"""
import json
from pathlib import Path
from bench import ahead_of_time as a
entries = [entry for entry in json.loads(a.RECORD.read_text()) if entry["case"].startswith("gelu")]
for entry in entries:
    entry["digest"] = a.digest(entry["case"], entry["arch"])
    entry["rows"][0]["registers"] += 1
a.RECORD, a.SAMPLE = Path({str(tmp_path / "rows.json")!r}), 1
a.RECORD.write_text(json.dumps(entries))
a.changed_and_sample([(entry["case"], entry["arch"], {{}}) for entry in entries])
"""
    script = tmp_path / "wrong.py"  # a file, since the compiler's processes import it
    script.write_text("if __name__ == '__main__':\n" + textwrap.indent(code, "    "))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'gelu"), done.stderr
    assert "now compiles to something other than rows.json says" in done.stderr
