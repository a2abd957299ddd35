"""Prepares datasets: writes text or ready-made tokens, from this machine or the network, as a folder of shards.

From the command line:

    python -m fastgpt.data prepare stdlib                          Python's own library: offline, a second
    python -m fastgpt.data prepare text book.txt --tokenizer gpt2  text of your own
    python -m fastgpt.data prepare shakespeare-char                nanoGPT's smallest dataset, 1 MB
    python -m fastgpt.data prepare fineweb10b --shards 10          GPT-2 tokens of FineWeb, 100 M a shard
    python -m fastgpt.data prepare openwebtext                     nanoGPT's GPT-2 dataset, 9 G tokens

The shards are written into a hidden folder beside the dataset's, ``.NAME~HOST~…``, and moved when they are complete.
So an interrupted preparation leaves the old dataset as it was. If the process is killed, the hidden folder stays until
the dataset is prepared again. ``sources.py`` has the table of sources.
"""

import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastgpt import output
from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, ShardWriter, check_ids
from fastgpt.data.sources import FINEWEB_SHARDS, SOURCES, Corpus
from fastgpt.data.tokenizers import MOST_IDS, TRAINED, Tokens, build_tokenizer
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import Lock, reachable

SHARD_TOKENS = 100_000_000  # 200 MB, as llm.c cuts its data
SECONDS_BETWEEN_LOOKS = 0.2  # whether another process is done


