"""What every measurement of whole training steps shares: the request, the tokens, a timed update, and the verdict.

``bench.mfu`` runs all contenders in one process, ``bench.cpu`` each in a process of its own.
"""

import gc
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from bench.contenders import AGREE, CONTENDERS, OURS, Update, differences
from bench.pages import Record, aligned, prediction, table
from bench.timing import error_in_a_line, figures, interleave, synchronise, wall_ms
from fastgpt.model.config import GPTConfig
from fastgpt.train.predict.trace import Setup
from fastgpt.train.step import Batch


class Tokens:
    """Batches that a model can learn from, without a file.

    Tokens follow Zipf's law, and in half of all places a token is followed by its own fixed successor. The same seed
    gives the same tokens.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, seed: int = 2) -> None:
        self.shape = batch_size, config.block_size + 1  # one more, because targets are shifted by one
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        V = config.vocab_size
        self.frequency = 1.0 / torch.arange(1, V + 1)  # Zipf's law
        self.successor = torch.randperm(V, generator=self.generator)

    def next(self) -> Batch:
        B, T1 = self.shape
        drawn = torch.multinomial(self.frequency, B * T1, replacement=True, generator=self.generator).view(B, T1)
        follows = torch.rand(B, T1, generator=self.generator) < 0.5
        for t in range(1, T1):
            drawn[:, t] = torch.where(follows[:, t], self.successor[drawn[:, t - 1]], drawn[:, t])
        drawn = drawn.to(self.device)  # in one copy
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        name: of the model.
        config: of the model, without dropout.
        batch_size: sequences in a micro-batch.
        accumulation: micro-batches in an update.
        recompute: what fastgpt recomputes: ``none``, ``cheap`` or ``block``.
    """

    name: str
    config: GPTConfig
    batch_size: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype
    recompute: str = "cheap"

    @property
    def tokens(self) -> int:
        """Tokens in an update."""
        return self.batch_size * self.accumulation * self.config.block_size

    def setup(self) -> Setup:
        """The step of fastgpt, as the plan describes it."""
        return Setup(self.config, self.batch_size, self.device.type, self.dtype, recompute=self.recompute)

    def make(self, name: str) -> Update:
        """The update of a contender that runs in this process."""
        options = {"recompute": self.recompute} if name.startswith(OURS) else {}
        return CONTENDERS[name](self.config, self.device, self.dtype, self.accumulation, **options)

    def batches(self, seed: int = 2) -> Iterator[list[Batch]]:
        """The micro-batches of one update after the other, without end."""
        tokens = Tokens(self.config, self.batch_size, self.device, seed)
        while True:
            yield [tokens.next() for _ in range(self.accumulation)]


@dataclass
class Contender:
    """The state of a contender.

    Attributes:
        update: takes micro-batches; ``None`` if there is none, or none any more.
        peak_bytes: the peak of its memory, weights included; ``None`` if that cannot be measured.
        ms: per update.
        losses: of every update since the first.
        failure: what ended its part.
    """

    update: Update | None = None
    peak_bytes: int | None = None
    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failure: str | None = None


def timed_update(update: Update, batches: Sequence[Batch], device: torch.device) -> tuple[float, float]:
    """Milliseconds and loss of one update."""
    ms, loss = wall_ms(lambda: update(batches), device)
    return ms, loss.item()


# ---- contenders in one process ----

WARM_UP = 3  # updates: compile, record graphs, replay them


def prepare(name: str, request: Request) -> Contender:
    """Make a contender, warm it up, and measure its peak of memory."""
    contender = Contender()
    cuda = request.device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(request.device)
    before = torch.cuda.memory_allocated(request.device) if cuda else 0
    torch.manual_seed(1)  # the same weights for all
    try:
        contender.update = request.make(name)
        batches = request.batches(seed=3)
        for _ in range(WARM_UP):
            contender.losses.append(contender.update(next(batches)).item())
        synchronise(request.device)
    except Exception as error:
        contender.update, contender.failure = None, error_in_a_line(error)
    if cuda:
        contender.peak_bytes = torch.cuda.max_memory_allocated(request.device) - before
    return contender


