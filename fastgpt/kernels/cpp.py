"""Loads the C++ kernels (csrc/), which are compiled once per instruction set, for the widest one of this CPU.

Loading a library registers its kernels with PyTorch's dispatcher under ``fastgpt::``. Nothing else uses the library.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.kernels import slow_path

# The instruction sets of setup.py, the narrowest first.
_LIBRARIES = ("default", "avx2", "avx512", "avx512_bf16")

# Values of ONEDNN_MAX_CPU_ISA, which limits PyTorch's products of bf16 to an instruction set, without AVX512_BF16.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Extension:
    """The outcome of :func:`load`.

    Attributes:
        library: the loaded library, or ``None``.
        reason: its instruction set, or why none is loaded, in a few words.
        products: dtypes of operands and result for which the library's matrix product is faster than PyTorch's.
    """

    library: Path | None
    reason: str
    products: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()


def _widest() -> str:
    """The widest of ``_LIBRARIES`` that this CPU runs.

    PyTorch is asked, so that a setting that limits PyTorch's instruction set limits fastgpt's too.
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if (
        capability == "avx512"
        and torch.cpu._is_avx512_bf16_supported()
        and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _WITHOUT_BF16
    ):
        return "avx512_bf16"
    return capability if capability in _LIBRARIES else "default"


def load() -> Extension:
    """Load the widest library that this CPU can run. If there is none, warn once and give the reason."""
    widest = _widest()
    here = Path(__file__).parent
    names = _LIBRARIES[: _LIBRARIES.index(widest) + 1]
    built = [path for name in reversed(names) for path in sorted(here.glob(f"_cpu_{name}.*so"))]
    if not built:
        others = sorted(path.name for path in here.glob("_cpu_*so"))
        reason = (
            f"this CPU has {widest}, the build has {', '.join(others)}" if others else "the C++ kernels are not built"
        )
        return _without(reason)
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return _without(f"{built[0].name} does not load: {str(error).splitlines()[0]}")
    kinds = ((a, out) for a in (torch.float32, torch.bfloat16) for out in {a, torch.float32})
    faster = (k for k in kinds if torch.ops.fastgpt.matmul_beats_torch(*(dtype == torch.bfloat16 for dtype in k)))
    return Extension(built[0], built[0].name.split(".")[0].removeprefix("_cpu_"), frozenset(faster))


def _without(reason: str) -> Extension:
    slow_path.warn(reason)
    return Extension(None, reason)
