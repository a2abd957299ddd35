"""A prepared dataset, opened: its splits as memory-mapped shards, its tokenizer, its identity."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, read_shard, read_tokens
from fastgpt.data.sources import SOURCES
from fastgpt.data.tokenizers import Tokenizer, Tokens, tokenizer_from_meta
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import reachable


@dataclass(frozen=True)
class Dataset:
    """An opened dataset: each split a list of memory-mapped 1-D uint16 shards."""

    path: Path
    train: list[Tokens]
    val: list[Tokens]
    meta: DatasetMeta | None  # None for bare files

    @cached_property
    def identity(self) -> str:
        """A digest of the tokens and their tokenizer, the same wherever the files lie.

        It comes from the shards' SHA-256 in ``meta.json``; for bare files from their lengths, and the first and last
        megabyte of each.
        """
        digest = hashlib.sha256()
        if self.meta is not None:
            shards = [shard.sha256 for shard in (*self.meta.train, *self.meta.val)]
            digest.update(json.dumps([shards, self.meta.tokenizer], sort_keys=True).encode())
        else:
            for tokens in (*self.train, *self.val):
                digest.update(len(tokens).to_bytes(8, "little"))
                digest.update(tokens[: 1 << 19].tobytes() + tokens[-(1 << 19) :].tobytes())
        return digest.hexdigest()

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's vocabulary size; None for bare files, which do not tell it."""
        return self.meta.vocab_size if self.meta else None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; None for bare files, which do not tell it."""
        return tokenizer_from_meta(self.meta.tokenizer) if self.meta else None


def open_dataset(name_or_path: str | Path, data_dir: str | Path = "data") -> Dataset:
    """Open a dataset: a name under ``data_dir``, the path of its folder, or that of a training ``.bin``.

    The last is for the files of nanoGPT (``…/train.bin``) and llm.c: the validation split is the file beside
    it whose name has ``val`` for ``train``. Their vocabulary is unknown. nanoGPT's ``meta.pkl`` is not looked
    at, as unpickling a file runs whatever code is in it.

    ``RequestError`` if there is no such dataset, with how to get it, or if one of its files is damaged.
    """
    data_dir = Path(data_dir)
    candidates = (reachable(data_dir / name_or_path), reachable(Path(name_or_path)))
    for path in candidates:
        if (path / META_FILE).is_file():
            return _open_folder(path)
    for path in candidates:
        if path.is_file():
            return _open_file(path)
        if (path / "train.bin").is_file():
            raise RequestError(
                f"{path} is no prepared dataset; to train on nanoGPT's files in it, pass {path / 'train.bin'}"
            )
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

    return Dataset(path, [read(shard) for shard in meta.train], [read(shard) for shard in meta.val], meta)


def _open_file(path: Path) -> Dataset:
    if path.suffix != ".bin":
        raise RequestError(
            f"{path} holds no tokens; if it is text: {PREPARE} text {path} --name {path.stem}, "
            f"then --dataset {path.stem}"
        )
    val = path.with_name("val".join(path.name.rsplit("train", 1)))
    if val == path:
        raise RequestError(f"{path} is not named as a training split: pass a file like train.bin, beside a val.bin")
    if not val.is_file():
        raise RequestError(f"{path} has no validation split beside it: there is no {val}")
    return Dataset(path, [read_tokens(path)], [read_tokens(val)], meta=None)


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
