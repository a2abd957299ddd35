"""``python -m bench.gpu``: the first minutes on a GPU, in stages, those first that teach most.

    make gpu                              # the GPU at hand, with the python3 at hand as it is: at most 9.5 minutes
    make gpu-rehearsal                    # the same stages on a machine without one, small, in about two minutes
    python -m bench.gpu --stages step kernels --minutes 4 --out DIR

A stage is a few commands, each one that a person could type. Every command runs in a process of its own with a limit
of its own: one that dies or hangs takes nothing else with it. If recorded CUDA graphs fail in the first stage, the
others go on without them. How many sequences a step takes depends on the GPU's memory.

Writes into bench/results/DEVICE what each command records and prints (``gpu/NAME.txt``), and after every command
``gpu/stages.json`` and ``gpu/summary.txt``. Exit status: 0 all passed; 1 something failed; 2 the request was wrong.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.timing import REPOSITORY, provenance, results_folder
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError

MEMORY_A_WORKER = 3 << 30  # bytes of the GPU's: CUDA's context, and the tests at GPT-2's size
SHOWN = {"mfu": 8, "mfu-compiled": 7, "kernels": 8}  # lines of what they print, in the summary
OURS, WITHOUT_GRAPHS = "fastgpt", "fastgpt, no graphs"  # contenders of bench.mfu
GRACE_SECONDS = 10  # from an interrupt, at which a command writes what it has, to the end of it


@dataclass(frozen=True)
class Command:
    """What a stage runs.

    Attributes:
        name: of its output's file.
        module: after ``python -m``.
        flags: on a GPU.
        seconds: after which it is stopped.
        small: the flags in a rehearsal; ``None`` where it has no place in one.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    seconds: float
    small: tuple[str, ...] | None


@dataclass(frozen=True)
class Outcome:
    """What became of a command: ``passed``, ``failed``, ``stopped`` by its limit, or ``no time`` was left for it."""

    stage: str
    command: str
    status: str
    seconds: float
    output: str


TINY = ("--preset", "quickstart", "--device", "cpu", "--n_layer", "1", "--n_head", "2", "--n_embd", "64",
        "--block_size", "32", "--batch_size", "2", "--seconds", "0")  # fmt: skip
BATCH, KERNELS_BATCH = "BATCH", "KERNELS_BATCH"  # in place of a number, which depends on the GPU's memory
GPT2 = ("--preset", "gpt2-124m", "--batch_size", BATCH)
SMOKE = "tests/kernels/test_at_gpt2_size.py"

# All tests that run on a GPU, and do not merely stand in for one or for a caller who errs.
TESTS = (
    "tests/kernels", "tests/train/test_step.py", "tests/train/predict/test_trace.py", "tests/data/test_prefetch.py",
    "-k", "(triton or cuda or on_a_gpu or captured_step or two_devices) and not "
    "(malformed or ahead_of_time or test_triton_launch or cpp or reference or smoke)",
    "--tb=short", "--durations=10",
)  # fmt: skip

STAGES: dict[str, tuple[Command, ...]] = {
    # what is here, and does a step run at all, with graphs and without, and train as plain PyTorch does
    "first": (
        Command("doctor", "fastgpt.doctor", ("--quick",), 25, ("--quick",)),
        Command(
            "first-step", "bench.mfu",
            ("--preset", "gpt2-30m", "--n_layer", "2", "--n_head", "4", "--n_embd", "256", "--block_size", "256",
             "--batch_size", "8", "--seconds", "1", "--loss_steps", "20",
             "--contenders", "fastgpt", "fastgpt, no graphs", "eager"),
            75, (*TINY, "--loss_steps", "20", "--contenders", "fastgpt", "eager"),
        ),
    ),
    # every operator, forward and backward, at GPT-2's shapes and in every dtype, against float64
    "operators": (
        Command("smoke", "pytest", (SMOKE, "--tb=short"), 80, (SMOKE, "-k", "gelu")),
    ),
    # the headline: whole steps of GPT-2 124M, where their time goes, and what they learn. First those that compile in
    # a moment; torch.compile takes its time
    "step": (
        Command(
            "mfu", "bench.mfu",
            (*GPT2, "--seconds", "6", "--profile", "--loss_steps", "50",
             "--contenders", "fastgpt", "fastgpt, no graphs", "eager"),
            100, (*TINY, "--profile", "--loss_steps", "5", "--contenders", "fastgpt", "eager"),
        ),
        Command(
            "mfu-compiled", "bench.mfu",
            (*GPT2, "--seconds", "10", "--profile", "--contenders", "fastgpt", "compile", "strongest"), 150, None,
        ),
    ),
    # the kernels against their best peers
    "kernels": (
        Command(
            "kernels", "bench.kernels",
            ("--batch_size", KERNELS_BATCH, "--seconds", "60", "--ops", "attention_qkv", "linear_cross_entropy",
             "adamw_flat", "add_layer_norm", "gelu_bias", "attention", "layer_norm", "gelu", "linear"),
            80, ("--device", "cpu", "--block_size", "32", "--seconds", "0", "--ops", "layer_norm"),
        ),
    ),
    # the rest, as far as there is time
    "rest": (
        Command("tests", "pytest", TESTS, 150, None),
        Command(
            "mfu-12gb", "bench.mfu",
            (*GPT2, "--seconds", "1", "--vram", "12GB", "--contenders", "fastgpt", "compile"), 120, None,
        ),
        Command(
            "mfu-autotuned", "bench.mfu",
            (*GPT2, "--seconds", "8", "--contenders", "fastgpt", "strongest, max-autotune"), 200, None,
        ),
    ),
}  # fmt: skip


