"""Settles a request: the device, the dtype, the dataset, the architecture and the micro-batch that it comes to.

All that can be wrong with a request is found here, before the model is made. Nothing is written but the ``stdlib``
dataset, which every machine can make offline.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt import compilers, hardware
from fastgpt.data.dataset import Dataset, open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import META_FILE
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.kernels import dispatch
from fastgpt.limits import Bound
from fastgpt.model.config import GPT2_VOCABULARY, GPTConfig, padded_vocab_size
from fastgpt.train import checkpoint, resume, run_folder, trackers
from fastgpt.train.config import TrainConfig
from fastgpt.train.diagnose import Facts, wanted_tokens_per_step
from fastgpt.train.models import open_model
from fastgpt.train.predict import micro_batch, roofline
from fastgpt.train.predict.roofline import Prediction
from fastgpt.train.predict.trace import Setup
from fastgpt.units import count, size


@dataclass(frozen=True)
class Settled:
    """A request that can be met on this machine.

    Attributes:
        config: the request, with micro-batch, accumulation and recomputation filled in.
        run_dir: folder of the run.
        device: to train on.
        dtype: of the weights that the model computes with.
        dataset: opened.
        tokenizer: the dataset's; ``None`` for token files without one.
        gpt_config: the architecture.
        memory: bytes free on the device, and what limits them.
        prediction: of the step's time and memory; ``None`` where no choice depends on it and none is cheap to make.
        initial: the weights to start from, by name; ``None`` for random ones or those of the run that is resumed.
        changes: flags that differ from those of the run that is resumed, in words.
        left_open: the flags that the request left to the device, and how it put that.
    """

    config: TrainConfig
    run_dir: Path
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    tokenizer: Tokenizer | None
    gpt_config: GPTConfig
    memory: Bound
    prediction: Prediction | None
    initial: dict[str, torch.Tensor] | None
    changes: list[str]
    left_open: dict[str, Any]

    @property
    def resizable(self) -> bool:
        """Whether the micro-batch was left to us, so that it may be halved when memory runs out."""
        return "batch_size" in self.left_open

    def facts(self) -> Facts:
        """What the diagnosis needs to know about the run."""
        cuda = self.device.type == "cuda"
        accumulation = self.config.gradient_accumulation_steps
        return Facts(
            self.config,
            self.gpt_config,
            dataset_tokens=sum(map(len, self.dataset.train)),
            predicted_seconds=self.prediction.seconds(accumulation) if self.prediction is not None else None,
            peak_flops=hardware.peak_flops(self.device, self.dtype),
            n_sm=torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else None,
            wanted_tokens_per_step=wanted_tokens_per_step(self.config),
        )


def settle(config: TrainConfig) -> Settled:
    """The run that ``config`` comes to on this machine.

    Raises:
        RequestError: the device, the dataset, the architecture, the folder or the memory does not allow it. Nothing of
            an earlier run has been touched by then.
    """
    device = hardware.find_device(config.device)
    dtype = config.torch_dtype(hardware.training_dtype(device))
    _check_one_process()
    try:
        backend, _ = dispatch.backend_of(device, dtype)
    except RuntimeError as error:
        raise RequestError(str(error)) from error
    _check_compilers(config, device, backend)
    trackers.check(config)
    resuming = config.init_from == "resume"
    run_dir = Path(config.out_dir) if resuming else run_folder.check(config)
    dataset = _open_or_prepare(config)
    initial = None
    if resuming:
        vocab_size = _vocab_size_of(run_dir, dataset)
    elif config.init_from == "scratch":
        vocab_size = padded_vocab_size(dataset.vocab_size or GPT2_VOCABULARY)
    else:
        config, initial = _start_from(config, dataset)
        vocab_size = len(initial["transformer.wte.weight"])
    tokenizer = dataset.tokenizer()
    gpt_config = config.gpt_config(vocab_size, tokenizer.eot if tokenizer is not None else None)
    memory, total = hardware.memory(device)
    _check_size(gpt_config, config, total)
    settled, prediction = _fill_in(config, device, dtype, gpt_config, memory)
    changes = resume.differences(run_dir, settled) if resuming and run_folder.is_run(run_dir) else []
    open_values = {"batch_size": None, "recompute": "auto"}
    left_open = {name: value for name, value in open_values.items() if getattr(config, name) == value}
    return Settled(
        settled, run_dir, device, dtype, dataset, tokenizer, gpt_config, memory, prediction, initial, changes, left_open
    )


def _vocab_size_of(run_dir: Path, dataset: Dataset) -> int:
    """The vocabulary of a run that is resumed: its own, which a model that it started from may have decided."""
    padded = padded_vocab_size(dataset.vocab_size or GPT2_VOCABULARY)
    if not run_folder.is_run(run_dir):
        return padded
    own = run_folder.read_config(run_dir).model.vocab_size
    # A dataset of a quite different vocabulary is refused later, with both names.
    return own if padded_vocab_size(own) == padded else padded


def _start_from(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, dict[str, torch.Tensor]]:
    """The request with the architecture of the model that it starts from, and the model's weights.

    Position embeddings beyond ``block_size`` are cut off.

    Raises:
        RequestError: there is no such model, or it does not fit the dataset or ``block_size``.
    """
    opened = open_model(config.init_from)
    model, own = opened.model.config, dataset.tokenizer()
    if own is not None and opened.tokenizer is not None and own.to_meta() != opened.tokenizer.to_meta():
        raise RequestError(
            f"{config.init_from} reads {opened.tokenizer.name} tokens, and {config.dataset} has {own.name} tokens of "
            "another vocabulary: prepare the data with the model's tokenizer"
        )
    if (dataset.vocab_size or 0) > model.vocab_size:
        raise RequestError(
            f"{config.dataset} has {dataset.vocab_size} tokens, more than the {model.vocab_size} of {config.init_from}"
        )
    if config.block_size > model.block_size:
        raise RequestError(
            f"--block_size {config.block_size} is longer than the context of {config.init_from}, {model.block_size}"
        )
    weights = {name: p.detach() for name, p in opened.model.named_parameters()}
    if model.positions == "learned":
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    changed = {name: getattr(model, name) for name in resume.ARCHITECTURE}
    return replace(config, **changed), weights


def _check_one_process() -> None:
    """Refuse to be one of several processes, each of which would train the same run.

    torchrun and accelerate set ``WORLD_SIZE``. Scripts for Slurm set it too, because ``torch.distributed`` needs it.
    """
    n_processes = os.environ.get("WORLD_SIZE", "1")
    if n_processes.isdecimal() and int(n_processes) > 1:
        raise RequestError(
            f"WORLD_SIZE is {n_processes}, but fastgpt trains on one device: start one process "
            "(torchrun --nproc_per_node=1, or without torchrun)"
        )


def _check_compilers(config: TrainConfig, device: torch.device, backend: str) -> None:
    """Refuse what would fail in the first update, because it compiles code for this machine then."""
    if config.compile:
        missing = compilers.missing_for_compile(device)
        if missing is not None:
            raise RequestError(f"--compile: {missing}")
    elif backend == "triton" and device.type == "cuda":
        missing = compilers.missing_for_triton()
        if missing is not None:
            raise RequestError(f"{missing}; --backend reference works without, slower")


def _check_size(gpt_config: GPTConfig, config: TrainConfig, memory: Bound) -> None:
    """Refuse a model whose weights, gradients and moments alone, all fp32 or with 8-bit moments, are too large.

    No micro-batch makes them smaller, and to create such a model would take long, and the memory of other programs.
    """
    least = checkpoint.n_bytes(gpt_config, config.state_bits, config.optimizer) + 4 * gpt_config.n_params
    if least > memory.amount:
        remedy = ", or pass --state_bits 8" if config.state_bits == 32 else ""
        raise RequestError(
            f"a model of {count(gpt_config.n_params)} parameters takes {size(least)} for weights, gradients and "
            f"moments, more than the {size(memory.amount)} of this machine ({memory.source}): make it smaller{remedy}"
        )


def _open_or_prepare(config: TrainConfig) -> Dataset:
    try:
        return open_dataset(config.dataset, config.data_dir)
    except RequestError:
        if config.dataset != "stdlib" or Path(config.data_dir, config.dataset, META_FILE).exists():
            raise
        return open_dataset(prepare("stdlib", data_dir=config.data_dir))


def _fill_in(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, gpt_config: GPTConfig, memory: Bound
) -> tuple[TrainConfig, Prediction | None]:
    """The request with what it left to the device, and the prediction of its step."""
    # On a CPU only where a choice depends on it: measuring its ceilings and tracing the step take two seconds.
    automatic = config.batch_size is None
    # Only our kernels are predicted; a choice between micro-batches holds without them too.
    predictable = hardware.known_gpu(device) is not None and dispatch.backend_of(device, dtype)[0] != "reference"
    machine = roofline.at_hand(device, dtype) if automatic or predictable else None
    setup = Setup.of(config, gpt_config, device.type, dtype)
    found: list[micro_batch.Choice] = []
    if machine is not None and automatic:
        kinds = micro_batch.kinds_of_recompute(config, setup.device_type)
        found = micro_batch.choices(setup, machine, memory.amount, config.total_batch_size, kinds, config.tokens_at(0))
    config = micro_batch.fill_in(config, setup, memory, found)
    setup = replace(setup, batch_size=config.micro_batch_size, recompute=config.recompute)
    return config, roofline.predict(setup, machine) if machine is not None else None
