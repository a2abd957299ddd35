"""The operators on NVIDIA GPUs, one file an op. Imported when the first of them runs, and Triton with it.

Under ``TRITON_INTERPRET=1`` they run on CPU tensors, slowly, for tests.
"""

from collections.abc import Callable
from typing import Any

from fastgpt.kernels.triton import adamw, attention, cross_entropy, embedding, gelu, layer_norm, linear

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "add_column_sums_": linear.add_column_sums_,
    "embedding_backward_": embedding.embedding_backward_,
    "layer_norm": layer_norm.layer_norm,
    "add_layer_norm": layer_norm.add_layer_norm,
    "layer_norm_backward": layer_norm.layer_norm_backward,
    "gelu": gelu.gelu,
    "gelu_backward": gelu.gelu_backward,
    "gelu_backward_recompute_": gelu.gelu_backward_recompute_,
    "attention": attention.attention,
    "attention_backward": attention.attention_backward,
    "attention_qkv": attention.attention_qkv,
    "attention_qkv_backward": attention.attention_qkv_backward,
    "cross_entropy": cross_entropy.cross_entropy,
    "cross_entropy_backward": cross_entropy.cross_entropy_backward,
    "cross_entropy_": cross_entropy.cross_entropy_,
    "grad_norm": adamw.grad_norm,
    "adamw_": adamw.adamw_,
    "adamw_8bit_": adamw.adamw_8bit_,
}
