"""Checkpoints: ``checkpoints/step-NNNNNNN/{model.safetensors, optimizer.safetensors, state.json, manifest.json}``.

A checkpoint is written to a folder with another name, flushed to the disk, and then renamed. So a folder with the final
name is complete, also after a power cut. Older checkpoints are removed only after that. The manifest has the SHA-256 of
each file; a file that no longer matches it is refused.
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt import json_files
from fastgpt.errors import RequestError
from fastgpt.files import file_sha256, written_whole
from fastgpt.model.config import GPTConfig
from fastgpt.train.config import Optimizer

_PREFIX = "step-"
_RANDOM = "rng_state."
_PARTIAL, _OLD = ".partial", ".old"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
LATEST, BEST = "latest", "best"  # links to the newest checkpoint, and to the one with the best validation loss


class NotSaved(OSError):
    """The disk did not take a checkpoint; the message says why."""


@dataclass(frozen=True)
class DataOrigin:
    """The dataset that a run is trained on: where it was, and the digest of its content."""

    path: str
    id: str


@dataclass(frozen=True)
class State:
    """What a run needs to continue, besides tensors. All of it is JSON."""

    step: int
    tokens: int
    best_val_loss: float | None  # among the checkpoints
    best_step: int | None
    loader: dict[str, int]
    model: GPTConfig
    state_bits: int = 32  # of the moments
    optimizer: Optimizer = "adamw"
    skipped: int = 0  # updates
    skipped_in_a_row: int = 0  # just before this step, because gradients were not finite
    most_in_a_row: int = 0
    last_skipped: int = 0  # the number of that update
    reported_skipped: int | None = None  # of `skipped`, those that the log has told; `None` for all
    reported_spikes: int | None = None
    spikes: int = 0  # updates that were skipped because they stood out
    spike_window: list[list[float]] = field(default_factory=list)  # see SpikeDetector.state_dict
    loss_scale: float = 1.0
    updates_since_overflow: int = 0
    data: DataOrigin | None = None
    evaluated_step: int | None = None  # of the last evaluation, -1 before the first
    eval_batch_size: int | None = None  # blocks in a batch of an evaluation
    optimizer_seeds: list[int] = field(default_factory=list)  # of each parameter group that rounds stochastically

    def __post_init__(self) -> None:
        if self.step < 0 or self.tokens < 0 or not 0 <= self.spikes <= self.skipped <= self.step:
            raise ValueError(f"step {self.step}, tokens {self.tokens}, skipped {self.skipped} are not those of a run")
        if self.state_bits not in (8, 32) or self.loss_scale <= 0.0:
            raise ValueError(f"state_bits {self.state_bits}, loss_scale {self.loss_scale} are not those of a run")
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ValueError(f"eval_batch_size {self.eval_batch_size} is less than 1")


@dataclass(frozen=True)
class Manifest:
    """The SHA-256 of each file of a checkpoint."""

    sha256: dict[str, str]


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


def save(
    run_dir: Path, state: State, parameters: dict[str, Tensor], moments: dict[str, dict[str, Tensor]],
    keep: int | None = 1, random: dict[str, Tensor] | None = None, best_before: int | None = None,
) -> Path:  # fmt: skip
    """Write a checkpoint, then remove earlier ones.

    Args:
        run_dir: the run's folder.
        state: the rest of the run's state.
        parameters: fp32, by name.
        moments: ``exp_avg`` and ``exp_avg_sq``, with 8 bits their scales, and Muon's ``momentum_buffer``, each by
            parameter name.
        keep: how many of the newest remain, with this one; the one with the best validation loss always does. ``None``
            for all.
        random: from :func:`random_state`, now if ``None``.
        best_before: the step whose checkpoint was the best until this one; kept if this one cannot be written.

    Raises:
        NotSaved: the disk is full, or does not take it for another reason. The newest checkpoint and the best one are
            as they were.
    """
    tensors = {f"{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}
    tensors |= random_state() if random is None else random
    earlier = [step for step in steps(run_dir) if step < state.step]
    try:
        path = _save(run_dir, state, parameters, tensors)
    except NotSaved:
        # Later ones go too: the run was resumed before them because they are damaged.
        best = state.best_step if state.best_step in earlier else best_before
        if not _remove_all_but(run_dir, {best, *earlier[-1:], state.step}):
            raise
        path = _save(run_dir, state, parameters, tensors)  # there may be room now
    _link(run_dir, LATEST, state.step)
    if state.best_step is not None:
        _link(run_dir, BEST, state.best_step)
    if keep is not None:
        _remove_all_but(run_dir, {state.step, state.best_step, *earlier[max(0, len(earlier) - keep + 1) :]})
    return path


def _link(run_dir: Path, name: str, step: int) -> None:
    """Make ``name`` a link to a checkpoint, for people; nothing here reads it. File systems without links lack it."""
    path = run_dir / "checkpoints" / name
    if path.is_dir() and not path.is_symlink():  # a copy of the run that followed its links
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError), written_whole(path) as link:
        link.symlink_to(folder(run_dir, step).name)


def _remove_all_but(run_dir: Path, kept: set[int | None]) -> bool:
    """Remove checkpoints; whether there was one. What cannot be removed, such as an open file on NFS, stays."""
    removed = [step for step in steps(run_dir) if step not in kept]
    for step in removed:
        path = folder(run_dir, step)
        # Under its own name, half of it could be taken for a whole one if the process died now.
        leaving = path.with_name(path.name + _PARTIAL)
        with suppress(OSError):
            path.rename(leaving)
            path = leaving
        shutil.rmtree(path, ignore_errors=True)
    return bool(removed)


def _save(run_dir: Path, state: State, parameters: dict[str, Tensor], others: dict[str, Tensor]) -> Path:
    target = folder(run_dir, state.step)
    partial, old = (target.with_name(target.name + suffix) for suffix in (_PARTIAL, _OLD))
    try:
        recover(run_dir)
        for left_over in (*target.parent.glob(f"{_PREFIX}*{_PARTIAL}"), old):  # of processes that died
            shutil.rmtree(left_over, ignore_errors=True)
        _write(partial, state, parameters, others)
        if target.exists():  # saved before at this step
            target.rename(old)
        partial.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it is in the way
        with suppress(OSError):
            recover(run_dir)
        raise NotSaved(getattr(error, "strerror", None) or str(error)) from error
    shutil.rmtree(old, ignore_errors=True)
    return target


def n_bytes(model: GPTConfig, state_bits: int, optimizer: Optimizer) -> int:
    """The size of a checkpoint of a model: fp32 parameters and moments, in 8 bits with an fp32 scale for 256.

    AdamW has two moments for each parameter that it updates, and Muon one.
    """
    parameters = model.n_params
    moments = 2 * parameters - (model.n_params_of_blocks if optimizer == "muon" else 0)
    return parameters * 4 + (moments * 4 if state_bits == 32 else moments + moments // 64)


def _write(partial: Path, state: State, parameters: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Write all files of a checkpoint to the folder ``partial``, and have the disk write them."""
    partial.mkdir(parents=True)
    save_file(_on_cpu(parameters), partial / "model.safetensors", metadata={"format": "pt"})
    save_file(_on_cpu(others), partial / "optimizer.safetensors")
    json_files.write(partial / "state.json", asdict(state))
    manifest = Manifest({path.name: file_sha256(path) for path in sorted(partial.iterdir())})
    json_files.write(partial / MANIFEST, asdict(manifest))
    mode = (partial / MANIFEST).stat().st_mode & 0o777  # the umask's; safetensors lets only the owner read
    for path in partial.iterdir():
        path.chmod(mode)
        _flush(path)
    _flush(partial)


