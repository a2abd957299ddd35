"""Paths that can be reached, files that are complete or do not exist, their SHA-256, and lock files."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgpt.errors import RequestError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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
    """Yield a temporary path to write to. At the end it is renamed to ``path``; after an exception it is removed."""
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
        # Large blocks, because a thread that hashes beside a training loop waits for Python's lock after each.
        while block := file.read(16 << 20):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """A file that at most one process holds at a time.

    The lock is the operating system's (``flock``), so it ends with the process, however that ends. On a network file
    system it holds between machines if that system's locks do. Where there are no locks, nothing is locked.

    Args:
        path: the file. It is created, holds the name of the process, and is removed in the end.

    Attributes:
        works: whether the system has locks; known once the lock is held.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self.works = False

    def acquire(self) -> str | None:
        """Take the lock if it is free. Return ``None``, or the process that holds it.

        Raises:
            OSError: the file cannot be created.
        """
        if fcntl is None:
            return None
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.works = True
            except BlockingIOError:
                holder = os.pread(file, 200, 0).decode(errors="replace").strip()
                os.close(file)
                return holder or "another process"
            except OSError:  # a file system without locks
                pass
            if not self.works or self._is(file):
                break
            os.close(file)  # its holder has just removed it: there is a new one, or none
        self._file = file
        with suppress(OSError):  # a full disk
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return None

    def _is(self, file: int) -> bool:
        """Whether the descriptor's file still has the lock's path."""
        try:
            return os.stat(self._path).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back and remove the file."""
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = None
