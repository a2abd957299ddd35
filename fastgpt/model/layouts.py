"""The architectures of transformers that a GPT of ours can be, and where the weights of each lie.

A layout is exact: transformers computes what our model computes, up to rounding. It says what the options have to be,
what ``config.json`` says of them, and how the modules are called. Reading and writing a folder (``huggingface.py``), or
a GGUF file (``gguf.py``), go through the same table.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.model.config import NORM_EPS, QK_NORM_EPS, ROTARY_BASE, GPTConfig
from fastgpt.model.gpt import GPT

# Of options that later GPTs have: how the weights begin is over, and documents are a note of export's.
OPTIONS = {f.name: f.default for f in fields(GPTConfig) if f.metadata.get("later")} | {"bias": True}
del OPTIONS["zero_init"], OPTIONS["end_of_text"]

# Names of the same function.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "relu2": ("relu2",),
    "swiglu": ("silu", "swish"),
}


@dataclass(frozen=True)
class Layout:
    """An architecture of transformers.

    Attributes:
        name: as people call it.
        architecture: the class in transformers.
        model_type: in ``config.json``, and of the architecture in a GGUF file.
        needs: what options must be. One that is neither here nor in ``free`` must be as in GPT-2.
        free: options that may be anything.
        read: entries of ``config.json`` that are fields of ours, each with what transformers takes if it is missing;
            ``None`` is 0 to us.
        entries: what else ``config.json`` says: for each entry the values that mean what our model computes. The first
            one is written, and is transformers' own unless ``missing`` has that.
        modules: their names by ours. N stands for the number of the layer. Several names are for rows, one after the
            other.
        prefix: of most names; the weights of a model without an output layer lack it.
        missing: what transformers takes for entries that are missing, if not the first of the values.
        unwritten: entries that are checked like the others but not written.
        dropouts: entries of the dropout, where the architecture has all of ours.
        zero_biases: whether it always has biases; those that our model lacks are zeros.
        conv1d: whether the weights in the blocks lie the other way round, (in, out).
        ones: weights of a head's norm, by which our QK-norm does not multiply.
        qk_scale: what the weights of queries and keys are multiplied by.
    """

    name: str
    architecture: str
    model_type: str
    needs: Mapping[str, Any]
    free: tuple[str, ...]
    read: Mapping[str, tuple[str, Any]]
    entries: Callable[[GPTConfig], dict[str, tuple[Any, ...]]]
    modules: Mapping[str, tuple[str, ...]]
    prefix: str
    missing: Mapping[str, Any] = field(default_factory=dict)
    unwritten: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    zero_biases: bool = False
    conv1d: bool = False
    ones: tuple[str, ...] = ()
    qk_scale: float = 1.0

    def misfits(self, config: GPTConfig) -> list[str]:
        """The options of a model that the architecture does not have, as ``name=value``."""
        wanted = {name: value for name, value in (OPTIONS | dict(self.needs)).items() if name not in self.free}
        found = {name: getattr(config, name) for name in wanted}
        return [f"{name}={value}" for name, value in found.items() if value != wanted[name]]

    def written_config(self, config: GPTConfig) -> GPTConfig:
        """The model that the weights are written of: with the biases that the architecture has."""
        return replace(config, bias=config.bias or self.zero_biases, end_of_text=-1, zero_init=False)


class Part(NamedTuple):
    """What a tensor of theirs is in our model.

    Attributes:
        ours: the parameter; ``None`` for a weight that our model does not have, which is ones.
        start: its first row there.
        shape: as it lies in ours.
        transposed: whether theirs lies the other way round.
        factor: theirs divided by ours.
    """

    ours: str | None
    start: int
    shape: tuple[int, ...]
    transposed: bool
    factor: float

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, in fp32 on the CPU, but not transposed. A bias that is not there is zeros."""
        if self.ours is None:
            return torch.ones(self.shape)
        if self.ours not in parameters:
            return torch.zeros(self.shape)
        rows = parameters[self.ours].detach()[self.start : self.start + self.shape[0]].float().cpu()
        return rows if self.factor == 1.0 else rows * self.factor


