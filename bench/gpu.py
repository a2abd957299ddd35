"""``python -m bench.gpu``: tests and timings on a GPU in a few minutes, in stages, the most informative first.

    make gpu                              # on the GPU of this machine, with its python3 as it is: at most 9.5 minutes
    make gpu-rehearsal                    # the same stages, small, on a machine without a GPU, in about two minutes
    python -m bench.gpu --stages step kernels --minutes 4 --out DIR

A stage is a few commands that a user could type. Every command runs in its own process with its own time limit, so that
one that crashes or hangs does not affect the others. If CUDA graphs fail in the first stage, the other stages run
without them. The micro-batch of a step depends on the GPU's memory.

Writes into bench/results/DEVICE what each command records, its output (gpu/NAME.txt), and after every command
gpu/stages.json and gpu/summary.txt. Exit status: 0 all passed; 1 a command failed; 2 the request was wrong.
"""

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

from bench.contenders import NO_GRAPHS, OURS, difference
from bench.records import REPOSITORY, begin, read, results_folder, write
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError

MEMORY_PER_WORKER = 3 << 30  # bytes on the GPU: CUDA's context, and the tests at GPT-2's size
SHOWN = {"mfu": 8, "mfu-compiled": 7, "kernels": 8}  # lines of their output in the summary: their tables
GRACE_SECONDS = 10  # from an interrupt, on which a command writes its results so far, to a kill
GRAPHS_AGREE = 1e-3  # the largest relative difference of a loss with CUDA graphs from the same without


@dataclass(frozen=True)
class Command:
    """One command of a stage.

    Attributes:
        name: of the file with its output.
        module: what ``python -m`` runs.
        flags: on a GPU.
        seconds: the time limit.
        small: the flags in a rehearsal; ``None`` if a rehearsal leaves it out.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    seconds: float
    small: tuple[str, ...] | None


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``passed``, ``failed``, ``stopped`` by its time limit, or ``no time``, which is not run.

    ``output`` is the file with its output, in the folder of the records.
    """

    stage: str
    command: str
    status: str
    seconds: float
    output: str


TINY = ("--preset", "quickstart", "--device", "cpu", "--n_layer", "1", "--n_head", "2", "--n_embd", "64",
        "--block_size", "32", "--batch_size", "2", "--seconds", "0")  # fmt: skip
BATCH, KERNELS_BATCH = "BATCH", "KERNELS_BATCH"  # placeholders for numbers that depend on the GPU's memory
GPT2 = ("--preset", "gpt2-124m", "--batch_size", BATCH)
SMOKE = "tests/kernels/test_at_gpt2_size.py"
RUN = "build/gpu-run"  # of the stage "trainer"
TINY_RUN = ("--device", "cpu", "--n_layer", "1", "--eval_iters", "2", "--eval_interval", "4")

# All tests that run on a GPU; those of the stage "operators" have run by then.
TESTS = (
    "tests/kernels", "tests/train/test_step.py", "tests/train/predict/test_trace.py", "tests/data/test_prefetch.py",
    "-m", "gpu and not smoke", "--tb=short", "--durations=10",
)  # fmt: skip

