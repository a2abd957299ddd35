"""Builds csrc/ into one library per instruction set; everything else is in pyproject.toml.

fastgpt/kernels/cpp.py loads the one that the CPU at hand can run. A build that fails (no compiler, say) is
not fatal: the ops then run on plain PyTorch, and ``python -m fastgpt.doctor`` says why.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Every x86-64 CPU sold for training since 2013 has AVX2; elsewhere the compiler's default serves (NEON on arm64).
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}
if platform.machine().lower() not in {"x86_64", "amd64"}:
    INSTRUCTION_SETS = {"default": []}

TARGET_TORCH = "0x020b000000000000"  # the oldest torch supported, 2.11, as torch/headeronly/version.h writes it


def extension(name: str, flags: list[str]) -> CppExtension:
    return CppExtension(
        f"fastgpt.kernels._cpu_{name}",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            "-ffp-contract=fast",  # a * b + c as one FMA
            "-fno-math-errno",
            "-Wno-psabi",  # the ABI of vector arguments, all of them inlined
            f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            *flags,
        ],
        py_limited_api=True,
    )


class OptionalBuild(BuildExtension):
    """Builds where it can; where it cannot, the installation goes through without the C++ kernels."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTGPT_REQUIRE_BUILD"):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(
                f"warning: fastgpt's C++ kernels were not built ({reason}); ops run on plain PyTorch",
                file=sys.stderr,
            )
            self.extensions.clear()

    def build_extension(self, ext: CppExtension) -> None:
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)  # the same sources, other flags: other object files
        super().build_extension(ext)
        self.build_temp = shared


setup(
    ext_modules=[extension(name, flags) for name, flags in INSTRUCTION_SETS.items()],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
