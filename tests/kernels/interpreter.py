"""Mends Triton's interpreter where, as of Triton 3.9, it computes something else than a GPU; for the tests alone.

NumPy has no bf16, so the interpreter keeps such numbers as uint16: its cast from fp32 drops the low bits where a
GPU rounds, and its ``dot`` multiplies the uint16 themselves. Its fp32 ``dot`` is a BLAS call whose rounding depends
on the shape and the strides of the tiles; a GPU's does not, and attention's backward relies on scores that come
out as they did in the forward. Here a ``dot`` is summed in fp64 and rounded once. Triton 3.6 does not know either
that NumPy 2.4 makes an index of 0-dim arrays alone.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bit patterns, rounded to the nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    """Replace the interpreter's cast, dot and index."""
    cast, patch_lang_tensor = InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16:
            return cast_impl(self, TensorHandle(widen(src.data), tl.float32), dst_type)
        if target == tl.bfloat16:
            wide = src if source == tl.float32 else cast(self, src, tl.float32)
            return TensorHandle(narrow(wide.data), tl.bfloat16)
        return cast(self, src, dst_type) if source != target else TensorHandle(src.data, target)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = (widen(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
        exact = np.matmul(x.astype(np.float64), y.astype(np.float64)) + d.data
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    def patch(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch
