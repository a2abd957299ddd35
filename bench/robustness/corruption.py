"""Damages the files of a small run and of its dataset at random, and sees what is made of them.

    python -m bench.robustness.corruption               # 2,000 damages, 200 runs without any
    python -m bench.robustness.corruption --trials 20   # the short form

Each trial copies a run with two checkpoints and its dataset, damages one file, resumes the run and samples from it. It
ends in one of these ways:

    refused      status 2 and one line that names a file; nothing has been written
    told         the damage is named, and the run ends with the right bits without the damaged part
    harmless     the right bits, without a word: nothing that matters was damaged
    silent       other bits without a word
    traceback    an error that is Python's own
    unnamed      refused, without a file's name
    hang         no end within a minute

Only the first three may occur, and a run without damage must never be refused.
"""

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from bench import records
from bench.robustness.child import FLAGS, Ended, finish, prepare
from fastgpt import limits
from fastgpt.train import checkpoint

FAILURES = ("silent", "traceback", "unnamed", "hang")
PAGE = 4096  # bytes that a disk loses together

# ---- the damages ----


def flip(content: bytearray, draw: random.Random) -> bytes:
    """One bit."""
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def truncate(content: bytearray, draw: random.Random) -> bytes:
    """The end is missing."""
    return content[: draw.randrange(len(content) + 1)]


def zero(content: bytearray, draw: random.Random) -> bytes:
    """A page, or what there is of one, is zero."""
    start = draw.randrange(0, len(content) + 1, PAGE)
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)
    return content


def extend(content: bytearray, draw: random.Random) -> bytes:
    """Rubbish at the end."""
    return content + draw.randbytes(draw.randrange(1, 100))


def exchange(content: bytearray, draw: random.Random) -> bytes:
    """Two stretches of 64 bytes have changed places."""
    if len(content) >= 128:
        a, b = sorted(draw.sample(range(0, len(content) - 63, 64), 2))
        content[a : a + 64], content[b : b + 64] = content[b : b + 64], content[a : a + 64]
    return content


def overwrite(content: bytearray, draw: random.Random) -> bytes:
    """Up to 16 bytes have other values."""
    start = draw.randrange(len(content) + 1)
    return content[:start] + draw.randbytes(min(16, len(content) - start)) + content[start + 16 :]


DAMAGES: list[Callable[[bytearray, random.Random], bytes]] = [flip, truncate, zero, extend, exchange, overwrite]


