"""Token files as other programs leave them: nanoGPT's folders, and the shards of llm.c and its relatives."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from fastgpt.errors import RequestError

META_PICKLE = "meta.pkl"
LARGEST_PICKLE = 64 << 20  # bytes; nanoGPT's is some kilobytes

# fineweb_train_000001.bin, fineweb_val_000000.bin; build-nanogpt writes the same as .npy
_SHARD = re.compile(r"(?P<prefix>.*)(?P<split>train|val)_(?P<number>\d+)\.(?P<kind>bin|npy)")


@dataclass(frozen=True)
class TokenFiles:
    """The files of a dataset that has no ``meta.json``.

    Attributes:
        train: of the training split, in their order.
        val: of the validation split.
        tokenizer: that made the tokens.
    """

    train: list[Path]
    val: list[Path]
    tokenizer: Tokenizer


def find(folder: Path) -> TokenFiles | None:
    """The token files in a folder; ``None`` if they are not laid out as another program does.

    Raises:
        RequestError: a split is missing, there are several datasets, or ``meta.pkl`` is not nanoGPT's.
    """
    if (folder / "train.bin").is_file():
        if not (folder / "val.bin").is_file():
            raise RequestError(f"{folder} has no val.bin beside its train.bin")
        pickled = folder / META_PICKLE
        # without one, nanoGPT takes the tokens for GPT-2's
        tokenizer = read_meta_pickle(pickled) if pickled.is_file() else GPT2Tokenizer()
        return TokenFiles([folder / "train.bin"], [folder / "val.bin"], tokenizer)
    return shards_in(folder)


def shards_in(folder: Path, like: Path | None = None) -> TokenFiles | None:
    """The numbered shards of GPT-2's tokens in a folder, with their prefix; ``None`` if there are none.

    Shards without a prefix are not taken: they are ours, of a preparation that has not finished.

    Args:
        folder: is looked into, not below.
        like: one of them, if there may be several datasets.

    Raises:
        RequestError: a split is missing, or there are several datasets.
    """
    found = [(path, match) for path in sorted(folder.glob("*_*.*")) if (match := _SHARD.fullmatch(path.name))]
    wanted = _SHARD.fullmatch(like.name) if like is not None else None
    if wanted is not None:
        found = [(path, match) for path, match in found if match["prefix"] == wanted["prefix"]]
    kinds = {(match["prefix"], match["kind"]) for _, match in found if match["prefix"]}
    if not kinds:
        return None
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{prefix}*.{kind}" for prefix, kind in kinds))
        raise RequestError(f"{folder} has several datasets, {names}: pass one of the files")
    (prefix, _kind), *_ = kinds
    splits = {
        split: [path for path, match in found if match["prefix"] == prefix and match["split"] == split]
        for split in ("train", "val")
    }
    for split, paths in splits.items():
        if not paths:
            raise RequestError(f"{folder} has no shard {prefix}{split}_000000 or so")
    return TokenFiles(splits["train"], splits["val"], GPT2Tokenizer())


def read_meta_pickle(path: Path) -> CharTokenizer:
    """The characters in nanoGPT's ``meta.pkl``. Nothing that it names is imported or run.

    Raises:
        RequestError: it is not a table with the characters by number.
    """
    try:
        if path.stat().st_size > LARGEST_PICKLE:
            raise RequestError(f"{path} is too large for nanoGPT's")
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except RequestError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise RequestError(f"{path} is not nanoGPT's meta.pkl: {error}") from error
    characters = content.get("itos") if isinstance(content, dict) else None
    if not isinstance(characters, dict) or not characters or sorted(map(str, characters)) != sorted(
        map(str, range(len(characters)))
    ):  # fmt: skip
        raise RequestError(f"{path} is not nanoGPT's meta.pkl: it does not map numbers from 0 on to characters")
    vocabulary: list[Any] = [characters.get(i) for i in range(len(characters))]
    if not all(isinstance(c, str) and len(c) == 1 for c in vocabulary) or len(set(vocabulary)) < len(vocabulary):
        raise RequestError(f"{path} is not of a char vocabulary: some of its tokens are not single characters")
    return CharTokenizer("".join(vocabulary))


class _PlainUnpickler(pickle.Unpickler):
    """Knows tables, lists, numbers and texts, and nothing that has to be looked up by name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")
