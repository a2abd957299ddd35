"""A run is a folder: its configuration, its metrics, its checkpoints, and what is made of them."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastgpt import json_files
from fastgpt.errors import RequestError
from fastgpt.files import Lock, reachable
from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.units import count_of, size

CONFIG, METRICS, PLOT, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"
REPORT = "report.html"
LOCK = ".lock"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class RunConfig:
    """The content of ``config.json``: what later commands need to know about a run.

    Attributes:
        train: the flags, as they were settled for the device.
        model: the architecture.
        tokenizer: its description, ``None`` for tokens without one.
        left_open: the flags that the request left to the device, as they were then; a resumed run settles them again.
    """

    train: dict[str, Any]
    model: GPTConfig
    tokenizer: dict[str, Any] | None
    left_open: dict[str, Any] = field(default_factory=dict)


def held(run_dir: Path) -> list[Path]:
    """The files and folders of an earlier run in ``run_dir``."""
    return [
        run_dir / name
        for name in (CONFIG, METRICS, CHECKPOINTS, PLOT, REPORT, TENSORBOARD)
        if (run_dir / name).exists()
    ]


def is_run(run_dir: Path) -> bool:
    """Whether ``run_dir`` holds a run."""
    return (run_dir / CONFIG).is_file()


def check(config: TrainConfig) -> Path:
    """The folder of a run that starts from scratch.

    Raises:
        RequestError: it holds a run and ``--overwrite`` is not given, or it is a file.
    """
    run_dir = reachable(Path(config.out_dir))
    if run_dir.exists() and not run_dir.is_dir():
        raise RequestError(f"--out_dir {run_dir} is a file, not a folder")
    if held(run_dir) and not config.overwrite:
        raise RequestError(
            f"{run_dir} already holds a run: pass --overwrite to replace it, --init_from resume to continue it, "
            "or another --out_dir"
        )
    return run_dir


def check_room(run_dir: Path, checkpoints: int, n_bytes: int, *, replaced: bool) -> str | None:
    """A warning if the disk has no room for all checkpoints that a run is to keep.

    Args:
        run_dir: its folder, which exists.
        checkpoints: how many have to fit beside what stays there.
        n_bytes: the size of one.
        replaced: whether what is there is removed first.

    Raises:
        RequestError: not even one fits.
    """
    free = shutil.disk_usage(run_dir).free
    if replaced:
        files = (path for item in held(run_dir) for path in (item, *item.rglob("*")) if path.is_file())
        free += sum(path.stat().st_size for path in files)
    if free < n_bytes:
        raise RequestError(
            f"the disk of {run_dir} has {size(free)} free, and a checkpoint takes {size(n_bytes)}: make room, or pass "
            "another --out_dir"
        )
    if free < checkpoints * n_bytes:
        wanted = f"{count_of(checkpoints, 'checkpoint')} of {size(n_bytes)}"
        return f"the disk of {run_dir} has {size(free)} free, and the run will write {wanted}: make room"
    return None


class RunLock:
    """Keeps a second process out of a run's folder while it is entered (see :class:`fastgpt.files.Lock`).

    Args:
        run_dir: is created if it does not exist.

    Attributes:
        until_exit: keep the lock when it is left, until the process ends: a thread still writes to the folder.

    Raises:
        RequestError: another process trains there, or the folder cannot be written to.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.until_exit = False
        self._lock = Lock(run_dir / LOCK)

    def __enter__(self) -> "RunLock":
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            holder = self._lock.acquire()
        except OSError as error:
            raise RequestError(f"cannot write to --out_dir {self._run_dir}: {error.strerror}") from error
        if holder is not None:
            raise RequestError(
                f"{self._run_dir} is in use by {holder}: wait for it, stop it, or pass another --out_dir"
            )
        return self

    def __exit__(self, *_: object) -> None:
        if not self.until_exit:
            self._lock.release()


def clear(run_dir: Path) -> None:
    """Remove an earlier run. Other files in the folder stay."""
    for path in held(run_dir):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write ``config.json``.

    Args:
        run_dir: is created if it does not exist.
        config: the content.

    Raises:
        RequestError: the folder cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        json_files.write(run_dir / CONFIG, asdict(config))
    except OSError as error:
        raise RequestError(f"cannot write to --out_dir {run_dir}: {error.strerror}") from error


def read_config(run_dir: Path) -> RunConfig:
    """The content of ``config.json``.

    Raises:
        RequestError: ``run_dir`` is not a run, or the file is damaged.
    """
    path = reachable(run_dir / CONFIG)
    if not path.is_file():
        raise RequestError(f"{run_dir} is not a run: it has no {CONFIG}")
    content = json_files.read(path)
    if not content.keys() & {"train", "model"}:
        raise RequestError(f"{run_dir} is not a run: another program wrote its {CONFIG}")
    return json_files.build(RunConfig, content, str(path))
