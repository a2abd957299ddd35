"""Text in pieces, so that its size does not matter: files, folders, compressed files, JSON lines, Parquet.

A text is a sequence of documents, and a document comes in pieces. It can be read several times: once for its
characters, its length and its digest, then for its tokens.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastgpt.errors import RequestError

PIECE = 1 << 20  # characters that are read at a time
BYTE_ORDER_MARK = "\ufeff"
# What files of other encodings may start with. UTF-32's mark begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
PLAIN = (".txt", ".md", ".text")  # what is taken of a folder, besides the kinds below
COMPRESSED = (".gz", ".zst")

END_OF_TEXT = "<|endoftext|>"  # how GPT-2 spells the token that ends a document


class Marker:
    """Stands for an ``END_OF_TEXT`` that is in the text itself and means the token. It counts as one character."""


MARKER = Marker()

Piece = str | Marker | None  # None stands between two documents
Pieces = Iterator[Piece]


@dataclass(frozen=True)
class Text:
    """A text that can be read again and again.

    Attributes:
        origin: where it is from, in words.
        pieces: begins to read it.
    """

    origin: str
    pieces: Callable[[], Pieces]


@dataclass(frozen=True)
class Scan:
    """What one reading of a text has found.

    Attributes:
        n_characters: without the marks between documents.
        characters: all that occur.
        sha256: of the text.
    """

    n_characters: int
    characters: frozenset[str]
    sha256: str


def scan(text: Text) -> Scan:
    """Read a text once."""
    n, digest = 0, hashlib.sha256()
    characters: set[str] = set()
    for piece in text.pieces():
        if piece is None:
            digest.update(b"\0")  # which no text has
            continue
        if isinstance(piece, Marker):
            n += 1
            digest.update(END_OF_TEXT.encode())
            continue
        n += len(piece)
        characters.update(piece)
        digest.update(piece.encode("utf-8", errors="surrogatepass"))
    return Scan(n, frozenset(characters), digest.hexdigest())


def with_markers(text: Text) -> Text:
    """The same text, with ``MARKER`` for every ``END_OF_TEXT`` in it."""

    def pieces() -> Pieces:
        held = ""  # what may be the start of a marker
        for piece in text.pieces():
            if not isinstance(piece, str):
                if held:
                    yield held
                held = ""
                yield piece
                continue
            *ended, held = (held + piece).split(END_OF_TEXT)
            for before in ended:
                if before:
                    yield before
                yield MARKER
            kept = max((n for n in range(1, len(END_OF_TEXT)) if held.endswith(END_OF_TEXT[:n])), default=0)
            if len(held) > kept:
                yield held[: len(held) - kept]
            held = held[len(held) - kept :]
        if held:
            yield held

    return Text(text.origin, pieces)


def part(pieces: Iterable[Piece], start: int, stop: int | None) -> Pieces:
    """The characters from ``start`` to ``stop`` of a text, with the marks between their documents."""
    at, begun = 0, False
    for piece in pieces:
        if piece is None:
            if begun and (stop is None or at < stop):
                yield None
            continue
        if isinstance(piece, Marker):
            taken: Piece = piece if start <= at and (stop is None or at < stop) else ""
            at += 1
        else:
            taken = piece[max(0, start - at) : None if stop is None else max(0, stop - at)]
            at += len(piece)
        if taken:
            begun = True
            yield taken
        if stop is not None and at >= stop:
            return


def expanded(names: Sequence[str | Path]) -> list[str | Path]:
    """File names with those that a pattern such as ``data/*.txt`` stands for, sorted, in its place.

    Raises:
        RequestError: a pattern stands for none.
    """
    found: list[str | Path] = []
    for name in names:
        if glob.escape(str(name)) == str(name) or os.path.exists(name):
            found.append(name)
            continue
        matches = sorted(glob.glob(str(name), recursive=True))
        if not matches:
            raise RequestError(f"no file matches {name}")
        found += matches
    return found


def of_files(names: Sequence[str | Path], text_field: str = "text") -> Text:
    """The text of files, in this order; each file is a document, and so is each row of JSON lines and of Parquet.

    Args:
        names: UTF-8 text, ``.jsonl`` or ``.parquet``, the first two also as ``.gz`` or ``.zst``; of a folder, all such
            files in it and below, by name.
        text_field: of a row.

    Raises:
        RequestError: a file cannot be read, or a folder has none. What is wrong in a file is found when it is read.
    """
    files = [file for name in names for file in _files_of(Path(name))]
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise RequestError(f"cannot read {file}: {error.strerror}") from error

    def pieces() -> Pieces:
        for i, file in enumerate(files):
            if i:
                yield None
            yield from _documents(file, text_field)

    shown = ", ".join(file.name for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return Text(shown, pieces)


def documents(text: Text) -> list[str]:
    """The documents of a text that is without markers."""
    found: list[list[str]] = [[]]
    for piece in text.pieces():
        if piece is None:
            found.append([])
        elif isinstance(piece, str):
            found[-1].append(piece)
    return ["".join(pieces) for pieces in found]


def of_string(text: str, origin: str) -> Text:
    """A text that is in memory."""
    return Text(origin, lambda: _sliced(text))


def _sliced(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    kinds = {*PLAIN, ".jsonl", ".parquet"}
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) in kinds]
    if not found:
        raise RequestError(f"{path} has no {', '.join(sorted(kinds))} in it")
    return found


def _kind(file: Path) -> str:
    """The ending that tells what is in a file, without that of a compression."""
    return (file.with_suffix("") if file.suffix in COMPRESSED else file).suffix


def _documents(file: Path, text_field: str) -> Pieces:
    if _kind(file) == ".jsonl":
        yield from _with_marks(_json_rows(file, text_field))
    elif _kind(file) == ".parquet":
        yield from _with_marks(_parquet_rows(file, text_field))
    else:
        yield from _text_pieces(file)


def _with_marks(documents: Iterable[str]) -> Pieces:
    for i, document in enumerate(documents):
        if i:
            yield None
        yield from _sliced(document)


def _text_pieces(file: Path) -> Iterator[str]:
    read = 0
    with _opened(file) as stream:
        for number, text in enumerate(iter(lambda: _read(stream, file), "")):
            piece = text.removeprefix(BYTE_ORDER_MARK) if number == 0 else text
            if "\0" in piece:
                # one of the two bytes of an ASCII character is 0
                if number == 0 and len(piece) % 2 == 0 and {"\0"} in (set(piece[:200:2]), set(piece[1:200:2])):
                    raise _wrong_encoding(file, "UTF-16")
                raise RequestError(f"{file} is not text: character {read + piece.index(chr(0))} is NUL")
            read += len(piece)
            if piece:
                yield piece
    if not read:
        raise RequestError(f"{file} is empty")


def _read(stream: IO[str], file: Path) -> str:
    try:
        return stream.read(PIECE)
    except UnicodeDecodeError as error:
        with _opened(file, binary=True) as content:
            start = content.read(4)
            encoding = next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), None)
            if encoding is not None:
                raise _wrong_encoding(file, encoding) from error
            place, byte = _first_bad_byte(content, start)
        raise RequestError(f"{file} is not UTF-8 text: byte {place} is {byte:#04x}") from error
    except (OSError, EOFError) as error:  # EOFError: a compressed file that has been cut off
        raise RequestError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _first_bad_byte(content: IO[bytes], start: bytes) -> tuple[int, int]:
    """Where a file stops being UTF-8, and the byte there."""
    decoder, before, block = codecs.getincrementaldecoder("utf-8")(), 0, start
    while True:
        pending = len(decoder.getstate()[0])  # bytes of a character that is not complete
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return before - pending + error.start, error.object[error.start]
        before += len(block)
        block = content.read(PIECE)


def _wrong_encoding(file: Path, encoding: str) -> RequestError:
    return RequestError(f"{file} is {encoding} text: save it as UTF-8 (iconv -f {encoding} -t UTF-8)")


def _opened(file: Path, binary: bool = False) -> Any:
    """A file opened for reading, as text or as bytes, decompressed."""
    try:
        if file.suffix == ".gz":
            raw: Any = gzip.open(file, "rb")  # noqa: SIM115
        elif file.suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise RequestError(f"{file} needs the zstandard library: pip install zstandard") from error
            raw = zstandard.open(file, "rb")
        else:
            raw = file.open("rb")
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error
    return raw if binary else io.TextIOWrapper(raw, encoding="utf-8")


_HALF_PAIR = re.compile("[\ud800-\udfff]")  # of UTF-16, which JSON may spell and no encoding of text has


def _json_rows(file: Path, text_field: str) -> Iterator[str]:
    with _opened(file) as stream:
        lines = iter(lambda: _line(stream, file), "")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(BYTE_ORDER_MARK))
            except ValueError as error:
                raise RequestError(f"{file}, line {number}: {error}") from error
            if isinstance(row, dict) and text_field in row and not isinstance(row[text_field], str):
                shown = json.dumps(row[text_field])[:40]
                raise RequestError(f"{file}, line {number}: {text_field} is not a text, but {shown}")
            if not isinstance(row, dict) or text_field not in row:
                known = f" (it has {', '.join(map(str, row))[:100]})" if isinstance(row, dict) else ""
                raise RequestError(f"{file}, line {number}: no text named {text_field}{known}: pass --text_field")
            yield _HALF_PAIR.sub("\ufffd", row[text_field])


def _line(stream: IO[str], file: Path) -> str:
    try:
        return stream.readline()
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise RequestError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _parquet_rows(file: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RequestError(f"{file} needs the pyarrow library: pip install pyarrow") from error
    try:
        with closing(ParquetFile(file)) as table:
            if text_field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise RequestError(f"{file} has no column {text_field} (it has {names}): pass --text_field")
            for batch in table.iter_batches(batch_size=1000, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise RequestError(f"{file}: a row of the column {text_field} is not text")
                    yield value
    except (ArrowException, OSError) as error:
        raise RequestError(f"cannot read {file}: {error}") from error
