"""Trackers that a run's metrics go to besides its own file: TensorBoard, Weights & Biases. Imported on request."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from fastgpt.errors import RequestError
from fastgpt.train.config import TrainConfig
from fastgpt.train.run_folder import TENSORBOARD

WANDB_ID = "wandb/fastgpt-id"  # in the run's folder; holds the run's id at Weights & Biases


class Tracker(Protocol):
    """Gets every record of ``metrics.jsonl`` as it is written."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """The numbers of one record; ``kind`` is ``train``, ``eval`` or ``finding``."""

    def close(self, failed: bool) -> None:
        """End the run."""


def check(config: TrainConfig) -> None:
    """Check that the requested trackers can be used.

    Raises:
        RequestError: a package is missing, or the login to Weights & Biases fails.
    """
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise _missing("tensorboard") from error
    if config.wandb:
        try:  # a name from it, because any folder called wandb can be imported
            from wandb import Error, login
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            login()
        except Error as error:
            raise RequestError(f"--wandb: {error}") from error


def _missing(package: str) -> RequestError:
    return RequestError(f"--{package} needs the package {package}: pip install fastgpt[{package}]")


def start(config: TrainConfig, run_dir: Path, step: int) -> list[Tracker]:
    """The requested trackers.

    Args:
        config: the run's.
        run_dir: its folder, which exists already.
        step: the update that the run continues from; 0 for a new run.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run_dir, step))
    if config.wandb:
        trackers.append(WeightsAndBiases(config, run_dir, step))
    return trackers


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # updates after the checkpoint are repeated; their first records are hidden
        self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1 if step else None)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project and under the name of the flags, or else ``WANDB_PROJECT`` and the run's folder."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        import wandb

        id_file = run_dir / WANDB_ID
        self._run = wandb.init(
            project=config.wandb_project or os.environ.get("WANDB_PROJECT", "fastgpt"),
            name=config.wandb_run_name or run_dir.resolve().name,
            dir=str(run_dir),
            config=asdict(config),
            allow_val_change=True,  # --max_iters, say, of a resumed run
            id=id_file.read_text() if step and id_file.exists() else None,
            resume="allow",
        )
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(self._run.id)
        # Its own step counter cannot go back, but a run that resumes from a checkpoint does.
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**{f"{kind}/{name}": value for name, value in values.items()}, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