def prepare(
    source: str,
    files: Sequence[str | Path] = (),
    *,
    tokenizer: str | None = None,
    name: str | None = None,
    data_dir: str | Path = "data",
    val_fraction: float | None = None,
    shards: int | None = None,
    text_field: str = "text",
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Make the dataset ``data_dir/name`` and return that folder, which ``open_dataset`` opens.

    The same dataset (the same text, split and tokenizer) is made again. Processes that train on it notice nothing.
    If another process is preparing that name, this one waits for it.

    Args:
        source: one of ``SOURCES``.
        files: only for the source ``text``, which needs them: UTF-8 text, JSON lines, Parquet, these as ``.gz`` or
            ``.zst``, folders of such files, or ``-`` for standard input. They are taken in this order, as documents.
        tokenizer: ``char``, ``byte``, ``gpt2``, the path of a ``tokenizer.json``, or ``train`` for a byte-pair encoding
            that is learnt from the training split; ``None`` for the source's own.
        name: ``None`` for the source's name; for ``text`` the first file's, without its extension.
        data_dir: folder of datasets; nothing outside it is written.
        val_fraction: the part at the end that is validation, 0.1 by default. ``openwebtext`` draws that part of its
            documents, 0.0005 by default. ``fineweb10b`` has its own validation split.
        shards: number of training shards of ``fineweb10b``; all 103 by default.
        text_field: the field of a JSON line, or the column of Parquet, that has the text.
        vocab_size: of a tokenizer that is trained.
        overwrite: replace another dataset of that name.

    Raises:
        RequestError: the request is wrong, a file is not text, another dataset has that name, a library is not
            installed, a download fails, or the folder cannot be written.
    """
    _check_request(source, files, tokenizer, val_fraction, shards, vocab_size)
    name = name or (_name_of(files[0]) if files else source)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RequestError(f"'{name}' cannot be a dataset's name (letters, digits, _ . + -): pass another as --name")
    target = reachable(Path(data_dir, name))
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file: pass another --name")
    with _spooled(files) as readable:
        corpus = SOURCES[source].make_corpus(readable, tokenizer, val_fraction, shards, text_field, vocab_size)
        _make(corpus, target, overwrite)
    return target


def _make(corpus: Corpus, target: Path, overwrite: bool) -> None:
    """Write a dataset, unless another process has just made it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as (waited_for, has_locks):
            if _is_made(corpus, target, overwrite):
                if waited_for is not None:
                    output.note(f"{target} has been made by {waited_for}")
                    return
                output.note(f"{target} already holds this dataset; it is made again")
            with _staging(target, has_locks) as folder:
                train, val = corpus.ready(folder) if corpus.ready is not None else _write(corpus, folder)
                tokenizer_meta, vocab_size = corpus.tokenizer.to_meta(), corpus.tokenizer.vocab_size
                _move(folder, target, DatasetMeta(corpus.source, corpus.split, tokenizer_meta, vocab_size, train, val))
    except OSError as error:
        raise RequestError(f"cannot write to {target.parent}: {error.strerror or error}") from error


def _check_request(
    source: str,
    files: Sequence[str | Path],
    tokenizer: str | None,
    val_fraction: float | None,
    shards: int | None,
    vocab_size: int | None,
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
        if tokenizer != TRAINED and not Path(tokenizer).exists():
            build_tokenizer(tokenizer, "")  # so that a wrong name is found before any work
        if SOURCES[source].text is None and tokenizer != SOURCES[source].tokenizer:
            raise RequestError(f"{source} uses the {SOURCES[source].tokenizer} tokenizer, not {tokenizer}")
    if vocab_size is not None:
        if tokenizer != TRAINED:
            raise RequestError("--vocab_size is for --tokenizer train")
        if not 257 <= vocab_size <= MOST_IDS:
            raise RequestError(f"--vocab_size must be from 257 to {MOST_IDS}, got {vocab_size}")
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


def _name_of(file: str | Path) -> str:
    """A dataset's name for a file: ``book`` for ``book.txt.gz``."""
    return "stdin" if str(file) == "-" else Path(file).resolve().name.split(".")[0]


@contextmanager
def _spooled(files: Sequence[str | Path]) -> Iterator[Sequence[str | Path]]:
    """The files, with standard input as one of them, since it is read more than once."""
    if "-" not in map(str, files):
        yield files
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [copy if str(name) == "-" else name for name in files]


@contextmanager
def _locked(target: Path) -> Iterator[tuple[str | None, bool]]:
    """Keeps other processes from preparing ``target``.

    Yields the process that has been waited for, if any, and whether the file system has locks.
    """
    lock = Lock(_beside(target, ".lock"))
    waited_for = holder = lock.acquire()
    if holder is not None:
        output.note(f"waiting for {holder}, which is preparing {target}")
    while holder is not None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        holder = lock.acquire()
    try:
        yield waited_for, lock.works
    finally:
        lock.release()


@contextmanager
def _staging(target: Path, has_locks: bool) -> Iterator[Path]:
    """An empty folder beside ``target``, on the same file system; it is removed in the end.

    The lock on ``target`` is held. So a folder that an earlier process of this machine has left behind belongs to
    nobody. Another machine may not see the lock, so its folders stay.
    """
    prefix = f"~{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}~"
    if has_locks:
        for left in _beside(target, "").parent.iterdir():
            if left.name.startswith(_beside(target, prefix).name):
                shutil.rmtree(left, ignore_errors=True)
    start = _beside(target, prefix)
    with tempfile.TemporaryDirectory(prefix=start.name, dir=start.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _beside(target: Path, suffix: str) -> Path:
    """A hidden path beside the dataset's folder, or beside the folder that a link of that name leads to."""
    folder = target.resolve()
    return folder.with_name(f".{folder.name}{suffix}")


def _is_made(corpus: Corpus, target: Path, overwrite: bool) -> bool:
    """Whether ``target`` holds the dataset of ``corpus`` already. ``RequestError`` if it holds another one."""
    if not (target / META_FILE).exists():
        return False
    try:
        found = DatasetMeta.read(target)
    except RequestError:
        if overwrite:
            return False
        raise
    if (found.source, found.split, found.tokenizer) == (corpus.source, corpus.split, corpus.tokenizer.to_meta()):
        return True
    if overwrite:
        return False
    raise RequestError(
        f"{target} already holds another dataset (of {found.source}; {found.tokenizer.get('name')} tokenizer; "
        f"{found.split}): pass --overwrite to replace it, or another --name"
    )


def _write(corpus: Corpus, folder: Path) -> tuple[list[Shard], list[Shard]]:
    """Write both splits of ``corpus`` into ``folder`` as shards."""
    vocab_size = corpus.tokenizer.vocab_size
    train = [Shard.of(path) for path in _write_split(corpus.train, folder, "train", vocab_size)]
    val = [Shard.of(path) for path in _write_split(corpus.val, folder, "val", vocab_size)]
    for split, shards in (("training", train), ("validation", val)):
        if sum(shard.tokens for shard in shards) < 2:
            raise RequestError(
                f"the {split} split of {corpus.source} has less than two tokens: "
                "use more text or another --val_fraction"
            )
    return train, val


def _write_split(parts: Iterable[Tokens], folder: Path, split: str, vocab_size: int) -> Iterator[Path]:
    writer: ShardWriter | None = None
    count = 0
    for part in parts:
        check_ids(part, vocab_size, f"the {split} split")
        while len(part):
            writer = writer or ShardWriter(folder / f"{split}_{count:06d}.bin")
            room = SHARD_TOKENS - writer.count
            writer.write(part[:room])
            part = part[room:]
            if writer.count == SHARD_TOKENS:
                yield writer.close()
                writer, count = None, count + 1
                output.note(f"{split}: {count} shards of {SHARD_TOKENS:,} tokens")
    if writer is not None:
        yield writer.close()


def _move(folder: Path, target: Path, meta: DatasetMeta) -> None:
    """Move the finished shards of ``folder`` to ``target``, in place of the dataset there.

    ``meta.json`` is removed first and written last. So wherever this process ends, a reader finds the old dataset, no
    dataset, or the new one. If the new dataset is the same, ``meta.json`` stays. A process that has mapped a file which
    is replaced keeps its content.
    """
    target.mkdir(exist_ok=True)
    if not meta.is_in(target):
        (target / META_FILE).unlink(missing_ok=True)
    new = [shard.file for shard in (*meta.train, *meta.val)]
    for old in target.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", old.name) and old.name not in new:
            old.unlink()
    for file in new:
        os.replace(folder / file, target / file)
    meta.write(target)
