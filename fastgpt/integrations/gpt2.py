"""Hugging Face transformers' GPT-2 on fastgpt's kernels."""

from typing import Any

import torch.nn as nn
from torch import Tensor

from fastgpt import kernels
from fastgpt.integrations import probe
from fastgpt.integrations.causal_lm import CausalLM, is_causal_alone, require_patchable, run_with_labels
from fastgpt.integrations.swap import (
    Model,
    named,
    refuse,
    replaceable,
    require,
    require_kind,
)
from fastgpt.kernels.heads import MAX_HEAD_SIZE

# The activation modules of transformers that compute a GELU, and the form of GELU that each computes.
GELU_FORMS = {
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "GELUActivation": "none",
}


class _Conv1D(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight.T, self.bias)


class _Attention(nn.Module):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self, args, kwargs)
        x, cache = given.pop("hidden_states"), given.pop("past_key_values", None)
        if hasattr(cache, "self_attention_cache") or not is_causal_alone(self, x, cache, given):
            return super().forward(*args, **kwargs)
        options: dict[str, Any] = {
            "scale": getattr(self, "scaling", None),  # before 5.1, transformers' sdpa always uses the default
            "dropout_p": self.attn_dropout.p if self.training else 0.0,
        }
        qkv = self.c_attn(x)
        if cache is None:
            y = kernels.attention_qkv(qkv, self.num_heads, **options)
        else:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            place = [{"cache_position": given["cache_position"]}] if "cache_position" in given else []
            k, v = cache.update(k, v, self.layer_idx, *place)
            # there is no mask, so the cache was empty; a static cache also returns its unused part
            T = x.shape[1]
            y = kernels.attention(q, k[:, :, :T], v[:, :, :T], **options).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.c_proj(y)), None


class _MLP(nn.Module):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        form = _gelu_form(self.act)
        if form is None or not replaceable(self.c_fc, _Conv1D) or not replaceable(self.act):
            return super().forward(hidden_states)
        hidden = kernels.gelu(kernels.linear(hidden_states, self.c_fc.weight.T), form, self.c_fc.bias)
        return self.dropout(self.c_proj(hidden))


class _Block(nn.Module):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self, args, kwargs)
        x, encoded = given.pop("hidden_states"), given.pop("encoder_hidden_states", None)
        if encoded is not None or not replaceable(self.ln_2, kernels.LayerNorm):
            return super().forward(*args, **kwargs)
        given.pop("encoder_attention_mask", None)
        attended, weights = self.attn(self.ln_1(x), **given)
        norm = self.ln_2
        y, total = kernels.add_layer_norm(attended, x, norm.weight, norm.bias, norm.eps)
        hidden = total + self.mlp(y)
        if "output_attentions" not in self.fastgpt_arguments:
            return hidden
        return (hidden, weights) if given.get("output_attentions") else (hidden,)  # before 5.1


class _LMHeadModel(CausalLM):
    fastgpt_body = "transformer"


def _gelu_form(activation: nn.Module) -> str | None:
    if type(activation) is nn.GELU:
        return activation.approximate
    return GELU_FORMS.get(type(activation).__name__)


def patch_gpt2(model: Model) -> Model:
    """Run transformers' GPT-2 on fastgpt's kernels, in place. Needs transformers 4.57 or newer.

    The patch replaces:

    - attention, if ``attn_implementation`` is ``"sdpa"`` (transformers' default) and the causal mask is the only mask.
      Padding masks, eager attention, and generation of one token with a cache run in transformers' code
    - all linear layers
    - GELU, together with the bias before it
    - layer norms; the second one of a block together with the residual add before it
    - the output layer and the loss, in training mode with ``labels``

    The patched model is compared with the original on random tokens. If their results differ, the patch is undone.

    A training step with ``labels`` computes logits only if they are read. ``logits`` of its output is a tensor whose
    shape, dtype and device are known. The first function that needs its numbers has them computed, with their gradient
    and under the autocast of the forward, whatever mode it runs in itself. What Accelerate, ``DistributedDataParallel``
    and FSDP do to every output computes nothing. Hidden states, ``(B, T, C)``, stay in memory as long as the output
    does. Pickled, ``logits`` is an ordinary tensor. After a change in place, use the tensor that the change returned.

    Read logits before the optimizer's step, and with FSDP before the backward: once the weight has changed, reading is
    a ``RuntimeError``. As in autograd, the tensor's version tells. ``.data`` does not count it up; after such a change
    logits are products of old hidden states and new weights. ``logits`` is ``None`` in a compiled
    model, in ``torch.func`` and in replicas of ``torch.nn.DataParallel``. A function of logits that is compiled with
    ``fullgraph=True`` needs an ordinary tensor: ``output.logits.contiguous()``.

    ``past_key_values`` of a training step is ``None`` unless ``use_cache=True`` is passed. Everything is as before in
    evaluation, with a ``loss_function`` of your own, with ``logits_to_keep``, and in fp16.

    Patch the model before you use ``device_map``, PEFT or FSDP, which wrap modules or move them to other devices.

    Args:
        model: a ``GPT2LMHeadModel`` with its weights loaded.

    Returns:
        ``model``. :func:`unpatch` undoes it.

    Raises:
        ValueError: the model cannot be patched. The message names the module and the reason. The model is unchanged.
    """
    gpt = require_patchable(model, "gpt2", "GPT2LMHeadModel")
    from transformers.models.gpt2 import modeling_gpt2 as hf
    from transformers.pytorch_utils import Conv1D

    require(not gpt.config.add_cross_attention, "", "has cross attention, which is not supported")
    plan: dict[nn.Module, type[nn.Module]] = {gpt: _LMHeadModel, gpt.lm_head: kernels.Linear}
    norms = {"transformer.ln_f": gpt.transformer.ln_f}
    for i, block in enumerate(gpt.transformer.h):
        name = f"transformer.h.{i}"
        require_kind(block, name, hf.GPT2Block)
        require_kind(block.attn, f"{name}.attn", hf.GPT2Attention)
        require_kind(block.mlp, f"{name}.mlp", hf.GPT2MLP)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            require_kind(block.get_submodule(part), f"{name}.{part}", Conv1D)
            plan[block.get_submodule(part)] = _Conv1D
        head_size = block.attn.head_dim
        require(
            head_size <= MAX_HEAD_SIZE,
            f"{name}.attn",
            f"has heads of {head_size}; at most {MAX_HEAD_SIZE} are supported",
        )
        if _gelu_form(block.mlp.act) is None:
            refuse(f"{name}.mlp.act", f"{type(block.mlp.act).__name__} is not a GELU that fastgpt supports")
        norms |= {f"{name}.ln_1": block.ln_1, f"{name}.ln_2": block.ln_2}
        plan |= {block: _Block, block.attn: _Attention, block.mlp: _MLP}
    for name, norm in norms.items():
        require_kind(norm, name, nn.LayerNorm)
        plan[norm] = kernels.LayerNorm
    # Other implementations of attention do not use the kernels, and flash attention does not run on a CPU.
    if gpt.config._attn_implementation == "sdpa":
        for i, block in enumerate(gpt.transformer.h):
            probe.check_block(f"transformer.h.{i}", block, plan, gpt.config.n_embd)

    probe.patch_and_check(
        model, plan, gpt.transformer.ln_f, gpt.transformer.wte.weight.shape[0], run_with_labels(model)
    )
    return model