STAGES: dict[str, tuple[Command, ...]] = {
    # the machine; whether a step runs with and without CUDA graphs, and has the losses of plain PyTorch
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
    # every operator against float64, forward and backward, at GPT-2's shapes and in every dtype
    "operators": (
        Command("smoke", "pytest", (SMOKE, "--tb=short"), 80, (SMOKE, "-k", "gelu")),
    ),
    # whole steps of GPT-2 124M, the time by kind of kernel, and the losses
    "step": (
        Command(
            "mfu", "bench.mfu",
            (*GPT2, "--seconds", "6", "--profile", "--loss_steps", "50",
             "--contenders", "fastgpt", "fastgpt, no graphs", "eager"),
            100, (*TINY, "--profile", "--loss_steps", "5", "--contenders", "fastgpt", "eager"),
        ),
    ),
    # a whole run as a user starts it, with data, evaluations and checkpoints; then more of it; then its text
    "trainer": (
        Command(
            "train", "fastgpt.train",
            ("--preset", "quickstart", "--device", "cuda", "--out_dir", RUN, "--overwrite"),
            50, ("--preset", "quickstart", *TINY_RUN, "--max_iters", "4", "--out_dir", RUN, "--overwrite"),
        ),
        Command(
            "train-resumed", "fastgpt.train", ("--init_from", "resume", "--max_iters", "1000", "--out_dir", RUN),
            40, ("--init_from", "resume", "--max_iters", "8", "--out_dir", RUN),
        ),
        Command(
            "sample", "fastgpt.sample", (RUN, "--prompt", "def ", "--max_new_tokens", "100", "--device", "cuda"),
            25, (RUN, "--prompt", "def ", "--max_new_tokens", "8"),
        ),
    ),
    # each kernel against its best peers
    "kernels": (
        Command(
            "kernels", "bench.kernels",
            ("--batch_size", KERNELS_BATCH, "--seconds", "60", "--ops", "attention_qkv", "linear_cross_entropy",
             "adamw_flat", "add_layer_norm", "gelu_bias", "attention", "layer_norm", "gelu", "linear"),
            80, ("--device", "cpu", "--block_size", "32", "--seconds", "0", "--ops", "layer_norm"),
        ),
    ),
    # whole steps against torch.compile, which is slow to compile
    "compile": (
        Command(
            "mfu-compiled", "bench.mfu",
            (*GPT2, "--seconds", "10", "--profile", "--contenders", "fastgpt", "compile", "strongest"), 150, None,
        ),
    ),
    # the remaining tests and timings, in the time that is left
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
    """An empty record, the folder of this device, the number of processes for the tests, and the micro-batch."""
    memory = hardware.memory(device)[1].amount
    workers = min(12, os.cpu_count() or 1, memory // MEMORY_PER_WORKER) if device.type == "cuda" else 1
    return begin("stages", "bench.gpu", argv, device), results_folder(device), workers, micro_batch(memory)


def micro_batch(memory: int) -> int:
    """Sequences of 1024 tokens, B, with which all contenders of stage ``step`` together fit a GPU of ``memory`` bytes.

    All of them are in memory at the same time. In bf16 they take, in GiB, counted on tensors without data: eager
    1.6 + 0.92 B while it runs, fastgpt's graphs 2.5 + 0.29 B always, fastgpt without graphs 2.1 at rest, CUDA itself
    0.7. The sum is 6.9 + 1.21 B: 9.3 for 2, 11.7 for 4, 16.6 for 8, 26.3 for 16. A card of 12 GB may also drive a
    display.
    """
    return next((size for least, size in ((40e9, 16), (20e9, 8), (14e9, 4)) if memory >= least), 2)


def arguments(
    command: Command, rehearsal: bool, graphs: bool, folder: Path, workers: int, batch_size: int
) -> list[str]:
    """The command line of a command.

    Kernels are timed on at least 8 sequences, which fit where all contenders of a step do not; fewer are too short.

    Args:
        command: of a stage.
        rehearsal: use the small flags.
        graphs: whether CUDA graphs work; if not, "fastgpt, no graphs" takes the place of "fastgpt".
        folder: of the records.
        workers: processes for the tests.
        batch_size: the micro-batch of a step.
    """
    sizes = {BATCH: batch_size, KERNELS_BATCH: max(8, batch_size)}
    flags = [str(sizes.get(flag, flag)) for flag in (command.small or () if rehearsal else command.flags)]
    if not graphs and OURS in flags:
        flags.remove(OURS)
        if NO_GRAPHS not in flags:  # so that no stage is left without a contender of ours
            flags.insert(flags.index("--contenders") + 1, NO_GRAPHS)
    if command.module.startswith("bench."):
        # a record names its command, which should not depend on where the repository lies
        flags += ["--out", str(folder.relative_to(REPOSITORY) if folder.is_relative_to(REPOSITORY) else folder)]
    label = command.name.removeprefix("mfu-")
    if label != command.name:  # so that its record does not replace that of the command "mfu"
        flags += ["--label", label]
    if command.module == "pytest":
        flags += ["-p", "no:cacheprovider"]
        if find_spec("pytest_timeout"):  # by a thread, because a process that waits for a GPU ignores interrupts
            flags += ["--timeout=60", "--timeout-method=thread"]
        if find_spec("xdist") and workers > 1:
            flags += ["-n", str(workers)]
    return [sys.executable, "-m", command.module, *flags]


def execute(line: Sequence[str], output: Path, seconds: float) -> str:
    """Run a command line for at most ``seconds``. Returns its status (see :class:`Outcome`)."""
    record = output.with_suffix(".jsonl")  # of the tests that passed
    record.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUNBUFFERED": "1",
                                "FASTGPT_TEST_RECORD": str(record)}  # fmt: skip
    if not torch.cuda.is_available():  # a rehearsal runs its few tests even if they have passed before
        environment["FASTGPT_TEST_ALL"] = "1"
    with output.open("w") as file:
        process = subprocess.Popen(
            line, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
            # background jobs of a shell ignore interrupts, and their children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            return "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:  # end the whole group, which includes the compilers that the command started
            for number in (signal.SIGINT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(GRACE_SECONDS)
                except (ProcessLookupError, subprocess.TimeoutExpired):  # gone, or hangs in the driver for good
                    pass


def graphs_work(record: dict[str, Any] | None) -> bool:
    """Whether CUDA graphs did not fail in the first stage, and had the same losses as without.

    True if the stage was stopped before it ran them.
    """
    contenders = record["comparisons"][0]["contenders"] if record and record["comparisons"] else {}
    ours, without = contenders.get(OURS), contenders.get(NO_GRAPHS, {})
    if ours is None:
        return True
    comparable = ours["losses"] and without.get("losses")
    return ours["failure"] is None and (not comparable or difference(ours["losses"], without["losses"]) <= GRAPHS_AGREE)


def run_stages(
    names: Sequence[str], folder: Path, seconds: float, rehearsal: bool, workers: int, batch_size: int,
    note: Callable[[list[Outcome]], None],
) -> list[Outcome]:  # fmt: skip
    """Run all commands of these stages, for at most ``seconds``; ``note`` gets the outcomes after each command."""
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
            shown = output.relative_to(folder).as_posix()
            outcomes.append(Outcome(stage, command.name, status, time.monotonic() - start, shown))
            note(outcomes)
            print(f"{stage}: {command.name} {status} after {outcomes[-1].seconds:.0f} s", flush=True)
            if command.name == "first-step" and not graphs_work(newest(folder, "mfu-*.json", started)):
                graphs = False
                print("CUDA graphs failed or changed the losses: the other stages run without them")
    return outcomes


# ---- the summary ----


def newest(folder: Path, pattern: str, since: float) -> dict[str, Any] | None:
    """The newest record that was written at or after ``since``; ``None`` if there is none."""
    found = [path for path in folder.glob(pattern) if path.stat().st_mtime >= since]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return read(path)
        except ValueError:  # its command was stopped while it wrote
            continue
    return None


def tail(output: Path, n: int) -> list[str]:
    """The last lines of a command's output."""
    try:
        lines = [line.rstrip() for line in output.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [line[:160] for line in lines if line][-n:]


def summary(outcomes: Sequence[Outcome], folder: Path, so_far: bool = False) -> str:
    """At most 40 lines: what passed, the main figures, and the next step; ``so_far`` if commands are still to run."""
    lines = [f"{o.stage:<10} {o.command:<14} {o.status:<8} {o.seconds:5.0f} s" for o in outcomes]
    for o in outcomes:
        if o.command in SHOWN and o.status != "no time":
            lines += ["", *tail(folder / o.output, SHOWN[o.command])]
    bad = [o for o in outcomes if o.status in ("failed", "stopped")]
    for o in [o for o in bad if o.command not in SHOWN][:3]:
        end = tail(folder / o.output, 3)
        lines += ["", f"{o.command} {o.status}; {o.output} ends:", *(f"  {line}" for line in end)]
    if bad:
        last = f"next: fix {bad[0].command}, then run python -m bench.gpu --stages {bad[0].stage}"
    else:
        last = f"{'all passed so far' if so_far else 'all passed'}; the records are in {folder}"
    lines += ["", last]
    return "\n".join([*lines[:-2][:37], *lines[-2:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print the summary."""
    parser = Parser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="default all, in order")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; default 9.5")
    parser.add_argument("--rehearse", action="store_true", help="run the stages small, on a machine without a GPU")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    flags = parser.parse_args(argv)
    if not flags.rehearse and not torch.cuda.is_available():
        raise RequestError("PyTorch finds no GPU here; --rehearse runs the stages without one")
    if flags.minutes <= 0:
        raise RequestError("--minutes must be more than 0")
    device = torch.device("cpu" if flags.rehearse else "cuda")
    # in another process, so that this one has no CUDA context, which would take GPU memory
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        about, own_folder, workers, batch_size = child.submit(examine, argv, device).result()
    folder = (flags.out or own_folder).absolute()
    (folder / "gpu").mkdir(parents=True, exist_ok=True)

    def note(outcomes: list[Outcome]) -> None:
        record = about | {"rehearsal": flags.rehearse, "outcomes": [asdict(o) for o in outcomes]}
        write(record, folder / "gpu" / "stages")
        # now, in case the machine is taken away
        (folder / "gpu" / "summary.txt").write_text(summary(outcomes, folder, so_far=True) + "\n")

    outcomes = run_stages(flags.stages, folder, 60.0 * flags.minutes, flags.rehearse, workers, batch_size, note)
    words = summary(outcomes, folder)
    (folder / "gpu" / "summary.txt").write_text(words + "\n")
    print(f"\n{words}")
    return int(any(o.status in ("failed", "stopped") for o in outcomes))


if __name__ == "__main__":
    run(main)
