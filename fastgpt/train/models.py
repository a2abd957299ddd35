"""Opens a model wherever it comes from: a run of fastgpt, a folder as Hugging Face keeps it, or a name on its hub."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastgpt.data.neighbours import META_PICKLE, read_meta_pickle
from fastgpt.data.tokenizer_json import FILE, JsonTokenizer
from fastgpt.data.tokenizer_meta import tokenizer_from_meta
from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import reachable
from fastgpt.model import GPT, huggingface
from fastgpt.model.config import GPT2_VOCABULARY, GPTConfig
from fastgpt.model.gpt import on_meta
from fastgpt.train import checkpoint, run_folder

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NANOGPT = "ckpt.pt"
CHECKPOINTS = "latest, best or a step"  # what --checkpoint takes
# Another tokenizer of GPT-2's size would cut this differently.
PROBE = "It's 1,234 naïve fastgpt tokenizations:\n\n\tdef f(x): return x**2  # Größe, число, 漢字, 🙂"


@dataclass(frozen=True)
class OpenedModel:
    """A model with the tokenizer that it was trained with.

    Attributes:
        name: as it was asked for.
        origin: where it comes from, in words.
        model: in fp32 on the CPU, in eval mode.
        tokenizer: ``None`` for a model of tokens whose tokenizer is unknown.
    """

    name: str
    origin: str
    model: GPT
    tokenizer: Tokenizer | None

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; those from here on are padding."""
        return self.tokenizer.vocab_size if self.tokenizer is not None else self.model.config.vocab_size


def open_model(name: str, which: str = "latest", data_dir: str | Path = "data") -> OpenedModel:
    """Open a model.

    Args:
        name: the folder of a run, a folder with ``config.json`` and ``model.safetensors``, nanoGPT's ``ckpt.pt`` or the
            folder that it lies in, or a name on the hub such as ``gpt2``.
        which: of a run's checkpoints: ``latest``, ``best`` or a step.
        data_dir: folder of datasets, where the characters of a nanoGPT model are.

    Raises:
        RequestError: there is no such model, or it is damaged or not one that fastgpt computes.
    """
    path = reachable(Path(name))
    if run_folder.is_run(path) and not huggingface.is_folder(path):
        return _open_run(name, path, which)
    nanogpt = path / NANOGPT if path.is_dir() else path
    if nanogpt.is_file() and nanogpt.suffix == ".pt":
        return _open_nanogpt(name, nanogpt, data_dir)
    if path.is_dir():
        if not huggingface.is_folder(path):
            raise RequestError(f"{path} is neither a run nor a model: it has no {huggingface.CONFIG} and no {NANOGPT}")
        return _open_folder(name, path, f"the folder {path}")
    if path.exists():
        raise RequestError(f"{path} is a file; give the folder of a run or of a model")
    check_name(name)
    return _open_folder(name, _download(name), f"{name} on the Hugging Face hub")


