"""Models as Hugging Face keeps them: a folder with ``config.json`` and ``model.safetensors``.

``layouts.py`` has the architectures. A folder from the hub may lack the prefix of the names, such as ``transformer.``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.model import layouts
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT, on_meta
from fastgpt.model.layouts import Layout

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"

# Buffers of old versions, not parameters.
_BUFFERS = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder as Hugging Face keeps models."""
    return (path / CONFIG).is_file() and "model_type" in _read_json(path / CONFIG)


def read_config(folder: Path) -> GPTConfig:
    """The architecture of a model, without dropout.

    Raises:
        RequestError: there is no ``config.json``, or it describes something else than our model computes.
    """
    return _read(folder)[1]


def _read(folder: Path) -> tuple[Layout, GPTConfig]:
    path = folder / CONFIG
    content = _read_json(path)
    if "model_type" not in content:
        raise RequestError(f"{path} names no model_type")
    model_type = content["model_type"]
    layout = layouts.BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if layout is None:
        raise RequestError(
            f"{path}: model_type is {model_type!r}, and fastgpt reads {', '.join(layouts.BY_MODEL_TYPE)}"
        )
    content = _with_rotation(content, path)
    values = dict(layout.needs)
    for ours, (entry, default) in layout.read.items():
        value = content.get(entry, default)
        values[ours] = value = 0 if value is None and default is None else value
        if type(value) is not (bool if isinstance(default, bool) else int):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise RequestError(f"{path}: {entry} is {value!r}, not {kind}")
    if values.get("n_kv_head") == values["n_head"]:
        values["n_kv_head"] = 0
    try:
        config = GPTConfig(**{"bias": True} | values)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error
    for entry, allowed in (layout.entries(config) | dict(layout.unwritten)).items():
        value = content.get(entry, layout.missing.get(entry, allowed[0]))
        if value not in allowed:
            raise RequestError(f"{path}: {entry} is {value!r}, and fastgpt's {layout.name} has {allowed[0]!r}")
    return layout, config


def _with_rotation(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The entries, and those of the table of rotary positions, which transformers keeps within them under two names."""
    for name in ("rope_parameters", "rope_scaling"):  # the later one counts
        table = content.get(name)
        if table is None:
            continue
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise RequestError(f"{path}: {name} is {table!r}, and fastgpt turns all layers alike")
        # "type" is the name of rope_type in old folders
        content = content | {"rope_type" if key == "type" else key: value for key, value in table.items()}
    return content


def load(folder: Path) -> GPT:
    """The model of a folder, in fp32 on the CPU.

    Raises:
        RequestError: the folder does not hold a model that ours computes, or is damaged.
    """
    layout, config = _read(folder)
    model = on_meta(config)
    expected = layouts.parts(layout, model)
    found: dict[str, Tensor] = {}
    missing = set(expected)
    for file, name, tensor in _tensors(folder):
        full = name if name.startswith((layout.prefix, "lm_head.")) else layout.prefix + name
        if _BUFFERS.search(full) or (full == "lm_head.weight" and config.tied):  # the head is the token embedding
            continue
        part = expected.get(full)
        if part is None:
            raise RequestError(f"{file}: {name} is no parameter of {layout.name}")
        shape = part.shape[::-1] if part.transposed else part.shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise RequestError(
                f"{file}: {name} has shape {tuple(tensor.shape)} and {tensor.dtype}; {CONFIG} asks for {shape}"
            )
        missing.discard(full)
        if part.ours is None:
            if not (tensor == 1).all():
                raise RequestError(f"{file}: {name} is not all ones, and fastgpt's QK-norm has no weight")
            continue
        if part.ours not in found:
            found[part.ours] = torch.empty(model.get_parameter(part.ours).shape)
        rows = found[part.ours][part.start : part.start + part.shape[0]]
        rows.copy_(tensor.T if part.transposed else tensor)
        if part.factor != 1.0:
            rows /= part.factor
    for name in sorted(missing):
        raise RequestError(f"{folder} lacks the weights {name.removeprefix(layout.prefix)}")
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
        RequestError: transformers has no architecture that computes the same.
        OSError: a file cannot be written.
    """
    layout = layouts.layout_of(config)
    written = replace(layout.written_config(config), vocab_size=vocab_size)
    tensors = {}
    for name, part in layouts.parts(layout, on_meta(written)).items():
        tensor = part.of(parameters)
        tensors[name] = (tensor.T if part.transposed else tensor).contiguous()
    with written_whole(folder / WEIGHTS) as partial:
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
    content = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        **{entry: getattr(written, ours) for ours, (entry, _) in layout.read.items()},
        **{entry: allowed[0] for entry, allowed in layout.entries(written).items()},
        **dict.fromkeys(layout.dropouts, config.dropout),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    _write_json(folder / CONFIG, content)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)  # safetensors lets only the owner read
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "do_sample": True}
    _write_json(folder / GENERATION_CONFIG, {name: value for name, value in generation.items() if value is not None})


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
