"""The work of the ops of ``bench.kernels``, and the shapes that they are timed at."""

import math

import torch

from bench import ops
from bench.ops import Setting

CPU = torch.device("cpu")
TINY = {"C": 128, "H": 2, "V": 61, "adamw_L": 1, "adamw_V": 61}


def test_the_optimizers_model_is_gpt2_124m():
    shapes = ops.gpt2_shapes(12, 50304, 1024, 768)
    assert len(shapes) == 148
    assert sum(map(math.prod, shapes)) == 124_475_904
    assert [len(shape) for shape in shapes] == sorted(map(len, shapes), reverse=True)


def test_work_is_counted_as_stated():
    s = Setting(CPU, torch.bfloat16, 2, 16, **TINY)
    B, T, H, D, N, C, V = 2, 16, 2, 64, 32, 128, 61
    product = 2 * B * H * T * T * D
    assert ops.attention_work(s) == {"fwd": 2 * product / 2, "fwd+bwd": 2 * product / 2 * 3.5}
    assert ops.layer_norm(s).work == {"fwd": 2 * N * C * 2, "fwd+bwd": 5 * N * C * 2}
    assert ops.add_layer_norm(s).work == {"fwd": 4 * N * C * 2, "fwd+bwd": 8 * N * C * 2}
    assert ops.rms_norm(s).work == {"fwd": 2 * N * C * 2, "fwd+bwd": 5 * N * C * 2}
    assert ops.add_rms_norm(s).work == {"fwd": 4 * N * C * 2, "fwd+bwd": 8 * N * C * 2}
    assert ops.relu2(s).work == {"fwd": 2 * N * 4 * C * 2, "fwd+bwd": 5 * N * 4 * C * 2}
    H = 8 * C // 3
    for unit in (ops.swiglu, ops.geglu):
        for packed in (False, True):
            assert unit(s, packed).work == {"fwd": 3 * N * H * 2, "fwd+bwd": 8 * N * H * 2}
    assert ops.gelu(s).work == {"fwd": 2 * N * 4 * C * 2, "fwd+bwd": 5 * N * 4 * C * 2}
    assert ops.rotary(s).work == {"fwd": 4 * N * C * 2, "fwd+bwd": 8 * N * C * 2}
    assert ops.rotary(s, qk_norm=True).work == {"fwd": 4 * N * C * 2, "fwd+bwd": 10 * N * C * 2}
    assert ops.rotary_qkv(s).work == {"fwd": 2 * N * 3 * C * 2, "fwd+bwd": 4 * N * 3 * C * 2}
    assert ops.rotary_qkv(s, qk_norm=True).work == {"fwd": 2 * N * 3 * C * 2, "fwd+bwd": 5 * N * 3 * C * 2}
    assert ops.cross_entropy(s).work == {"fwd": N * V * 2, "fwd+bwd": 3 * N * V * 2}
    assert ops.cross_entropy(s, label_smoothing=0.1).work == ops.cross_entropy(s).work
    assert ops.linear(s).work == {"fwd": 2 * N * C * 4 * C, "fwd+bwd": 6 * N * C * 4 * C}
    assert ops.linear_cross_entropy(s).work == {"fwd": 2 * N * C * V, "fwd+bwd": 6 * N * C * V}
    n_params = sum(map(math.prod, ops.gpt2_shapes(1, V, T, C)))
    assert ops.adamw(s).work == {"step": 38 * n_params}
    assert ops.adamw(s, dtype=torch.bfloat16).work == {"step": 18 * n_params}
