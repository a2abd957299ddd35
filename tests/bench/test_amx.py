"""What ``make amx`` tests is the library that emulates AMX."""

import os

import pytest
import torch

from fastgpt.kernels import dispatch, linear, use_backend

pytestmark = pytest.mark.skipif("FASTGPT_EMULATE_AMX" not in os.environ, reason="needs the build of make amx")


def test_the_library_that_is_tested_emulates_amx():
    library = dispatch.EXTENSION.library
    assert library is not None
    assert library.name == "_cpu_avx512_bf16.abi3.so", "needs a CPU with AVX512_BF16"
    assert b"emulated" in library.read_bytes()


def test_products_of_every_dtype_that_amx_has_are_ours():
    assert {(dtype, dtype) for dtype in (torch.float32, torch.bfloat16)} <= set(dispatch.EXTENSION.products)
    x, weight = torch.randn(40, 70, dtype=torch.bfloat16), torch.randn(33, 70, dtype=torch.bfloat16)
    with use_backend("cpp"):
        torch.testing.assert_close(linear(x, weight), x @ weight.T, rtol=2e-2, atol=2e-1)
