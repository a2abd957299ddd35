"""Text that a model writes while it is trained: how it changes is for those who read the run's report."""

from collections.abc import Callable

import torch

from fastgpt import limits
from fastgpt.data.dataset import Dataset
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT
from fastgpt.model.generate import generate

PROMPT_TOKENS = 16  # of the validation split
NEW_TOKENS = 100  # a few lines; on a CPU GPT-2 124M writes them in some seconds


def prompt_of(dataset: Dataset) -> list[int]:
    """The tokens that every sample of a run continues."""
    return dataset.val[0][:PROMPT_TOKENS].tolist()


def sample(model: GPT, tokenizer: Tokenizer, prompt: list[int], seed: int, check: Callable[[], None]) -> str | None:
    """What the model writes after ``prompt``; ``None`` if its logits are not finite or memory does not suffice.

    The same seed draws the same random numbers in every call, and none of the run's own.

    Args:
        model: in training mode, and left so.
        tokenizer: its own.
        prompt: token ids.
        seed: of the draws.
        check: called before each token; what it raises ends the sample and is passed on.
    """
    device = next(model.parameters()).device
    ids = []
    model.eval()
    try:
        for token in generate(
            model, torch.tensor([prompt], device=device), NEW_TOKENS, temperature=0.8, top_k=200,
            vocab_size=tokenizer.vocab_size, generator=torch.Generator(device).manual_seed(seed),
        ):  # fmt: skip
            check()
            ids.append(int(token))
    except RequestError:
        return None
    except (RuntimeError, MemoryError) as error:
        if not limits.ran_out(error):
            raise
        return None
    finally:
        model.train()
    return tokenizer.decode(ids)
