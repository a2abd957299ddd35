"""``python -m fastgpt.train``: train a GPT, then show its loss and a sample.

python -m fastgpt.train                                   about a minute on a CPU, offline
python -m fastgpt.train --preset gpt2-124m                GPT-2 124M on FineWeb
python -m fastgpt.train --preset gpt2-124m --init_from resume
"""

from collections.abc import Sequence
from contextlib import nullcontext

from fastgpt import hardware, kernels, sample
from fastgpt.cli import run
from fastgpt.errors import RequestError
from fastgpt.train.config import parse
from fastgpt.train.memory import ran_out
from fastgpt.train.presets import PRESETS
from fastgpt.train.trainer import Trainer

PROMPT_TOKENS = 16  # of the validation split, for the sample at the end


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run that ``argv`` asks for."""
    config = parse(argv, PRESETS)
    hardware.use_threads()
    with nullcontext() if config.backend == "auto" else kernels.use_backend(config.backend):
        try:
            trainer = Trainer(config)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            _, total = hardware.memory(hardware.find_device(config.device))
            raise RequestError(
                f"out of memory as the model was made ({total.amount / 2**30:.1f} GiB, the limit is {total.source}): "
                "a smaller model or --state_bits 8 take less"
            ) from error
        status = trainer.train()
        if status == 0 and trainer.tokenizer is not None:
            prompt = trainer.dataset.val[0][:PROMPT_TOKENS].tolist()
            print(f"sample, going on from {trainer.tokenizer.decode(prompt)!r}:", flush=True)
            sample.show(trainer.model, trainer.tokenizer, prompt, max_new_tokens=300, seed=config.seed)
    return status


if __name__ == "__main__":
    run(main)
