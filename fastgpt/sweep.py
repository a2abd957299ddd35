"""``python -m fastgpt.sweep --preset NAME --n_layer 1,4,6``: one run for each value, and what each took and gave.

python -m fastgpt.sweep --preset shakespeare-char-cpu --n_layer 1,4,6
python -m fastgpt.sweep --preset shakespeare-char-cpu --n_layer 1,4,6 --n_head 2,4,6 --n_embd 64,128,384 --together

All flags are those of fastgpt.train. Several with commas give every combination, or with --together one run for each
place in the lists. Runs that are complete already are not repeated; one that was interrupted is resumed.
"""

import itertools
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import IO, Any

from fastgpt import json_files, output
from fastgpt.cli import Parser, run
from fastgpt.data.stream import show
from fastgpt.errors import RequestError
from fastgpt.model.config import GPT2_VOCABULARY
from fastgpt.sample import encode_prompt
from fastgpt.train import report, run_folder
from fastgpt.train.config import known_flag
from fastgpt.train.log import read_metrics
from fastgpt.train.models import open_model
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.units import count, duration, size

TABLE, PLOT, SAMPLES = "sweep.json", "sweep.png", "samples.txt"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's


@dataclass(frozen=True)
class Planned:
    """A run of the sweep.

    Attributes:
        name: of its folder.
        values: of the flags that vary.
        argv: for ``fastgpt.train``.
        run_dir: its folder.
        max_iters: updates.
    """

    name: str
    values: dict[str, str]
    argv: list[str]
    run_dir: Path
    max_iters: int


def main(argv: Sequence[str] | None = None) -> int:
    """Train the runs, then show the table."""
    parser = Parser(prog="python -m fastgpt.sweep", description=__doc__)
    parser.add_argument("--together", action="store_true", help="one run for each place in the lists")
    parser.add_argument("--prompt", help="of the samples (a line break)")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="of each sample (200)")
    parser.add_argument("--report", action="store_true", help="train nothing; show what is there")
    parser.epilog = "all other flags are those of fastgpt.train, one or more of them with a list of values: 1,4,6"
    options, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    if options.prompt == "":
        parser.error("--prompt is empty")
    if options.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1")
    plans, folder = plan(rest, options.together)
    failed, stopped = [], 0
    for one in plans if not options.report else ():
        status = train(one)
        if status > 128:  # a signal, which ends the whole sweep
            stopped = status
            break
        if status:
            failed.append(one.name)
    rows = [row for one in plans if (row := summary(one)) is not None]
    if not rows:
        if stopped:
            return stopped
        raise RequestError(f"no run in {folder} has been evaluated yet")
    json_files.write(folder / TABLE, {"varied": list(plans[0].values), "rows": rows})
    _print_table(rows)
    if stopped:  # without plots and samples, which would delay the end
        print(f"\ntable so far: {folder / TABLE}; the same command continues")
        return stopped
    plot(plans, rows, folder / PLOT)
    page = folder / run_folder.REPORT
    report.write([one.run_dir for one in plans if one.name in {row["name"] for row in rows}], page)
    samples = write_samples(plans, options.prompt, options.max_new_tokens, folder / SAMPLES)
    print(f"\ntable: {folder / TABLE}, plots: {folder / PLOT}, report: {page}")
    if samples:
        print(f"samples: {folder / SAMPLES}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def plan(argv: Sequence[str], together: bool) -> tuple[list[Planned], Path]:
    """The runs that a command line asks for, and the folder that they lie in.

    Raises:
        RequestError: no flag has a list, the lists do not fit, or ``fastgpt.train`` would refuse one of the runs.
    """
    fixed, varied, out_dir = _split(argv)
    if not varied:
        raise RequestError("no flag has a list of values: for example --n_layer 1,4,6")
    if together:
        lengths = {name: len(values) for name, values in varied.items()}
        if len(set(lengths.values())) > 1:
            raise RequestError(f"--together needs lists of one length, got {lengths}")
        choices = list(zip(*varied.values(), strict=True))
    else:
        choices = list(itertools.product(*varied.values()))
    plans: list[Planned] = []
    folder = Path(out_dir) if out_dir else None
    for chosen in choices:
        values = dict(zip(varied, chosen, strict=True))
        flags = [*fixed, *(f"--{name}={value}" for name, value in values.items())]
        config = parse(flags, PRESETS)
        config.gpt_config(GPT2_VOCABULARY, end_of_text=GPT2_VOCABULARY - 1)  # refuses what cannot be a model
        folder = folder or Path(f"runs/sweep-{config.preset}")
        name = "_".join(f"{name}-{value}" for name, value in values.items()).replace("/", "-")
        run_dir = folder / name
        argv_ = [*flags, f"--out_dir={run_dir}", "--init_from=auto"]
        plans.append(Planned(name, values, argv_, run_dir, config.max_iters))
    names = [one.name for one in plans]
    if len(set(names)) < len(names):
        raise RequestError("a value stands twice in a list")
    assert folder is not None
    return plans, folder


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]], str | None]:
    """Flags with one value, those with a list, and ``--out_dir``."""
    fixed: list[str] = []
    varied: dict[str, list[str]] = {}
    out_dir: str | None = None
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise RequestError(f"unexpected argument '{flag}'")
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        name = known_flag(flag)
        if name in ("init_from", "overwrite"):
            raise RequestError(f"--{name} has no place in a sweep, which resumes what is there")
        if name == "out_dir":
            out_dir = value
        elif "," in value:
            varied[name] = value.split(",")
        else:
            fixed.append(f"--{name}{equals}{value}")
    return fixed, varied, out_dir


