"""What ``make asan`` tests is the sanitized build, and the sanitizers see what they are there to see in it.

Operators are called here as no public function calls them, so that the C++ kernels themselves do something wrong.
"""

import os
import subprocess
import sys

import pytest

from fastgpt.kernels import dispatch

pytestmark = pytest.mark.skipif("FASTGPT_SANITIZE" not in os.environ, reason="needs the build of make asan")

FAULTS = {
    "a vector of the kernel's": (
        "torch.ops.fastgpt.layer_norm(torch.randn(3, 70), torch.ones(8), None, 1e-5)",
        "AddressSanitizer",
    ),
    "a tensor of PyTorch's, read": (
        "torch.ops.fastgpt.add_layer_norm(torch.randn(3, 70), torch.randn(2, 70), torch.ones(70), None, 1e-5)",
        "AddressSanitizer",
    ),
    "a tensor of PyTorch's, written": (
        "torch.ops.fastgpt.gelu_backward_recompute_(torch.randn(2, 70), torch.randn(3, 70), None, True, None)",
        "AddressSanitizer",
    ),
    "misaligned": (
        "weight = torch.frombuffer(bytearray(33), dtype=torch.float32, offset=1);"
        "torch.ops.fastgpt.layer_norm(torch.randn(3, 8), weight, None, 1e-5)",
        "misaligned address",
    ),
}


def test_the_library_that_is_tested_is_the_one_with_asan():
    assert dispatch.EXTENSION.library is not None
    assert b"__asan_report_load" in dispatch.EXTENSION.library.read_bytes()
    assert b"__ubsan_handle" in dispatch.EXTENSION.library.read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
def test_asan_sees_a_fault(fault, tmp_path):
    call, report = FAULTS[fault]
    code = f"import torch, fastgpt.kernels; torch.set_num_threads(1); {call}; print('unseen')"
    # in a folder without fastgpt, which would be found there first
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode
    assert report in done.stderr
    assert "csrc/" in done.stderr
    assert "unseen" not in done.stdout
