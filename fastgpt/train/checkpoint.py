"""Checkpoints: ``checkpoints/step-NNNNNNN/{model.safetensors, optimizer.safetensors, state.json}``.

A checkpoint is written to a folder with another name and then renamed, so a folder with the final name is complete.
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
_RANDOM = "rng_state."


@dataclass(frozen=True)
class State:
    """What a run needs to continue, besides tensors. All of it is JSON."""

    step: int
    tokens: int
    best_val_loss: float | None  # among the checkpoints
    best_step: int | None
    loader: dict[str, Any]
    model: dict[str, Any]
    state_bits: int = 32  # of the moments
    loss_scale: float = 1.0
    updates_since_overflow: int = 0
    data: dict[str, str] | None = None  # the dataset's path and identity
    evaluated_step: int | None = None  # of the last evaluation, -1 before the first
    eval_batch_size: int | None = None  # blocks in a batch of an evaluation
    optimizer_seeds: list[int] = field(default_factory=list)  # of each parameter group that rounds stochastically


def steps(run_dir: Path) -> list[int]:
    """The steps that have a checkpoint in ``run_dir``, ascending."""
    found = (path.name.removeprefix(_PREFIX) for path in (run_dir / "checkpoints").glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in found if name.isdigit())


def folder(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of ``step``."""
    return run_dir / "checkpoints" / f"{_PREFIX}{step:07d}"


def newest(run_dir: Path) -> Path:
    """The folder of the newest checkpoint.

    Raises:
        RequestError: there is none.
    """
    found = steps(run_dir)
    if not found:
        raise RequestError(f"{run_dir} holds no checkpoint; train a run with --out_dir {run_dir} first")
    return folder(run_dir, found[-1])


def save(run_dir: Path, state: State, parameters: dict[str, Tensor], moments: dict[str, dict[str, Tensor]]) -> Path:
    """Write a checkpoint. Of earlier ones only that with the best validation loss is kept.

    Args:
        run_dir: the run's folder.
        state: the rest of the run's state.
        parameters: fp32, by name.
        moments: ``exp_avg`` and ``exp_avg_sq``, and with 8 bits their scales, each by parameter name.
    """
    target = folder(run_dir, state.step)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_on_cpu(parameters), partial / "model.safetensors", metadata={"format": "pt"})
    optimizer = {f"{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
    save_file({**_on_cpu(optimizer), **random_state()}, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for step in steps(run_dir):
        if step not in (state.step, state.best_step):
            shutil.rmtree(folder(run_dir, step))
    return target


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU are not copied: safetensors takes views of one buffer if they do not overlap."""
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
    """The optimizer's moments, by kind and parameter name. ``RequestError`` if they are damaged."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load_tensors(path / "optimizer.safetensors").items():
        kind, _, name = key.partition(".")
        if not key.startswith(_RANDOM):
            moments.setdefault(kind, {})[name] = tensor
    return moments


def load_random_state(path: Path) -> dict[str, Tensor]:
    """The state of torch's random number generators. ``RequestError`` if the file is damaged."""
    tensors = _load_tensors(path / "optimizer.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_RANDOM)}


def random_state() -> dict[str, Tensor]:
    """The state of torch's random number generators now."""
    state = {_RANDOM + "cpu": torch.get_rng_state()}
    return {**state, _RANDOM + "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's random number generators to ``state``."""
    torch.set_rng_state(state[_RANDOM + "cpu"])
    if _RANDOM + "cuda" in state and torch.cuda.is_initialized():  # not initialized: this run is on the CPU
        torch.cuda.set_rng_state(state[_RANDOM + "cuda"])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
