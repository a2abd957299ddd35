"""The table of datasets that fastgpt can make: what each is, its tokenizer, and where its text comes from.

To add one, write a function that returns its text or a :class:`Corpus`, and a row in ``SOURCES``. The command's help,
the vocabulary that ``plan`` assumes and the answer to a request for a missing dataset come from the table.
"""

import codecs
import hashlib
import http.client
import importlib
import os
import shutil
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt.data.progress import Progress
from fastgpt.data.shards import PREPARE, Shard, check_ids, read_shard
from fastgpt.data.text import END_OF_TEXT, Piece, Pieces, Text, of_files, of_string, part, scan, with_markers
from fastgpt.data.tokenizer_json import JsonTokenizer
from fastgpt.data.tokenizers import TRAINED, GPT2Tokenizer, Tokenizer, Tokens, build_tokenizer, encoded
from fastgpt.errors import RequestError

VAL_FRACTION = 0.1  # of a text
BPE_VOCABULARY = 8192  # of a tokenizer that is trained, if not told otherwise

# Enough for a run of minutes, and prepared in about a second. The library without its tests has hardly more.
STDLIB_BYTES = 10_000_000
# Tests contain odd text on purpose. Installed packages differ from machine to machine.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

RETRY_SECONDS = (1.0, 2.0, 4.0)
SILENT_SECONDS = 30.0
DOWNLOAD_SECONDS = 120.0

OPENWEBTEXT_REPO = "Skylion007/openwebtext"
OPENWEBTEXT_VAL_FRACTION = 0.0005  # with this seed it is nanoGPT's split, so losses can be compared
OPENWEBTEXT_SEED = 2357

FINEWEB_REPO = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


@dataclass(frozen=True)
class Request:
    """What is asked of :func:`fastgpt.data.prepare.prepare`, which describes each argument."""

    source: str
    files: Sequence[str | Path] = ()
    val_files: Sequence[str | Path] = ()
    tokenizer: str | None = None
    val_fraction: float | None = None
    shards: int | None = None
    text_field: str = "text"
    vocab_size: int | None = None
    special_tokens: bool = False
    max_tokens: int | None = None
    num_proc: int = 1


# Takes a number of arrays to leave out at the start; the others are 1-D, of any lengths.
Split = Callable[[int], Generator[Tokens, None, None]]


def _no_tokens(skip: int) -> Generator[Tokens, None, None]:
    yield from ()


@dataclass
class Corpus:
    """Tokens that can be written as shards. They are computed or downloaded only when they are iterated.

    Attributes:
        source: where the text is from, in words. The same words stand for the same text.
        split: which part is validation, in words.
        tokenizer: of the tokens.
        train: begins to make the training tokens.
        val: likewise.
        ready: writes ready-made training and validation shards into a folder, instead of ``train`` and ``val``.
    """

    source: str
    split: str
    tokenizer: Tokenizer
    train: Split = _no_tokens
    val: Split = _no_tokens
    ready: Callable[[Path], tuple[list[Shard], list[Shard]]] | None = None


@dataclass(frozen=True)
class Source:
    """A row of the table.

    Attributes:
        summary: what it is.
        needs: what it needs apart from this machine, for the help; empty if nothing.
        tokenizer: the one that is used by default.
        vocab_size: with that tokenizer; ``None`` if it depends on the text.
        text: takes the files and the field of a row, and returns the text; ``None`` for a source that is not one.
        corpus: returns the corpus; for a source with a fixed tokenizer.
        shards: returns the corpus; for a source with ready-made shards.
    """

    summary: str
    needs: str
    tokenizer: str
    vocab_size: int | None
    text: Callable[[Sequence[str | Path], str], Text] | None = None
    corpus: Callable[[Request, Progress], Corpus] | None = None
    shards: Callable[[Request, Progress], Corpus] | None = None

    def make_corpus(self, request: Request, progress: Progress) -> Corpus:
        """The source's tokens."""
        if self.shards is not None:
            return self.shards(request, progress)
        if self.corpus is not None:
            return self.corpus(request, progress)
        assert self.text is not None
        return _of_text(self.text(request.files, request.text_field), self.tokenizer, request, progress)


