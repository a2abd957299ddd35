"""GPT-2 as a GGUF file, which llama.cpp and the programs around it run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.model.config import GPTConfig

ARCHITECTURE = "gpt2"

# Our names and llama.cpp's. N stands for the number of the layer.
NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.h.N.ln_1": "blk.N.attn_norm",
    "transformer.h.N.attn.c_attn": "blk.N.attn_qkv",
    "transformer.h.N.attn.c_proj": "blk.N.attn_output",
    "transformer.h.N.ln_2": "blk.N.ffn_norm",
    "transformer.h.N.mlp.c_fc": "blk.N.ffn_up",
    "transformer.h.N.mlp.c_proj": "blk.N.ffn_down",
    "transformer.ln_f": "output_norm",
}


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
        RequestError: the ``gguf`` package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise RequestError("a GGUF file needs the gguf package: pip install gguf") from error
    with written_whole(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_name(name)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        if vocabulary is None:
            writer.add_tokenizer_model("no_vocab")
            writer.add_vocab_size(config.vocab_size)
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
        n_tokens = len(vocabulary.tokens) if vocabulary is not None else config.vocab_size
        for ours, t in parameters.items():
            tensor = t.detach().float().cpu()
            rows = tensor[:n_tokens] if ours == "transformer.wte.weight" else tensor
            writer.add_tensor(theirs(ours), rows.contiguous().numpy())
        for missing in _missing_biases(parameters, config):
            writer.add_tensor(theirs(missing[0]), torch.zeros(missing[1]).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def theirs(name: str) -> str:
    """llama.cpp's name of a parameter."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    layer = next((part for part in parts if part.isdigit()), "N")
    pattern = ".".join("N" if part.isdigit() else part for part in parts)
    return f"{NAMES[pattern].replace('N', layer)}.{kind}"


def _missing_biases(parameters: Mapping[str, Tensor], config: GPTConfig) -> list[tuple[str, int]]:
    """The biases that the format asks for and the model does not have, with their sizes."""
    names = [name for name in parameters if name.endswith(".weight") and not name.startswith(("transformer.w",))]
    biases = [(name.removesuffix("weight") + "bias", parameters[name].shape[0]) for name in names]
    return [(name, size) for name, size in biases if name not in parameters]
