"""nanoGPT's model, and models derived from it, on fastgpt's kernels.

build-nanogpt's and llm.c's models are nanoGPT's without dropout. llm.c's has a GELU of its own, and the argument
``return_logits``. build-nanogpt's loss ignores PyTorch's -100 instead of -1.
"""

import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt import kernels
from fastgpt.integrations import probe
from fastgpt.integrations.swap import Model, is_patched, loss_is_fusable, replaceable, require, require_kind
from fastgpt.kernels.heads import MAX_HEAD_SIZE

EPS = 1e-5  # of nanoGPT's LayerNorm, where it is a constant in the code


class _LayerNorm(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, EPS)


class _Attention(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        dropout_p = getattr(self, "dropout", 0.0) if self.training else 0.0
        y = kernels.attention_qkv(self.c_attn(x), self.n_head, dropout_p=dropout_p)
        return _dropped(self, "resid_dropout", self.c_proj(y))


class _MLP(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        kind = _gelu_kind(self.gelu)
        if kind is None or not (replaceable(self.gelu) and replaceable(self.c_fc, kernels.Linear)):
            return super().forward(x)
        hidden = kernels.gelu(kernels.linear(x, self.c_fc.weight), kind, self.c_fc.bias)
        return _dropped(self, "dropout", self.c_proj(hidden))


def _dropped(module: Any, name: str, x: Tensor) -> Tensor:
    """``x`` after the dropout of that name, if the module has one."""
    dropout = getattr(module, name, None)
    return x if dropout is None else dropout(x)


def _gelu_kind(gelu: nn.Module) -> str | None:
    """``none`` or ``tanh``; ``None`` for what is not known as a GELU. That it is one is checked with its block."""
    if type(gelu) is nn.GELU:
        return gelu.approximate
    return "tanh" if type(gelu).__name__ == "NewGELU" and not list(gelu.parameters()) else None


class _Block(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        norm = self.ln_2
        if not (replaceable(norm, kernels.LayerNorm) or replaceable(norm, _LayerNorm)):
            return super().forward(x)
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else EPS
        y, total = kernels.add_layer_norm(self.attn(self.ln_1(x)), x, norm.weight, norm.bias, eps)
        return total + self.mlp(y)


class _GPT(nn.Module):
    ignore_index = -1

    def forward(self: Any, idx: Tensor, targets: Tensor | None = None, return_logits: bool | None = None) -> Any:
        parts, T = self.transformer, idx.shape[1]
        given = {} if return_logits is None else {"return_logits": return_logits}
        if (
            not self.training
            or return_logits
            or targets is None
            or self.config.block_size < T
            or not loss_is_fusable(self.lm_head, kernels.Linear)
        ):
            return super().forward(idx, targets, **given)
        x = _dropped(parts, "drop", parts.wte(idx) + parts.wpe(torch.arange(T, device=idx.device)))
        for block in parts.h:
            x = block(x)
        x = parts.ln_f(x).flatten(0, 1)
        return None, kernels.linear_cross_entropy(
            x, self.lm_head.weight, targets.flatten(), ignore_index=self.ignore_index
        )


class _GPTOfPyTorch(_GPT):
    ignore_index = -100


def patch_nanogpt(model: Model) -> Model:
    """Run nanoGPT's ``GPT`` on fastgpt's kernels, in place.

    The patch replaces:

    - attention
    - all linear layers
    - GELU, together with the bias before it
    - layer norms; the second one of a block together with the residual add before it
    - the output layer and the loss, in training mode with ``targets``

    A model is recognised by the names of its modules. Then each block, and the whole model, is compared with its own
    code on random input. If the results differ, the model is not patched.

    A training step with ``targets`` never computes logits: the model then returns ``(None, loss)``. In evaluation, in
    fp16 and with llm.c's ``return_logits=True`` it returns the same as before.

    Args:
        model: nanoGPT's ``GPT``, or a class like it. Its norms may be ``torch.nn.LayerNorm``, its GELU exact or tanh.
            It may lack dropout, as build-nanogpt's and llm.c's do.

    Returns:
        ``model``. :func:`unpatch` undoes it.

    Raises:
        ValueError: the model cannot be patched. The message names the module and the reason. The model is unchanged.
    """
    require(not is_patched(model), "", "already patched")
    gpt: Any = model
    _require_children(gpt, "", {"transformer", "lm_head"})
    _require_children(gpt.transformer, "transformer", {"wte", "wpe", "h", "ln_f"}, {"drop"})
    block_size = getattr(getattr(gpt, "config", None), "block_size", None)
    require(isinstance(block_size, int), "", "expected config.block_size, an integer, as in nanoGPT")
    require(not any(p.is_meta for p in gpt.parameters()), "", "is on the meta device; load its weights first")
    width = gpt.transformer.wte.weight.shape[1]
    ignores_minus_1 = hasattr(gpt.transformer, "drop") or "return_logits" in inspect.signature(gpt.forward).parameters
    whole = _GPT if ignores_minus_1 else _GPTOfPyTorch
    plan: dict[nn.Module, type[nn.Module]] = {gpt: whole}
    linears, norms = {"lm_head": gpt.lm_head}, {"transformer.ln_f": gpt.transformer.ln_f}
    for i, block in enumerate(gpt.transformer.h):
        name = f"transformer.h.{i}"
        _require_children(block, name, {"ln_1", "attn", "ln_2", "mlp"})
        _require_children(block.attn, f"{name}.attn", {"c_attn", "c_proj"}, {"resid_dropout", "attn_dropout"})
        _require_children(block.mlp, f"{name}.mlp", {"c_fc", "gelu", "c_proj"}, {"dropout"})
        linears |= {f"{name}.{part}": block.get_submodule(part) for part in ("attn.c_attn", "attn.c_proj")}
        linears |= {f"{name}.{part}": block.get_submodule(part) for part in ("mlp.c_fc", "mlp.c_proj")}
        norms |= {f"{name}.ln_1": block.ln_1, f"{name}.ln_2": block.ln_2}
        _require_attention(block.attn, f"{name}.attn", width)
        if _gelu_kind(block.mlp.gelu) is None:
            require_kind(block.mlp.gelu, f"{name}.mlp.gelu", nn.GELU)
        plan |= {block: _Block, block.attn: _Attention, block.mlp: _MLP}
    for name, linear in linears.items():
        require_kind(linear, name, nn.Linear)
        plan[linear] = kernels.Linear
    require(gpt.lm_head.bias is None, "lm_head", "has a bias, which is not supported")
    for name, norm in norms.items():
        vector = getattr(norm, "weight", None)
        require(isinstance(vector, Tensor) and vector.shape == (width,), name, f"expected a weight of {width} numbers")
        require(hasattr(norm, "bias"), name, "has no attribute bias, so it is not nanoGPT's LayerNorm")
        plan[norm] = kernels.LayerNorm if type(norm) is nn.LayerNorm else _LayerNorm
    for name, module in gpt.named_modules():
        require("forward" not in module.__dict__, name, "its forward is overridden; patch the model before that")

    for name, norm in norms.items():
        probe.check_norm(name, norm, plan)
    for i, block in enumerate(gpt.transformer.h):
        probe.check_block(f"transformer.h.{i}", block, plan, width)

    def run(tokens: Tensor, targets: Tensor) -> Any:
        targets = targets[:, :block_size].clone()
        if ignores_minus_1 or targets.device.type == "cpu":  # a GPU does not survive a target that is out of range
            targets[0, 0] = whole.ignore_index
        return model(tokens[:, :block_size], targets)

    probe.patch_and_check(model, plan, gpt.transformer.ln_f, gpt.transformer.wte.weight.shape[0], run)
    return model


def _require_children(
    module: Any, name: str, required: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> None:
    """Refuse a module unless it has the submodules that nanoGPT's has, and no others."""
    require(isinstance(module, nn.Module), name, f"expected a module, got {type(module).__name__}")
    children = {child for child, _ in module.named_children()}
    missing, unknown = sorted(required - children), sorted(children - required - optional)
    require(not missing, name, f"has no {', '.join(missing)}, so it is not nanoGPT's")
    require(not unknown, name, f"has {', '.join(unknown)}, which nanoGPT's does not have")


def _require_attention(attn: Any, name: str, width: int) -> None:
    n_head: Any = getattr(attn, "n_head", None)
    dropout = getattr(attn, "dropout", 0.0)
    require(
        isinstance(n_head, int) and n_head > 0 and width % n_head == 0, name, f"has {n_head} heads for width {width}"
    )
    head_size = width // n_head
    require(head_size <= MAX_HEAD_SIZE, name, f"has heads of {head_size}; at most {MAX_HEAD_SIZE} are supported")
    require(isinstance(dropout, int | float), name, "expected dropout, a number, as in nanoGPT")
    has_module = hasattr(attn, "resid_dropout")
    require(hasattr(attn, "dropout") or not has_module, name, "has resid_dropout and no number dropout")
