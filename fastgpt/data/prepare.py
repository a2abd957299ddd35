"""Prepares datasets: writes text or ready-made tokens, from this machine or the network, as a folder of shards.

From the command line:

    python -m fastgpt.data prepare stdlib                          Python's own library: offline, a second
    python -m fastgpt.data prepare text book.txt --tokenizer gpt2  text of your own
    python -m fastgpt.data prepare shakespeare-char                nanoGPT's smallest dataset, 1 MB
    python -m fastgpt.data prepare fineweb10b --shards 10          GPT-2 tokens of FineWeb, 100 M a shard
    python -m fastgpt.data prepare openwebtext                     nanoGPT's GPT-2 dataset, 9 G tokens

The shards are written into a hidden folder beside the dataset's, ``.NAME~HOST~…``, and moved when they are complete.
So an interrupted preparation leaves the old dataset as it was. If it has finished shards, or was killed, the hidden
folder stays until the dataset is prepared again. The same request then takes over the shards that are finished.
``sources.py`` has the table of sources.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from fastgpt import __version__, json_files, limits, output
from fastgpt.data import text, tokenizers
from fastgpt.data.progress import Progress
from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, ShardWriter, check_ids
from fastgpt.data.sources import FINEWEB_SHARDS, SOURCES, Corpus, Request, Split
from fastgpt.data.tokenizers import MOST_IDS, TOKENIZERS, TRAINED
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import Lock, reachable

SHARD_TOKENS = 100_000_000  # 200 MB, as llm.c cuts its data
SECONDS_BETWEEN_LOOKS = 0.2  # whether another process is done
STATE_FILE = "state.json"


def prepare(
    source: str,
    files: Sequence[str | Path] = (),
    *,
    val_files: Sequence[str | Path] = (),
    tokenizer: str | None = None,
    name: str | None = None,
    data_dir: str | Path = "data",
    val_fraction: float | None = None,
    shards: int | None = None,
    text_field: str = "text",
    vocab_size: int | None = None,
    special_tokens: bool = False,
    max_tokens: int | None = None,
    num_proc: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make the dataset ``data_dir/name`` and return that folder, which ``open_dataset`` opens.

    The same dataset (the same text, split and tokenizer) is made again. Processes that train on it notice nothing.
    If another process is preparing that name, this one waits for it.

    Args:
        source: one of ``SOURCES``.
        files: only for the source ``text``, which needs them: UTF-8 text, JSON lines, Parquet, these as ``.gz`` or
            ``.zst``, folders of such files, patterns such as ``data/*.txt``, or ``-`` for standard input. They are
            taken in this order, as documents.
        val_files: likewise; they are the validation split, and all of ``files`` is for training.
        tokenizer: ``char``, ``byte``, ``gpt2``, the path of a ``tokenizer.json``, or ``train`` for a byte-pair encoding
            that is learnt from the training split; ``None`` for the source's own.
        name: ``None`` for the source's name; for ``text`` the first file's, without its extension.
        data_dir: folder of datasets; nothing outside it is written.
        val_fraction: the part at the end that is validation, 0.1 by default. ``openwebtext`` draws that part of its
            documents, 0.0005 by default. ``fineweb10b`` has its own validation split.
        shards: number of training shards of ``fineweb10b``; all 103 by default.
        text_field: the field of a JSON line, or the column of Parquet, that has the text.
        vocab_size: of a tokenizer that is trained.
        special_tokens: ``<|endoftext|>`` in the text is the token that ends a document; otherwise it is ordinary text.
        max_tokens: of the training split at most.
        num_proc: threads that tokenize (tiktoken and tokenizers need no processes for that); by default as many as
            this process has cores. The dataset does not depend on it.
        overwrite: replace another dataset of that name.
        progress: shows how far it is; by default on standard error.

    Raises:
        RequestError: the request is wrong, a file is not text, another dataset has that name, a library is not
            installed, a download fails, or the folder cannot be written.
    """
    request = Request(
        source, files, val_files, tokenizer, val_fraction, shards, text_field, vocab_size, special_tokens, max_tokens,
        limits.threads().amount if num_proc is None else num_proc,
    )  # fmt: skip
    _check_request(request)
    request = dataclasses.replace(request, files=text.expanded(files), val_files=text.expanded(val_files))
    name = name or (_name_of(request.files[0]) if files else source)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RequestError(f"'{name}' cannot be a dataset's name (letters, digits, _ . + -): pass another as --name")
    target = reachable(Path(data_dir, name))
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file: pass another --name")
    with _spooled(request) as readable, progress or Progress() as shown:
        corpus = SOURCES[source].make_corpus(readable, shown)
        if max_tokens is not None:
            corpus.split += f"; at most {max_tokens:,} training tokens"
        _make(corpus, target, overwrite, max_tokens, shown)
    return target


