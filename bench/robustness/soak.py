"""Kills small runs at random moments, resumes them each time, and compares what comes out with an undisturbed run.

    python -m bench.robustness.soak                # 1,000 times SIGKILL, 100 times each of SIGTERM, SIGINT, SIGHUP
    python -m bench.robustness.soak --kills 5      # the short form

A run saves after every second update, so that many kills hit a checkpoint being written. It is resumed with
``--init_from auto`` until it ends by itself. Then all files of its last checkpoint must have the bits of the
undisturbed run's, and ``metrics.jsonl`` the same losses; and no checkpoint may have been lost on the way.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bench import records
from bench.robustness.child import FLAGS, Child, finish, prepare
from fastgpt.train import checkpoint

UPDATES = 60
SIGNALS = {"SIGKILL": 1000, "SIGTERM": 100, "SIGINT": 100, "SIGHUP": 100}


class Lost(Exception):
    """A run lost something that it must not lose."""


def command(run_dir: Path, data_dir: Path) -> list[str]:
    """The arguments of a run."""
    return [
        *FLAGS, "--dataset=d", f"--data_dir={data_dir}", f"--out_dir={run_dir}", "--init_from=auto",
        f"--max_iters={UPDATES}", f"--lr_decay_iters={UPDATES}", "--checkpoint_interval=2",
    ]  # fmt: skip


def fingerprint(run_dir: Path) -> dict[str, str]:
    """What a finished run has computed: its last checkpoint, and its losses by step."""
    last = checkpoint.newest(run_dir)
    digests = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in checkpoint.FILES}
    losses = {}
    for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # half a line, of a run that was killed while it wrote it
            continue
        if record["kind"] == "train":
            losses[record["step"]] = record["loss"]
    return digests | {"step": last.name, "losses": json.dumps(sorted(losses.items()))}


def torment(run_dir: Path, data_dir: Path, number: int, life: float, draw: random.Random, left: int) -> Counter[str]:
    """Run to the end, killed up to ``left`` times on the way; how the processes ended.

    Args:
        run_dir: folder of the run; does not exist yet.
        data_dir: where its dataset is.
        number: the signal.
        life: seconds that an undisturbed run takes.
        draw: of the moments.
        left: kills.

    Raises:
        Lost: a checkpoint was lost, or a process ended otherwise than it should.
    """
    ends: Counter[str] = Counter()
    reached = 0
    while True:
        child, killing = Child("train", command(run_dir, data_dir)), left > 0
        if killing:
            time.sleep(draw.uniform(0.0, life))
            child.kill(number)
        ended = child.wait()
        checkpoint.recover(run_dir)
        steps = checkpoint.steps(run_dir)
        if (steps[-1] if steps else 0) < reached:
            raise Lost(f"after {signal.Signals(number).name} the newest of {run_dir} is {steps}, not {reached}")
        reached = steps[-1] if steps else 0
        if ended.status == 0:
            return ends
        # The word for a signal that ends Python before fastgpt hears signals is the same number.
        if not killing or ended.status != 128 + number:
            raise Lost(f"{run_dir} ended with status {ended.status}:\n{ended.output}")
        left -= 1
        if any(run_dir.glob("checkpoints/*.partial")):
            ends["while a checkpoint was written"] += 1
        else:
            ends["otherwise" if reached else "before the first checkpoint"] += 1


def soak(folder: Path, number: int, kills: int, seed: int) -> dict[str, int]:
    """Kill runs ``kills`` times; a summary.

    Raises:
        Lost: a run did not become what the undisturbed one is.
    """
    data_dir, draw = prepare(folder), random.Random(seed)
    start = time.monotonic()
    ended = finish("train", *command(folder / "whole", data_dir))
    life = time.monotonic() - start
    assert ended.status == 0, ended.output
    expected = fingerprint(folder / "whole")
    ends: Counter[str] = Counter()
    runs = 0
    while ends.total() < kills:
        run_dir = folder / "run"
        ends += torment(run_dir, data_dir, number, life, draw, kills - ends.total())
        found = fingerprint(run_dir)
        if found != expected:
            differing = ", ".join(name for name in expected if found[name] != expected[name])
            raise Lost(f"{run_dir} differs from the undisturbed run in {differing}")
        runs += 1
        shutil.rmtree(run_dir)
    return {"kills": kills, **ends, "runs that ended with the bits of the undisturbed one": runs}


def main() -> None:
    """Soak, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.robustness.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, help="of each signal (1000 of SIGKILL, 100 of each other)")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS), help="which (all)")
    parser.add_argument("--seed", type=int, default=1)
    request = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {}
    for name in request.signals:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = soak(Path(folder), signal.Signals[name], request.kills or SIGNALS[name], request.seed)
            except Lost as error:
                sys.exit(f"error: {error}")
        print(name, *(f"{count} {what}" for what, count in found[name].items()), sep=", ", flush=True)
    if request.kills is None and request.signals == list(SIGNALS):
        record = records.begin("soak", "bench.robustness.soak", None, torch.device("cpu"))
        records.write(record | {"outcomes": found}, records.RESULTS / "robustness" / "soak")


if __name__ == "__main__":
    main()
