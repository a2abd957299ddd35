"""Settles a request: the device, the dtype, the dataset, the architecture and the micro-batch that it comes to.

All that can be wrong with a request is found here, before the model is made. Nothing is written but the ``stdlib``
dataset, which every machine can make offline.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt import hardware
from fastgpt.data.dataset import Dataset, open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.kernels import dispatch
from fastgpt.limits import Bound
from fastgpt.model.config import GPT2_VOCABULARY, GPTConfig, padded_vocab_size
from fastgpt.train import checkpoint, resume, run_folder, trackers
from fastgpt.train.config import TrainConfig
from fastgpt.train.diagnose import Facts, wanted_tokens_per_step
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
    try:
        dispatch.backend_of(device, dtype)
    except RuntimeError as error:
        raise RequestError(str(error)) from error
    trackers.check(config)
    resuming = config.init_from == "resume"
    run_dir = Path(config.out_dir) if resuming else run_folder.check(config)
    dataset = _open_or_prepare(config)
    # bare token files do not state their vocabulary, and are taken for GPT-2's
    gpt_config = config.gpt_config(padded_vocab_size(dataset.vocab_size or GPT2_VOCABULARY))
    memory, total = hardware.memory(device)
    _check_size(gpt_config, config.state_bits, total)
    settled, prediction = _fill_in(config, device, dtype, gpt_config, memory)
    changes = resume.differences(run_dir, settled) if resuming and run_folder.is_run(run_dir) else []
    open_values = {"batch_size": None, "recompute": "auto"}
    left_open = {name: value for name, value in open_values.items() if getattr(config, name) == value}
    tokenizer = dataset.tokenizer()
    return Settled(
        settled, run_dir, device, dtype, dataset, tokenizer, gpt_config, memory, prediction, changes, left_open
    )


def _check_size(gpt_config: GPTConfig, state_bits: int, memory: Bound) -> None:
    """Refuse a model whose weights, gradients and moments alone, all fp32 or with 8-bit moments, are too large.

    No micro-batch makes them smaller, and to create such a model would take long, and the memory of other programs.
    """
    least = checkpoint.n_bytes(gpt_config.n_params, state_bits) + 4 * gpt_config.n_params
    if least > memory.amount:
        raise RequestError(
            f"a model of {count(gpt_config.n_params)} parameters takes {size(least)} for weights, gradients and "
            f"moments, more than the {size(memory.amount)} of this machine ({memory.source}): make it smaller, or "
            "pass --state_bits 8"
        )


def _open_or_prepare(config: TrainConfig) -> Dataset:
    try:
        return open_dataset(config.dataset, config.data_dir)
    except RequestError:
        if config.dataset != "stdlib":
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
    setup = Setup(
        gpt_config, config.batch_size or 1, device.type, dtype, config.state_bits, deterministic=config.deterministic
    )
    found: list[micro_batch.Choice] = []
    if machine is not None and automatic:
        kinds = micro_batch.kinds_of_recompute(config, setup.device_type)
        found = micro_batch.choices(setup, machine, memory.amount, config.total_batch_size, kinds)
    config = micro_batch.fill_in(config, setup, memory, found)
    setup = replace(setup, batch_size=config.micro_batch_size, recompute=config.recompute)
    return config, roofline.predict(setup, machine) if machine is not None else None
