"""The largest micro-batch of each contender in a limited amount of GPU memory, and its speed at that size."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from bench import steps
from bench.contenders import OURS, RECORDED
from bench.pages import Record
from bench.steps import Request
from fastgpt.train.predict import micro_batch, trace
from fastgpt.units import GIB, gib

Note = Callable[[dict[str, Any]], None]


def within(vram: float, name: str, request: Request, comparison: Record, note: Callable[[], None]) -> None:
    """Find a contender's largest micro-batch in ``vram`` GiB, add it to the comparison, and print a line."""
    steps.release()
    memory = int(vram * GIB)
    guess = first_guess(name, request, memory, comparison["contenders"][name])
    print(f"largest micro-batch of {name}, starting from {guess}", flush=True)
    total = torch.cuda.get_device_properties(request.device).total_memory
    # the limit is one of PyTorch's allocator, which does not count what CUDA itself takes
    fraction = min(1.0, (memory - trace.CUDA_RESERVE) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, request.device)

    def note_best(best: dict[str, Any]) -> None:
        comparison["largest"][name] = dict(best)
        note()

    best = largest(name, request, guess, note_best)
    torch.cuda.set_per_process_memory_fraction(1.0, request.device)
    speed = f", {best['tokens_per_s']:,.0f} tokens/s" if "ms" in best else f": {best['beyond']}"
    print(f"{name}: at most {best['batch_size']} sequences in {gib(memory)}{speed}", flush=True)


def largest(name: str, request: Request, guess: int, note: Note, seconds: float = 1.0) -> dict[str, Any]:
    """A contender's largest micro-batch in the memory that the process may use, to a tenth, and its speed there.

    The search starts from ``guess``. After every try, ``note`` gets the best so far. torch.compile specialises on the
    first size and makes the size a variable for the second, so the second compilation serves all further sizes.
    """
    best: dict[str, Any] = {"batch_size": 0}

    def fits(batch_size: int) -> bool:
        resized = replace(request, batch_size=batch_size, accumulation=1, recompute="cheap")
        contender = steps.prepare(name, resized)
        if contender.update is not None:
            steps.take_turns({name: contender}, resized, seconds, least=2)
        success = contender.update is not None
        if not success:
            best["beyond"] = contender.failure  # out of memory, or another failure
        else:
            ms = median(contender.ms)
            if batch_size > best["batch_size"] or (batch_size == best["batch_size"] and ms < best["ms"]):
                tokens_per_s = 1e3 * resized.tokens / ms
                best.update(batch_size=batch_size, ms=ms, tokens_per_s=tokens_per_s, peak_bytes=contender.peak_bytes)
        note(best)
        contender.update = None
        if name in RECORDED:
            steps.release()
        return success

    # away from the guess in steps that double, then by halves between what fits and what does not
    low, high, step = 0, guess, max(1, guess // 10)
    while fits(high):
        low, high, step = high, high + step, 2 * step
    while high - low > max(1, low // 10):
        middle = (low + high) // 2 if low else max(1, high - step)
        step *= 2
        if fits(middle):
            low = middle
        else:
            high = middle
    if name.startswith("compile") and name not in RECORDED and best["batch_size"] not in (0, guess):
        steps.release()  # compile once more, for this size alone, which may be faster
        fits(best["batch_size"])
    return best


def first_guess(name: str, request: Request, memory: int, measured: Record) -> int:
    """A micro-batch that about fills ``memory`` bytes: the plan's for fastgpt, for others scaled from the peak."""
    if name.startswith(OURS):
        return max(1, micro_batch.largest_batch(replace(request.setup(), recompute="cheap"), memory))
    # bytes a parameter: weights, gradients and two moments in fp32; bf16 weights with fp32 masters take as much
    at_rest = 16 * request.config.n_params
    passing = (measured.get("peak_bytes") or 0) - at_rest
    if passing <= 0:
        return request.batch_size
    return max(1, int((memory - trace.CUDA_RESERVE - at_rest) * request.batch_size / passing))
