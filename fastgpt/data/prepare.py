"""Makes datasets: text or ready tokens, from this machine or the network, into a folder of shards.

From the command line:

    python -m fastgpt.data prepare stdlib                          Python's own library: offline, a second
    python -m fastgpt.data prepare text book.txt --tokenizer gpt2  text of your own
    python -m fastgpt.data prepare shakespeare-char                nanoGPT's smallest dataset, 1 MB
    python -m fastgpt.data prepare fineweb10b --shards 10          GPT-2 tokens of FineWeb, 100 M a shard
    python -m fastgpt.data prepare openwebtext                     nanoGPT's GPT-2 dataset, 9 G tokens

The folder is written beside its final place and moved there when complete, so that an interrupted preparation leaves
the old dataset as it was. ``sources.py`` has the table of sources.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, check_ids, write_shard
from fastgpt.data.sources import FINEWEB_SHARDS, SOURCES, Corpus
from fastgpt.data.tokenizers import Tokens, build_tokenizer
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import reachable

SHARD_TOKENS = 100_000_000  # 200 MB, as llm.c cuts its data


def prepare(
    source: str,
    files: Sequence[str | Path] = (),
    *,
    tokenizer: str | None = None,
    name: str | None = None,
    data_dir: str | Path = "data",
    val_fraction: float | None = None,
    shards: int | None = None,
) -> Path:
    """Make the dataset ``data_dir/name`` and return that folder, which ``open_dataset`` opens.

    Args:
        source: one of ``SOURCES``.
        files: UTF-8 text files, joined in this order; only for the source ``text``, which needs them.
        tokenizer: ``char``, ``byte`` or ``gpt2``; ``None`` for the source's own.
        name: ``None`` for the source's name; for ``text`` the first file's, without its extension.
        data_dir: folder of datasets; nothing outside it is written.
        val_fraction: the part at the end that is validation, 0.1 by default. ``openwebtext`` draws that part of its
            documents, 0.0005 by default. ``fineweb10b`` has its own validation split.
        shards: number of training shards of ``fineweb10b``; all 103 by default.

    A dataset of the same name is replaced.

    Raises:
        RequestError: the request is wrong, a file is not text, a library is not installed, or a download fails.
    """
    _check_request(source, files, tokenizer, val_fraction, shards)
    name = name or (Path(files[0]).stem if files else source)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RequestError(f"'{name}' cannot be a dataset's name (letters, digits, _ . + -): pass another as --name")
    target = reachable(Path(data_dir, name))
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file: pass another --name")
    row = SOURCES[source]
    corpus = row.make_corpus(files, tokenizer, val_fraction) if row.shards is None else None
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir)
    except OSError as error:
        raise RequestError(f"cannot write to {data_dir}: {error.strerror}") from error
    with staging as folder:
        staged = Path(folder)
        if row.shards is not None:
            meta = row.shards(staged, shards)
        else:
            assert corpus is not None
            meta = _write(corpus, staged)
        _move(staged, target, meta)
    return target


def _check_request(
    source: str,
    files: Sequence[str | Path],
    tokenizer: str | None,
    val_fraction: float | None,
    shards: int | None,
) -> None:
    if source not in SOURCES:
        is_file = os.path.isfile(source)  # also of what is too long for a path
        hint = f"; for a text file: {PREPARE} text {source}" if is_file else did_you_mean(source, SOURCES)
        raise RequestError(f"no source '{source}' (there are {', '.join(SOURCES)}){hint}")
    if source == "text" and not files:
        raise RequestError(f"text needs at least one file: {PREPARE} text FILE…")
    if source != "text" and files:
        raise RequestError(
            f"{source} takes no files, but {files[0]} was given; for your own text: {PREPARE} text {files[0]}"
        )
    if tokenizer is not None:
        build_tokenizer(tokenizer, "")  # so that a wrong name is found before any work
        if SOURCES[source].text is None and tokenizer != SOURCES[source].tokenizer:
            raise RequestError(f"{source} uses the {SOURCES[source].tokenizer} tokenizer, not {tokenizer}")
    if val_fraction is not None:
        if SOURCES[source].shards is not None:
            raise RequestError(f"{source} has its own validation split: leave out --val_fraction")
        if not 0 < val_fraction < 1:
            raise RequestError(f"--val_fraction must be between 0 and 1, got {val_fraction:g}")
    if shards is not None:
        if SOURCES[source].shards is None:
            raise RequestError(f"--shards is for fineweb10b, not {source}")
        if not 1 <= shards <= FINEWEB_SHARDS:
            raise RequestError(f"--shards must be from 1 to {FINEWEB_SHARDS}, got {shards}")


def _write(corpus: Corpus, folder: Path) -> DatasetMeta:
    """Write both splits of ``corpus`` into ``folder`` as shards."""
    vocab_size = corpus.tokenizer.vocab_size
    train = [Shard.of(path) for path in _write_split(corpus.train, folder, "train", vocab_size)]
    val = [Shard.of(path) for path in _write_split(corpus.val, folder, "val", vocab_size)]
    for split, shards in (("training", train), ("validation", val)):
        if sum(shard.tokens for shard in shards) < 2:
            raise RequestError(
                f"{corpus.source} gives a {split} split of less than two tokens: "
                "take more text or another --val_fraction"
            )
    return DatasetMeta(corpus.source, corpus.split, corpus.tokenizer.to_meta(), vocab_size, train, val)


def _write_split(parts: Iterable[Tokens], folder: Path, split: str, vocab_size: int) -> Iterator[Path]:
    buffer = np.empty(SHARD_TOKENS, dtype=np.uint16)  # memory that is not written to is not taken
    filled = count = 0

    def flush() -> Path:
        path = folder / f"{split}_{count:06d}.bin"
        check_ids(buffer[:filled], vocab_size, path.name)
        write_shard(path, buffer[:filled])
        return path

    for part in parts:
        while len(part):
            taken = part[: SHARD_TOKENS - filled]
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            part = part[len(taken) :]
            if filled == SHARD_TOKENS:
                yield flush()
                filled, count = 0, count + 1
                print(f"{split}: {count} shards of {SHARD_TOKENS:,} tokens", file=sys.stderr)
    if filled:
        yield flush()


def _move(folder: Path, target: Path, meta: DatasetMeta) -> None:
    """Put the finished shards of ``folder`` in the place of whatever dataset ``target`` holds."""
    target.mkdir(exist_ok=True)
    (target / META_FILE).unlink(missing_ok=True)
    new = [shard.file for shard in (*meta.train, *meta.val)]
    for old in target.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", old.name) and old.name not in new:
            old.unlink()
    for file in new:
        os.replace(folder / file, target / file)
    meta.write(target)