def check_name(name: str, others: tuple[str, ...] = ()) -> None:
    """Refuse a name that is neither a path nor one on the hub.

    Args:
        name: of a model.
        others: what could have been meant besides.

    Raises:
        RequestError: there can be no such model.
    """
    if not (reachable(Path(name)).exists() or name in HUB_NAMES or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
        near = did_you_mean(name, (*HUB_NAMES, *others))
        raise RequestError(f"there is no {name}: give the folder of a run, of a model, or a name such as gpt2{near}")


def _open_run(name: str, path: Path, which: str) -> OpenedModel:
    found = _checkpoint_of(path, which)
    try:
        return _open_checkpoint(name, path, found)
    except RequestError:
        if found.exists():
            raise
        return _open_run(name, path, which)  # the run goes on, and has removed it meanwhile


def _open_checkpoint(name: str, path: Path, found: Path) -> OpenedModel:
    tokenizer = run_folder.read_config(path).tokenizer
    config = checkpoint.load_state(found).model
    if config.n_params != checkpoint.n_parameters(found):
        raise RequestError(
            f"{found / 'model.safetensors'} does not hold the {config.n_params:,} parameters of its model"
        )
    model = on_meta(config)
    model.load_state_dict(checkpoint.load_parameters(found, model.state_dict()), assign=True)
    step = int(found.name.rpartition("-")[2])
    return OpenedModel(
        name, f"step {step} of {path}", model.eval(), tokenizer_from_meta(tokenizer) if tokenizer else None
    )


def _checkpoint_of(path: Path, which: str) -> Path:
    """The folder of a run's checkpoint, after its files have been compared with its manifest."""
    names = ["model.safetensors", "state.json"]
    newest, damage = checkpoint.newest_good(path, names)
    if which == "latest":
        for problem in damage:
            print(f"{problem}: taking {newest}", file=sys.stderr)
        return newest
    steps = checkpoint.steps(path)
    step = checkpoint.load_state(newest).best_step if which == "best" else int(which) if which.isdigit() else None
    if step is None:
        if which == "best":
            raise RequestError(f"{path} has not been evaluated yet, so that no checkpoint is the best")
        raise RequestError(f"--checkpoint must be {CHECKPOINTS}, got {which}")
    if step not in steps:
        raise RequestError(f"{path} has no checkpoint of step {step} (there are {', '.join(map(str, steps))})")
    checkpoint.verify(checkpoint.folder(path, step), names)
    return checkpoint.folder(path, step)


def _open_folder(name: str, folder: Path, origin: str) -> OpenedModel:
    model = huggingface.load(folder).eval()
    return OpenedModel(name, origin, model, _tokenizer_of(folder, model.config.vocab_size))


def _tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder. Without a ``tokenizer.json``, a vocabulary of 50257 is GPT-2's."""
    if not (folder / FILE).is_file():
        return GPT2Tokenizer() if vocab_size == GPT2_VOCABULARY else None
    tokenizer = JsonTokenizer.open(folder)
    if tokenizer.vocab_size > vocab_size:
        raise RequestError(f"{folder / FILE} has {tokenizer.vocab_size} tokens, more than the model's {vocab_size}")
    if tokenizer.vocab_size == GPT2_VOCABULARY:
        with suppress(RequestError):  # its vocabulary cannot be had here
            if np.array_equal(tokenizer.encode(PROBE), GPT2Tokenizer().encode(PROBE)):
                return GPT2Tokenizer()  # which is faster, and shares the tokens of datasets
    return tokenizer


def _open_nanogpt(name: str, file: Path, data_dir: str | Path) -> OpenedModel:
    """The model of nanoGPT's ``ckpt.pt``, which is read as tensors and plain values: nothing in it is run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        arguments, tensors = dict(content["model_args"]), dict(content["model"])
        sizes = {key: arguments[key] for key in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
        # torch.compile puts a prefix in front; the head is the token embedding, and the mask is no parameter
        tensors = {key.removeprefix("_orig_mod."): t for key, t in tensors.items()}
        tensors = {key: t.float() for key, t in tensors.items() if not key.endswith((".attn.bias", "lm_head.weight"))}
        config = GPTConfig(vocab_size=len(tensors["transformer.wte.weight"]), **sizes)
        model = on_meta(config)
        model.load_state_dict(tensors, assign=True)
    except Exception as error:  # pickle, zip files, torch and the table each raise their own
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"{file} cannot be read as nanoGPT's checkpoint: {why[:200]}") from error
    dataset = Path(data_dir, str(content.get("config", {}).get("dataset", "")))
    tokenizer: Tokenizer | None = None
    if (dataset / META_PICKLE).is_file():
        tokenizer = read_meta_pickle(dataset / META_PICKLE)
    elif config.vocab_size >= GPT2_VOCABULARY:
        tokenizer = GPT2Tokenizer()
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{dataset} has {tokenizer.vocab_size} tokens, and {file} knows {config.vocab_size}")
    return OpenedModel(name, f"nanoGPT's {file}, step {content.get('iter_num', '?')}", model.eval(), tokenizer)


def _download(name: str) -> Path:
    """The folder of a model on the hub, downloaded if it is not in the cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RequestError(f"{name} comes from the Hugging Face hub: pip install huggingface-hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # requests, httpx and the hub each raise their own
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        subject = name if name in HUB_NAMES else f"there is no folder {name}, and it"
        raise RequestError(
            f"{subject} cannot be had from the Hugging Face hub ({why[:120]}); a folder with its config.json and "
            "model.safetensors serves as well"
        ) from error
