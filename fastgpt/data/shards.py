"""Token shards on disk, and datasets, which are folders of shards.

A shard is llm.c's format: a header of 256 int32 (magic number, version, token count, zeros), then the tokens
as uint16, all little-endian. A dataset is a folder:

    train_000000.bin train_000001.bin …   the training split
    val_000000.bin …                      the validation split
    meta.json                             tokenizer, vocabulary size, split, SHA-256 and length of each shard

``meta.json`` is written last and removed first: a folder without one is not a dataset.
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
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

PREPARE = "python -m fastgpt.data prepare"  # the command in error messages


def write_shard(path: str | Path, tokens: npt.NDArray[Any]) -> None:
    """Write ``tokens`` (1-D, ids from 0 to 65535) as one shard. An incomplete file never gets its name.

    ``ValueError`` for tokens of another shape or range.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(f"tokens must be a 1-D array of integers, not {tokens.ndim}-D of {tokens.dtype}")
    if tokens.dtype != np.uint16 and tokens.size and not 0 <= tokens.min() <= tokens.max() <= 65535:
        raise ValueError(f"tokens run from {tokens.min()} to {tokens.max()}, beyond 0 to 65535")
    with written_whole(Path(path)) as partial, open(partial, "wb") as file:
        file.write(_header(len(tokens)).data)  # tofile does not report that the disk is full
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def _header(count: int) -> npt.NDArray[np.int32]:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header


class ShardWriter:
    """A shard that is written token by token; it is one only after :meth:`close`.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        count: tokens so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: Tokens) -> None:
        """Append 1-D tokens."""
        self._file.write(np.ascontiguousarray(tokens, dtype="<u2").data)  # tofile hides that the disk is full
        self.count += len(tokens)

    def close(self) -> Path:
        """Write the header; returns the path."""
        self._file.seek(0)
        self._file.write(_header(self.count).data)
        self._file.close()
        return self.path


def read_shard(path: str | Path) -> Tokens:
    """The tokens of one shard: a 1-D read-only view of the file, which is memory-mapped, not read.

    ``RequestError`` if the file is missing, is no shard, or does not hold as many tokens as its header says.
    """
    size = _size(path)
    if size < HEADER_BYTES:
        raise RequestError(
            f"{path} is not a token shard: it has {size} bytes, less than the {HEADER_BYTES} of a header"
        )
    magic, version, count = _first(path, 3)
    if magic != MAGIC:
        raise RequestError(f"{path} is not a token shard: it starts with {magic}, not the magic number {MAGIC}")
    if version != VERSION:
        raise RequestError(f"{path} is a token shard of version {version}; only version {VERSION} is supported")
    if size != HEADER_BYTES + 2 * count:
        raise RequestError(
            f"{path} is damaged: its header says {count} tokens, but its {size} bytes "
            f"hold {(size - HEADER_BYTES) / 2:g}; prepare or copy it again"
        )
    return _map(path, HEADER_BYTES, count)


def read_tokens(path: str | Path) -> Tokens:
    """The tokens of a file as a 1-D memory-mapped read-only view: a shard, nanoGPT's bare uint16, or NumPy's ``.npy``.

    ``RequestError`` if the file is missing or cannot be any of them.
    """
    size = _size(path)
    if Path(path).suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RequestError(f"{path} cannot be read: {error}") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise RequestError(f"{path} has {tokens.ndim}-D {tokens.dtype}; only 1-D uint16 is read")
        return np.asarray(tokens)
    # Bare GPT-2 tokens cannot start like a shard: the magic number's lower half is 55432.
    magic = _first(path, 1)[0] if size >= 4 else None
    if magic == MAGIC:
        return read_shard(path)
    if magic == MAGIC_UINT32:
        raise RequestError(f"{path} holds 32-bit tokens, as llm.c writes them for Llama 3; only 16-bit ones are read")
    if size % 2:
        raise RequestError(f"{path} is not a file of uint16 tokens: its size of {size} bytes is odd")
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
    with _named_in_errors(path):
        return os.stat(path).st_size


def _first(path: str | Path, count: int) -> list[int]:
    """The first ``count`` int32 of a file."""
    with _named_in_errors(path):
        return np.fromfile(path, dtype="<i4", count=count).tolist()


def _map(path: str | Path, offset: int, count: int) -> Tokens:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=np.uint16)
    with _named_in_errors(path):
        # A plain array, because it takes several times as long to slice an np.memmap.
        return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,)))


@contextmanager
def _named_in_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """The entry of one shard in ``meta.json``: file name, length in tokens, and SHA-256 of the file."""

    file: str
    tokens: int
    sha256: str

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.file in ("", ".", "..") or "/" in self.file or "\\" in self.file:
            raise ValueError(
                f"a shard is the name of a file in the folder and a number of tokens, not {self.file!r}, {self.tokens}"
            )

    @classmethod
    def of(cls, path: Path) -> "Shard":
        """The entry of the shard at ``path``, from its content."""
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
            if isinstance(error.__cause__, OSError):  # it may be whole
                raise
            raise RequestError(f"{error}: prepare the dataset again with --overwrite") from error

    def is_in(self, folder: Path) -> bool:
        """Whether ``folder`` holds this dataset: not another one, and not one that is just being replaced."""
        try:
            return self.read(folder) == self
        except RequestError:
            return False
