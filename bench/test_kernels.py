"""``pytest bench/ --benchmark-only``: every op of bench.kernels beside PyTorch's, in fp32 and bf16.

Forward and backward at 512 tokens of GPT-2 124M, in under three minutes on two cores; ``-k "gelu and bfloat16"``
takes less. A table is an op's, at one dtype. Unlike in ``python -m bench.kernels``, which makes the records, contenders
do not take turns, caches stay warm, on a GPU launching and waiting count, nothing is checked, and torch.compile stays
out: compiling would take longer than all else.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench import kernels

pytestmark = pytest.mark.filterwarnings("ignore")  # a backend of sdpa that cannot run says why, at length

_, SETTING = kernels.parse(["--block_size", "512"])
TINY = {"T": 16, "C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}


def cases() -> Iterator[tuple[str, str, str]]:
    """Op, dtype and contender; an op has its contenders once it is built, so here it is built small."""
    for name, (build, _) in kernels.OPS.items():
        for dtype in (torch.float32, torch.bfloat16):
            op = build(replace(SETTING, dtype=dtype, **TINY))
            if op.inputs or dtype == torch.float32:  # an optimizer chooses its own dtype
                for contender in op.contenders:
                    if contender.whole and contender.name != "torch.compile":
                        yield name, str(dtype).removeprefix("torch."), contender.name


@pytest.mark.parametrize(("name", "dtype", "contender"), list(cases()))
def test_op(name, dtype, contender, benchmark):
    torch.manual_seed(0)
    build, _ = kernels.OPS[name]
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
        pytest.skip(kernels.skipped(error))
    benchmark.group, benchmark.name = f"{name} {dtype}" if op.inputs else name, contender
    if op.inputs:
        benchmark(call)
    else:
        benchmark.pedantic(call, setup=op.before, rounds=20)