# ---- running ----


def examine(argv: Sequence[str] | None, device: torch.device) -> tuple[dict[str, Any], Path, int, int]:
    """What a record begins with, the folder of this device, how many processes may share the tests, a micro-batch."""
    memory = hardware.memory(device)[1].amount
    workers = min(12, os.cpu_count() or 1, memory // MEMORY_A_WORKER) if device.type == "cuda" else 1
    return provenance("bench.gpu", argv, device), results_folder(device), workers, micro_batch(memory)


def micro_batch(memory: int) -> int:
    """Sequences of 1024 tokens, B, with which all contenders of stage ``step`` fit a GPU with so many bytes.

    They stay there together. GiB that they take in bf16, counted on tensors without data: eager 1.6 + 0.92 B while it
    runs, fastgpt's graphs 2.5 + 0.29 B all the time, fastgpt without graphs 2.1 at rest, and CUDA itself 0.7. That is
    6.9 + 1.21 B: 9.3 for 2, 11.7 for 4, 16.6 for 8, 26.3 for 16. A card of 12 GB may have a screen to feed too.
    """
    return next((size for least, size in ((40e9, 16), (20e9, 8), (14e9, 4)) if memory >= least), 2)


def arguments(
    command: Command, rehearsal: bool, graphs: bool, folder: Path, workers: int, batch_size: int
) -> list[str]:
    """The command line; where CUDA graphs have failed it does without. ``workers`` share the tests.

    Kernels are timed on 8 sequences at least: they fit where all contenders of a step do not, and less says little.
    """
    sizes = {BATCH: batch_size, KERNELS_BATCH: max(8, batch_size)}
    flags = [str(sizes.get(flag, flag)) for flag in (command.small or () if rehearsal else command.flags)]
    if not graphs and OURS in flags:
        flags.remove(OURS)
        if WITHOUT_GRAPHS not in flags:  # so that no stage is left without a contender of ours
            flags.insert(flags.index("--contenders") + 1, WITHOUT_GRAPHS)
    if command.module.startswith("bench."):
        flags += ["--out", str(folder)]
    if command.module == "pytest":
        flags += ["-p", "no:cacheprovider"]
        if find_spec("pytest_timeout"):  # an interrupt does not end a thread that waits for a GPU
            flags += ["--timeout=60", "--timeout-method=thread"]
        if find_spec("xdist") and workers > 1:
            flags += ["-n", str(workers)]
    return [sys.executable, "-m", command.module, *flags]


def execute(line: Sequence[str], output: Path, seconds: float) -> str:
    """Run a command line; its status in a word."""
    record = output.with_suffix(".jsonl")  # of tests
    record.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1",
                                "FASTGPT_TEST_RECORD": str(record)}  # fmt: skip
    if not torch.cuda.is_available():  # the few tests of a rehearsal run also where they have passed before
        environment["FASTGPT_TEST_ALL"] = "1"
    with output.open("w") as file:
        process = subprocess.Popen(
            line, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
            # a shell's background jobs, and all that they start, ignore interrupts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            return "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:  # the compilers' processes that it has started too
            for number in (signal.SIGINT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(GRACE_SECONDS)
                except (ProcessLookupError, subprocess.TimeoutExpired):  # one that hangs in the driver is left there
                    pass


def graphs_work(record: dict[str, Any] | None) -> bool:
    """Whether nothing speaks against recorded graphs: no failure in the first stage, no losses other than without.

    A stage that was stopped before it came to them has nothing to say.
    """
    contenders = {} if record is None else record["contenders"]
    ours, without = contenders.get("fastgpt"), contenders.get("fastgpt, no graphs", {})
    if ours is None:
        return True
    pairs = zip(ours["losses"], without.get("losses", []), strict=False)
    return ours["failure"] is None and all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)


def run_stages(
    names: Sequence[str], folder: Path, seconds: float, rehearsal: bool, workers: int, batch_size: int,
    note: Callable[[list[Outcome]], None],
) -> list[Outcome]:  # fmt: skip
    """All commands of these stages in turn; ``note`` gets the outcomes so far."""
    started, deadline = time.time(), time.monotonic() + seconds
    outcomes: list[Outcome] = []
    graphs = True
    for stage in names:
        for command in STAGES[stage]:
            if rehearsal and command.small is None:
                continue
            output = folder / "gpu" / f"{command.name}.txt"
            limit = min(command.seconds, deadline - time.monotonic() - GRACE_SECONDS)
            start = time.monotonic()
            if limit <= 0:
                status = "no time"
            else:
                print(f"{stage}: {command.name}, at most {limit:.0f} s", flush=True)
                line = arguments(command, rehearsal, graphs, folder, workers, batch_size)
                status = execute(line, output, limit)
            outcomes.append(Outcome(stage, command.name, status, time.monotonic() - start, str(output)))
            note(outcomes)
            print(f"{stage}: {command.name} {status} after {outcomes[-1].seconds:.0f} s", flush=True)
            if command.name == "first-step" and not graphs_work(newest(folder, "mfu-*.json", started)):
                graphs = False
                print("with recorded CUDA graphs a step failed or learnt otherwise: the other stages do without")
    return outcomes


# ---- what a person reads ----


def newest(folder: Path, pattern: str, since: float) -> dict[str, Any] | None:
    """The record that was written last, and since then; ``None`` without one."""
    found = [path for path in folder.glob(pattern) if path.stat().st_mtime >= since]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return json.loads(path.read_text())
        except ValueError:  # cut off
            continue
    return None


def tail(output: Path, n: int) -> list[str]:
    """The last lines of what a command printed."""
    try:
        lines = [line.rstrip() for line in output.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [line[:160] for line in lines if line][-n:]


def summary(outcomes: Sequence[Outcome], folder: Path, so_far: bool = False) -> str:
    """At most 40 lines: what passed, the figures that count, and where to look next; ``so_far`` if more is to come."""
    lines = [f"{o.stage:<10} {o.command:<14} {o.status:<8} {o.seconds:5.0f} s" for o in outcomes]
    for o in outcomes:
        if o.command in SHOWN and o.status != "no time":
            lines += ["", *tail(Path(o.output), SHOWN[o.command])]
    bad = [o for o in outcomes if o.status in ("failed", "stopped")]
    for o in [o for o in bad if o.command not in SHOWN][:3]:
        lines += ["", f"{o.command} {o.status}; {o.output} ends:", *(f"  {line}" for line in tail(Path(o.output), 3))]
    passed = "all passed so far" if so_far else "all passed"
    lines += ["", f"{passed}; records are in {folder}" if not bad else "next: mend the first that failed, and run "
              f"python -m bench.gpu --stages {bad[0].stage}"]  # fmt: skip
    return "\n".join([*lines[:-2][:37], *lines[-2:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, print the summary."""
    parser = Parser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default all, in order")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; default 9.5")
    parser.add_argument("--rehearse", action="store_true", help="on a machine without a GPU: the same stages, small")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    flags = parser.parse_args(argv)
    if not flags.rehearse and not torch.cuda.is_available():
        raise RequestError("torch sees no GPU here; --rehearse runs the stages without one")
    if flags.minutes <= 0:
        raise RequestError("--minutes is more than 0")
    device = torch.device("cpu" if flags.rehearse else "cuda")
    # in a process of its own, so that this one holds none of the GPU's memory
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        about, own_folder, workers, batch_size = child.submit(examine, argv, device).result()
    folder = (flags.out or own_folder).absolute()
    (folder / "gpu").mkdir(parents=True, exist_ok=True)

    def note(outcomes: list[Outcome]) -> None:
        record = about | {"rehearsal": flags.rehearse, "outcomes": [asdict(o) for o in outcomes]}
        (folder / "gpu" / "stages.json").write_text(json.dumps(record, indent=1) + "\n")
        # in case the machine is taken away
        (folder / "gpu" / "summary.txt").write_text(summary(outcomes, folder, so_far=True) + "\n")

    outcomes = run_stages(flags.stages, folder, 60.0 * flags.minutes, flags.rehearse, workers, batch_size, note)
    words = summary(outcomes, folder)
    (folder / "gpu" / "summary.txt").write_text(words + "\n")
    print(f"\n{words}")
    return int(any(o.status in ("failed", "stopped") for o in outcomes))


if __name__ == "__main__":
    run(main)
