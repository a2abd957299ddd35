"""``python -m fastgpt.train``: train a GPT, then show its loss and a sample.

python -m fastgpt.train                                   about a minute on a CPU, offline
python -m fastgpt.train --preset gpt2-124m                GPT-2 124M on FineWeb
python -m fastgpt.train --preset gpt2-124m --init_from resume
"""

from collections.abc import Sequence
from contextlib import nullcontext

from fastgpt import compilers, hardware, kernels, limits, output
from fastgpt.cli import run
from fastgpt.data.stream import show
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.train.samples import prompt_of
from fastgpt.train.settle import settle
from fastgpt.train.trainer import Trainer
from fastgpt.units import gib


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run that ``argv`` requests."""
    config = parse(argv, PRESETS)
    hardware.use_threads()
    with nullcontext() if config.backend == "auto" else kernels.use_backend(config.backend):
        settled = settle(config)
        try:
            trainer = Trainer(settled)
        except (RuntimeError, MemoryError) as error:
            if not limits.ran_out(error):
                raise
            _, total = hardware.memory(settled.device)
            remedy = " or --state_bits 8" if config.state_bits == 32 else ""
            raise RequestError(
                f"out of memory while the model was created ({gib(total.amount)}, limited by {total.source}): "
                f"a smaller model{remedy} takes less"
            ) from error
        try:
            status = trainer.train()
        except Exception as error:
            failure = compilers.failure(error)
            if failure is None:
                raise
            output.note(f"error: {failure}")
            return 1
        if status == 0 and settled.tokenizer is not None:
            _show_sample(trainer.model, settled.tokenizer, prompt_of(settled.dataset), config.seed)
    return status


def _show_sample(model: GPT, tokenizer: Tokenizer, prompt: list[int], seed: int) -> None:
    """Print a sample. The run is done, so nothing that goes wrong here is an error."""
    try:
        print(f"sample, continued from {tokenizer.decode(prompt)!r}:", flush=True)
        show(model, tokenizer, prompt, max_new_tokens=300, seed=seed)
    except RequestError as error:
        output.note(f"no sample: {error}")
    except (OSError, RuntimeError, MemoryError) as error:
        why = limits.exhausted(error)
        if why is not None:
            output.note(f"no sample: {why}")
        elif not isinstance(error, OSError):  # which only means that nobody reads it
            raise


if __name__ == "__main__":
    run(main)
