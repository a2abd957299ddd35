"""What the language models of transformers have in common: an output layer, a loss, and what a patch requires."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastgpt import kernels
from fastgpt.integrations.lazy_logits import lazy_logits
from fastgpt.integrations.swap import is_patched, loss_is_fusable, named, require, require_kind

OLDEST_TRANSFORMERS = (4, 57)

# Arguments of the model that a training step passes on unchanged.
PASSED_ON = {
    "input_ids",
    "past_key_values",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "cache_position",
    "head_mask",
    "output_attentions",
    "output_hidden_states",
}


# Arguments of a layer that do not affect its attention. If any other argument is set, transformers' own code runs.
IRRELEVANT = {"use_cache", "position_ids", "cache_position", "num_items_in_batch"}


def is_causal_alone(attention: Any, x: Tensor, cache: Any, given: dict[str, Any]) -> bool:
    """Whether attention can run on the kernels, and is faster there.

    Args:
        attention: a module of transformers.
        x: its input, (B, T, C).
        cache: of keys and values, or ``None``.
        given: its other arguments by name.
    """
    others = {name for name, value in given.items() if value is not None and value is not False} - IRRELEVANT
    return (
        not others  # such as a mask other than the causal one
        and attention.config._attn_implementation == "sdpa"
        and (cache is None or x.shape[1] > 1)  # PyTorch's attention is faster for a single query
    )


class CausalLM(nn.Module):
    """The ``forward`` of a model with an output layer: in a training step the loss is computed without logits.

    Attributes:
        fastgpt_body: the attribute of the model that makes hidden states of tokens.
    """

    fastgpt_body = "model"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = named(self, args, kwargs)
        labels, n_items = given.pop("labels", None), given.pop("num_items_in_batch", None)
        shifted, ignore_index = given.pop("shift_labels", None), given.pop("ignore_index", -100)
        return_dict, to_keep = given.pop("return_dict", None), given.pop("logits_to_keep", 0)
        if (
            not self.training
            or labels is None
            or not (isinstance(to_keep, int) and to_keep == 0)
            or not given.keys() <= PASSED_ON
            or not _takes_the_mean_of_cross_entropies(self)
            or not loss_is_fusable(self.lm_head, kernels.Linear)
        ):
            return super().forward(*args, **kwargs)
        cache_asked_for = given.get("use_cache") is not None or given.get("past_key_values") is not None
        # Without a cache, position_ids can mean packed sequences.
        if not cache_asked_for and given.get("position_ids") is None:
            # The default is a cache, which would only cost copies here. But without a cache, transformers builds a mask
            # for packed sequences if it is traced, or older than 5.0.
            given["use_cache"] = torch.compiler.is_compiling() or "head_mask" in self.fastgpt_arguments
        outputs = getattr(self, self.fastgpt_body)(**given, return_dict=True)
        if not cache_asked_for:
            outputs.past_key_values = None
        hidden = outputs.last_hidden_state
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shifted.reshape(-1).to(hidden.device)
        loss = kernels.linear_cross_entropy(hidden.flatten(0, -2), self.lm_head.weight, targets, ignore_index)
        if n_items is not None:
            count = (targets != ignore_index).sum()
            n_items = n_items.to(loss.device) if isinstance(n_items, Tensor) else n_items
            loss = torch.where(count > 0, loss, 0.0) * (count / n_items)  # 0 instead of NaN if all targets are ignored
        logits = lazy_logits(hidden, self.lm_head)
        return _output(outputs, loss, logits, self.config.return_dict if return_dict is None else return_dict)


def _output(outputs: Any, loss: Tensor, logits: Tensor | None, return_dict: bool) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

    kind: Any = CausalLMOutputWithCrossAttentions if hasattr(outputs, "cross_attentions") else CausalLMOutputWithPast
    output = kind(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return output if return_dict else output.to_tuple()


def _takes_the_mean_of_cross_entropies(model: Any) -> bool:
    """Whether the model has the default loss function."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    # as model.loss_function, but without its warning about the default, which torch.compile cannot trace
    loss = getattr(model, "_loss_function", None) or LOSS_MAPPING.get(str(getattr(model, "loss_type", None)))
    return loss in (None, ForCausalLMLoss)


def require_patchable(model: nn.Module, family: str, name: str, oldest: tuple[int, int] = OLDEST_TRANSFORMERS) -> Any:
    """Check what every patch of a language model needs, and return the model.

    Args:
        model: to be patched.
        family: the folder of transformers that it comes from, such as ``gpt2``.
        name: of its class.
        oldest: version of transformers.

    Raises:
        ValueError: it cannot be patched. The message names the module and the reason.
    """
    require(not is_patched(model), "", "already patched")
    try:
        import transformers

        kind: Any = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    except ImportError:
        raise ValueError(f"model: expected transformers' {name}, got {type(model).__name__}") from None
    version = transformers.__version__
    supported = tuple(int(n) for n in version.split(".")[:2]) >= oldest
    least = ".".join(map(str, oldest))
    require(supported, "", f"transformers {version} is too old; {least} is the oldest that can be patched")
    require(
        isinstance(model, kind)
        and type(model).forward is kind.forward
        and type(model).loss_function is kind.loss_function,
        "",
        f"expected transformers' {name}, got {type(model).__name__}",
    )
    require(
        "forward" not in model.__dict__,
        "",
        "its forward is overridden, for example by a device_map; patch the model before that",
    )
    require(not any(p.is_meta for p in model.parameters()), "", "is on the meta device; load its weights first")
    lm: Any = model
    require_kind(lm.lm_head, "lm_head", nn.Linear)
    require(lm.lm_head.bias is None, "lm_head", "has a bias, which is not supported")
    return lm


def run_with_labels(model: Any) -> Callable[[Tensor, Tensor], Any]:
    """The function that :func:`probe.patch_and_check` calls."""

    def run(tokens: Tensor, targets: Tensor) -> Any:
        labels = targets.clone()
        labels[0, 3] = -100
        output = model(tokens, labels=labels)
        return output.logits, output.loss

    return run
