"""Paths that can be had, files that are written whole or not at all, and their SHA-256."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import RequestError


def reachable(path: Path) -> Path:
    """``path``, which need not exist.

    Raises:
        RequestError: no file can be there, or it cannot be seen: too long a name, a loop of links, no permission.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to, which gets the name ``path`` at the end; after an exception nothing is left of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