def train(one: Planned) -> int:
    """Train a run to its end unless it is there; the status of its command, 0 if it is complete."""
    print(f"\n{one.name}", flush=True)
    if is_complete(one):
        print("is complete")
        return 0
    command = [sys.executable, "-m", "fastgpt.train", *one.argv]
    print(shlex.join(["python", *command[1:]]), flush=True)
    return launch(command)


def launch(command: list[str], stdout: IO[Any] | None = None) -> int:
    """Run a command and return its exit status: 128 + N if signal N ended it or reached this process.

    A run that receives a signal saves a checkpoint before it ends. This function waits until it has ended.

    Args:
        command: the program and its arguments.
        stdout: where its output goes; ``None`` for this process's.
    """
    told = 0
    with subprocess.Popen(command, stdout=stdout) as process:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # a terminal sends Ctrl-C to the command as well
                told = 128 + signal.SIGINT
            except SystemExit as end:  # kill, which only this process got
                told = int(end.code or 0)
                process.send_signal(told - 128)
    return told or (status if status >= 0 else 128 - status)


def is_complete(one: Planned) -> bool:
    """Whether a run has been trained to its last update."""
    metrics = one.run_dir / run_folder.METRICS
    ends = read_metrics(metrics)["end"] if metrics.exists() else []
    return any(end["step"] == one.max_iters and end["status"] == 0 for end in ends)


def summary(one: Planned) -> dict[str, Any] | None:
    """What a run took and what came of it; ``None`` if it has not been evaluated."""
    metrics = one.run_dir / run_folder.METRICS
    if not metrics.exists():
        return None
    records = read_metrics(metrics)
    updates, evaluations, ends = records["train"], records["eval"], records["end"]
    if not evaluations:
        return None
    last = evaluations[-1]
    best = min((e for e in evaluations if e["val_loss"] is not None), key=lambda e: e["val_loss"], default=last)
    steady = updates[len(updates) // 10 :]  # the first ones are slower
    return {
        "name": one.name,
        "values": one.values,
        "parameters": run_folder.read_config(one.run_dir).model.n_params,
        "steps": last["step"],
        "tokens": updates[-1]["tokens"] if updates else 0,
        "ms": statistics.median(u["ms"] for u in steady) if steady else None,
        "tokens_per_s": statistics.median(u["tokens_per_s"] for u in steady) if steady else None,
        "peak_bytes": max((end["peak_bytes"] for end in ends if end["peak_bytes"]), default=None),
        "seconds": sum(end["seconds"] for end in ends) if ends else None,
        "train_loss": last["train_loss"],
        "val_loss": last["val_loss"],
        "val_loss_error": last.get("val_loss_error"),
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = ["run", "parameters", "ms a step", "tokens/s", "peak memory", "time", "train loss", "val loss", "best"]
    cells = []
    for row in rows:
        error = row["val_loss_error"]
        cells.append(
            [
                row["name"],
                count(row["parameters"], 2),
                _or_dash(row["ms"], lambda ms: f"{ms:,.1f}"),
                _or_dash(row["tokens_per_s"], lambda rate: f"{rate:,.0f}"),
                _or_dash(row["peak_bytes"], size),
                _or_dash(row["seconds"], duration),
                _or_dash(row["train_loss"], lambda loss: f"{loss:.4f}"),
                _or_dash(row["val_loss"], lambda loss: f"{loss:.4f}")
                + (f" ± {error:.4f}" if error is not None else ""),
                _or_dash(row["best_val_loss"], lambda loss: f"{loss:.4f}") + f" at {row['best_step']:,}",
            ]
        )
    print()
    output.table(columns, cells)


def _or_dash(value: Any, shown: Any) -> str:
    return "-" if value is None else shown(value)


def plot(plans: Sequence[Planned], rows: Sequence[dict[str, Any]], image: Path) -> None:
    """Draw the validation loss over steps and over time, and the last one over the first flag that varies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time, final = figure.subplots(1, 3)
    shown = {row["name"] for row in rows}
    for one, color in zip((p for p in plans if p.name in shown), itertools.cycle(COLORS), strict=False):
        records = read_metrics(one.run_dir / run_folder.METRICS)
        evaluations = [e for e in records["eval"] if e["val_loss"] is not None]
        steps, losses = [e["step"] for e in evaluations], [e["val_loss"] for e in evaluations]
        ms = statistics.median([u["ms"] for u in records["train"]] or [0.0])  # without evaluations
        label = ", ".join(f"{name} {value}" for name, value in one.values.items())
        by_step.plot(steps, losses, color=color, marker="o", ms=3, label=label)
        by_time.plot([step * ms / 60e3 for step in steps], losses, color=color, marker="o", ms=3)
    varied = next(iter(plans[0].values))
    labels = [row["values"][varied] for row in rows]
    numeric = all(_is_number(label) for label in labels)
    places = [float(label) for label in labels] if numeric else list(range(len(labels)))
    errors = [row["val_loss_error"] or 0.0 for row in rows]
    finals = [row["val_loss"] if row["val_loss"] is not None else float("nan") for row in rows]
    final.errorbar(places, finals, yerr=errors, color=COLORS[0], fmt="o", capsize=3)
    final.set_xticks(places, labels)
    by_step.set(xlabel="step", ylabel="validation loss (nats per token)")
    by_time.set(xlabel="minutes of training")
    final.set(xlabel=varied, ylabel="last validation loss")
    by_step.legend(frameon=False)
    for axes in (by_step, by_time, final):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(image)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_samples(plans: Sequence[Planned], prompt: str | None, max_new_tokens: int, path: Path) -> bool:
    """Write a sample of each run from the same prompt and seed; whether there was one."""
    texts = []
    for one in plans:
        try:
            opened = open_model(str(one.run_dir))
        except RequestError:  # it has no checkpoint yet
            continue
        if opened.tokenizer is None:
            continue
        with redirect_stdout(StringIO()) as text:
            try:
                show(
                    opened.model, opened.tokenizer, encode_prompt(opened.tokenizer, prompt),
                    max_new_tokens=max_new_tokens, seed=1337,
                )  # fmt: skip
            except RequestError as error:  # it has diverged, or does not know the prompt's characters
                print(f"no sample: {error}")
        texts.append(f"==== {one.name} ====\n{text.getvalue()}")
    if texts:
        path.write_text("\n".join(texts), encoding="utf-8")
        print("\n" + "\n".join(texts))
    return bool(texts)


if __name__ == "__main__":
    run(main)
