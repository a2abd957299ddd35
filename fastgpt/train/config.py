"""Every flag of ``python -m fastgpt.train``, its default and its meaning; names are nanoGPT's where it has one."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from fastgpt.cli import Parser, did_you_mean, parse_bool
from fastgpt.errors import RequestError
from fastgpt.kernels.dispatch import BACKENDS
from fastgpt.model.config import GPTConfig
from fastgpt.units import count, parse_count

_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
)
_MAY_BE_AUTO = ("batch_size", "gradient_accumulation_steps")
_NOT_NEGATIVE = (
    "seed",
    "total_batch_size",
    "warmup_iters",
    "checkpoint_interval",
    "max_hours",
    "learning_rate",
    "min_lr",
    "weight_decay",
    "grad_clip",
)


AUTO = 0  # of batch_size and gradient_accumulation_steps: chosen for the device that runs


def _option(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are nanoGPT's for GPT-2 124M unless a preset says otherwise.

    Raises:
        RequestError: values that do not fit together or lie out of range.
    """

    # what and where
    preset: str = _option("quickstart", "the set of defaults that the other flags override")
    dataset: str = _option("stdlib", "a dataset's name under --data_dir, or the path of one")
    data_dir: str = _option("data", "folder of prepared datasets")
    out_dir: str = _option("", "folder of the run; runs/PRESET if not given")
    overwrite: bool = _option(False, "replace a run that is already in out_dir")
    init_from: str = _option("scratch", "scratch, or resume from out_dir's newest checkpoint", ("scratch", "resume"))
    seed: int = _option(1337, "of the initial weights, the batches and dropout")

    # model
    n_layer: int = _option(12, "layers")
    n_head: int = _option(12, "attention heads; must divide n_embd")
    n_embd: int = _option(768, "width")
    block_size: int = _option(1024, "context length in tokens")
    bias: bool = _option(False, "biases in linear layers and layer norms; OpenAI's GPT-2 has them")
    dropout: float = _option(0.0, "on attention, residual branches and the embedding")
    expect_params: str = _option("", "refuse to start if the model is over 2 % off this size, e.g. 124M")

    # batches and length
    batch_size: int = _option(12, "sequences in a micro-batch; auto for what is fastest in the device's memory")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an update; by default what --total_batch_size asks")
    total_batch_size: int = _option(AUTO, "tokens in an update, exactly; 0 for what the two above come to")
    max_iters: int = _option(600_000, "updates")
    max_hours: float = _option(0.0, "stop with a checkpoint after so many hours; 0 for no limit")

    # optimizer
    learning_rate: float = _option(6e-4, "peak learning rate")
    min_lr: float = _option(6e-5, "learning rate that the cosine decays to")
    warmup_iters: int = _option(2000, "updates of linear warm-up")
    lr_decay_iters: int = _option(600_000, "update at which the cosine ends")
    beta1: float = _option(0.9, "AdamW's decay rate of the first moment")
    beta2: float = _option(0.95, "AdamW's decay rate of the second moment")
    weight_decay: float = _option(0.1, "on matrices; vectors have none")
    grad_clip: float = _option(1.0, "largest gradient norm; 0 for no clipping")
    state_bits: int = _option(32, "of each of AdamW's two moments; 8 take 2 bytes a parameter instead of 8", (8, 32))

    # evaluation, logging, checkpoints
    eval_interval: int = _option(2000, "updates between evaluations")
    eval_iters: int = _option(200, "batches of each split in an evaluation")
    log_interval: int = _option(1, "updates between logged lines")
    checkpoint_interval: int = _option(0, "updates between checkpoints; 0 for one at each evaluation")
    tensorboard: bool = _option(False, "also log to TensorBoard, in out_dir/tensorboard")
    wandb: bool = _option(False, "also log to Weights & Biases, in the project fastgpt or that of WANDB_PROJECT")

    # machine
    device: str = _option("auto", "cpu, cuda, cuda:N; auto for a GPU if there is one")
    dtype: str = _option(
        "auto",
        "auto: bfloat16 where the device multiplies it faster, else float32, on older GPUs float16",
        ("auto", "float32", "bfloat16", "float16"),
    )
    recompute: str = _option(
        "auto",
        "what the backward makes again instead of keeping it: nothing, norms and GELU, or whole blocks",
        ("auto", "none", "cheap", "block"),
    )
    deterministic: bool = _option(
        True, "the same gradients to the bit each time; False lets attention's be added up by atomics on a GPU"
    )
    cuda_graphs: bool = _option(True, "record the step on a GPU once and replay it")
    compile: bool = _option(False, "run the model through torch.compile, without CUDA graphs or --recompute")
    backend: str = _option("auto", "what runs the kernels", BACKENDS)

    def __post_init__(self) -> None:
        if not self.out_dir:
            object.__setattr__(self, "out_dir", f"runs/{self.preset}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"--{item.name} must be a finite number, got {value}")
        if self.batch_size == AUTO and not self.total_batch_size:
            raise RequestError("--batch_size auto needs --total_batch_size, the tokens of an update")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1 and not (name in _MAY_BE_AUTO and self.total_batch_size):
                raise RequestError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise RequestError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.compile and self.recompute in ("cheap", "block"):
            raise RequestError(
                f"--recompute {self.recompute} does nothing with --compile, where the compiler chooses what is kept: "
                "leave one of them out"
            )
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise RequestError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.lr_decay_iters < self.warmup_iters:
            raise RequestError(
                f"--lr_decay_iters={self.lr_decay_iters} is over before the warm-up is "
                f"(--warmup_iters={self.warmup_iters})"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one update."""
        return self.total_batch_size or self.batch_size * self.gradient_accumulation_steps * self.block_size

    def torch_dtype(self, automatic: torch.dtype) -> torch.dtype:
        """What ``--dtype`` names; ``automatic`` for auto."""
        return automatic if self.dtype == "auto" else getattr(torch, self.dtype)

    def with_batch_size(self, batch_size: int) -> "TrainConfig":
        """The same run with this micro-batch, and with as many of them in an update as make it exact.

        Raises:
            RequestError: no number of them does.
        """
        if not self.total_batch_size:
            return replace(self, batch_size=batch_size)
        accumulation, rest = divmod(self.total_batch_size, batch_size * self.block_size)
        if rest or not accumulation:
            raise RequestError(
                f"an update of {self.total_batch_size:,} tokens is no whole number of micro-batches of {batch_size} x "
                f"{self.block_size}: {self._exact_choices(batch_size)}"
            )
        return replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)

    def _exact_choices(self, batch_size: int) -> str:
        """What would be exact and is near."""
        sequences, rest = divmod(self.total_batch_size, self.block_size)
        micro_batch = batch_size * self.block_size
        below = self.total_batch_size // micro_batch * micro_batch
        totals = " or ".join(f"{total}" for total in (below, below + micro_batch) if total)
        if rest:
            return f"--total_batch_size {totals} would do"
        divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
        smaller = max((n for n in divisors if n < batch_size), default=None)
        larger = min((n for n in divisors if n > batch_size), default=None)
        sizes = " or ".join(f"{n}" for n in (smaller, larger) if n)
        return f"--batch_size {sizes} would do, or --total_batch_size {totals}"

    def model(self, vocab_size: int) -> GPTConfig:
        """The model of this run, checked against ``--expect_params``."""
        try:
            names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
            config = GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise RequestError(str(error)) from error
        if self.expect_params:
            expected = parse_count("expect_params", self.expect_params)
            if all(abs(n / expected - 1) > 0.02 for n in (config.n_params, config.n_params_without_positions)):
                raise RequestError(
                    f"--expect_params {self.expect_params}, but this model has {count(config.n_params, 2)} parameters "
                    f"(n_layer={config.n_layer}, n_embd={config.n_embd}, vocabulary {config.vocab_size})"
                )
        return config


def _parse_batch_size(text: str) -> int:
    if text == "auto":
        return AUTO
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, not '{text}'") from None
    if number < 1:
        raise RequestError(f"--batch_size must be at least 1, got {number}")
    return number


_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "True|False", str: "TEXT"}


def parse(argv: Sequence[str] | None, presets: dict[str, dict[str, Any]]) -> TrainConfig:
    """The run that a command line asks for: a preset's values, then the flags'.

    Raises:
        RequestError: an unknown preset or flag, or a value that does not parse or fit.
    """
    parser = Parser(
        prog="python -m fastgpt.train",
        description="Train a GPT.\n\n  python -m fastgpt.train                        a minute on a CPU, offline\n"
        "  python -m fastgpt.train --preset gpt2-124m     GPT-2 124M on FineWeb",
        epilog=f"presets: {', '.join(presets)}",
    )
    add_flags(parser)
    return resolve(vars(parser.parse_args(argv)), presets)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``TrainConfig``; those that are not given are absent from the result."""
    for item in fields(TrainConfig):
        options: dict[str, Any] = {"type": item.type, "choices": item.metadata["choices"]}
        if item.type is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True}
        if item.name == "batch_size":
            options["type"] = _parse_batch_size
        if options["choices"] is None:
            options["metavar"] = _METAVARS[item.type]
        help = item.metadata["help"].replace("%", "%%") + (f" ({item.default})" if item.default != "" else "")
        parser.add_argument(f"--{item.name}", default=argparse.SUPPRESS, help=help, **options)


def resolve(given: dict[str, Any], presets: dict[str, dict[str, Any]]) -> TrainConfig:
    """The run that flags ask for: their preset's values, then theirs.

    A preset's ``total_batch_size`` gives way to a ``gradient_accumulation_steps`` among the flags.

    Raises:
        RequestError: the preset is unknown, or the values do not fit.
    """
    preset = given.get("preset", TrainConfig.preset)
    if preset not in presets:
        raise RequestError(
            f"unknown preset '{preset}'{did_you_mean(preset, list(presets))} (there are {', '.join(presets)})"
        )
    values = {**presets[preset], **given, "preset": preset}
    if "gradient_accumulation_steps" in given and "total_batch_size" not in given:
        total = values.pop("total_batch_size", AUTO)
        if values.get("batch_size") == AUTO:
            values["batch_size"] = _shared_out(total, given["gradient_accumulation_steps"], values)
    config = TrainConfig(**{**values, **_rates_for_width(values, given, presets[preset].get("n_embd"))})
    if config.batch_size == AUTO or not config.total_batch_size:
        return config
    settled = config.with_batch_size(config.batch_size)
    accumulation = settled.gradient_accumulation_steps
    if given.get("gradient_accumulation_steps", accumulation) != accumulation:
        raise RequestError(
            f"--gradient_accumulation_steps {given['gradient_accumulation_steps']} contradicts --total_batch_size "
            f"{config.total_batch_size}, which takes {accumulation}; give one of them"
        )
    return settled


def _shared_out(total: int, accumulation: int, values: dict[str, Any]) -> int:
    """The micro-batch of an update of so many tokens in so many parts."""
    block_size = values.get("block_size", TrainConfig.block_size)
    if accumulation < 1 or total % (accumulation * block_size) or not total:
        raise RequestError(
            f"--gradient_accumulation_steps {accumulation} does not divide an update of {total:,} tokens in sequences "
            f"of {block_size}: give --batch_size too"
        )
    return total // (accumulation * block_size)


def _rates_for_width(values: dict[str, Any], given: dict[str, Any], preset_width: int | None) -> dict[str, float]:
    """The preset's learning rates carried over to another ``n_embd``, unless the flags give rates of their own.

    Adam's best rate falls as 1 / width (Yang and Hu et al., "Tensor Programs V", 2022), so a preset made
    narrower without this would train too slowly, and one made wider might diverge.
    """
    if preset_width is None or values["n_embd"] < 1 or "learning_rate" in given:
        return {}
    names = [name for name in ("learning_rate", "min_lr") if name in values and name not in given]
    return {name: values[name] * preset_width / values["n_embd"] for name in names}