def recover(run_dir: Path) -> None:
    """Give a checkpoint its name back if the process died between the two renames of :func:`save`."""
    for old in (run_dir / "checkpoints").glob(f"{_PREFIX}*{_OLD}"):
        target = old.with_name(old.name.removesuffix(_OLD))
        if not target.exists():
            old.rename(target)


def verify(path: Path, names: Sequence[str] = FILES) -> None:
    """Compare files of a checkpoint with its manifest. A checkpoint from before there were manifests is accepted.

    Args:
        path: folder of the checkpoint.
        names: the files; all by default.

    Raises:
        RequestError: a file is missing or has changed; the message names it.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        return
    expected = json_files.build(Manifest, json_files.read(manifest), str(manifest)).sha256
    if not expected.keys() >= set(FILES):
        raise RequestError(f"{manifest} is damaged: it does not list {', '.join(FILES)}")
    for name in names:
        try:
            found = file_sha256(path / name)
        except OSError as error:
            raise RequestError(f"{path / name} cannot be read: {error.strerror}") from error
        if found != expected[name]:
            raise RequestError(f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def newest_good(run_dir: Path, names: Sequence[str] = FILES) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files are those that were written, and what is wrong with newer ones.

    Args:
        run_dir: the run's folder.
        names: the files that matter; all by default.

    Raises:
        RequestError: there is none.
    """
    problems: list[str] = []
    for step in reversed(steps(run_dir)):
        try:
            verify(folder(run_dir, step), names)
            if "state.json" in names:  # it has not been compared if there is no manifest
                load_state(folder(run_dir, step))
        except RequestError as error:
            problems.append(str(error))
            continue
        return folder(run_dir, step), problems
    if problems:
        raise RequestError(f"{run_dir} has no checkpoint that can be used: {'; '.join(problems)}")
    return newest(run_dir), problems  # raises