def take_turns(contenders: Mapping[str, Contender], request: Request, seconds: float, least: int = 3) -> None:
    """Time one update of each contender per round, for about ``seconds`` and at least ``least`` rounds."""
    playing = {name: c for name, c in contenders.items() if c.update is not None}
    batches = itertools.tee(request.batches(), len(playing))  # each is drawn once, and trains all of them

    def turn(contender: Contender, batches: Iterator[list[Batch]]) -> list[float]:
        assert contender.update is not None
        ms, loss = timed_update(contender.update, next(batches), request.device)
        contender.losses.append(loss)
        return [ms]

    turns = {
        name: partial(turn, contender, own) for (name, contender), own in zip(playing.items(), batches, strict=True)
    }
    for name, readings in interleave(turns, seconds, (least, math.inf)).items():
        playing[name].ms += readings.ms
        if readings.failure is not None:
            playing[name].update, playing[name].failure = None, error_in_a_line(readings.failure)


def release() -> None:
    """Free unused memory, and all compiled code."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the record ----


def compare(request: Request, contenders: Mapping[str, Contender], ceilings: Mapping[str, float | None]) -> Record:
    """The comparison, as a record has it; ``ceilings`` may lack ``bandwidth`` and ``peak_flops``."""
    ours = [name for name in contenders if name.startswith(OURS)]
    return {
        "name": request.name,
        "shapes": {"batch_size": request.batch_size, "accumulation": request.accumulation, **asdict(request.config)},
        "ceilings": dict(ceilings),
        "ours": OURS if OURS in ours or not ours else ours[0],
        "contenders": {name: describe(name, c, request, ceilings) for name, c in contenders.items()},
    }


def describe(name: str, contender: Contender, request: Request, ceilings: Mapping[str, float | None]) -> Record:
    """A contender, as a record has it."""
    found: dict[str, Any] = {"ours": name.startswith(OURS), "whole": True, "failure": contender.failure}
    if len(contender.ms) < 2:  # no quartiles
        return found | {"failure": contender.failure or "not timed", "losses": contender.losses}
    timed = figures(contender.ms)
    rate = request.config.flops_per_token * request.tokens / (1e-3 * timed["ms"])
    gemm, peak = ceilings["gemm_flops"], ceilings.get("peak_flops")
    return {
        **found,
        **timed,
        "tokens_per_s": 1e3 * request.tokens / timed["ms"],
        "rate": rate,
        "unit": "FLOP/s",
        "mfu": rate / peak if peak else None,
        "share_of_ceiling": rate / gemm if gemm else None,
        "peak_bytes": contender.peak_bytes,
        "losses": contender.losses,
    }


# ---- the verdict ----


def disagreeing(record: Record) -> tuple[list[str], float]:
    """The contenders with losses that differ by more than the dtype allows, and the largest difference."""
    wrong, largest = [], 0.0
    for comparison in record["comparisons"]:
        losses = {
            name: c["losses"] for name, c in comparison["contenders"].items() if not c["failure"] and c.get("losses")
        }
        for name, apart in differences(losses).items():
            largest = max(largest, apart)
            if apart > AGREE[record["dtype"]]:
                wrong.append(f"{comparison['name']} {name}")
    return wrong, largest


def report(record: Record) -> int:
    """Print the table, and what is wrong if anything is. Returns the exit status."""
    comparisons = record["comparisons"]
    rows = table(comparisons)
    if len(comparisons) == 1:
        rows = [row[1:] for row in rows]  # the name is the same everywhere
    print(aligned(rows, words=(0, 1) if len(comparisons) > 1 else (0,)))
    for comparison in comparisons:
        if "predicted" in comparison:
            print(prediction(comparison))
    wrong, largest = disagreeing(record)
    print(f"losses differ by at most {largest:.1e}")
    if wrong:
        print(f"losses disagree: {', '.join(wrong)}")
    failed, alone = False, False
    for comparison in comparisons:
        whole = [c for c in comparison["contenders"].values() if c["whole"]]
        ours, baselines = ([c for c in whole if c["ours"] == own] for own in (True, False))
        failed |= any(c.get("ms") is None for c in ours)
        alone |= bool(baselines) and all(c.get("ms") is None or c["failure"] for c in baselines)
    if alone:
        print("no baseline was timed to the end, so there is nothing to compare with")
    sys.stdout.flush()
    return int(bool(wrong) or failed or alone)