def _of_text(text: Text, default_tokenizer: str, request: Request, progress: Progress) -> Corpus:
    val_text = of_files(request.val_files, request.text_field) if request.val_files else None
    if request.special_tokens:
        text, val_text = with_markers(text), with_markers(val_text) if val_text is not None else None
    found = scan(_watched(text, progress, "reading"))
    val_found = scan(_watched(val_text, progress, "reading")) if val_text is not None else None

    val_fraction = VAL_FRACTION if request.val_fraction is None else request.val_fraction
    cut = found.n_characters if val_text is not None else int(found.n_characters * (1 - val_fraction))
    n_val = found.n_characters - cut if val_found is None else val_found.n_characters

    def train_pieces() -> Pieces:
        return part(text.pieces(), 0, cut)

    def val_pieces() -> Pieces:
        return part(text.pieces(), cut, None) if val_text is None else val_text.pieces()

    name = request.tokenizer or default_tokenizer
    if name == TRAINED:
        pieces = progress.watch(train_pieces(), "learning a vocabulary", cut, _length)
        built: Tokenizer = JsonTokenizer.train(
            (piece for piece in pieces if isinstance(piece, str)), request.vocab_size or BPE_VOCABULARY
        )
    elif name.endswith(".json") or Path(name).is_dir():
        built = JsonTokenizer.open(Path(name))
    else:
        characters = found.characters | (val_found.characters if val_found is not None else frozenset())
        built = build_tokenizer(name, "".join(characters))
    if request.special_tokens and built.eot is None:
        raise RequestError(f"--special_tokens: the {name} tokenizer has no {END_OF_TEXT}; use gpt2 or train")

    origin = f"{text.origin} (SHA-256 {found.sha256[:16]})" if request.files else text.origin
    if val_text is None or val_found is None:
        split = f"the last {val_fraction:g} of the text is validation"
    else:
        split = f"{val_text.origin} (SHA-256 {val_found.sha256[:16]}) is validation"
    if request.special_tokens:
        split += f"; {END_OF_TEXT} in the text is a token"

    def tokens(pieces: Callable[[], Pieces], doing: str, total: int, skip: int) -> Generator[Tokens, None, None]:
        return encoded(progress.watch(pieces(), doing, total, _length), built, request.num_proc, skip)

    train = partial(tokens, train_pieces, "training split", cut)
    return Corpus(origin, split, built, train, partial(tokens, val_pieces, "validation split", n_val))


def _watched(text: Text, progress: Progress, doing: str) -> Text:
    return Text(text.origin, lambda: progress.watch(text.pieces(), doing, None, _length))


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, str) else int(piece is not None)


# ---- text ----


def _stdlib_text(files: Sequence[str | Path], text_field: str) -> Text:
    """The library's Python files, always in the same order, up to ``STDLIB_BYTES``."""
    root = sysconfig.get_path("stdlib")
    content = bytearray()
    for path in _stdlib_files(root):
        content += path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if len(content) >= STDLIB_BYTES:
            break
    if not content:
        raise RequestError(f"this Python has no source files in {root}; use {PREPARE} text FILE")
    # the cut may lie inside a character
    text = content[:STDLIB_BYTES].decode("utf-8", errors="ignore")
    return of_string(text, f"standard library of Python {sys.version.split()[0]}")


def _stdlib_files(root: str) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_STDLIB)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _shakespeare_text(files: Sequence[str | Path], text_field: str) -> Text:
    elsewhere = f"get that file in another way, then: {PREPARE} text FILE --name shakespeare-char"
    try:
        content = _downloaded(SHAKESPEARE_URL)
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"cannot download {SHAKESPEARE_URL} ({_line(error)}): {elsewhere}") from error
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:  # such as a network's login page
        raise RequestError(f"{SHAKESPEARE_URL} returned something other than that file: {elsewhere}")
    return of_string(content.decode("utf-8"), SHAKESPEARE_URL)


def _downloaded(url: str) -> bytes:
    """The content of a small file. What may pass, such as a connection that breaks, is tried again."""
    for wait in RETRY_SECONDS:
        try:
            return _downloaded_once(url)
        except urllib.error.HTTPError as error:
            if error.code not in (408, 429) and error.code < 500:  # what the server says again
                raise
        except urllib.error.URLError:  # no connection
            raise
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(wait)
    return _downloaded_once(url)


def _downloaded_once(url: str) -> bytes:
    content, end = bytearray(), time.monotonic() + DOWNLOAD_SECONDS
    with urllib.request.urlopen(url, timeout=SILENT_SECONDS) as response:
        while block := response.read1(1 << 16):  # returns what has come; read would wait for all
            content += block
            if time.monotonic() > end:
                raise TimeoutError(f"{len(content):,} bytes in {DOWNLOAD_SECONDS:g} s")
        length = response.headers.get("Content-Length", "")
    if length.isdecimal() and len(content) < int(length):
        raise ConnectionError(f"the connection broke after {len(content):,} of {length} bytes")
    return bytes(content)


