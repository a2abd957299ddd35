"""Loads csrc/, compiled once per instruction set, in the form that this CPU can run.

Loading a library registers its kernels with the dispatcher under ``fastgpt::``. Nothing else touches it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastgpt.kernels import slow_path

# Widest first. torch's own answer is used, so ATEN_CPU_CAPABILITY=avx2 narrows fastgpt with it.
_LIBRARIES = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


@dataclass(frozen=True)
class Extension:
    """The loaded library, or ``None``, and the reason in a few words."""

    library: Path | None
    reason: str
    products: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()  # operands, result: faster than PyTorch's


def load() -> Extension:
    """Load the widest library this CPU can run; where there is none, warn once and say why."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = _LIBRARIES.get(capability, ("default",))
    here = Path(__file__).parent
    built = [path for name in names for path in sorted(here.glob(f"_cpu_{name}.*so"))]
    if not built:
        others = sorted(path.name for path in here.glob("_cpu_*so"))
        reason = (
            f"this CPU is {capability}, the build has {', '.join(others)}"
            if others
            else "the C++ kernels are not built"
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
