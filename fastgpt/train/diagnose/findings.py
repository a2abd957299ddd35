"""A finding, and the facts about a run that findings rest on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.train.presets import PRESETS


@dataclass(frozen=True)
class Finding:
    """One problem of a run.

    Attributes:
        code: the kind of problem; a run has at most one finding of each code.
        step: number of updates done when it was found; 0 if it was known before the run.
        text: one or two sentences: what is wrong, the numbers, and what to do.
    """

    code: str
    step: int
    text: str


@dataclass(frozen=True)
class Facts:
    """What is known about a run before it starts.

    Attributes:
        config: the request.
        gpt_config: the architecture.
        dataset_tokens: tokens in the training split; ``None`` if the dataset is not on this machine.
        predicted_seconds: predicted seconds of an update of ``tokens_per_step``; ``None`` without a prediction.
        peak_flops: the device's dense peak in FLOP/s; ``None`` where it is unknown.
        n_sm: the GPU's streaming multiprocessors; ``None`` for a CPU.
        wanted_tokens_per_step: tokens per update that were requested; ``None`` if none were.
    """

    config: TrainConfig
    gpt_config: GPTConfig
    dataset_tokens: int | None
    predicted_seconds: float | None = None
    peak_flops: float | None = None
    n_sm: int | None = None
    wanted_tokens_per_step: int | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.tokens_before(self.config.max_iters)

    def tokens_per_parameter(self, tokens: int) -> float:
        """Return ``tokens`` per parameter, without position embeddings: the N of 6 N FLOPs per token."""
        return tokens / self.gpt_config.n_params_without_positions

    def epochs(self, tokens: int) -> float:
        """Return how many passes over the training split ``tokens`` are; NaN if its size is unknown."""
        return tokens / self.dataset_tokens if self.dataset_tokens else math.nan


def wanted_tokens_per_step(config: TrainConfig) -> int | None:
    """Return the tokens per update that the request or else its preset states; ``None`` if neither does."""
    return config.total_batch_size or PRESETS.get(config.preset, {}).get("total_batch_size")


def joined(items: Sequence[str], last: str = "and") -> str:
    """Return the items as in ``a, b and c``."""
    return f" {last} ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