def layout_of(config: GPTConfig) -> Layout:
    """The architecture of transformers that a model is.

    Raises:
        RequestError: there is none among the layouts.
    """
    misfits = {layout.name: layout.misfits(config) for layout in LAYOUTS}
    fewest = min(misfits.values(), key=len)
    if fewest:
        nearest = [f"{name} has no {', '.join(lacks)}" for name, lacks in misfits.items() if len(lacks) == len(fewest)]
        raise RequestError(f"fastgpt writes no architecture of transformers that is this model's: {'; '.join(nearest)}")
    return next(layout for layout in LAYOUTS if not misfits[layout.name])


def parts(layout: Layout, model: GPT) -> dict[str, Part]:
    """The tensors of a model of this architecture by their names. Of ``model`` only names and shapes matter."""
    found = {}
    for ours, parameter in model.named_parameters():
        module, _, kind = ours.rpartition(".")
        theirs = _renamed(module, layout.modules)
        stacked = model.get_parameter(f"{module}.weight").stacked if len(theirs) > 1 else (len(parameter),)  # type: ignore[attr-defined]
        transposed = layout.conv1d and ".h." in ours and parameter.dim() == 2
        start = 0
        for name, rows in zip(theirs, stacked, strict=True):
            factor = layout.qk_scale if name.endswith((".q_proj", ".k_proj")) else 1.0
            found[f"{name}.{kind}"] = Part(ours, start, (rows, *parameter.shape[1:]), transposed, factor)
            start += rows
    for name in layout.ones:
        for layer in range(model.config.n_layer):
            found[name.replace("N", str(layer))] = Part(None, 0, (model.config.head_size,), False, 1.0)
    return found


