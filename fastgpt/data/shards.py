"""Token shards on disk, and the folders of them that make a dataset.

A shard is llm.c's format: a header of 256 int32 (magic number, version, token count, zeros), then the tokens
as uint16, all little-endian. A dataset is a folder:

    train_000000.bin train_000001.bin …   the training split
    val_000000.bin …                      the validation split
    meta.json                             tokenizer, vocabulary size, split, SHA-256 and length of each shard

``meta.json`` is written last: a folder without one is not a dataset.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt import json_files
from fastgpt.data.tokenizers import Tokens
from fastgpt.errors import RequestError
from fastgpt.files import file_sha256, written_whole

MAGIC = 20240520
MAGIC_UINT32 = 20240801  # of llm.c's shards for Llama 3
VERSION = 1
HEADER_BYTES = 256 * 4
META_FILE = "meta.json"

PREPARE = "python -m fastgpt.data prepare"  # the command that error messages tell one to type


def write_shard(path: str | Path, tokens: npt.NDArray[Any]) -> None:
    """Write ``tokens`` (1-D, ids from 0 to 65535) as one shard: whole under its name, or not at all.

    ``ValueError`` for tokens of another shape or range.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(f"tokens must be a 1-D array of integers, not {tokens.ndim}-D of {tokens.dtype}")
    if tokens.dtype != np.uint16 and tokens.size and not 0 <= tokens.min() <= tokens.max() <= 65535:
        raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}, beyond 0 to 65535")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with written_whole(Path(path)) as partial, open(partial, "wb") as file:
        header.tofile(file)
        tokens.astype("<u2", copy=False).tofile(file)


def read_shard(path: str | Path) -> Tokens:
    """The tokens of one shard: a 1-D read-only view of the file, which is memory-mapped, not read.

    ``RequestError`` if the file is missing, is no shard, or does not hold as many tokens as its header says.
    """
    size = _size(path)
    if size < HEADER_BYTES:
        raise RequestError(f"{path} is no token shard: {size} bytes, less than the {HEADER_BYTES} of its header")
    magic, version, count = _first_words(path, 3)
    if magic != MAGIC:
        raise RequestError(f"{path} is no token shard: it starts with {magic}, not the magic number {MAGIC}")
    if version != VERSION:
        raise RequestError(f"{path} is a token shard of version {version}, and only version {VERSION} is known")
    if size != HEADER_BYTES + 2 * count:
        raise RequestError(
            f"{path} is damaged: its header says {count} tokens, its {size} bytes "
            f"hold {(size - HEADER_BYTES) / 2:g}; prepare or copy it again"
        )
    return _map(path, HEADER_BYTES, count)


def read_tokens(path: str | Path) -> Tokens:
    """The tokens of a ``.bin`` file, a shard or nanoGPT's bare uint16, as a 1-D memory-mapped read-only view.

    ``RequestError`` if the file is missing or cannot be either.
    """
    size = _size(path)
    # Bare GPT-2 tokens cannot start like a shard: the magic number's lower half is 55432.
    magic = _first_words(path, 1)[0] if size >= 4 else None
    if magic == MAGIC:
        return read_shard(path)
    if magic == MAGIC_UINT32:
        raise RequestError(f"{path} holds 32-bit tokens, as llm.c writes them for Llama 3; only 16-bit ones are read")
    if size % 2:
        raise RequestError(f"{path} is no file of uint16 tokens: its {size} bytes are an odd number")
    tokens = _map(path, 0, size // 2)
    # Vocabularies of 32-bit tokens have at most some 200,000 entries, so their upper halves are 0 to 3.
    if size % 4 == 0 and size >= 256 and tokens[1:4096:2].max() <= 3 < tokens[0:4096:2].max():
        raise RequestError(f"{path} looks like a file of 32-bit tokens; only 16-bit ones are read")
    return tokens


def check_ids(tokens: Tokens, vocab_size: int, where: str) -> None:
    """Refuse ids outside the vocabulary, which would be read past the end of the embedding table."""
    if tokens.max(initial=0) >= vocab_size:
        raise RequestError(f"{where} has the token {tokens.max()}, outside its vocabulary of {vocab_size}")


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def _first_words(path: str | Path, count: int) -> list[int]:
    try:
        return np.fromfile(path, dtype="<i4", count=count).tolist()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def _map(path: str | Path, offset: int, count: int) -> Tokens:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=np.uint16)
    # A plain array on the map: slices of np.memmap itself take several times as long to make.
    return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """What ``meta.json`` says of one shard: its file name, its length in tokens, the file's SHA-256."""

    file: str
    tokens: int
    sha256: str

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.file in ("", ".", "..") or "/" in self.file or "\\" in self.file:
            raise ValueError(
                f"a shard is a file of the folder with a number of tokens, not {self.file!r}, {self.tokens}"
            )

    @classmethod
    def of(cls, path: Path) -> "Shard":
        """The record of the shard at ``path``, from the file itself."""
        return cls(path.name, len(read_shard(path)), file_sha256(path))


@dataclasses.dataclass(frozen=True)
class DatasetMeta:
    """The content of ``meta.json``."""

    source: str  # where the text is from, in words
    split: str  # which part is validation, in words
    tokenizer: dict[str, Any]  # Tokenizer.to_meta()
    vocab_size: int
    train: list[Shard]
    val: list[Shard]

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= 65536:
            raise ValueError(f"vocab_size must be from 1 to 65536, got {self.vocab_size}")

    def write(self, folder: Path) -> None:
        """Write ``folder/meta.json``, which makes ``folder`` a dataset."""
        json_files.write(folder / META_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "DatasetMeta":
        """The content of ``folder/meta.json``. ``RequestError`` if it is not what ``write`` writes."""
        path = folder / META_FILE
        try:
            return json_files.build(cls, json_files.read(path), str(path))
        except RequestError as error:
            raise RequestError(f"{error}: prepare the dataset again") from error
