"""Every flag of ``python -m fastgpt.train``, its default and its meaning. Names are nanoGPT's where it has one.

A flag is a field of :class:`TrainConfig`: its annotation gives the type and the choices, ``_option`` the default and
the help text. One that does not change what is learnt also belongs to ``UNREMARKABLE`` in ``resume.py``.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from fastgpt.cli import Parser, parse_bool
from fastgpt.errors import RequestError, did_you_mean
from fastgpt.kernels.dispatch import BACKENDS
from fastgpt.model.config import GPTConfig
from fastgpt.train import nanogpt
from fastgpt.train.schedule import learning_rate
from fastgpt.units import count, parse_count

_AT_LEAST_ONE = (
    "batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters", "log_interval",
    "max_skipped_updates", "keep_checkpoints",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "total_batch_size", "warmup_iters", "checkpoint_interval", "max_hours", "learning_rate", "min_lr",
    "weight_decay", "grad_clip", "skip_spikes", "muon_learning_rate", "batch_ramp",
)  # fmt: skip

# No computer takes more: a larger number is a slip, and would only be found when it has filled the memory.
_AT_MOST = {"batch_size": 2**24, "gradient_accumulation_steps": 2**32, "total_batch_size": 2**40}

# With --batch_ramp the first updates have one in so many tokens, and then it doubles, as in nanochat's trial of it.
RAMP_START = 8
DOUBLINGS = RAMP_START.bit_length() - 1

Optimizer = Literal["adamw", "muon"]

SAME_SIZE = 0.02  # relative difference of two numbers of parameters that counts as none


def _option(default: Any, help: str, choices: Sequence[str] | None = None, aliases: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "aliases": aliases})


@dataclass(frozen=True)
class TrainConfig:
    """One run as it was requested. The defaults are nanoGPT's for GPT-2 124M, unless a preset overrides them.

    ``batch_size`` is ``None`` for ``--batch_size auto`` until :func:`fastgpt.train.settle.settle` has chosen one for
    the device.

    Raises:
        RequestError: a value is out of range, or two values contradict each other.
    """

    # what and where
    preset: str = _option("quickstart", "the set of defaults that the other flags override")
    dataset: str = _option("stdlib", "a dataset's name under --data_dir, or the path of one")
    data_dir: str = _option("data", "folder of prepared datasets")
    out_dir: str = _option("", "folder of the run; runs/PRESET if not given")
    overwrite: bool = _option(False, "replace a run that is already in out_dir")
    init_from: str = _option(
        "scratch", "resume: from out_dir's newest checkpoint; auto: resume if there is one; MODEL: from its weights"
    )
    seed: int = _option(1337, "seed of the initial weights, the order of the data and dropout")

    # model
    n_layer: int = _option(12, "layers")
    n_head: int = _option(12, "attention heads; must divide n_embd")
    n_embd: int = _option(768, "width")
    block_size: int = _option(1024, "context length in tokens")
    bias: bool = _option(False, "biases in linear layers and layer norms; OpenAI's GPT-2 has them")
    dropout: float = _option(0.0, "dropout on attention weights, residual branches and the embedding")
    positions: Literal["learned", "rotary"] = _option("learned", "embeddings of positions, or rotated queries and keys")
    norm: Literal["layer", "rms"] = _option("layer", "layer norm, or RMS norm")
    qk_norm: bool = _option(False, "RMS norm of each head's queries and keys: bounds the scores, allows larger rates")
    mlp: Literal["gelu", "relu2", "swiglu"] = _option("gelu", "what stands between the MLP's two layers")
    n_kv_head: int = _option(0, "heads of keys and values, shared by groups of query heads; 0: as many as --n_head")
    tied: bool = _option(True, "use the token embedding as output layer; False: a layer of its own")
    softcap: float = _option(0.0, "c in c tanh(logits / c), which keeps logits below c; 0: none")
    window: int = _option(0, "attention sees so many tokens, but all in each fourth and the last layer; 0: all")
    document_mask: bool = _option(False, "attention does not look across an end-of-text token")
    zero_init: bool = _option(False, "begin with the last layer of each branch at zero")
    value_embeddings: bool = _option(False, "add an embedding of the token to the values of every other layer")
    expect_params: str = _option("", "refuse to start if the model's size differs by over 2 % from this, e.g. 124M")

    # batches and length
    batch_size: int | None = _option(12, "sequences in a micro-batch; auto: the fastest that fits the device's memory")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an update; follows from --total_batch_size if set")
    total_batch_size: int = _option(0, "tokens in an update, exactly; 0: the product of the two flags above")
    batch_ramp: int = _option(
        0, "updates until one has all its tokens: an eighth, a quarter and a half, for a third of these each; 0: none"
    )
    max_iters: int = _option(600_000, "updates")
    max_hours: float = _option(0.0, "stop with a checkpoint after this many hours; 0: no limit")

    # optimizer
    optimizer: Optimizer = _option(  # noqa: RUF009
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for the rest"
    )
    learning_rate: float = _option(6e-4, "peak learning rate")
    min_lr: float = _option(6e-5, "learning rate at the end of the decay")
    warmup_iters: int = _option(2000, "updates of linear warm-up")
    lr_decay_iters: int = _option(600_000, "update at which the decay ends")
    schedule: Literal["cosine", "wsd"] = _option("cosine", "a cosine; wsd: constant, then linear over the --cooldown")
    cooldown: float = _option(0.4, "of --schedule wsd, the share of --lr_decay_iters during which the rate falls")
    decay_lr: bool = _option(True, "warm up and decay; False: the learning rate is constant")
    beta1: float = _option(0.9, "AdamW's decay rate of the first moment")
    beta2: float = _option(0.95, "AdamW's decay rate of the second moment")
    weight_decay: float = _option(0.1, "weight decay of matrices; vectors have none")
    muon_learning_rate: float = _option(
        0.0, "Muon's peak learning rate, on AdamW's scale (its steps are as large as AdamW's); 0: --learning_rate"
    )
    momentum: float = _option(0.95, "Muon's momentum")
    grad_clip: float = _option(1.0, "gradients are scaled down to at most this norm; 0: no clipping")
    max_skipped_updates: int = _option(
        10, "end the run after so many updates in a row whose gradients are not finite; each is skipped"
    )
    skip_spikes: float = _option(
        0.0,
        "skip an update whose loss or gradient norm is so many standard deviations above the last 128's mean; 0: none",
    )
    state_bits: Literal[8, 32] = _option(
        32, "bits of each of the optimizer's moments; 8 bits save 6 bytes a parameter, 3 where it is Muon's"
    )

    # evaluation, logging, checkpoints
    eval_interval: int = _option(2000, "updates between evaluations")
    eval_iters: int = _option(200, "batches of each split in an evaluation")
    eval_only: bool = _option(False, "evaluate once, and end")
    log_interval: int = _option(1, "updates between logged lines")
    checkpoint_interval: int = _option(0, "updates between checkpoints; 0: one at each evaluation")
    always_save_checkpoint: bool = _option(
        True, "at evaluations; False: only if the validation loss is the best so far, and at the end"
    )
    keep_checkpoints: int = _option(2, "newest checkpoints to keep, besides the one with the best validation loss")
    tensorboard: bool = _option(False, "also log to TensorBoard, in out_dir/tensorboard")
    wandb: bool = _option(False, "also log to Weights & Biases", aliases=("wandb_log",))
    wandb_project: str = _option("", "project there; the variable WANDB_PROJECT, or fastgpt, if not given")
    wandb_run_name: str = _option("", "name of the run there; that of its folder if not given")

    # machine
    device: str = _option("auto", "cpu, cuda or cuda:N; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "auto: bfloat16 where the device multiplies it faster, otherwise float32; float16 on older GPUs"
    )
    recompute: Literal["auto", "none", "cheap", "block"] = _option(
        "auto", "what the backward recomputes instead of keeping it in memory: nothing, norms and GELU, or whole blocks"
    )
    deterministic: bool = _option(
        True, "the same bits in every run; False: on a GPU attention's backward uses atomic adds, which may be faster"
    )
    cuda_graphs: bool = _option(True, "record the step on a GPU once and replay it")
    compile: bool = _option(False, "run the model through torch.compile; excludes CUDA graphs and --recompute")
    backend: str = _option("auto", "what runs the kernels", BACKENDS)

    def __post_init__(self) -> None:
        if not self.out_dir:
            object.__setattr__(self, "out_dir", f"runs/{self.preset}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"--{item.name} must be a finite number, got {value}")
        if self.seed >= 2**63:
            raise RequestError(f"--seed must be less than 2**63, got {self.seed}")
        if self.batch_size is None and not self.total_batch_size:
            raise RequestError("--batch_size auto needs --total_batch_size, the tokens of an update")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} must be at least 1, got {value}")
        for name, most in _AT_MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise RequestError(f"--{name} must be at most {most:,}, got {value:,}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise RequestError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.batch_ramp:
            self._check_ramp()
        if self.compile and self.recompute in ("cheap", "block"):
            raise RequestError(
                f"--recompute {self.recompute} has no effect with --compile, where the compiler chooses what is kept: "
                "leave out one of them"
            )
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise RequestError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.cooldown <= 1.0:
            raise RequestError(f"--cooldown must be in (0, 1], got {self.cooldown}")
        if self.muon_learning_rate and (self.optimizer != "muon" or not self.learning_rate):
            raise RequestError(
                "--muon_learning_rate needs --optimizer muon, and a --learning_rate above 0; 0 leaves it out"
            )
        if self.lr_decay_iters < self.warmup_iters:
            raise RequestError(
                f"--lr_decay_iters={self.lr_decay_iters} lies before the end of the warm-up "
                f"(--warmup_iters={self.warmup_iters})"
            )

    def _check_ramp(self) -> None:
        """Refuse a first update that is not a whole number of micro-batches, or of sequences if those are left open."""
        unit = RAMP_START * (self.batch_size or 1) * self.block_size
        if unit > 0 and self.tokens_per_step % unit:  # a block_size below 1 is refused with the architecture
            total = -(-self.tokens_per_step // unit) * unit
            parts = f"micro-batches of {self.batch_size} x" if self.batch_size else "sequences of"
            raise RequestError(
                f"--batch_ramp begins with 1/{RAMP_START} of an update, and {self.tokens_per_step:,} tokens are not "
                f"{RAMP_START} times a whole number of {parts} {self.block_size}: --total_batch_size {total} would be"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences in a micro-batch, B, once it is known."""
        assert self.batch_size is not None, "--batch_size auto has not been settled yet"
        return self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one update; with ``--batch_ramp`` in those after it."""
        return self.total_batch_size or self.micro_batch_size * self.gradient_accumulation_steps * self.block_size

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """The first of the updates of each size, ascending, and what divides ``tokens_per_step`` there."""
        begins = [-(-self.batch_ramp * i // DOUBLINGS) for i in range(DOUBLINGS + 1)] if self.batch_ramp else [0]
        return [(begin, 2 ** (len(begins) - 1 - i)) for i, begin in enumerate(begins)]

    def _divisor_at(self, step: int) -> int:
        return next(divisor for begin, divisor in reversed(self._sizes) if step >= begin)

    def tokens_at(self, step: int) -> int:
        """Tokens in an update, the first of which is step 0."""
        return self.tokens_per_step // self._divisor_at(step)

    def accumulation_at(self, step: int) -> int:
        """Micro-batches in an update, the first of which is step 0."""
        return self.gradient_accumulation_steps // self._divisor_at(step)

    def tokens_before(self, step: int) -> int:
        """Tokens in the updates before ``step``."""
        ends = [*(begin for begin, _ in self._sizes[1:]), step]
        return sum(
            max(0, min(step, end) - begin) * (self.tokens_per_step // divisor)
            for (begin, divisor), end in zip(self._sizes, ends, strict=True)
        )

    def updates_for(self, tokens: int) -> float:
        """How many updates take so many tokens."""
        begin = max((first for first, _ in self._sizes if self.tokens_before(first) <= tokens), default=0)
        return begin + (tokens - self.tokens_before(begin)) / self.tokens_at(begin)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of an update, the first of which is step 0."""
        if not self.decay_lr:
            return self.learning_rate
        return learning_rate(
            step, peak=self.learning_rate, floor=self.min_lr, warmup_iters=self.warmup_iters,
            decay_iters=self.lr_decay_iters, cooldown=self.cooldown if self.schedule == "wsd" else None,
        )  # fmt: skip

    @property
    def muon_lr_ratio(self) -> float:
        """Muon's learning rate divided by AdamW's, at every step."""
        return self.muon_learning_rate / self.learning_rate if self.muon_learning_rate else 1.0

    def torch_dtype(self, automatic: torch.dtype) -> torch.dtype:
        """The dtype of the weights that the model computes with; ``automatic`` for ``--dtype auto``."""
        return automatic if self.dtype == "auto" else getattr(torch, self.dtype)

    def with_batch_size(self, batch_size: int) -> "TrainConfig":
        """The same run with this micro-batch. Gradient accumulation follows, so that an update keeps its tokens.

        Raises:
            RequestError: an update of ``total_batch_size`` tokens is not a whole number of such micro-batches.
        """
        if not self.total_batch_size:
            return replace(self, batch_size=batch_size)
        accumulation, rest = divmod(self.total_batch_size, batch_size * self.block_size)
        if rest or not accumulation:
            raise RequestError(
                f"an update of {self.total_batch_size:,} tokens is not a whole number of micro-batches of {batch_size} "
                f"x {self.block_size}: {self._exact_choices(batch_size)}"
            )
        return replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)

    def _exact_choices(self, batch_size: int) -> str:
        """The nearest values that would be exact."""
        sequences, rest = divmod(self.total_batch_size, self.block_size)
        micro_batch = batch_size * self.block_size
        below = self.total_batch_size // micro_batch * micro_batch
        totals = " or ".join(f"{total}" for total in (below, below + micro_batch) if total)
        if rest:
            return f"--total_batch_size {totals} would be exact"
        found = divisors(sequences)
        smaller = max((n for n in found if n < batch_size), default=None)
        larger = min((n for n in found if n > batch_size), default=None)
        sizes = " or ".join(f"{n}" for n in (smaller, larger) if n)
        return f"--batch_size {sizes} would be exact, or --total_batch_size {totals}"

    def gpt_config(self, vocab_size: int, end_of_text: int | None = None) -> GPTConfig:
        """The architecture of this run, checked against ``--expect_params``.

        Args:
            vocab_size: of the model.
            end_of_text: the token that ends a document, which ``--document_mask`` needs.

        Raises:
            RequestError: it is none, or not the size that is expected.
        """
        if self.document_mask and end_of_text is None:
            raise RequestError("--document_mask needs a dataset whose tokenizer has an end-of-text token")
        try:
            names = {field.name for field in fields(GPTConfig)} & {field.name for field in fields(self)}
            options = {name: getattr(self, name) for name in names}
            if self.document_mask:
                options["end_of_text"] = end_of_text
            config = GPTConfig(vocab_size=vocab_size, **options)
        except ValueError as error:
            raise RequestError(str(error)) from error
        if self.expect_params:
            expected = parse_count("expect_params", self.expect_params)
            if not is_of_size(config, expected):
                raise RequestError(
                    f"--expect_params {self.expect_params}, but this model has {count(config.n_params, 2)} parameters "
                    f"(n_layer={config.n_layer}, n_embd={config.n_embd}, vocabulary {config.vocab_size})"
                )
        return config


