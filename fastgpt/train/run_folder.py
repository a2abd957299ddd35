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


def held(run_dir: Path) -> list[Path]:
    """The files and folders of an earlier run in ``run_dir``."""
    return [run_dir / name for name in (CONFIG, METRICS, CHECKPOINTS, PLOT, TENSORBOARD) if (run_dir / name).exists()]


def check(config: TrainConfig) -> Path:
    """The folder of a run that starts from scratch.

    Raises:
        RequestError: it holds a run and ``--overwrite`` is not given, or it is a file.
    """
    run_dir = Path(config.out_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise RequestError(f"--out_dir {run_dir} is a file, not a folder")
    if held(run_dir) and not config.overwrite:
        raise RequestError(
            f"{run_dir} already holds a run: pass --overwrite to replace it, --init_from resume to continue it, "
            "or another --out_dir"
        )
    return run_dir


def clear(run_dir: Path) -> None:
    """Remove an earlier run. Other files in the folder stay."""
    for path in held(run_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_config(run_dir: Path, config: TrainConfig, gpt_config: GPTConfig, tokenizer: dict[str, Any] | None) -> None:
    """Write ``config.json``: what later commands need to know about the run.

    Raises:
        RequestError: the folder cannot be written to.
    """
    content = {"train": asdict(config), "model": asdict(gpt_config), "tokenizer": tokenizer}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise RequestError(f"cannot write to --out_dir {run_dir}: {error.strerror}") from error


def read_config(run_dir: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        RequestError: ``run_dir`` is not a run, or the file is damaged.
    """
    try:
        return json.loads((run_dir / CONFIG).read_text())
    except OSError as error:
        raise RequestError(f"{run_dir} is not a run: it has no {CONFIG}") from error
    except ValueError as error:
        raise RequestError(f"{run_dir / CONFIG} is damaged: {error}") from error