def _make(corpus: Corpus, target: Path, overwrite: bool, max_tokens: int | None, progress: Progress) -> None:
    """Write a dataset, unless another process has just made it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as (waited_for, has_locks):
            if _is_made(corpus, target, overwrite):
                if waited_for is not None:
                    output.note(f"{target} has been made by {waited_for}")
                    return
                output.note(f"{target} already holds this dataset; it is made again")
            with _staging(target, has_locks, _digest(corpus)) as (folder, state):
                if corpus.ready is not None:
                    train, val = corpus.ready(folder)
                else:
                    train, val = _write(corpus, folder, state, max_tokens, progress)
                tokenizer_meta, vocab_size = corpus.tokenizer.to_meta(), corpus.tokenizer.vocab_size
                _move(folder, target, DatasetMeta(corpus.source, corpus.split, tokenizer_meta, vocab_size, train, val))
    except OSError as error:
        raise RequestError(f"cannot write to {target.parent}: {error.strerror or error}") from error


def _check_request(request: Request) -> None:
    name, tokenizer = request.source, request.tokenizer
    if name not in SOURCES:
        is_file = os.path.isfile(name)  # also of what is too long for a path
        hint = f"; for a text file: {PREPARE} text {name}" if is_file else did_you_mean(name, SOURCES)
        raise RequestError(f"no source '{name}' (there are {', '.join(SOURCES)}){hint}")
    source = SOURCES[name]
    if name == "text" and not request.files:
        raise RequestError(f"text needs at least one file: {PREPARE} text FILE…")
    if name != "text" and request.files:
        file = request.files[0]
        raise RequestError(f"{name} takes no files, but {file} was given; for your own text: {PREPARE} text {file}")
    if tokenizer is not None:
        known = (*TOKENIZERS, TRAINED)
        if tokenizer not in known and not Path(tokenizer).exists():  # found before any work
            near = did_you_mean(tokenizer, known)
            raise RequestError(
                f"no tokenizer '{tokenizer}' (there are {', '.join(known)}, and files such as tokenizer.json){near}"
            )
        if source.text is None and tokenizer != source.tokenizer:
            raise RequestError(f"{name} uses the {source.tokenizer} tokenizer, not {tokenizer}")
    if request.vocab_size is not None:
        if tokenizer != TRAINED:
            raise RequestError("--vocab_size is for --tokenizer train")
        if not 257 <= request.vocab_size <= MOST_IDS:
            raise RequestError(f"--vocab_size must be from 257 to {MOST_IDS}, got {request.vocab_size}")
    if request.val_fraction is not None:
        if source.shards is not None:
            raise RequestError(f"{name} has its own validation split: leave out --val_fraction")
        if not 0 < request.val_fraction < 1:
            raise RequestError(f"--val_fraction must be between 0 and 1, got {request.val_fraction:g}")
    if request.val_files:
        if name != "text":
            raise RequestError(f"--val_file is for the source text, not {name}")
        if request.val_fraction is not None:
            raise RequestError("--val_file and --val_fraction exclude each other")
    if request.special_tokens and source.text is None:
        raise RequestError(f"--special_tokens is for text, not {name}")
    if request.max_tokens is not None:
        if source.shards is not None:
            raise RequestError(f"--max_tokens is not for {name}, which has --shards")
        if request.max_tokens < 2:
            raise RequestError(f"--max_tokens must be at least 2, got {request.max_tokens}")
    if request.num_proc < 1:
        raise RequestError(f"--num_proc must be at least 1, got {request.num_proc}")
    if request.shards is not None:
        if source.shards is None:
            raise RequestError(f"--shards is for fineweb10b, not {name}")
        if not 1 <= request.shards <= FINEWEB_SHARDS:
            raise RequestError(f"--shards must be from 1 to {FINEWEB_SHARDS}, got {request.shards}")


def _name_of(file: str | Path) -> str:
    """A dataset's name for a file: ``book`` for ``book.txt.gz``."""
    return "stdin" if str(file) == "-" else Path(file).resolve().name.split(".")[0]


