"""Whether a dataset's shards are the ones that were written."""

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fastgpt.data.dataset import Dataset
from fastgpt.data.shards import META_FILE, Shard
from fastgpt.errors import RequestError
from fastgpt.files import file_sha256

AT_ONCE = 64 << 20  # bytes that are compared before the run begins: about 50 ms


class ShardVerifier:
    """Compares shards with their SHA-256 in ``meta.json``: the first 64 MB at once, the rest in a thread.

    Bare token files have no SHA-256. A dataset that has been replaced since it was opened is not compared, because the
    files under its names are no longer those that are mapped.

    Args:
        dataset: its shards are read again, from the files.

    Raises:
        RequestError: a shard has changed or cannot be read.
    """

    def __init__(self, dataset: Dataset) -> None:
        shards = [*dataset.meta.train, *dataset.meta.val] if dataset.meta else []
        self._folder, self._meta = dataset.path, dataset.meta
        self._problem: str | None = None
        n_bytes = itertools.accumulate(2 * shard.tokens for shard in shards)
        n_at_once = sum(total <= AT_ONCE for total in n_bytes)
        self._compare(shards[:n_at_once])
        self.check()
        self._thread = threading.Thread(target=self._compare, args=(shards[n_at_once:],), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``RequestError`` if a shard has been found to differ."""
        if self._problem is not None:
            raise RequestError(self._problem)

    def wait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until all shards have been compared or ``give_up`` returns true, then call :meth:`check`."""
        while self._thread.is_alive() and not give_up():
            self._thread.join(0.1)
        self.check()

    def _compare(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            problem = _problem_of(self._folder / shard.file, shard.sha256)
            if problem is not None:
                if self._meta is not None and self._meta.is_in(self._folder):
                    self._problem = problem
                return


def _problem_of(path: Path, sha256: str) -> str | None:
    try:
        found = file_sha256(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found == sha256:
        return None
    return f"{path} is damaged: its SHA-256 is not the one in {META_FILE}; prepare or copy it again"
