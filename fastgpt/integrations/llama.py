"""Hugging Face transformers' Llama on fastgpt's kernels."""

from typing import Any

import torch.nn as nn
from torch import Tensor

from fastgpt import kernels
from fastgpt.integrations import probe
from fastgpt.integrations.causal_lm import CausalLM, is_causal_alone, require_patchable, run_with_labels
from fastgpt.integrations.swap import Model, named, refuse, replaceable, require, require_kind
from fastgpt.kernels.heads import MAX_HEAD_SIZE

PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class _RMSNorm(nn.Module):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _Attention(nn.Module):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self, args, kwargs)
        x, cache = given.pop("hidden_states"), given.pop("past_key_values", None)
        turns = given.pop("position_embeddings", None)
        if turns is None or not is_causal_alone(self, x, cache, given):
            return super().forward(*args, **kwargs)
        tables = [_half(table, self.head_dim) for table in turns]
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (kernels.rotary(t, *tables).transpose(1, 2) for t in (q, k))  # (B, heads, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
            # there is no mask, so the cache was empty; a static cache also returns its unused part
            T = x.shape[1]
            k, v = k[:, :, :T], v[:, :, :T]
        dropout_p = self.attention_dropout if self.training else 0.0
        y = kernels.attention(q, k, v, scale=self.scaling, dropout_p=dropout_p)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


def _half(table: Tensor, D: int) -> Tensor:
    """Cosines or sines as :func:`kernels.rotary` takes them; transformers repeats them, (B or 1, T, D)."""
    half = table[..., : D // 2].float()
    return half[0] if half.shape[0] == 1 else half


class _MLP(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _is_silu(self.act_fn) or not replaceable(self.act_fn):
            return super().forward(x)
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class _DecoderLayer(nn.Module):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self, args, kwargs)
        norm = self.post_attention_layernorm
        if not replaceable(norm, _RMSNorm):
            return super().forward(*args, **kwargs)
        x = given.pop("hidden_states")
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **given)
        y, total = kernels.add_rms_norm(attended, x, norm.weight, norm.variance_epsilon)
        return total + self.mlp(y)


def _is_silu(activation: nn.Module) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def patch_llama(model: Model) -> Model:
    """Run transformers' Llama on fastgpt's kernels, in place. Needs transformers 5.0 or newer.

    The patch replaces:

    - attention with rotary positions and grouped queries, if ``attn_implementation`` is ``"sdpa"`` (transformers'
      default) and the causal mask is the only mask. Padding masks, eager attention, and generation of one token with a
      cache run in transformers' code
    - all linear layers
    - SwiGLU
    - RMS norms; the second one of a block together with the residual add before it
    - the output layer and the loss, in training mode with ``labels``

    What :func:`patch_gpt2` says of the comparison with the original, of ``logits`` and of ``past_key_values`` holds
    here too.

    Args:
        model: a ``LlamaForCausalLM`` with its weights loaded.

    Returns:
        ``model``. :func:`unpatch` undoes it.

    Raises:
        ValueError: the model cannot be patched. The message names the module and the reason. The model is unchanged.
    """
    lm = require_patchable(model, "llama", "LlamaForCausalLM", oldest=(5, 0))
    from transformers.models.llama import modeling_llama as hf

    body, config = lm.model, lm.config
    require_kind(body, "model", hf.LlamaModel)
    require_kind(body.norm, "model.norm", hf.LlamaRMSNorm)
    plan: dict[nn.Module, type[nn.Module]] = {lm: CausalLM, lm.lm_head: kernels.Linear, body.norm: _RMSNorm}
    for i, layer in enumerate(body.layers):
        name = f"model.layers.{i}"
        require_kind(layer, name, hf.LlamaDecoderLayer)
        require_kind(layer.self_attn, f"{name}.self_attn", hf.LlamaAttention)
        require_kind(layer.mlp, f"{name}.mlp", hf.LlamaMLP)
        for part in PROJECTIONS:
            require_kind(layer.get_submodule(part), f"{name}.{part}", nn.Linear)
            plan[layer.get_submodule(part)] = kernels.Linear
        for part in ("input_layernorm", "post_attention_layernorm"):
            require_kind(layer.get_submodule(part), f"{name}.{part}", hf.LlamaRMSNorm)
            plan[layer.get_submodule(part)] = _RMSNorm
        D = layer.self_attn.head_dim
        require(
            D % 2 == 0 and D <= MAX_HEAD_SIZE,
            f"{name}.self_attn",
            f"has heads of {D}; even sizes of at most {MAX_HEAD_SIZE} are supported",
        )
        if not _is_silu(layer.mlp.act_fn):
            refuse(f"{name}.mlp.act_fn", f"{type(layer.mlp.act_fn).__name__} is not SiLU")
        plan |= {layer: _DecoderLayer, layer.self_attn: _Attention, layer.mlp: _MLP}
    probe.patch_and_check(model, plan, body.norm, config.vocab_size, run_with_labels(model))
    return model
