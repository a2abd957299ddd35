"""A run is a folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``loss.png``, perhaps ``tensorboard/``."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastgpt.errors import RequestError
from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig

CONFIG, METRICS, PLOT, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"
TENSORBOARD = "tensorboard"


def held(run: Path) -> list[Path]:
    """The files and folders of a run that ``run`` holds already."""
    return [run / name for name in (CONFIG, METRICS, CHECKPOINTS, PLOT, TENSORBOARD) if (run / name).exists()]


def check(config: TrainConfig) -> Path:
    """The folder of a run that starts from scratch.

    Raises:
        RequestError: it holds a run that is not to be overwritten, or is no folder.
    """
    run = Path(config.out_dir)
    if run.exists() and not run.is_dir():
        raise RequestError(f"--out_dir {run} is a file, not a folder")
    if held(run) and not config.overwrite:
        raise RequestError(
            f"{run} already holds a run: pass --overwrite to replace it, --init_from resume to go on with it, "
            "or another --out_dir"
        )
    return run


def clear(run: Path) -> None:
    """Remove an earlier run; anything else in the folder stays."""
    for path in held(run):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_config(run: Path, config: TrainConfig, model: GPTConfig, tokenizer: dict[str, Any] | None) -> None:
    """Everything that later commands need to know of the run.

    Raises:
        RequestError: the folder cannot be written to.
    """
    content = {"train": asdict(config), "model": asdict(model), "tokenizer": tokenizer}
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise RequestError(f"cannot write to --out_dir {run}: {error.strerror}") from error


def read_config(run: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        RequestError: ``run`` is no run.
    """
    try:
        return json.loads((run / CONFIG).read_text())
    except OSError as error:
        raise RequestError(f"{run} is no run: it has no {CONFIG}") from error
    except ValueError as error:
        raise RequestError(f"{run / CONFIG} is damaged: {error}") from error
