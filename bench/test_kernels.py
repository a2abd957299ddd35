"""``pytest bench/ --benchmark-only``: every op of bench.kernels and its peers in PyTorch, in fp32 and bf16.

Times forward and backward at 512 tokens of GPT-2 124M, in under three minutes on two cores; ``-k "gelu and bfloat16"``
selects some. There is a table for each op and dtype. ``python -m bench.kernels`` makes the records. Unlike there,
contenders do not take turns, caches stay warm, launching and waiting count on a GPU, and nothing is checked.
torch.compile is left out, because compiling would take longer than everything else.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench import kernels
from bench.ops import OPS
from bench.timing import error_in_a_line
from fastgpt.units import dtype_name

pytestmark = pytest.mark.filterwarnings("ignore")  # a backend of sdpa that cannot run warns at length

_, SETTING = kernels.parse(["--block_size", "512"])
TINY = {"T": 16, "C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}


def cases() -> Iterator[tuple[str, str, str]]:
    """Every op, dtype and contender. Only an op that is built has contenders, so a small one is built here."""
    for name, (build, _) in OPS.items():
        for dtype in (torch.float32, torch.bfloat16):
            op = build(replace(SETTING, dtype=dtype, **TINY))
            if op.inputs or dtype == torch.float32:  # an optimizer has its own dtype
                for contender in op.contenders:
                    if contender.whole and contender.name != "torch.compile":
                        yield name, dtype_name(dtype), contender.name


@pytest.mark.parametrize(("name", "dtype", "contender"), list(cases()))
def test_op(name, dtype, contender, benchmark):
    torch.manual_seed(0)
    build, _ = OPS[name]
    op = build(replace(SETTING, dtype=getattr(torch, dtype)))
    function = next(c.function for c in op.contenders if c.name == contender)

    def call() -> None:
        kernels.evaluate(function, op.inputs, op.douts, backward=bool(op.inputs))
        if SETTING.device.type == "cuda":
            torch.cuda.synchronize(SETTING.device)

    try:
        call()  # Triton compiles
    except RuntimeError as error:
        if contender.startswith("fastgpt"):
            raise
        pytest.skip(error_in_a_line(error))
    benchmark.group, benchmark.name = f"{name} {dtype}" if op.inputs else name, contender
    if op.inputs:
        benchmark(call)
    else:
        benchmark.pedantic(call, setup=op.before, rounds=20)
