"""What a resumed run takes from the run before: its configuration, which flags override, and its data.

A resumed run is the run that would have been, so whatever must be the same is checked, and whatever differs is listed.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fastgpt import json_files
from fastgpt.data.dataset import Dataset
from fastgpt.errors import RequestError
from fastgpt.files import reachable
from fastgpt.model.config import GPTConfig
from fastgpt.train import checkpoint, run_folder
from fastgpt.train.config import TrainConfig, parse_flags, resolve
from fastgpt.train.models import check_name

# Flags that a model to start from decides.
ARCHITECTURE = (
    "n_layer", "n_head", "n_embd", "bias", "positions", "norm", "qk_norm", "mlp", "n_kv_head", "tied", "softcap",
    "window", "value_embeddings",
)  # fmt: skip

# May differ without a word: they say where and how a process runs, or are settled anew for the device.
UNREMARKABLE = {
    "preset", "init_from", "overwrite", "out_dir", "data_dir", "device", "batch_size", "gradient_accumulation_steps",
    "recompute", "expect_params", "tensorboard", "wandb", "backend", "cuda_graphs", "max_hours",
    "max_skipped_updates", "keep_checkpoints", "always_save_checkpoint", "eval_only", "wandb_project", "wandb_run_name",
}  # fmt: skip


def parse(argv: Sequence[str] | None, presets: dict[str, dict[str, Any]]) -> TrainConfig:
    """The run that a command line requests.

    A run that is resumed starts from its own configuration, any other from its preset's. The flags override either.
    ``--init_from auto`` becomes ``resume`` if the folder holds a checkpoint, otherwise ``scratch``.

    Raises:
        RequestError: a preset or a flag is unknown, a value is invalid, or there is nothing to resume.
    """
    given = parse_flags(argv, presets)
    start = given.get("init_from", TrainConfig.init_from)
    if start not in ("resume", "auto"):
        _check_initial_model(start, given)
        return resolve(given, presets)
    preset = given.get("preset", TrainConfig.preset)
    run_dir = reachable(Path(given.get("out_dir") or presets.get(preset, {}).get("out_dir") or f"runs/{preset}"))
    if (run_dir / run_folder.CHECKPOINTS).is_dir():
        with run_folder.RunLock(run_dir):  # a process that is saving there now has no name to give back
            checkpoint.recover(run_dir)  # before auto takes the folder for one without a checkpoint
    if start == "auto" and not checkpoint.steps(run_dir):
        # a run that ended before its first checkpoint has nothing to lose
        return replace(resolve(given | {"init_from": "scratch"}, presets), overwrite=True)
    checkpoint.newest(run_dir)  # there is one, or the request is refused
    saved = run_folder.read_config(run_dir)
    values = known_flags(saved.train) | known_flags(saved.left_open)
    return resolve(given | {"init_from": "resume", "out_dir": str(run_dir)}, presets, values)


def _check_initial_model(start: str, given: dict[str, Any]) -> None:
    """Refuse a model that cannot exist, and flags of the architecture beside one to start from, which has its own."""
    if start == "scratch":
        return
    try:
        check_name(start, ("scratch", "resume", "auto"))
    except RequestError as error:
        raise RequestError(f"--init_from {start}: {error}; scratch, resume and auto start from none") from error
    own = [name for name in ARCHITECTURE if name in given]
    if own:
        raise RequestError(f"--{own[0]} is the model's that --init_from {start} starts from: leave it out")


def known_flags(saved: dict[str, Any]) -> dict[str, Any]:
    """The saved values of flags that this version of fastgpt has.

    Raises:
        RequestError: a value has the wrong type.
    """
    hints = get_type_hints(TrainConfig)
    names = [name for name in hints if name in saved]
    return {name: json_files.convert(hints[name], saved[name], f"{run_folder.CONFIG}: {name}") for name in names}


def differences(run_dir: Path, config: TrainConfig) -> list[str]:
    """The flags that differ from those of the run before, as ``learning_rate 0.01 (was 0.02)``."""
    before, now = known_flags(run_folder.read_config(run_dir).train), asdict(config)
    names = [name for name in now if name in before and name not in UNREMARKABLE and now[name] != before[name]]
    return [f"{name} {now[name]} (was {before[name]})" for name in names]


def find(run_dir: Path, config: TrainConfig, gpt_config: GPTConfig, dataset: Dataset) -> tuple[Path, list[str]]:
    """The newest undamaged checkpoint of a run if it can be continued with this request, and what damage was found.

    Raises:
        RequestError: there is none, or it is of another architecture, other moments or other data, or it lies beyond
            the last update that is requested.
    """
    path, damage = checkpoint.newest_good(run_dir)
    state = checkpoint.load_state(path)
    if replace(state.model, dropout=gpt_config.dropout) != gpt_config:  # dropout may change
        raise RequestError(
            f"cannot resume: {path} holds a model of {_shape(state.model)}, the request is {_shape(gpt_config)}"
        )
    if state.state_bits != config.state_bits:
        raise RequestError(
            f"cannot resume: {path} holds moments of {state.state_bits} bits; pass --state_bits {state.state_bits}"
        )
    if state.optimizer != config.optimizer:
        raise RequestError(
            f"cannot resume: {path} holds the state of {state.optimizer}; pass --optimizer {state.optimizer}"
        )
    if state.data is not None and state.data.id != dataset.identity:
        raise RequestError(
            f"cannot resume: {path} was trained on {state.data.path} ({state.data.id[:12]}), and "
            f"{dataset.path} ({dataset.identity[:12]}) is other data; pass that dataset, or start a new run"
        )
    if state.step > config.max_iters:
        raise RequestError(
            f"cannot resume: the run is at step {state.step:,} already, and --max_iters is {config.max_iters:,}"
        )
    return path, damage


def _shape(model: GPTConfig) -> str:
    names = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias"]
    names += [f.name for f in fields(model) if f.name not in names and getattr(model, f.name) != f.default]
    return ", ".join(f"{name}={getattr(model, name)}" for name in names if name != "dropout")