@contextmanager
def _spooled(request: Request) -> Iterator[Request]:
    """The request with standard input as one of the files, since it is read more than once."""
    if "-" not in map(str, (*request.files, *request.val_files)):
        yield request
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "stdin")
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        files, val_files = (
            [copy if str(name) == "-" else name for name in names] for names in (request.files, request.val_files)
        )
        try:
            yield dataclasses.replace(request, files=files, val_files=val_files)
        except RequestError as error:
            raise RequestError(str(error).replace(str(copy), "standard input")) from error


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


@dataclasses.dataclass
class _Finished:
    """The finished shards of a split, for the preparation that goes on after an interruption.

    Attributes:
        shards: that are finished.
        arrays: of the split's tokens that are wholly in these shards.
        offset: tokens of the next array that are in them too.
    """

    shards: list[Shard] = dataclasses.field(default_factory=list)
    arrays: int = 0
    offset: int = 0


@dataclasses.dataclass
class _State:
    """The content of ``state.json`` in a folder of shards that are being written.

    Attributes:
        digest: of all that the shards depend on.
        train: what is finished of the training split.
        val: of the validation split.
    """

    digest: str
    train: _Finished = dataclasses.field(default_factory=_Finished)
    val: _Finished = dataclasses.field(default_factory=_Finished)

    def write(self, folder: Path) -> None:
        json_files.write(folder / STATE_FILE, dataclasses.asdict(self))

    def count(self) -> int:
        """The number of finished shards."""
        return len(self.train.shards) + len(self.val.shards)

    @classmethod
    def read(cls, folder: Path, digest: str) -> "_State | None":
        """The state of a folder; ``None`` unless it is of the same tokens and all its shards are whole."""
        try:
            state = json_files.build(cls, json_files.read(folder / STATE_FILE), str(folder))
            shards = [*state.train.shards, *state.val.shards]
            if state.digest == digest and all(Shard.of(folder / shard.file) == shard for shard in shards):
                return state
        except (RequestError, OSError):
            pass
        return None


