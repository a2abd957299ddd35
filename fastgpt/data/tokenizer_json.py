"""Any ``tokenizer.json`` of Hugging Face's ``tokenizers`` library, such as a byte-pair encoding of one's own."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.text import END_OF_TEXT as END_OF_TEXT
from fastgpt.data.tokenizers import (
    BYTE_SPELLING,
    MOST_IDS,
    SAFE_CUT,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    Tokens,
    known_ids,
)
from fastgpt.errors import RequestError

FILE = "tokenizer.json"
BESIDE_A_CUT = 64  # characters on either side of a cut that are looked at
CUTS_TRIED = 100  # before a text is left whole


class JsonTokenizer(Tokenizer):
    """What a ``tokenizer.json`` describes.

    Args:
        content: of the file.
        where: names it in messages.

    Attributes:
        content: of the file.

    Raises:
        RequestError: the library is not installed, the content is damaged, or it has more ids than 16 bits can number.
    """

    name = "json"

    def __init__(self, content: str, where: str = FILE) -> None:
        self.content = content
        try:
            self._tokenizer = _library().Tokenizer.from_str(content)
        except Exception as error:  # the library raises this class itself
            raise RequestError(f"{where} is not a tokenizer: {str(error).splitlines()[0]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # in a text they are text, as in the other tokenizers
        self.vocab_size = self._tokenizer.get_vocab_size()
        if self.vocab_size > MOST_IDS:
            raise RequestError(f"{where} has {self.vocab_size:,} tokens; at most {MOST_IDS:,} fit into 16 bits")
        self.eot = self._tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def open(cls, path: Path) -> "JsonTokenizer":
        """The tokenizer of a file, or of a folder with a ``tokenizer.json``."""
        file = path / FILE if path.is_dir() else path
        try:
            return cls(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "JsonTokenizer":
        """A byte-pair encoding as GPT-2's, learnt from ``texts``.

        Args:
            texts: read once, and cut between words into pieces, of which the library takes 256 at a time.
            vocab_size: ids, with those of the 256 bytes and ``<|endoftext|>``; fewer if the texts have no more pairs.
        """
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _word_pieces(text)), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> Tokens:
        return np.array(self._encoding(text).ids, dtype=np.uint16)

    def cut(self, text: str, start: int) -> int | None:
        # Each tokenizer has its own rules, so that a cut is tried. They are local where text is first split into words.
        for found in islice(SAFE_CUT.finditer(text, start - 1), CUTS_TRIED):
            end = found.end()
            if self._words_are_apart(text[max(0, end - BESIDE_A_CUT) : end], text[end : end + BESIDE_A_CUT]):
                return end
        return None

    def _words_are_apart(self, left: str, right: str) -> bool:
        """Whether two texts have the words and the tokens of both as one text."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        if splitter is None:
            return False

        def words(text: str) -> list[str]:
            normal = text if normalizer is None else normalizer.normalize_str(text)
            return [word for word, _ in splitter.pre_tokenize_str(normal)]

        return words(left) + words(right) == words(left + right) and (
            self._encoding(left).ids + self._encoding(right).ids == self._encoding(left + right).ids
        )

    def _encoding(self, text: str) -> Any:
        # Of the library's functions it is the one that computes no offsets and lets other threads of Python run.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return encoding

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self._tokenizer.decode(known_ids(ids, self.vocab_size), skip_special_tokens=False)

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, "content": json.loads(self.content)}


def _word_pieces(text: str, size: int = 1 << 14) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + size, start + 2 * size)
        stop = start + 2 * size if cut is None else cut.end()
        yield text[start:stop]
        start = stop


def to_json(tokenizer: Tokenizer) -> str:
    """The ``tokenizer.json`` that gives the same tokens and the same text.

    Raises:
        RequestError: the library is not installed, or it is none of our tokenizers.
    """
    library = _library()
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.content
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.vocabulary)}
        made = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<unknown>"))  # which is not there
        made.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
        made.decoder = library.decoders.Fuse()
        return made.to_str()
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {character: byte for byte, character in BYTE_SPELLING.items()}
        merges: list[tuple[str, str]] = []
    elif isinstance(tokenizer, GPT2Tokenizer):
        vocabulary, merges = vocabulary_and_merges(tokenizer)
    else:
        raise RequestError(f"the tokenizer {tokenizer.name} has no {FILE}")
    made = library.Tokenizer(library.models.BPE(vocabulary, merges))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    if tokenizer.eot is not None:
        made.add_special_tokens([library.AddedToken(END_OF_TEXT, normalized=False)])
    return made.to_str()


def vocabulary_and_merges(tokenizer: GPT2Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of GPT-2's tokens, spelled as in its files, and the pairs that are merged into them, in that order."""
    ranks = tokenizer.ranks()
    spelled = {token: "".join(map(BYTE_SPELLING.__getitem__, token)) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            # The pair is what is left when all merges of lower rank have been done.
            left, right = _merged(token, ranks, rank)
            merges.append((rank, (spelled[left], spelled[right])))
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.eot}
    return vocabulary, [pair for _, pair in sorted(merges)]


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The parts of a token after all merges with a rank under ``below``."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
        rank, i = min(pairs)
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise RequestError("a tokenizer.json needs the tokenizers library: pip install tokenizers") from error
    return tokenizers
