"""Makes datasets: text or ready tokens, from this machine or the network, into a folder of shards.

From the command line:

    python -m fastgpt.data prepare stdlib                          Python's own library: offline, a second
    python -m fastgpt.data prepare text book.txt --tokenizer gpt2  text of your own
    python -m fastgpt.data prepare shakespeare-char                nanoGPT's smallest dataset, 1 MB
    python -m fastgpt.data prepare fineweb10b --shards 10          GPT-2 tokens of FineWeb, 100 M a shard
    python -m fastgpt.data prepare openwebtext                     nanoGPT's GPT-2 dataset, 9 G tokens

The folder is made beside its final place and moved there when whole, so an interrupted preparation leaves
what was there before.
"""

import dataclasses
import hashlib
import http.client
import importlib
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.cli import did_you_mean
from fastgpt.data.shards import META_FILE, PREPARE, DatasetMeta, Shard, read_shard, write_shard
from fastgpt.data.tokenizers import GPT2Tokenizer, Tokenizer, Tokens, build_tokenizer
from fastgpt.errors import RequestError

SOURCES = ("stdlib", "text", "shakespeare-char", "openwebtext", "fineweb10b")

SHARD_TOKENS = 100_000_000  # 200 MB, as llm.c cuts its data

# Enough for a run of minutes, little enough that preparing it takes about a second; the library without
# its tests is hardly more.
STDLIB_BYTES = 10_000_000
# Tests hold odd text on purpose; packages installed beside the library differ from machine to machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

OPENWEBTEXT_REPO = "Skylion007/openwebtext"
OPENWEBTEXT_VAL_FRACTION = 0.0005  # with the seed, nanoGPT's split, so that losses compare
OPENWEBTEXT_SEED = 2357

FINEWEB_REPO = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


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
    """Make the dataset ``data_dir/name`` and return that folder; ``open_dataset`` opens it.

    Args:
        source: one of ``SOURCES``.
        files: UTF-8 text files, joined in this order; for the source ``text`` alone, which needs them.
        tokenizer: ``char``, ``byte`` or ``gpt2``; by default what suits the source.
        name: by default the source's name; for ``text`` the first file's, without its extension.
        data_dir: where datasets live; nothing outside it is written.
        val_fraction: the part at the end that is validation, default 0.1; ``openwebtext`` draws that part
            of its documents, default 0.0005; ``fineweb10b`` has a validation split of its own.
        shards: how many of the training shards of ``fineweb10b``, default 103, all.

    A dataset of the same name is replaced. ``RequestError`` if anything about the request is wrong, a
    file cannot be read as text, a needed library is not installed, or a download fails.
    """
    _check_request(source, files, tokenizer, val_fraction, shards)
    name = name or (Path(files[0]).stem if files else source)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RequestError(f"'{name}' cannot be a dataset's name (letters, digits, _ . + -): pass another as --name")
    target = Path(data_dir, name)
    if target.exists() and not target.is_dir():
        raise RequestError(f"{target} is a file: pass another --name")
    corpus = None if source == "fineweb10b" else _corpus(source, files, tokenizer, val_fraction)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir)
    except OSError as error:
        raise RequestError(f"cannot write to {data_dir}: {error.strerror}") from error
    with staging as folder:
        staged = Path(folder)
        meta = _write(corpus, staged) if corpus else _fineweb10b(staged, shards or FINEWEB_SHARDS)
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
        hint = (
            f"; for a file of text: {PREPARE} text {source}"
            if Path(source).is_file()
            else did_you_mean(source, SOURCES)
        )
        raise RequestError(f"no source '{source}' (there are {', '.join(SOURCES)}){hint}")
    if source == "text" and not files:
        raise RequestError(f"which text? {PREPARE} text FILE…")
    if source != "text" and files:
        raise RequestError(
            f"{source} takes no files, and {files[0]} was given; for your text: {PREPARE} text {files[0]}"
        )
    if tokenizer is not None:
        build_tokenizer(tokenizer, "")  # so that a wrong name is found before any work
        if source in ("openwebtext", "fineweb10b") and tokenizer != "gpt2":
            raise RequestError(f"{source} is prepared with the gpt2 tokenizer, not {tokenizer}")
    if val_fraction is not None:
        if source == "fineweb10b":
            raise RequestError("fineweb10b has a validation split of its own: leave out --val_fraction")
        if not 0 < val_fraction < 1:
            raise RequestError(
                f"--val_fraction must lie between 0 and 1, for some text in both splits: {val_fraction:g}"
            )
    if shards is not None:
        if source != "fineweb10b":
            raise RequestError(f"--shards is for fineweb10b, not {source}")
        if not 1 <= shards <= FINEWEB_SHARDS:
            raise RequestError(f"--shards must be 1 to {FINEWEB_SHARDS}, and is {shards}")


@dataclasses.dataclass
class _Corpus:
    """Tokens on their way to shards; each split an iterable of 1-D arrays of any lengths."""

    source: str
    split: str
    tokenizer: Tokenizer
    train: Iterable[Tokens]
    val: Iterable[Tokens]


