"""``python -m fastgpt.train``: train a GPT, then show its loss and a sample.

python -m fastgpt.train                                   about a minute on a CPU, offline
python -m fastgpt.train --preset gpt2-124m                GPT-2 124M on FineWeb
python -m fastgpt.train --preset gpt2-124m --init_from resume
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress

from fastgpt import hardware, kernels
from fastgpt.cli import run
from fastgpt.data.stream import show
from fastgpt.errors import RequestError
from fastgpt.train.memory import ran_out
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.train.settle import settle
from fastgpt.train.trainer import Trainer
from fastgpt.units import gib

PROMPT_TOKENS = 16  # of the validation split, for the sample at the end


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run that ``argv`` requests."""
    config = parse(argv, PRESETS)
    hardware.use_threads()
    with nullcontext() if config.backend == "auto" else kernels.use_backend(config.backend):
        settled = settle(config)
        try:
            trainer = Trainer(settled)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            _, total = hardware.memory(settled.device)
            raise RequestError(
                f"out of memory while the model was created ({gib(total.amount)}, limited by {total.source}): "
                "a smaller model or --state_bits 8 take less"
            ) from error
        status = trainer.train()
        if status == 0 and settled.tokenizer is not None:
            prompt = settled.dataset.val[0][:PROMPT_TOKENS].tolist()
            with suppress(OSError):  # nobody reads it; the run is done
                print(f"sample, continued from {settled.tokenizer.decode(prompt)!r}:", flush=True)
                show(trainer.model, settled.tokenizer, prompt, max_new_tokens=300, seed=config.seed)
    return status


if __name__ == "__main__":
    run(main)
