"""Times a run with checkpoints against the same run without, in turns.

    python -m bench.robustness.checkpoint_cost

The model is ``gpt2-30m`` on the CPU with random tokens, 1,024 in an update: a small part of the preset's, so
that what a checkpoint costs shows the more. One of 360 MB is written every 100 updates. The time is that of all updates
and of whatever happens between them.
"""

import argparse
import io
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

INTERVAL, WARMUP = 100, 5
FLAGS = [
    "--preset=gpt2-30m", "--device=cpu", "--block_size=512", "--batch_size=2", "--total_batch_size=0",
    "--gradient_accumulation_steps=1", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1", "--overwrite",
]  # fmt: skip


def seconds(tokens: Path, run_dir: Path, updates: int, interval: int) -> float:
    """Wall-clock time of a run from the update ``WARMUP`` to its last checkpoint."""
    flags = [f"--dataset={tokens}", f"--out_dir={run_dir}", f"--max_iters={updates}"]
    trainer = Trainer(settle(parse([*FLAGS, *flags, f"--checkpoint_interval={interval}"], PRESETS)))
    update, save, times = trainer.update, trainer._save, []

    def timed_update() -> float:
        if trainer.step == WARMUP:
            times.append(time.perf_counter())
        return update()

    def last_save() -> Path:
        trainer._wait_and_report()  # the last checkpoint of both runs is left out
        times.append(time.perf_counter())
        return save()

    trainer.update, trainer._save = timed_update, last_save  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()):
        assert trainer.train() == 0
    return times[1] - times[0]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.robustness.checkpoint_cost", description=__doc__)
    parser.add_argument("--updates", type=int, default=2 * INTERVAL + 20, help="of each run")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each kind")
    request = parser.parse_args()
    hardware.use_threads()
    found: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as folder:
        tokens, run_dir = Path(folder, "train.bin"), Path(folder, "run")
        for path in (tokens, tokens.with_name("val.bin")):
            write_shard(path, np.random.default_rng(0).integers(50257, size=1_000_000, dtype=np.uint16))
        for i in range(request.pairs):
            for kind in sorted(found, reverse=bool(i % 2)):
                interval = INTERVAL if kind == "with" else 10**6
                found[kind].append(seconds(tokens, run_dir, request.updates, interval))
                print(kind, f"{found[kind][-1]:.2f} s", flush=True)
        written = sum(path.stat().st_size for path in checkpoint.newest(run_dir).iterdir())
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    cost = medians["with"] / medians["without"] - 1.0
    outcome = {"updates": request.updates, "interval": INTERVAL, "checkpoint_bytes": written, "seconds": found}
    record = records.begin("checkpoint_cost", "bench.robustness.checkpoint_cost", None, torch.device("cpu"))
    records.write(record | outcome | {"cost": cost}, records.RESULTS / "robustness" / "checkpoint_cost")
    print(f"checkpoints every {INTERVAL} updates cost {cost:.1%} of the time")


if __name__ == "__main__":
    main()
