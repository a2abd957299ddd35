"""Where a run's metrics go besides its own file: TensorBoard, Weights & Biases. Imported only when asked for."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from fastgpt.errors import RequestError
from fastgpt.train.config import TrainConfig
from fastgpt.train.run_folder import TENSORBOARD

WANDB_ID = "wandb/fastgpt-id"  # in the run's folder; under this id Weights & Biases knows the run


class Tracker(Protocol):
    """Takes every record of ``metrics.jsonl`` as it is written."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record's numbers; ``kind`` is ``train`` or ``eval``."""

    def close(self, failed: bool) -> None:
        """The run is over."""


def check(config: TrainConfig) -> None:
    """See that what the flags ask for is here.

    Raises:
        RequestError: a package is missing, or Weights & Biases lets nobody in.
    """
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise _missing("tensorboard") from error
    if config.wandb:
        try:  # a name, because a mere folder called wandb can be imported too
            from wandb import Error, login
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            login()
        except Error as error:
            raise RequestError(f"--wandb: {error}") from error


def _missing(package: str) -> RequestError:
    return RequestError(f"--{package} needs the package {package}: pip install fastgpt[{package}]")


def start(config: TrainConfig, run: Path, step: int) -> list[Tracker]:
    """The trackers that the flags ask for.

    Args:
        config: the run's.
        run: its folder, which is there already.
        step: the update that the run goes on from; 0 for a new run.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.wandb:
        trackers.append(WeightsAndBiases(config, run, step))
    return trackers


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # updates after the checkpoint are made again, so what was said of them is hidden
        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project ``fastgpt``, or that of ``WANDB_PROJECT``, named as the run's folder."""

    def __init__(self, config: TrainConfig, run: Path, step: int) -> None:
        import wandb

        id_file = run / WANDB_ID
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastgpt"),
            name=run.resolve().name,
            dir=str(run),
            config=asdict(config),
            allow_val_change=True,  # --max_iters, say, of a resumed run
            id=id_file.read_text() if step and id_file.exists() else None,
            resume="allow",
        )
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(self._run.id)
        # Its own count of steps never goes back, as a run does that is resumed from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**{f"{kind}/{name}": value for name, value in values.items()}, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