# ---- tokens of Hugging Face's datasets ----


def _openwebtext(request: Request, progress: Progress) -> Corpus:
    val_fraction = OPENWEBTEXT_VAL_FRACTION if request.val_fraction is None else request.val_fraction
    datasets = _library("datasets", "openwebtext")
    try:
        # Arrow files mapped from the disk (54 GB in its cache), so that the documents never fill the memory.
        documents = datasets.load_dataset(OPENWEBTEXT_REPO, split="train")
    except Exception as error:  # the library raises exceptions of many kinds
        raise RequestError(f"cannot download {OPENWEBTEXT_REPO} from Hugging Face ({_line(error)})") from error
    splits = documents.train_test_split(test_size=val_fraction, seed=OPENWEBTEXT_SEED, shuffle=True)
    tokenizer = GPT2Tokenizer()

    def pieces(documents: Any) -> Pieces:
        for batch in documents.iter(batch_size=1000):
            for text in batch["text"]:
                yield text
                yield None  # as in nanoGPT, an end of text follows the last document too

    def tokens(name: str, doing: str, skip: int) -> Generator[Tokens, None, None]:
        documents = splits[name]
        watched = progress.watch(pieces(documents), doing, len(documents), lambda piece: int(piece is None))
        return encoded(watched, tokenizer, request.num_proc, skip)

    split = f"{val_fraction:g} of the documents, drawn with seed {OPENWEBTEXT_SEED}, are validation"
    train, val = partial(tokens, "train", "training split"), partial(tokens, "test", "validation split")
    return Corpus(OPENWEBTEXT_REPO, split, tokenizer, train, val)


def _fineweb10b(request: Request, progress: Progress) -> Corpus:
    hub = _library("huggingface_hub", "fineweb10b")
    n_shards = request.shards or FINEWEB_SHARDS

    def bring(theirs: str, ours: Path) -> Shard:
        """Download a tokenized shard, under our name."""
        try:
            path = hub.hf_hub_download(repo_id=FINEWEB_REPO, filename=theirs, repo_type="dataset")
        except Exception as error:  # the library raises exceptions of many kinds
            raise RequestError(
                f"cannot download {theirs} of {FINEWEB_REPO} from Hugging Face ({_line(error)})"
            ) from error
        cached = Path(path).resolve()  # the path in the hub's cache is a symbolic link; link to its target
        check_ids(read_shard(cached), GPT2Tokenizer.vocab_size, theirs)
        try:
            os.link(cached, ours)  # so that 200 MB a shard are not stored twice
        except OSError:  # another file system, or one without links
            shutil.copyfile(cached, ours)
        shard = Shard.of(ours)
        progress.add(shard.tokens)
        return shard

    def ready(folder: Path) -> tuple[list[Shard], list[Shard]]:
        val = [bring("fineweb_val_000000.bin", folder / "val_000000.bin")]
        train = [bring(f"fineweb_train_{i + 1:06d}.bin", folder / f"train_{i:06d}.bin") for i in range(n_shards)]
        return train, val

    source = f"{FINEWEB_REPO}, {n_shards} of {FINEWEB_SHARDS} training shards"
    return Corpus(source, "the validation split of its publisher", GPT2Tokenizer(), ready=ready)


def _library(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RequestError(f"{source} needs the {name} library: pip install {name}") from error


def _line(error: Exception) -> str:
    """The first line of ``error``, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- the table ----

GPT2 = GPT2Tokenizer.vocab_size

SOURCES: dict[str, Source] = {
    "stdlib": Source("Python's own library: on every machine, offline", "", "byte", 256, text=_stdlib_text),
    "text": Source("your own text: text FILE…", "", "char", None, text=of_files),
    "shakespeare-char": Source("nanoGPT's smallest dataset, 1 MB", "network", "char", 65, text=_shakespeare_text),
    "openwebtext": Source(
        "nanoGPT's GPT-2 dataset, 9 billion tokens", "network, 54 GB of cache and `pip install datasets`", "gpt2", GPT2,
        corpus=_openwebtext,
    ),
    "fineweb10b": Source(
        "GPT-2 tokens of FineWeb, 200 MB a shard", "network and `pip install huggingface_hub`", "gpt2", GPT2,
        shards=_fineweb10b,
    ),
}  # fmt: skip