def _corpus(source: str, files: Sequence[str | Path], tokenizer: str | None, val_fraction: float | None) -> _Corpus:
    if source == "openwebtext":
        return _openwebtext(OPENWEBTEXT_VAL_FRACTION if val_fraction is None else val_fraction)
    if source == "stdlib":
        text, origin, suited = _stdlib_text(), f"standard library of Python {sys.version.split()[0]}", "byte"
    elif source == "shakespeare-char":
        text, origin, suited = _shakespeare_text(), SHAKESPEARE_URL, "char"
    else:
        text, origin, suited = _joined_text(files), ", ".join(Path(file).name for file in files), "char"
    val_fraction = 0.1 if val_fraction is None else val_fraction
    built = build_tokenizer(tokenizer or suited, text)
    cut = int(len(text) * (1 - val_fraction))
    split = f"the last {val_fraction:g} of the text is validation"
    return _Corpus(origin, split, built, [built.encode(text[:cut])], [built.encode(text[cut:])])


def _joined_text(files: Sequence[str | Path]) -> str:
    return "".join(_read_text(file) for file in files)


def _read_text(file: str | Path) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    if "\0" in text:
        raise RequestError(f"{file} is not text: character {text.index(chr(0))} is NUL")
    if not text:
        raise RequestError(f"{file} is empty")
    return text


def _stdlib_text() -> str:
    """The library's Python files, always in the same order, up to ``STDLIB_BYTES``."""
    root = sysconfig.get_path("stdlib")
    content = bytearray()
    for path in _stdlib_files(root):
        content += path.read_bytes()
        if len(content) >= STDLIB_BYTES:
            break
    if not content:
        raise RequestError(f"this Python keeps no source files in {root}: {PREPARE} text FILE instead")
    return content[:STDLIB_BYTES].decode("utf-8", errors="ignore")


def _stdlib_files(root: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_STDLIB)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _shakespeare_text() -> str:
    elsewhere = f"fetch that file by other means, then: {PREPARE} text FILE --name shakespeare-char"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"cannot download {SHAKESPEARE_URL} ({_line(error)}): {elsewhere}") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:  # a login page of the network, say
        raise RequestError(f"{SHAKESPEARE_URL} answered with something that is not that file: {elsewhere}")
    return content.decode("utf-8")


def _openwebtext(val_fraction: float) -> _Corpus:
    datasets = _library("datasets", "openwebtext")
    try:
        # Arrow files mapped from the disk (54 GB in its cache), so the documents never fill the memory.
        documents = datasets.load_dataset(OPENWEBTEXT_REPO, split="train")
    except Exception as error:  # the library lets through what any of its layers raises
        raise RequestError(f"cannot download {OPENWEBTEXT_REPO} from Hugging Face ({_line(error)})") from error
    splits = documents.train_test_split(test_size=val_fraction, seed=OPENWEBTEXT_SEED, shuffle=True)
    tokenizer = GPT2Tokenizer()

    def encoded(documents: Any) -> Iterator[Tokens]:
        for batch in documents.iter(batch_size=1000):
            yield tokenizer.encode_documents(batch["text"])

    split = f"{val_fraction:g} of the documents, drawn with seed {OPENWEBTEXT_SEED}, are validation"
    return _Corpus(OPENWEBTEXT_REPO, split, tokenizer, encoded(splits["train"]), encoded(splits["test"]))


def _write(corpus: _Corpus, folder: Path) -> DatasetMeta:
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
        _check_ids(buffer[:filled], vocab_size, path.name)
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


def _check_ids(tokens: Tokens, vocab_size: int, where: str) -> None:
    """An id beyond the vocabulary would reach past the end of the model's embedding table."""
    if tokens.max(initial=0) >= vocab_size:
        raise RequestError(f"{where} has the token {tokens.max()}, outside its vocabulary of {vocab_size}")


def _fineweb10b(folder: Path, shards: int) -> DatasetMeta:
    """Bring the tokenized shards into ``folder`` under our names."""
    hub = _library("huggingface_hub", "fineweb10b")

    def bring(theirs: str, ours: str) -> Shard:
        try:
            path = hub.hf_hub_download(repo_id=FINEWEB_REPO, filename=theirs, repo_type="dataset")
        except Exception as error:  # the library lets through what any of its layers raises
            raise RequestError(
                f"cannot download {theirs} of {FINEWEB_REPO} from Hugging Face ({_line(error)})"
            ) from error
        cached = Path(path).resolve()  # the hub's cache names a file by a link, which is not to be linked
        _check_ids(read_shard(cached), GPT2Tokenizer.vocab_size, theirs)
        try:
            os.link(cached, folder / ours)  # 200 MB a shard are not kept twice
        except OSError:  # another file system, or one without links
            shutil.copyfile(cached, folder / ours)
        return Shard.of(folder / ours)

    val = [bring("fineweb_val_000000.bin", "val_000000.bin")]
    train = [bring(f"fineweb_train_{i + 1:06d}.bin", f"train_{i:06d}.bin") for i in range(shards)]
    tokenizer = GPT2Tokenizer()
    split = "the validation split of its publisher"
    return DatasetMeta(FINEWEB_REPO, split, tokenizer.to_meta(), tokenizer.vocab_size, train, val)


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


def _library(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"{source} needs the {name} library: pip install {name}") from error


def _line(error: Exception) -> str:
    """The first line of ``error``, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
