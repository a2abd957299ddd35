"""A finding, and the facts about a run that findings rest on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt.model.config import GPTConfig
from fastgpt.train.config import TrainConfig
from fastgpt.train.presets import PRESETS


@dataclass(frozen=True)
class Finding:
    """One thing that the run's owner should know.

    Attributes:
        code: names the kind; a run has at most one of each.
        step: updates done when it became true; 0 for what is known before the run.
        text: one or two plain sentences with the numbers and what to do.
    """

    code: str
    step: int
    text: str


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts.

    Attributes:
        config: the request.
        gpt_config: the architecture.
        dataset_tokens: in the training split; ``None`` if it is not here.
        predicted_seconds: of an update; ``None`` if nobody predicted it.
        peak_flops: the device's dense peak in FLOP/s; ``None`` where it is not known.
        n_sm: the GPU's streaming multiprocessors; ``None`` for a CPU.
        wanted_tokens_per_step: what an update should hold; ``None`` if that was not asked for.
    """

    config: TrainConfig
    gpt_config: GPTConfig
    dataset_tokens: int | None
    predicted_seconds: float | None = None
    peak_flops: float | None = None
    n_sm: int | None = None
    wanted_tokens_per_step: int | None = None

    @property
    def planned_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.max_iters * self.config.tokens_per_step

    def tokens_per_parameter(self, tokens: int) -> float:
        """With N as in 6 N FLOPs a token: without position embeddings."""
        return tokens / self.gpt_config.n_params_without_positions

    def epochs(self, tokens: int) -> float:
        """How often so many tokens go through the training split; NaN if nobody knows."""
        return tokens / self.dataset_tokens if self.dataset_tokens else math.nan


def wanted_tokens_per_step(config: TrainConfig) -> int | None:
    """What an update should hold, by the request or else by its preset; ``None`` if neither says."""
    return config.total_batch_size or PRESETS.get(config.preset, {}).get("total_batch_size")


def joined(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return f" {last} ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
