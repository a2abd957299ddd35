"""A model as a GGUF file, which llama.cpp and the programs around it run.

The architectures and their weights are those of transformers (``layouts.py``). The ``gguf`` package knows llama.cpp's
name of each weight by transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.model import layouts
from fastgpt.model.config import NORM_EPS, ROTARY_BASE, GPTConfig
from fastgpt.model.gpt import on_meta
from fastgpt.model.layouts import Layout

# Those whose files transformers reads, with which they are tested.
ARCHITECTURES = ("gpt2", "llama", "qwen3", "starcoder2")

# llama.cpp turns pairs of neighbours in these, and transformers pairs of halves.
INTERLEAVED = ("llama",)


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level byte-pair encoding.

    Attributes:
        tokens: as GPT-2's files spell them, by id.
        merges: pairs in the order in which they are merged, each as text with a space between.
        end_of_text: its id; ``None`` for none.
    """

    tokens: list[str]
    merges: list[str]
    end_of_text: int | None


def save(
    path: Path, parameters: Mapping[str, Tensor], config: GPTConfig, vocabulary: Vocabulary | None, name: str
) -> None:
    """Write a model in fp32.

    Args:
        path: of the file.
        parameters: by our names. Rows of the embedding beyond the vocabulary are padding, and left out.
        config: the architecture.
        vocabulary: ``None`` for a tokenizer that llama.cpp does not have: the file then takes and gives token ids.
        name: of the model.

    Raises:
        RequestError: llama.cpp has no architecture that computes the same, or the ``gguf`` package is not installed.
    """
    layout = layout_of(config)
    try:
        import gguf
    except ImportError as error:
        raise RequestError("a GGUF file needs the gguf package: pip install gguf") from error
    n_tokens = len(vocabulary.tokens) if vocabulary is not None else config.vocab_size
    with written_whole(path) as partial:
        writer = gguf.GGUFWriter(partial, layout.model_type)
        writer.add_name(name)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.mlp_width)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        if config.norm == "rms":
            writer.add_layer_norm_rms_eps(NORM_EPS)
        else:
            writer.add_layer_norm_eps(NORM_EPS)
        if config.positions == "rotary":
            writer.add_head_count_kv(config.kv_heads)
            writer.add_key_length(config.head_size)
            writer.add_value_length(config.head_size)
            writer.add_rope_dimension_count(config.head_size)
            writer.add_rope_freq_base(ROTARY_BASE)
        writer.add_vocab_size(n_tokens)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        if vocabulary is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            kinds = [gguf.TokenType.NORMAL] * len(vocabulary.tokens)
            if vocabulary.end_of_text is not None:
                kinds[vocabulary.end_of_text] = gguf.TokenType.CONTROL
                writer.add_bos_token_id(vocabulary.end_of_text)
                writer.add_eos_token_id(vocabulary.end_of_text)
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(vocabulary.tokens)
            writer.add_token_types(kinds)
            writer.add_token_merges(vocabulary.merges)
        written = replace(layout.written_config(config), vocab_size=n_tokens)
        names = gguf.get_tensor_name_map(_key_of(layout, gguf.MODEL_ARCH_NAMES), config.n_layer)
        for hf_name, part in layouts.parts(layout, on_meta(written)).items():
            theirs = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, f"{hf_name} is a tensor of {layout.name}, and the package gguf does not know it"
            tensor = part.of(parameters)
            if layout.model_type in INTERLEAVED and hf_name.endswith((".q_proj.weight", ".k_proj.weight")):
                tensor = _pairs_of_neighbours(tensor, config.head_size)
            writer.add_tensor(theirs, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def layout_of(config: GPTConfig) -> Layout:
    """The architecture of llama.cpp that a model is.

    Raises:
        RequestError: it has none that computes the same, or none that is tested.
    """
    layout = layouts.layout_of(config)
    if layout.model_type not in ARCHITECTURES:
        raise RequestError(f"a GGUF file of {layout.name}'s architecture is not written: --format hf is")
    for option in ("window", "bias"):
        if getattr(config, option) and option in layout.free and not layout.zero_biases:
            raise RequestError(
                f"a GGUF file of {layout.name}'s architecture is written without {option} only: --format hf has it"
            )
    return layout


def _key_of(layout: Layout, names: Mapping[Any, str]) -> Any:
    """The gguf package's key of an architecture."""
    return next(key for key, name in names.items() if name == layout.model_type)


def _pairs_of_neighbours(weight: Tensor, head_size: int) -> Tensor:
    """The rows of queries or keys (H D, C) in another order: those that are turned together beside each other."""
    return weight.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)