def damage(folder: Path, draw: random.Random) -> tuple[list[Path], str]:
    """Damage one file below ``folder``, or two by swapping them; which, and how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    if draw.random() < 0.1:  # another file of the same kind in its place
        other = draw.choice([file for file in files if file.suffix == path.suffix])
        content = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(content)
        return [path, other], "swap"
    how = draw.choice(DAMAGES)
    path.write_bytes(how(bytearray(path.read_bytes()), draw))
    return [path], how.__name__


# ---- what becomes of them ----


def resume(folder: Path) -> Ended:
    """Resume the run in ``folder`` to its end."""
    return finish(
        "train", f"--out_dir={folder / 'run'}", "--init_from=resume", "--max_iters=26", f"--data_dir={folder}"
    )


def sample(folder: Path) -> Ended:
    """Sample from the run in ``folder``; the output is without the line that has the speed."""
    ended = finish("sample", str(folder / "run"), "--max_new_tokens=20", "--prompt=1")
    lines = ended.output.splitlines(keepends=True)
    return replace(ended, output="".join(line for line in lines if not line.endswith(" tokens/s\n")))


def weights(folder: Path) -> str:
    """The digest of the newest model."""
    return hashlib.sha256((checkpoint.newest(folder / "run") / "model.safetensors").read_bytes()).hexdigest()


def outcome(ended: Ended, right: bool, damaged: list[Path]) -> str:
    """The word for how a command has ended.

    Args:
        ended: the end.
        right: whether its result is that of the run without damage.
        damaged: the files.
    """
    if ended.status is None:
        return "hang"
    if "Traceback" in ended.output:
        return "traceback"
    named = any(path.name in ended.output for path in damaged)
    if ended.status == 0:
        told = named and ("damaged" in ended.output or "cannot be read" in ended.output)
        return "silent" if not right else "told" if told else "harmless"
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return "refused" if ended.status == 2 and len(lines) == 1 and named else "unnamed"


class Trial(NamedTuple):
    """One command on one damaged copy."""

    file: str  # without the step of its checkpoint
    damage: str
    command: str
    outcome: str
    output: str


def trial(base: Path, folder: Path, draw: random.Random, right: tuple[str, str, str]) -> list[Trial]:
    """Damage a copy of ``base``, then sample from it and resume it.

    Args:
        base: a run and its dataset.
        folder: where the copy is made, and removed.
        draw: of the damage.
        right: the digest of the resumed run's weights, and the samples of its two checkpoints.
    """
    shutil.copytree(base, folder)
    damaged, how = damage(folder, draw)
    file = "/".join(part if "step-" not in part else "step" for part in damaged[0].relative_to(folder).parts)
    sampled = sample(folder)
    found = [Trial(file, how, "sample", outcome(sampled, sampled.output.endswith(right[1:]), damaged), sampled.output)]
    resumed = resume(folder)
    as_expected = resumed.status == 0 and weights(folder) == right[0]
    found.append(Trial(file, how, "resume", outcome(resumed, as_expected, damaged), resumed.output))
    shutil.rmtree(folder)
    return found


def whole_run(base: Path, folder: Path) -> tuple[str, str, str]:
    """Make a run with two checkpoints and its dataset in ``base``; what comes of it, undamaged, as `trial` needs it."""
    prepare(base)
    flags = [*FLAGS, "--dataset=d", f"--data_dir={base}", f"--out_dir={base / 'run'}", "--lr_decay_iters=26"]
    samples = []
    for last, start in ((10, "scratch"), (20, "resume")):
        ended = finish("train", *flags, f"--max_iters={last}", f"--init_from={start}")
        assert ended.status == 0, ended.output
        samples.append(sample(base).output)
    checkpoints = base / "run" / "checkpoints"
    unread = (base / "text.txt", *(base / "run" / name for name in ("loss.png", "report.html")))
    for path in (*unread, checkpoints / "latest", checkpoints / "best"):
        path.unlink(missing_ok=True)
    assert checkpoint.steps(base / "run") == [10, 20]
    shutil.copytree(base, folder)
    ended = resume(folder)
    assert ended.status == 0, ended.output
    right = weights(folder), *samples
    shutil.rmtree(folder)
    return right


def is_false_alarm(base: Path, folder: Path, right: tuple[str, str, str]) -> bool:
    """Whether an undamaged copy is not sampled from or not resumed as it should."""
    shutil.copytree(base, folder)
    sampled, resumed = sample(folder), resume(folder)
    as_expected = sampled.output == right[2] and resumed.status == 0 and weights(folder) == right[0]
    shutil.rmtree(folder)
    return not as_expected


class Share(NamedTuple):
    """What one of the processes that share the trials does: every ``workers``-th, from ``worker`` on."""

    worker: int
    workers: int
    trials: int
    seed: int
    base: Path
    right: tuple[str, str, str]


def work(share: Share) -> tuple[Counter[tuple[str, ...]], int]:
    """How often each row of the table occurred in a share, and the number of false alarms."""
    folder, table = share.base.with_name(f"trial{share.worker}"), Counter[tuple[str, ...]]()
    for i in range(share.worker, share.trials, share.workers):
        for found in trial(share.base, folder, random.Random(f"{share.seed} {i}"), share.right):
            table[found[:-1]] += 1
            if found.outcome in FAILURES:
                print(f"trial {i}: {', '.join(found[:-1])}\n{found.output[-1500:]}", file=sys.stderr, flush=True)
    undamaged = range(share.worker, share.trials // 10, share.workers)
    return table, sum(is_false_alarm(share.base, folder, share.right) for _ in undamaged)


def main() -> None:
    """Try them all, and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.robustness.corruption", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--trials", type=int, help="damages (2000); a tenth as many runs without any")
    parser.add_argument("--seed", type=int, default=1)
    request = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    n, table, alarms, workers = request.trials or 2000, Counter[tuple[str, ...]](), 0, limits.threads().amount
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        base.mkdir()
        right = whole_run(base, Path(place) / "trial")
        shares = [Share(worker, workers, n, request.seed, base, right) for worker in range(workers)]
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            for part, part_alarms in pool.map(work, shares):
                table += part
                alarms += part_alarms
    outcomes = Counter[str]()
    for row, times in table.items():
        outcomes[row[-1]] += times
    said = ", ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common())
    print(f"{said}; {alarms} false alarms")
    if request.trials is None:
        record = records.begin("corruption", "bench.robustness.corruption", None, torch.device("cpu"))
        rows = [[*row, times] for row, times in sorted(table.items())]
        summary = {"damages": n, "undamaged": n // 10, "false alarms": alarms, "table": rows}
        records.write(record | {"outcomes": summary}, records.RESULTS / "robustness" / "corruption")
    sys.exit(bool(alarms or any(outcomes[outcome] for outcome in FAILURES)))


if __name__ == "__main__":
    main()
