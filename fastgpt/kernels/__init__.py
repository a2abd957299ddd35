"""Kernels for training GPTs: C++ on CPUs, Triton on NVIDIA GPUs, plain PyTorch as the reference.

    from fastgpt.kernels import layer_norm, attention, linear_cross_entropy, FusedAdamW

Imports nothing else of fastgpt, and works without a GPU, without Triton and without the compiled extension.
``backends()`` says what each operator runs on; ``FASTGPT_BACKEND`` and ``use_backend`` choose.
"""

from fastgpt.kernels.adamw import FusedAdamW
from fastgpt.kernels.attention import attention, attention_qkv
from fastgpt.kernels.cross_entropy import cross_entropy
from fastgpt.kernels.dispatch import backends, use_backend
from fastgpt.kernels.documents import document_bounds, document_starts, document_starts_from_cu_seqlens
from fastgpt.kernels.gelu import gelu
from fastgpt.kernels.glu import geglu, swiglu
from fastgpt.kernels.layer_norm import add_layer_norm, layer_norm
from fastgpt.kernels.linear import embedding, linear
from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt.kernels.modules import (
    GEGLU,
    GELU,
    AddLayerNorm,
    AddRMSNorm,
    CausalSelfAttention,
    CrossEntropyLoss,
    Embedding,
    LayerNorm,
    Linear,
    LinearCrossEntropyLoss,
    ReLU2,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
)
from fastgpt.kernels.muon import FusedMuon
from fastgpt.kernels.relu2 import relu2
from fastgpt.kernels.rms_norm import add_rms_norm, rms_norm
from fastgpt.kernels.rotary import rms_norm_rotary, rotary, rotary_qkv, rotary_tables

__all__ = [
    "GEGLU",
    "GELU",
    "AddLayerNorm",
    "AddRMSNorm",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "Embedding",
    "FusedAdamW",
    "FusedMuon",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "ReLU2",
    "RotaryEmbedding",
    "SwiGLU",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_qkv",
    "backends",
    "cross_entropy",
    "document_bounds",
    "document_starts",
    "document_starts_from_cu_seqlens",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "rms_norm_rotary",
    "rotary",
    "rotary_qkv",
    "rotary_tables",
    "swiglu",
    "use_backend",
]