# What fsync says where a file system or an operating system does not have it.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def _flush(path: Path) -> None:
    """Have the disk write a file or the entries of a folder now. ``OSError`` if it cannot, for example because full."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # which Windows does not open
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU are not copied: safetensors takes views of one buffer if they do not overlap."""
    return {name: t.detach().cpu() for name, t in tensors.items()}


def load_state(path: Path) -> State:
    """The JSON part of a checkpoint.

    Raises:
        RequestError: it is damaged, or another version of fastgpt wrote it.
    """
    return json_files.build(State, json_files.read(path / "state.json"), str(path / "state.json"))


def n_parameters(path: Path) -> int:
    """How many parameters a checkpoint has, from the head of its file. ``RequestError`` if it is damaged."""
    file = path / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{file} cannot be read: {error}") from error


def load_parameters(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by name, on the CPU.

    Args:
        path: folder of the checkpoint.
        like: tensors with the names, shapes and dtypes that are expected; ``None`` for any.

    Raises:
        RequestError: they are damaged, or not the ones that are expected.
    """
    file = path / "model.safetensors"
    parameters = _load_tensors(file)
    if like is not None:
        _check_like(file, parameters, like)
    return parameters


def load_moments(path: Path, like: Mapping[str, Mapping[str, Tensor]] | None = None) -> dict[str, dict[str, Tensor]]:
    """The optimizer's moments, by kind and parameter name. The arguments and errors are those of `load_parameters`."""
    file = path / "optimizer.safetensors"
    tensors = _load_tensors(file, lambda name: not name.startswith(_RANDOM))
    if like is not None:
        _check_like(file, tensors, {f"{kind}.{name}": t for kind, named in like.items() for name, t in named.items()})
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        moments.setdefault(kind, {})[name] = tensor
    return moments


def _check_like(file: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raise ``RequestError`` unless names, shapes and dtypes are those of ``like``: a copy would convert in silence."""
    for name in sorted(tensors.keys() ^ like.keys()):
        raise RequestError(f"{file}: {name} is {'missing' if name in like else 'unknown'}")
    for name, expected in like.items():
        t = tensors[name]
        if t.shape != expected.shape or t.dtype != expected.dtype:
            raise RequestError(
                f"{file}: expected {name} of {expected.dtype}, {tuple(expected.shape)}, got {t.dtype}, {tuple(t.shape)}"
            )


def load_random_state(path: Path) -> dict[str, Tensor]:
    """The state of torch's random number generators. ``RequestError`` if the file is damaged."""
    return _load_tensors(path / "optimizer.safetensors", lambda name: name.startswith(_RANDOM))


def random_state() -> dict[str, Tensor]:
    """The state of torch's random number generators now."""
    state = {_RANDOM + "cpu": torch.get_rng_state()}
    return {**state, _RANDOM + "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's random number generators to ``state``. ``RequestError`` if it is not what ``random_state`` gives."""
    try:
        torch.set_rng_state(state[_RANDOM + "cpu"])
        if _RANDOM + "cuda" in state and torch.cuda.is_initialized():  # not initialized: this run is on the CPU
            torch.cuda.set_rng_state(state[_RANDOM + "cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise RequestError(f"the checkpoint's random state cannot be used: {error}") from error


def _load_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a file with the names wanted; the others are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
