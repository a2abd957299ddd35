"""GPT-2 as Hugging Face keeps it: a folder with ``config.json`` and ``model.safetensors``.

Names of parameters are ours, except that a folder from the hub may lack ``transformer.`` in front. Weights of linear
layers lie the other way round (``Conv1D``: (in, out)). Biases that our model lacks are zeros there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT, on_meta

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"

# What our model computes; transformers' defaults, so that a missing entry means the same.
ONLY = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # all of them GELU's tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
DEFAULTS = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}  # transformers'

_CONV1D = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_MASKS = re.compile(r"\.attn\.(masked_)?bias$")  # buffers of old versions, not parameters


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder as Hugging Face keeps models."""
    return (path / CONFIG).is_file() and "model_type" in _read_json(path / CONFIG)


def read_config(folder: Path) -> GPTConfig:
    """The architecture of a GPT-2, without dropout.

    Raises:
        RequestError: there is no ``config.json``, or it describes something else than our model computes.
    """
    path = folder / CONFIG
    content = _read_json(path)
    if "model_type" not in content:
        raise RequestError(f"{path} names no model_type")
    for name, allowed in ONLY.items():
        value = content.get(name, allowed[0])
        if value not in allowed:
            raise RequestError(f"{path}: {name} is {value!r}, and fastgpt's GPT-2 has {allowed[0]!r}")
    sizes = {name: content.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in sizes.items():
        if type(value) is not int:
            raise RequestError(f"{path}: {name} is {value!r}, not a number")
    inner = content.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise RequestError(f"{path}: n_inner is {inner!r}, and fastgpt's GPT-2 has 4 n_embd, {4 * sizes['n_embd']}")
    try:
        return GPTConfig(block_size=sizes.pop("n_positions"), **sizes)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error


def load(folder: Path) -> GPT:
    """The model of a folder, in fp32 on the CPU.

    Raises:
        RequestError: the folder does not hold a GPT-2 that our model computes, or is damaged.
    """
    config = read_config(folder)
    model = on_meta(config)
    expected = {name: p.shape for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for file, name, tensor in _tensors(folder):
        own = name if name.startswith("transformer.") else f"transformer.{name}"
        if _MASKS.search(name) or name == "lm_head.weight":  # the head is the token embedding
            continue
        if own not in expected:
            raise RequestError(f"{file}: {name} is no parameter of GPT-2")
        if _CONV1D.search(name) and tensor.dim() == 2:
            tensor = tensor.T
        if tensor.shape != expected[own] or not tensor.is_floating_point():
            raise RequestError(
                f"{file}: {name} has shape {tuple(tensor.shape)} and {tensor.dtype}; {CONFIG} asks for "
                f"{tuple(expected[own])}"
            )
        found[own] = tensor.float().contiguous()
    for name in sorted(expected.keys() - found.keys()):
        raise RequestError(f"{folder} lacks the weights {name.removeprefix('transformer.')}")
    model.load_state_dict(found, assign=True)
    return model


def save(
    folder: Path, parameters: Mapping[str, Tensor], config: GPTConfig, vocab_size: int, end_of_text: int | None
) -> None:
    """Write a model that ``transformers`` loads with the same logits.

    Args:
        folder: exists.
        parameters: by our names.
        config: the architecture.
        vocab_size: of the tokenizer. Rows of the embedding beyond it are padding, and left out.
        end_of_text: the token at which generation stops; ``None`` for none.

    Raises:
        OSError: a file cannot be written.
    """
    tensors = {}
    for name, shape in _expected(config, vocab_size).items():
        ours = parameters.get(name)
        if ours is None:  # biases of a model without biases
            tensors[name] = torch.zeros(shape)
            continue
        t = ours.detach().float().cpu()
        t = t[:vocab_size] if name == "transformer.wte.weight" else t
        tensors[name] = (t.T if _CONV1D.search(name) else t).contiguous()
    with written_whole(folder / WEIGHTS) as partial:
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
    content = {
        "architectures": ["GPT2LMHeadModel"],
        **{name: allowed[0] for name, allowed in ONLY.items()},
        "vocab_size": vocab_size,
        "n_positions": config.block_size,
        **{name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    _write_json(folder / CONFIG, content)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)  # safetensors lets only the owner read
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "do_sample": True}
    _write_json(folder / GENERATION_CONFIG, {name: value for name, value in generation.items() if value is not None})


def check_gpt2(config: GPTConfig) -> None:
    """Raise ``RequestError`` if the architecture is not GPT-2's, as which a model is to be written."""
    if config.beyond_gpt2:
        raise RequestError(
            f"the model has what GPT-2 has not ({', '.join(config.beyond_gpt2)}), and only GPT-2's layout is written"
        )


def _expected(config: GPTConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by name, with all biases."""
    model = on_meta(GPTConfig(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd, bias=True))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return {name: shape[::-1] if _CONV1D.search(name) else shape for name, shape in shapes.items()}


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of a folder, with its file and its name."""
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield file, name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{file} cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise RequestError(f"{folder / INDEX} is damaged: it does not map weights to files of the folder")
        return [folder / name for name in sorted(set(names.values()))]
    pickled = " (pytorch_model.bin is pickled, and not read)" if (folder / "pytorch_model.bin").is_file() else ""
    raise RequestError(f"{folder} has no {WEIGHTS}{pickled}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} is damaged: it does not hold a table")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
