"""Builds csrc/ into one library per instruction set; everything else is in pyproject.toml.

fastgpt/kernels/cpp.py loads the library that suits the CPU. A build that fails, for want of a compiler for example, is
not fatal: the ops then run on plain PyTorch, and ``python -m fastgpt.doctor`` says why. ``FASTGPT_REQUIRE_BUILD=1``
makes it fatal. With ``FASTGPT_SANITIZE=1`` the libraries report accesses out of bounds and undefined behaviour, and end
the process. ``make asan`` builds such libraries in a folder of their own. With ``FASTGPT_EMULATE_AMX=1`` the library
for AVX512_BF16 computes AMX's tiles in AVX-512; ``make amx`` builds it.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# "default" is what the compiler takes for granted: SSE2 on x86-64, NEON on arm64, vectors of four either way.
INSTRUCTION_SETS = {"default": []}
if platform.machine().lower() in {"x86_64", "amd64"}:
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    INSTRUCTION_SETS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

TARGET_TORCH = "0x020b000000000000"  # the oldest torch supported, 2.11, as torch/headeronly/version.h writes it

SANITIZERS, OPTIMISATION = [], ["-O3", "-g0"]
if os.environ.get("FASTGPT_SANITIZE"):
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    # The frame pointer makes stack traces complete. Python's own flags may contain -fwrapv, which makes the overflow of
    # an integer defined behaviour, so that it would not be reported.
    OPTIMISATION = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv"]

EMULATED = ["-DFASTGPT_EMULATE_AMX"] if os.environ.get("FASTGPT_EMULATE_AMX") else []

# Error messages contain the paths of sources. Without the folder, a build has the same bits in any folder.
UNPLACED = [f"-fmacro-prefix-map={folder}{os.sep}=" for folder in (Path.cwd(), *include_paths())]


def extension(name: str, flags: list[str]) -> CppExtension:
    return CppExtension(
        f"fastgpt.kernels._cpu_{name}",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=["setup.py", *sorted(str(path) for path in Path("csrc").glob("*.h"))],  # setup.py holds the flags
        extra_compile_args=[
            *OPTIMISATION,
            *SANITIZERS,
            *EMULATED,
            "-std=c++17",
            "-fvisibility=hidden",
            "-ffp-contract=fast",  # a * b + c as one FMA
            "-fno-math-errno",
            "-Wno-psabi",  # warns about the ABI of functions that take vectors; all of ours are inlined
            f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            *UNPLACED,
            *flags,
        ],
        extra_link_args=SANITIZERS,
        py_limited_api=True,
    )


class OptionalBuild(BuildExtension):
    """Builds all libraries or none. If the build fails, the installation goes on without the C++ kernels."""

    def run(self) -> None:
        destinations = self._libraries()  # beside the sources for --inplace; build_ext then builds elsewhere first
        try:
            super().run()
        except BaseException as error:  # Ctrl-C too: some of the libraries would pass for a whole build
            for library in destinations + self._libraries():
                library.unlink(missing_ok=True)
            if os.environ.get("FASTGPT_REQUIRE_BUILD") or not isinstance(error, Exception):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(
                f"warning: fastgpt's C++ kernels were not built ({reason}); ops run on plain PyTorch",
                file=sys.stderr,
            )
            self.extensions.clear()

    def _libraries(self) -> list[Path]:
        return [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]

    def build_extension(self, ext: CppExtension) -> None:
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)  # each library compiles the same sources with other flags
        super().build_extension(ext)
        self.build_temp = shared


class FreshPackage(build_py):
    """Empties the package's folder under build/ first: it may hold files of an earlier build whose sources are gone."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "fastgpt"), ignore_errors=True)
        super().run()


class HonestWheel(bdist_wheel):
    """Tags the wheel by what was built: a wheel without libraries is pure Python and suits every platform."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[extension(name, flags) for name, flags in INSTRUCTION_SETS.items()],
    cmdclass={"bdist_wheel": HonestWheel, "build_ext": OptionalBuild, "build_py": FreshPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
