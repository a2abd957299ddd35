"""Every flag of ``python -m fastgpt.train``, its default and its meaning; names are nanoGPT's where it has one."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastgpt.cli import Parser, did_you_mean, parse_bool
from fastgpt.errors import RequestError
from fastgpt.kernels.ops import BACKENDS
from fastgpt.model.config import GPTConfig

_AT_LEAST_ONE = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
    "eval_interval",
    "eval_iters",
    "log_interval",
)
_NOT_NEGATIVE = (
    "seed",
    "warmup_iters",
    "checkpoint_interval",
    "max_hours",
    "learning_rate",
    "min_lr",
    "weight_decay",
    "grad_clip",
)


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
    batch_size: int = _option(12, "sequences in a micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an update")
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
        "auto: bfloat16 where the device multiplies it natively, else float32, on older GPUs float16",
        ("auto", "float32", "bfloat16", "float16"),
    )
    recompute: str = _option(
        "auto",
        "what the backward makes again instead of keeping it: nothing, norms and GELU, or whole blocks",
        ("auto", "none", "cheap", "block"),
    )
    cuda_graphs: bool = _option(True, "record the step on a GPU once and replay it")
    compile: bool = _option(False, "also run the model through torch.compile")
    backend: str = _option("auto", "what runs the kernels", BACKENDS)

    def __post_init__(self) -> None:
        if not self.out_dir:
            object.__setattr__(self, "out_dir", f"runs/{self.preset}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"--{item.name} must be a finite number, got {value}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise RequestError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise RequestError(f"--{name} must not be negative, got {getattr(self, name)}")
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
        return self.batch_size * self.gradient_accumulation_steps * self.block_size

    def model(self, vocab_size: int) -> GPTConfig:
        """The model of this run, checked against ``--expect_params``."""
        try:
            names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
            config = GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})
        except ValueError as error:
            raise RequestError(str(error)) from error
        if self.expect_params:
            expected = _parse_count(self.expect_params)
            if all(abs(n / expected - 1) > 0.02 for n in (config.n_params, config.n_params_without_positions)):
                raise RequestError(
                    f"--expect_params {self.expect_params}, but this model has {config.n_params / 1e6:.2f}M parameters "
                    f"(n_layer={config.n_layer}, n_embd={config.n_embd}, vocabulary {config.vocab_size})"
                )
        return config


def _parse_count(text: str) -> float:
    try:
        number = text.strip().upper()
        factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(number[-1:], 1.0)
        count = float(number.rstrip("KMB")) * factor
    except ValueError:
        count = 0.0
    if not count > 0:
        raise RequestError(f"--expect_params takes a count such as 124M, not '{text}'")
    return count


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
    for item in fields(TrainConfig):
        options: dict[str, Any] = {"type": item.type, "choices": item.metadata["choices"]}
        if item.type is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True}
        if options["choices"] is None:
            options["metavar"] = _METAVARS[item.type]
        help = item.metadata["help"].replace("%", "%%") + (f" ({item.default})" if item.default != "" else "")
        parser.add_argument(f"--{item.name}", default=argparse.SUPPRESS, help=help, **options)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", TrainConfig.preset)
    if preset not in presets:
        raise RequestError(
            f"unknown preset '{preset}'{did_you_mean(preset, list(presets))} (there are {', '.join(presets)})"
        )
    values = {**presets[preset], **given, "preset": preset}
    return TrainConfig(**{**values, **_rates_for_width(values, given, presets[preset].get("n_embd"))})


def _rates_for_width(values: dict[str, Any], given: dict[str, Any], preset_width: int | None) -> dict[str, float]:
    """The preset's learning rates carried over to another ``n_embd``, unless the flags give rates of their own.

    Adam's best rate falls as 1 / width (Yang and Hu et al., "Tensor Programs V", 2022), so a preset made
    narrower without this would train too slowly, and one made wider might diverge.
    """
    if preset_width is None or values["n_embd"] < 1 or "learning_rate" in given:
        return {}
    names = [name for name in ("learning_rate", "min_lr") if name in values and name not in given]
    return {name: values[name] * preset_width / values["n_embd"] for name in names}
