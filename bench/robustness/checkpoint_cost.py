"""Times the updates after which a checkpoint is written against those around them.

    python -m bench.robustness.checkpoint_cost

The model is ``gpt2-30m`` on the CPU with random tokens, 1,024 in an update: a small part of the preset's, so that what
a checkpoint costs shows the more. One of 360 MB is written every 20 updates. What it costs is the time of these 20
updates and of whatever happens between them, less 20 times the median of those of them that begin and end while nothing
is written. The cost of a checkpoint every 100 updates follows.
"""

import argparse
import io
import itertools
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from bench import records
from fastgpt import hardware
from fastgpt.data.shards import write_shard
from fastgpt.train import checkpoint
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.train.settle import settle
from fastgpt.train.trainer import Trainer

INTERVAL, MEASURED_INTERVAL = 100, 20
FLAGS = [
    "--preset=gpt2-30m", "--device=cpu", "--block_size=512", "--batch_size=2", "--total_batch_size=0",
    "--gradient_accumulation_steps=1", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1", "--overwrite",
    f"--checkpoint_interval={MEASURED_INTERVAL}",
]  # fmt: skip


def measure(tokens: Path, run_dir: Path, n_checkpoints: int) -> tuple[list[float], list[bool]]:
    """Seconds from the start of each update to that of the next, and whether a checkpoint was being written in it."""
    updates = (n_checkpoints + 1) * MEASURED_INTERVAL + 1
    trainer = Trainer(
        settle(parse([*FLAGS, f"--dataset={tokens}", f"--out_dir={run_dir}", f"--max_iters={updates}"], PRESETS))
    )
    update, starts, idle = trainer.update, [], []

    def timed_update() -> float:
        starts.append(time.perf_counter())
        idle.append(trainer.writer.idle)
        return update()

    trainer.update = timed_update  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()):
        assert trainer.train() == 0
    seconds = [after - before for before, after in itertools.pairwise(starts)]
    # the update after which a checkpoint begins ends while it is being written
    return seconds, [not (before and after) for before, after in itertools.pairwise(idle)]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.robustness.checkpoint_cost", description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=6)
    request = parser.parse_args()
    hardware.use_threads()
    with tempfile.TemporaryDirectory() as folder:
        tokens, run_dir = Path(folder, "train.bin"), Path(folder, "run")
        for path in (tokens, tokens.with_name("val.bin")):
            write_shard(path, np.random.default_rng(0).integers(50257, size=1_000_000, dtype=np.uint16))
        seconds, writing = measure(tokens, run_dir, request.checkpoints)
        written = sum(path.stat().st_size for path in checkpoint.newest(run_dir).iterdir())
    costs = []
    for first in range(MEASURED_INTERVAL - 1, len(seconds) - MEASURED_INTERVAL, MEASURED_INTERVAL):
        window = slice(first, first + MEASURED_INTERVAL)  # from the update after which the checkpoint begins
        quiet = [s for s, busy in zip(seconds[window], writing[window], strict=True) if not busy]
        costs.append(sum(seconds[window]) - MEASURED_INTERVAL * statistics.median(quiet))
    update = statistics.median(s for s, busy in zip(seconds, writing, strict=True) if not busy)
    cost = statistics.median(costs) / (INTERVAL * update)
    record = records.begin("checkpoint_cost", "bench.robustness.checkpoint_cost", None, torch.device("cpu"))
    outcome = {
        "checkpoint_bytes": written, "seconds": seconds, "writing": writing, "seconds_of_a_checkpoint": costs,
        "seconds_of_an_update": update, "interval": INTERVAL, "cost": cost,
    }  # fmt: skip
    records.write(record | outcome, records.RESULTS / "robustness" / "checkpoint_cost")
    print("a checkpoint costs", " ".join(f"{c:.2f}" for c in costs), f"s, an update takes {update:.2f} s:")
    print(f"a checkpoint every {INTERVAL} updates costs {cost:.2%} of the time")


if __name__ == "__main__":
    main()