def _renamed(module: str, modules: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Their names of a module of ours."""
    words = module.split(".")
    layer = next((word for word in words if word.isdigit()), "")
    pattern = ".".join("N" if word.isdigit() else word for word in words)
    return tuple(".".join(layer if word == "N" else word for word in name.split(".")) for name in modules[pattern])


def _gpt2_entries(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "activation_function": ("gelu_new", *ACTIVATIONS["gelu"]),
        "layer_norm_epsilon": (NORM_EPS,),
        "n_inner": (None, config.mlp_width),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }


# Names of the modules that we took over from GPT-2.
_GPT2_MODULES = (
    "transformer.wte", "transformer.wpe", "transformer.h.N.ln_1", "transformer.h.N.attn.c_attn",
    "transformer.h.N.attn.c_proj", "transformer.h.N.ln_2", "transformer.h.N.mlp.c_fc", "transformer.h.N.mlp.c_proj",
    "transformer.ln_f",
)  # fmt: skip

# What the descendants of Llama share.
_DECODER_READ = {
    "vocab_size": ("vocab_size", 32000), "block_size": ("max_position_embeddings", 2048),
    "n_layer": ("num_hidden_layers", 32), "n_head": ("num_attention_heads", 32), "n_embd": ("hidden_size", 4096),
    "n_kv_head": ("num_key_value_heads", None), "tied": ("tie_word_embeddings", False),
}  # fmt: skip
_DECODER_MODULES: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.h.N.ln_1": ("model.layers.N.input_layernorm",),
    "transformer.h.N.attn.c_attn": tuple(f"model.layers.N.self_attn.{one}_proj" for one in "qkv"),
    "transformer.h.N.attn.c_proj": ("model.layers.N.self_attn.o_proj",),
    "transformer.h.N.ln_2": ("model.layers.N.post_attention_layernorm",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
_GATED_MLP = {
    "transformer.h.N.mlp.c_fc": ("model.layers.N.mlp.gate_proj", "model.layers.N.mlp.up_proj"),
    "transformer.h.N.mlp.c_proj": ("model.layers.N.mlp.down_proj",),
}
_ROTATION = {"rope_type": ("default",), "partial_rotary_factor": (1.0,)}


def _decoder_entries(config: GPTConfig, eps: str = "rms_norm_eps") -> dict[str, tuple[Any, ...]]:
    return {
        "hidden_act": ACTIVATIONS[config.mlp],
        "intermediate_size": (config.mlp_width,),
        "num_key_value_heads": (config.kv_heads, None),
        "head_dim": (config.head_size, None),
        eps: (NORM_EPS,),
        "rope_theta": (ROTARY_BASE,),
    }


def _llama_entries(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _decoder_entries(config) | {"attention_bias": (config.bias,), "mlp_bias": (config.bias,)}


def _qwen3_entries(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return _decoder_entries(config) | {
        "attention_bias": (False,),
        "use_sliding_window": (config.window > 0,),
        "sliding_window": (config.window or None,),
        "layer_types": (kinds,) if config.window else (kinds, None),
    }


def _starcoder2_entries(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    return _decoder_entries(config, "norm_epsilon") | {"use_bias": (True,), "sliding_window": (None,)}


LAYOUTS = (
    Layout(
        "GPT-2", "GPT2LMHeadModel", "gpt2",
        needs={}, free=("bias",),
        read={
            "vocab_size": ("vocab_size", 50257), "block_size": ("n_positions", 1024), "n_layer": ("n_layer", 12),
            "n_head": ("n_head", 12), "n_embd": ("n_embd", 768),
        },
        entries=_gpt2_entries, modules={name: (name,) for name in _GPT2_MODULES}, prefix="transformer.",
        dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"), zero_biases=True, conv1d=True,
    ),
    Layout(
        "Llama", "LlamaForCausalLM", "llama",
        needs={"positions": "rotary", "norm": "rms", "mlp": "swiglu"}, free=("bias", "n_kv_head", "tied"),
        read=_DECODER_READ | {"bias": ("attention_bias", False)},
        entries=_llama_entries, modules=_DECODER_MODULES | _GATED_MLP, prefix="model.",
        missing={"intermediate_size": 11008, "rms_norm_eps": 1e-6, "mlp_bias": False}, unwritten=_ROTATION,
    ),
    # Its norms have one epsilon, and ours of queries and keys have another. An RMS norm of s x with an epsilon of
    # s² e is that of x with e, so that is where a factor of the weights goes.
    Layout(
        "Qwen3", "Qwen3ForCausalLM", "qwen3",
        needs={"positions": "rotary", "norm": "rms", "mlp": "swiglu", "qk_norm": True, "bias": False},
        free=("n_kv_head", "tied", "window"),
        read=_DECODER_READ | {"vocab_size": ("vocab_size", 151936), "block_size": ("max_position_embeddings", 32768),
                              "window": ("sliding_window", None)},
        entries=_qwen3_entries, modules=_DECODER_MODULES | _GATED_MLP, prefix="model.",
        missing={
            "intermediate_size": 22016, "rms_norm_eps": 1e-6, "head_dim": 128, "use_sliding_window": False,
            "layer_types": None,
        },
        unwritten=_ROTATION,
        ones=("model.layers.N.self_attn.q_norm.weight", "model.layers.N.self_attn.k_norm.weight"),
        qk_scale=math.sqrt(NORM_EPS / QK_NORM_EPS),
    ),
    Layout(
        "Arcee", "ArceeForCausalLM", "arcee",
        needs={"positions": "rotary", "norm": "rms", "mlp": "relu2"}, free=("bias", "n_kv_head", "tied"),
        read=_DECODER_READ | {"bias": ("attention_bias", False), "n_embd": ("hidden_size", 2560),
                              "block_size": ("max_position_embeddings", 4096)},
        entries=_llama_entries,
        modules=_DECODER_MODULES | {
            "transformer.h.N.mlp.c_fc": ("model.layers.N.mlp.up_proj",),
            "transformer.h.N.mlp.c_proj": ("model.layers.N.mlp.down_proj",),
        },
        prefix="model.", missing={"intermediate_size": 18432, "mlp_bias": False}, unwritten=_ROTATION,
    ),
    Layout(
        "Starcoder2", "Starcoder2ForCausalLM", "starcoder2",
        needs={"positions": "rotary"}, free=("bias", "n_kv_head", "tied"),
        read=_DECODER_READ | {
            "vocab_size": ("vocab_size", 49152), "block_size": ("max_position_embeddings", 4096),
            "n_layer": ("num_hidden_layers", 30), "n_head": ("num_attention_heads", 24),
            "n_embd": ("hidden_size", 3072), "tied": ("tie_word_embeddings", True),
        },
        entries=_starcoder2_entries,
        modules=_DECODER_MODULES | {
            "transformer.h.N.mlp.c_fc": ("model.layers.N.mlp.c_fc",),
            "transformer.h.N.mlp.c_proj": ("model.layers.N.mlp.c_proj",),
        },
        prefix="model.", missing={"intermediate_size": 12288}, unwritten=_ROTATION,
        dropouts=("attention_dropout", "embedding_dropout", "residual_dropout"), zero_biases=True,
    ),
)  # fmt: skip
BY_MODEL_TYPE = {layout.model_type: layout for layout in LAYOUTS}
