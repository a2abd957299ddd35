"""A prepared dataset, opened: its splits as memory-mapped shards, its tokenizer, its identity."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastgpt.data import neighbours
from fastgpt.data.neighbours import TokenFiles
from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, read_shard, read_tokens
from fastgpt.data.sources import SOURCES
from fastgpt.data.tokenizer_meta import tokenizer_from_meta
from fastgpt.data.tokenizers import Tokenizer, Tokens
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import reachable


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: each split a list of memory-mapped 1-D uint16 shards."""

    path: Path
    train: list[Tokens]
    val: list[Tokens]
    meta: DatasetMeta | None  # None for files of other programs
    found: TokenFiles | None = None  # these files, if they are laid out as another program does

    @cached_property
    def identity(self) -> str:
        """A digest of the tokens and their tokenizer. It does not depend on where the files are.

        It is computed from the SHA-256 of each shard in ``meta.json``. For bare files it is computed from the length,
        the first megabyte and the last megabyte of each file.
        """
        digest = hashlib.sha256()
        if self.meta is not None:
            shards = [shard.sha256 for shard in (*self.meta.train, *self.meta.val)]
            digest.update(json.dumps([shards, self.meta.tokenizer], sort_keys=True).encode())
        else:
            for tokens in (*self.train, *self.val):
                digest.update(len(tokens).to_bytes(8, "little"))
                digest.update(tokens[: 1 << 19].tobytes() + tokens[-(1 << 19) :].tobytes())
            if self.found is not None:
                digest.update(json.dumps(self.found.tokenizer.to_meta(), sort_keys=True).encode())
        return digest.hexdigest()

    def files(self, split: str) -> list[Path]:
        """The file of each shard of the split ``train`` or ``val``."""
        if self.found is not None:
            return getattr(self.found, split)
        if self.meta is None:
            return [self.path if split == "train" else _validation_file(self.path)]
        return [self.path / shard.file for shard in getattr(self.meta, split)]

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's vocabulary size; ``None`` for bare files, which do not state it."""
        if self.found is not None:
            return self.found.tokenizer.vocab_size
        return self.meta.vocab_size if self.meta else None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; ``None`` for bare files, which do not state it."""
        if self.found is not None:
            return self.found.tokenizer
        return tokenizer_from_meta(self.meta.tokenizer) if self.meta else None


def open_dataset(name_or_path: str | Path, data_dir: str | Path = "data") -> Dataset:
    """Open a dataset by its name under ``data_dir``, the path of its folder, or the path of a training file.

    A folder may also be nanoGPT's (``train.bin``, ``val.bin`` and perhaps ``meta.pkl``, of which nothing is run), or
    have the shards of llm.c and its relatives (``fineweb_train_000001.bin`` …, ``fineweb_val_000000.bin``; ``.npy`` is
    read too). A training file is taken with all shards of its kind; or, if it has no number, as the whole training
    split, whose validation split is the file whose name has ``val`` for ``train``, and whose vocabulary is unknown. A
    name with ``_`` also means a folder with ``-``, as nanoGPT's ``shakespeare_char``.

    An opened dataset keeps its tokens even if it is replaced, because files that are mapped stay until they are closed.

    ``RequestError`` if there is no such dataset, with how to get it, if one of its files is damaged, or if the dataset
    is replaced while it is opened.
    """
    data_dir = Path(data_dir)
    names = (data_dir / name_or_path, Path(name_or_path), data_dir / str(name_or_path).replace("_", "-"))
    candidates = tuple(map(reachable, names))
    for path in candidates:
        if (path / META_FILE).is_file():
            return _open_folder(path)
    for path in candidates:
        if path.is_file():
            return _open_file(path)
        found = neighbours.find(path) if path.is_dir() else None
        if found is not None:
            return _open_found(path, found)
        if any(path.glob("train_*.bin")):
            raise RequestError(f"{path} has no {META_FILE}, so its preparation did not finish: prepare it again")
    raise RequestError(_how_to_get(str(name_or_path), data_dir))


def _open_folder(path: Path) -> Dataset:
    meta = DatasetMeta.read(path)

    def read(shard: Shard) -> Tokens:
        tokens = read_shard(path / shard.file)
        if len(tokens) != shard.tokens:
            raise RequestError(
                f"{path / shard.file} has {len(tokens)} tokens, but {META_FILE} says {shard.tokens}: "
                "prepare the dataset again"
            )
        return tokens

    problem = None
    try:
        dataset = Dataset(path, [read(shard) for shard in meta.train], [read(shard) for shard in meta.val], meta)
    except RequestError as error:
        problem = error
    if not meta.is_in(path):  # some of the shards may be those of the new dataset
        raise RequestError(f"{path} was replaced by another dataset while it was opened: try again")
    if problem is not None:
        raise problem
    return dataset


def _open_found(path: Path, found: TokenFiles) -> Dataset:
    return Dataset(path, list(map(read_tokens, found.train)), list(map(read_tokens, found.val)), None, found)


def _open_file(path: Path) -> Dataset:
    found = neighbours.shards_in(path.parent, like=path)
    if found is not None and path in found.train:
        return _open_found(path, found)
    if path.suffix != ".bin":
        raise RequestError(
            f"{path} holds no tokens; if it is text: {PREPARE} text {path} --name {path.stem}, "
            f"then --dataset {path.stem}"
        )
    val = _validation_file(path)
    if val == path:
        raise RequestError(
            f"the name of {path} has no 'train' in it: pass a file such as train.bin, with val.bin in the same folder"
        )
    if not val.is_file():
        raise RequestError(f"{path} has no validation split: there is no {val}")
    return Dataset(path, [read_tokens(path)], [read_tokens(val)], meta=None)


def _validation_file(path: Path) -> Path:
    """The file beside a bare training file that holds the validation split."""
    return path.with_name("val".join(path.name.rsplit("train", 1)))


def _how_to_get(name: str, data_dir: Path) -> str:
    """The answer to a request for a dataset that does not exist."""
    into = "" if data_dir == Path("data") else f" --data_dir {data_dir}"
    source = SOURCES.get(name)
    if source is not None and name != "text":
        needs = f" (needs {source.needs})" if source.needs else ""
        return (
            f"no dataset '{name}' in {data_dir}: `{PREPARE} {name}{into}` makes it{needs}; or `{PREPARE} text FILE "
            f"--tokenizer {source.tokenizer} --name NAME{into}` makes one of your own text, for --dataset NAME"
        )
    there = sorted(path.parent.name for path in data_dir.glob(f"*/{META_FILE}"))
    return (
        f"no dataset '{name}' in {data_dir} (there {'are ' + ', '.join(there) if there else 'is none yet'}); "
        f"`{PREPARE} text FILE --name NAME{into}` makes one of your own text"
        f"{did_you_mean(name, [*there, *SOURCES])}"
    )