def divisors(n: int) -> list[int]:
    """The divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def is_of_size(config: GPTConfig, n_params: float) -> bool:
    """Whether a model has about so many parameters.

    Some count position embeddings and some do not. Value embeddings, and an output layer that is not tied, may be left
    out too: a model is called by the size of the GPT-2 of its shape.
    """
    parts = config.parameters_by_part
    beside = sum(parts.get(name, 0) for name in ("positions", "value embeddings", "output layer"))
    counts = config.n_params, config.n_params_without_positions, config.n_params - beside
    return any(abs(n / n_params - 1) <= SAME_SIZE for n in counts)


def _parse_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        number = _parse_whole(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, not '{text}'") from None
    if number < 1:
        raise RequestError(f"--batch_size must be at least 1, got {number}")
    return number


def _parse_whole(text: str) -> int:
    """A whole number, also written as ``1e3``."""
    try:
        number = float(text.replace("_", ""))
        whole = int(text) if text.lstrip("+-").isdigit() else int(number)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a whole number, not '{text}'") from None
    if whole != number and not text.lstrip("+-").isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, not '{text}'")
    return whole


def _parse_backend(text: str) -> str:
    """The ``backend`` of nanoGPT is that of several processes; a single one needs none."""
    return "auto" if text in ("nccl", "gloo") else text


_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "True|False", str: "TEXT", int | None: "N|auto"}


def parse_flags(argv: Sequence[str] | None, presets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The flags of a command line by name; those that are not given are absent.

    Raises:
        RequestError: a flag is unknown, or a value is invalid.
    """
    parser = Parser(
        prog="python -m fastgpt.train",
        description="Train a GPT.\n\n  python -m fastgpt.train                        a minute on a CPU, offline\n"
        "  python -m fastgpt.train --preset gpt2-124m     GPT-2 124M on FineWeb",
        epilog=f"presets: {', '.join(presets)}",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.py", help="a config file of nanoGPT's; flags override it")
    add_flags(parser)
    argv = [_unquoted(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    if file is None:
        return given
    if not file.endswith(".py"):
        parser.error(f"unexpected argument '{file}'")
    lines = [f"--{name}={value}" for name, value in nanogpt.read(Path(file)).items() if value is not None]
    try:
        from_file = vars(parser.parse_args(lines))
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from error
    from_file.pop("config")
    return {"preset": "nanogpt", **from_file, **given}


def _unquoted(arg: str) -> str:
    """``--dtype="float16"``, as nanoGPT wants texts, without the quotes."""
    flag, equals, value = arg.partition("=")
    if flag.startswith("--") and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return flag + equals + value[1:-1]
    return arg


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of ``TrainConfig``. Flags that are not given are absent from the parsed result."""
    hints = get_type_hints(TrainConfig)
    for item in fields(TrainConfig):
        kind, choices = hints[item.name], item.metadata["choices"]
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            kind = type(choices[0])
        options: dict[str, Any] = {"type": _parse_whole if kind is int else kind, "choices": choices}
        if kind is bool:  # --compile alone means --compile=True
            options |= {"type": parse_bool, "nargs": "?", "const": True}
        if item.name in ("batch_size", "backend"):
            options["type"] = {"batch_size": _parse_batch_size, "backend": _parse_backend}[item.name]
        if choices is None:
            options["metavar"] = _METAVARS[kind]
        help = item.metadata["help"].replace("%", "%%") + (f" ({item.default})" if item.default != "" else "")
        names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, dest=item.name, **options)


def known_flag(flag: str) -> str:
    """The name of a flag as typed, such as ``--max-iters``.

    Raises:
        RequestError: there is no such flag.
    """
    names = {alias: item.name for item in fields(TrainConfig) for alias in (item.name, *item.metadata["aliases"])}
    typed = flag.removeprefix("--").replace("-", "_")
    if typed not in names:
        raise RequestError(f"unknown flag {flag}{did_you_mean('--' + typed, ['--' + name for name in names])}")
    return names[typed]


def resolve(
    given: dict[str, Any], presets: dict[str, dict[str, Any]], before: dict[str, Any] | None = None
) -> TrainConfig:
    """The run that parsed flags request: their preset's values, overridden by the flags.

    ``gradient_accumulation_steps`` among the flags overrides a preset's ``total_batch_size`` too.

    Args:
        given: flags by name.
        presets: by name.
        before: the values of a run that is resumed, instead of the preset's.

    Raises:
        RequestError: the preset is unknown, or values contradict each other.
    """
    preset = given.get("preset", (before or {}).get("preset", TrainConfig.preset))
    if preset not in presets:
        raise RequestError(
            f"unknown preset '{preset}'{did_you_mean(preset, list(presets))} (there are {', '.join(presets)})"
        )
    values = {**(presets[preset] if before is None else before), **given, "preset": preset}
    if "gradient_accumulation_steps" in given and "total_batch_size" not in given:
        total = values.pop("total_batch_size", 0)
        if values.get("batch_size", TrainConfig.batch_size) is None:
            values["batch_size"] = _micro_batch_of(total, given["gradient_accumulation_steps"], values)
    rates = {} if before is not None else _rates_for_width(values, given, presets[preset].get("n_embd"))
    config = TrainConfig(**{**values, **rates})
    if config.batch_size is None or not config.total_batch_size:
        return config
    settled = config.with_batch_size(config.batch_size)
    accumulation = settled.gradient_accumulation_steps
    if given.get("gradient_accumulation_steps", accumulation) != accumulation:
        raise RequestError(
            f"--gradient_accumulation_steps {given['gradient_accumulation_steps']} contradicts --total_batch_size "
            f"{config.total_batch_size}, which takes {accumulation}; give one of them"
        )
    return settled


def _micro_batch_of(total: int, accumulation: int, values: dict[str, Any]) -> int:
    """The micro-batch with which ``accumulation`` of them make an update of ``total`` tokens."""
    block_size = values.get("block_size", TrainConfig.block_size)
    if accumulation < 1 or total % (accumulation * block_size) or not total:
        raise RequestError(
            f"--gradient_accumulation_steps {accumulation} does not divide an update of {total:,} tokens in sequences "
            f"of {block_size}: give --batch_size too"
        )
    return total // (accumulation * block_size)


def _rates_for_width(values: dict[str, Any], given: dict[str, Any], preset_width: int | None) -> dict[str, float]:
    """The preset's learning rates, scaled to another ``n_embd`` unless the flags set them.

    Adam's best rate falls as 1 / width (Yang and Hu et al., "Tensor Programs V", 2022). Without this, a preset made
    narrower would train too slowly, and one made wider might diverge.
    """
    if preset_width is None or values["n_embd"] < 1 or "learning_rate" in given:
        return {}
    names = [name for name in ("learning_rate", "min_lr") if name in values and name not in given]
    return {name: values[name] * preset_width / values["n_embd"] for name in names}
