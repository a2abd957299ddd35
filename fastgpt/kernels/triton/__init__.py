"""The operators on NVIDIA GPUs, one file an op. This package, and Triton with it, is imported when the first one runs.

Under ``TRITON_INTERPRET=1`` the operators run on CPU tensors, slowly, for tests.
"""

from collections.abc import Callable
from typing import Any

from fastgpt.kernels.ops import OPERATORS
from fastgpt.kernels.triton import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    gelu,
    glu,
    layer_norm,
    linear,
    relu2,
    rms_norm,
    rotary,
)

_FILES = (adamw, attention, cross_entropy, embedding, gelu, glu, layer_norm, linear, relu2, rms_norm, rotary)

# A function of these files is an operator's implementation if it has the operator's name.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    name: getattr(module, name) for module in _FILES for name in OPERATORS if hasattr(module, name)
}
