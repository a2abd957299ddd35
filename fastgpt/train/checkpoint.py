"""Checkpoints: ``checkpoints/step-NNNNNNN/{model.safetensors, optimizer.safetensors, state.json}``.

A checkpoint is written beside its final place and renamed into it, so a folder with that name is whole.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.errors import RequestError

_PREFIX = "step-"


@dataclass(frozen=True)
class State:
    """What a run must know besides tensors to go on: all of it is JSON."""

    step: int
    tokens: int
    best_val_loss: float | None  # among the checkpoints
    best_step: int | None
    loader: dict[str, Any]
    model: dict[str, Any]
    state_bits: int = 32  # of the moments
    loss_scale: float = 1.0
    updates_since_overflow: int = 0
    eval_batch_size: int | None = None  # blocks whose mean is one of the losses of an evaluation
    optimizer_seeds: list[int] = field(default_factory=list)  # for each parameter group that rounds at random


def steps(run: Path) -> list[int]:
    """The steps of which ``run`` holds a checkpoint, ascending."""
    found = (path.name.removeprefix(_PREFIX) for path in (run / "checkpoints").glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in found if name.isdigit())


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run / "checkpoints" / f"{_PREFIX}{step:07d}"


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint.

    Raises:
        RequestError: there is none.
    """
    found = steps(run)
    if not found:
        raise RequestError(f"{run} holds no checkpoint; train a run with --out_dir {run} first")
    return folder(run, found[-1])


def save(run: Path, state: State, parameters: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> Path:
    """Write a checkpoint; of the earlier ones only the one with the best validation loss stays.

    Args:
        run: the run's folder.
        state: the rest of the run's state.
        parameters: fp32, by name.
        moments: ``exp_avg`` and ``exp_avg_sq``, and with 8 bits their scales, each by parameter name.
    """
    target = folder(run, state.step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_on_cpu(parameters), partial / "model.safetensors", metadata={"format": "pt"})
    optimizer = {f"{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
    save_file({**_on_cpu(optimizer), **_random_state()}, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for step in steps(run):
        if step not in (state.step, state.best_step):
            shutil.rmtree(folder(run, step))
    return target


def _random_state() -> dict[str, Tensor]:
    state = {"rng_state.cpu": torch.get_rng_state()}
    return {**state, "rng_state.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else state


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Nothing is copied of what is there already: views of one buffer may be saved if they do not overlap."""
    return {name: t.detach().cpu() for name, t in tensors.items()}


def load_state(path: Path) -> State:
    """The JSON part of a checkpoint.

    Raises:
        RequestError: it is damaged, or another version of fastgpt wrote it.
    """
    try:
        return State(**json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{path / 'state.json'} cannot be read: {error}") from error


def load_parameters(path: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by name, on the CPU. ``RequestError`` if they are damaged."""
    return _load_tensors(path / "model.safetensors")


def load_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    """The optimizer's moments, by kind and parameter name; restores torch's random state on the way.

    ``RequestError`` if they are damaged.
    """
    tensors = _load_tensors(path / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng_state.cpu"))
    cuda_state = tensors.pop("rng_state.cuda", None)
    if cuda_state is not None and torch.cuda.is_initialized():  # else this run is on the CPU
        torch.cuda.set_rng_state(cuda_state)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        moments.setdefault(kind, {})[name] = tensor
    return moments


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