def _digest(corpus: Corpus) -> str:
    """Of all that decides how the tokens of a corpus are cut into arrays and shards."""
    cuts = (SHARD_TOKENS, tokenizers.ENCODED_AT_ONCE, text.PIECE, __version__)
    said = json.dumps([corpus.source, corpus.split, corpus.tokenizer.to_meta(), cuts], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


@contextmanager
def _staging(target: Path, has_locks: bool, digest: str) -> Iterator[tuple[Path, _State]]:
    """A folder beside ``target``, on the same file system, and what is finished in it.

    It is removed in the end, unless an interruption leaves finished shards in it. The lock on ``target`` is held. So a
    folder that an earlier process of this machine has left behind belongs to nobody: it is taken over or removed.
    Another machine may not see the lock, so its folders stay.
    """
    prefix = f"~{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}~"
    start = _beside(target, prefix)
    folder, state = None, None
    if has_locks:
        for left in start.parent.iterdir():
            if left.name.startswith(start.name):
                found = _State.read(left, digest) if state is None else None
                if found is None:
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    folder, state = left, found
    if folder is None or state is None:
        folder, state = Path(tempfile.mkdtemp(prefix=start.name, dir=start.parent)), _State(digest)
    else:
        output.note(f"{state.count()} shards are finished already")
    is_kept = False
    try:
        yield folder, state
    except (KeyboardInterrupt, SystemExit, OSError):
        is_kept = has_locks and (folder / STATE_FILE).exists()
        raise
    finally:
        if is_kept:
            output.note(f"{state.count()} finished shards are kept in {folder}: the same command goes on from there")
        else:
            shutil.rmtree(folder, ignore_errors=True)


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


def _write(
    corpus: Corpus, folder: Path, state: _State, max_tokens: int | None, progress: Progress
) -> tuple[list[Shard], list[Shard]]:
    """Write both splits of ``corpus`` into ``folder`` as shards, but for those that are finished."""
    vocab_size = corpus.tokenizer.vocab_size
    train, val = list(state.train.shards), list(state.val.shards)
    for name, split, shards, finished, limit in (
        ("train", corpus.train, train, state.train, max_tokens), ("val", corpus.val, val, state.val, None),
    ):  # fmt: skip
        for shard in _write_split(split, folder, name, vocab_size, finished, limit, progress):
            shards.append(shard)
            if shard.tokens == SHARD_TOKENS:  # a smaller one, at the end, is made again
                finished.shards.append(shard)
                state.write(folder)
    for name, shards in (("training", train), ("validation", val)):
        if sum(shard.tokens for shard in shards) < 2:
            raise RequestError(
                f"the {name} split of {corpus.source} has less than two tokens: use more text or another --val_fraction"
            )
    return train, val


def _write_split(
    split: Split, folder: Path, name: str, vocab_size: int, finished: _Finished, limit: int | None, progress: Progress
) -> Iterator[Shard]:
    """Write a split, at most ``limit`` tokens with those that are finished; yield each shard when it is finished."""
    done = sum(shard.tokens for shard in finished.shards)
    progress.taken_over += done
    progress.goal = None if limit is None else progress.tokens + limit - done
    writer: ShardWriter | None = None
    count, begin = len(finished.shards), finished.offset
    with closing(split(finished.arrays)) as arrays:
        for number, array in enumerate(arrays, start=finished.arrays):
            check_ids(array, vocab_size, f"the {name} split")
            end = len(array) if limit is None else min(len(array), begin + limit - done)
            while begin < end:
                writer = writer or ShardWriter(folder / f"{name}_{count:06d}.bin")
                part = array[begin : min(end, begin + SHARD_TOKENS - writer.count)]
                writer.write(part)
                begin, done = begin + len(part), done + len(part)
                progress.add(len(part))
                if writer.count == SHARD_TOKENS:
                    finished.arrays, finished.offset = number, begin
                    yield Shard.of(writer.close())
                    writer, count = None, count + 1
                    output.note(f"{name}: {count} shards of {SHARD_TOKENS:,} tokens")
            if done == limit:
                break
            begin = 0
    if writer is not None:
        yield Shard.of(writer.close())


def _move(folder: Path, target: Path, meta: DatasetMeta) -> None:
    """Move the finished shards of ``folder`` to ``target``, in place of the dataset there.

    ``meta.json`` is removed first and written last. So wherever this process ends, a reader finds the old dataset, no
    dataset, or the new one. If the new dataset is the same, ``meta.json`` stays. A process that has mapped a file which
    is replaced keeps its content.
    """
    (folder / STATE_FILE).unlink(missing_ok=True)  # what has been moved cannot be taken over
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
