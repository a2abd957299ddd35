"""``python -m bench.loss``: which recipe reaches a loss in fewer updates and less time, and what each option is worth.

python -m bench.loss data                  makes the dataset: sources of Python's library and of pinned packages
python -m bench.loss rates                 a grid of learning rates for each recipe, by the same rule
python -m bench.loss compare               both recipes at their best rates, each seed in turn
python -m bench.loss ablate                modern without each option, and baseline with each
python -m bench.loss show                  tables and a picture of what was found so far

A recipe is a set of flags of fastgpt.train. The baseline takes --updates updates, modern SHARE of them; each learning
rate falls over all of its run's updates. Modern is better if its final loss is lower all the same.

The study may take days and several machines. A finished run leaves one small file in bench/results/loss/runs, and a run
whose file is there is not repeated. One that was interrupted goes on from its checkpoint in --work. With --minutes,
the last run stops in time with a checkpoint, and the same command goes on later. Losses of different machines are
compared, times are not. Run nothing else on the machine meanwhile.
"""

import hashlib
import json
import math
import re
import shutil
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import loss_page
from bench.records import RESULTS, Record, begin, conditions, read, results_folder
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.data.dataset import Dataset, open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.errors import RequestError
from fastgpt.evaluation.loss import text_loss
from fastgpt.files import written_whole
from fastgpt.sweep import Planned, is_complete, launch
from fastgpt.train import run_folder
from fastgpt.train.log import read_metrics
from fastgpt.train.models import open_model
from fastgpt.train.trainer import DIVERGED_ADVICE
from fastgpt.units import count, count_of, duration, number

# ---- the study ----

# What all runs share. One dtype, so that losses of different machines can be compared. Muon's products take the same
# time for any batch, so that a small batch would make modern's updates slow.
COMMON: dict[str, Any] = {
    "preset": "nanogpt", "dataset": "python", "gradient_accumulation_steps": 1, "batch_size": 32, "block_size": 256,
    "n_layer": 6, "n_head": 4, "n_embd": 256, "dtype": "float32",
    "eval_iters": 4,  # of the curve only; the final loss is that of the whole validation split
}  # fmt: skip
WARMUP = 0.05  # of the updates
FLOOR = 0.1  # of the learning rate, where it ends; nanoGPT's

# The options that are tried. ``floor`` replaces FLOOR; all others are flags of the trainer.
# All are in modded-nanogpt (Jordan et al., 2024) and nanochat (Karpathy, 2025), there with RMS norms without weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "rotary": {"positions": "rotary"},
    "rms": {"norm": "rms"},
    "qk_norm": {"qk_norm": True},
    "relu2": {"mlp": "relu2"},
    "untied": {"tied": False},
    "softcap": {"softcap": 15.0},
    "zero_init": {"zero_init": True},
    "value_embeddings": {"value_embeddings": True},
    "muon": {"optimizer": "muon"},
    "wsd": {"schedule": "wsd", "cooldown": 0.5, "floor": 0.0},
}
BASELINE, MODERN = "baseline", "modern"
RECIPES: dict[str, tuple[str, ...]] = {
    BASELINE: (),  # GPT-2 with AdamW and a cosine, as nanoGPT trains it
    MODERN: ("rotary", "rms", "qk_norm", "relu2", "untied", "softcap", "zero_init", "muon", "wsd"),
}

UPDATES = 500  # of the baseline
SHARE = 0.55  # of them for modern
EVALUATIONS = 8  # points of a curve, besides the one before the first update

# The rule for learning rates: RATE x RATE_FACTOR**k, first for these k, then beyond an edge while the best lies there.
RATE, RATE_FACTOR, RATE_STEPS = 1e-3, 2.0, (0, 1, 2)
RATE_SEED = 0  # not one of those that are compared, for which the best rate would be chosen after the fact
SEEDS = (1, 2, 3, 4, 5)
ABLATION_SEEDS = (1,)

# The text: Python's library, and packages of constraints.txt, which are the same on every machine that installs these
# versions.
PACKAGES = ("torch", "numpy", "matplotlib")
VOCABULARY = 4096
VAL_FRACTION = 0.02

DEFAULT_FOLDER = RESULTS / "loss"


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Attributes:
        recipe: its name; ``modern - muon`` and ``baseline + muon`` in ablations.
        options: of ``OPTIONS``.
        rate: peak learning rate.
        updates: until the end.
        seed: of weights and data.
    """

    recipe: str
    options: tuple[str, ...]
    rate: float
    updates: int
    seed: int

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The flags of the trainer that decide what is learnt."""
        options = {name: value for option in self.options for name, value in OPTIONS[option].items()}
        floor = options.pop("floor", FLOOR)
        warmup = max(1, round(WARMUP * self.updates))
        return COMMON | options | {
            "learning_rate": self.rate, "min_lr": floor * self.rate, "warmup_iters": warmup,
            "max_iters": self.updates, "lr_decay_iters": self.updates,
            "eval_interval": -(-self.updates // EVALUATIONS), "seed": self.seed,
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        """A digest of the flags. Runs of the same key are the same run, whatever they are called."""
        return hashlib.sha256(json.dumps(self.flags, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def words(self) -> str:
        """The run for people."""
        return f"{self.recipe}, rate {number(self.rate, 2)}, seed {self.seed}, {self.updates:,} updates"

    def stem(self, digest: str) -> str:
        """The name of its files."""
        recipe = re.sub(r"[ +-]+", "-", self.recipe.replace("+", "with").replace(" - ", " without "))
        return f"{recipe}-{self.rate:.3g}-{self.updates}-seed-{self.seed}-{self.key}-{digest[:8]}"


class Rows:
    """What was measured on one dataset: the records of finished runs, by the key of their flags.

    Args:
        folder: where ``runs`` is.
        digest: of the dataset; ``None`` for the only one that there are rows of.

    Raises:
        RequestError: a file is damaged, or there are rows of several datasets and none was chosen.
    """

    def __init__(self, folder: Path, digest: str | None) -> None:
        self.folder = folder
        found: list[Record] = []
        for path in sorted((folder / "runs").glob("*.json")):
            try:
                found.append(read(path))
            except ValueError as error:
                raise RequestError(f"{path} is damaged: remove it, and its run is repeated ({error})") from error
        datasets = Counter(row["run"]["dataset"]["digest"] for row in found)
        chosen = [one for one in datasets if one.startswith(digest or "")]
        if digest is None and len(chosen) > 1:
            there = ", ".join(f"{one[:8]}: {count_of(n, 'run')}" for one, n in datasets.items())
            raise RequestError(
                f"{folder} has runs of several datasets, which cannot be compared ({there}): choose one with --digest"
            )
        if digest is not None and len(digest) < 64 and len(chosen) != 1:
            raise RequestError(f"--digest {digest} is that of {len(chosen)} datasets in {folder}")
        self.digest = chosen[0] if chosen else digest or ""
        self.by_key = {row["run"]["key"]: row for row in found if row["run"]["dataset"]["digest"] == self.digest}
        self.others = len(found) - len(self.by_key)

    def of(self, one: Run) -> Record | None:
        """The record of a run, ``None`` if it has not finished."""
        return self.by_key.get(one.key)

    def add(self, one: Run, record: Record) -> None:
        """Keep a record, and write it."""
        path = self.folder / "runs" / f"{one.stem(self.digest)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")
        self.by_key[one.key] = record


def final_loss(row: Record | None) -> float:
    """A run's final loss; infinity if it has diverged or has not finished."""
    loss = row["run"]["final_loss"] if row else None
    return math.inf if loss is None else loss


# ---- which runs ----


def updates_of(recipe: str, updates: int) -> int:
    """How many updates a recipe takes where the baseline takes ``updates``."""
    return updates if recipe == BASELINE else round(SHARE * updates)


def rate_run(recipe: str, k: int, updates: int) -> Run:
    """A point of a recipe's grid."""
    rate = RATE * RATE_FACTOR**k
    return Run(recipe, RECIPES[recipe], rate, updates_of(recipe, updates), RATE_SEED)


def grid(recipe: str, updates: int, rows: Rows) -> dict[int, Record]:
    """The points of a recipe's grid that have been measured, next to each other."""
    low, high = min(RATE_STEPS), max(RATE_STEPS)
    while rows.of(rate_run(recipe, low - 1, updates)) is not None:
        low -= 1
    while rows.of(rate_run(recipe, high + 1, updates)) is not None:
        high += 1
    found = {k: rows.of(rate_run(recipe, k, updates)) for k in range(low, high + 1)}
    return {k: row for k, row in found.items() if row is not None}


def next_step(losses: dict[int, float], wider: bool = False) -> int | None:
    """The next point of a grid; ``None`` if the best one lies inside.

    Args:
        losses: final losses of the points so far, with all of ``RATE_STEPS``.
        wider: one more in any case, beyond the edge of the lower loss.
    """
    best = min(losses, key=lambda k: losses[k])
    if best == max(losses):
        return best + 1
    if best == min(losses):
        return best - 1
    if not wider:
        return None
    return max(losses) + 1 if losses[max(losses)] < losses[min(losses)] else min(losses) - 1


def next_rate_runs(updates: int, rows: Rows) -> list[Run]:
    """The runs that the grids need next: until the best rates lie inside, and the grids have as many points."""
    losses = {
        recipe: {k: final_loss(row) for k, row in grid(recipe, updates, rows).items()} for recipe in RECIPES
    }  # fmt: skip
    runs = [rate_run(recipe, k, updates) for recipe in RECIPES for k in RATE_STEPS if k not in losses[recipe]]
    if runs:
        return runs
    steps = {recipe: next_step(found) for recipe, found in losses.items()}
    if not any(step is not None for step in steps.values()):
        most = max(map(len, losses.values()))
        steps = {recipe: next_step(found, wider=True) for recipe, found in losses.items() if len(found) < most}
    return [rate_run(recipe, step, updates) for recipe, step in steps.items() if step is not None]


def best_rate(recipe: str, updates: int, rows: Rows) -> float:
    """The rate of the lowest final loss.

    Raises:
        RequestError: the grids are not complete.
    """
    if next_rate_runs(updates, rows):
        raise RequestError("the learning rates have to be tuned first: python -m bench.loss rates")
    found = grid(recipe, updates, rows)
    return RATE * RATE_FACTOR ** min(found, key=lambda k: final_loss(found[k]))


def compare_runs(updates: int, rows: Rows) -> list[Run]:
    """Baseline and modern in turn, so that a seed's runs are likely to be on the same machine."""
    rates = {recipe: best_rate(recipe, updates, rows) for recipe in RECIPES}
    return [
        Run(recipe, RECIPES[recipe], rates[recipe], updates_of(recipe, updates), seed)
        for seed in SEEDS for recipe in RECIPES
    ]  # fmt: skip


def ablation_runs(updates: int, rows: Rows) -> dict[str, dict[str, list[Run]]]:
    """For each recipe, by the option that it has less or more, the runs of all seeds; "" for the recipe itself.

    All take modern's updates. Each has its recipe's best rate, which is not the best for every option.
    """
    found: dict[str, dict[str, list[Run]]] = {}
    for recipe, options in RECIPES.items():
        rate = best_rate(recipe, updates, rows)
        found[recipe] = {}
        for changed in ("", *OPTIONS):
            sign = "-" if changed in options else "+"
            name = f"{recipe} {sign} {changed}" if changed else recipe
            flipped = tuple(o for o in OPTIONS if (o in options) != (o == changed))
            found[recipe][changed] = [
                Run(name, flipped, rate, updates_of(MODERN, updates), seed) for seed in ABLATION_SEEDS
            ]
    return found


# ---- running ----


@dataclass
class Session:
    """What this process has to work with.

    Attributes:
        rows: what was measured, and is added to.
        dataset: opened.
        work: folder of the runs.
        data_dir: folder of datasets.
        device: to train on.
        argv: the command line, for the records.
        deadline: of ``time.monotonic``, or infinity.
    """

    rows: Rows
    dataset: Dataset
    work: Path
    data_dir: Path
    device: torch.device
    argv: Sequence[str] | None
    deadline: float = math.inf

    def take(self, runs: Sequence[Run]) -> int:
        """Make those of the runs that have no row, until the time is over; the status of the command.

        Raises:
            RequestError: a run has failed.
        """
        missing = [one for one in runs if self.rows.of(one) is None]
        for i, one in enumerate(missing):
            left = self.deadline - time.monotonic()
            if left <= 0:
                print(f"the time is over: {self.estimate(missing[i:])}")
                return 0
            print(f"[{len(runs) - len(missing) + i + 1}/{len(runs)}] {one.words}", flush=True)
            status = self.make(one, left)
            if status > 128:
                print(f"stopped: {self.estimate(missing[i:])}; the same command continues")
                return status
            row = self.rows.of(one)
            if row is not None:
                print(f"    {outcome(row['run'])}", flush=True)
        return 0

    def estimate(self, runs: Sequence[Run]) -> str:
        """What is left, in words."""
        mine = [row["run"] for row in self.rows.by_key.values() if row["run"]["device"] == device_key(self.device)]
        pace = {one["recipe"]: one["wall_seconds"] / one["updates"] for one in mine if one["wall_seconds"]}
        text = f"{count_of(len(runs), 'run')} left"
        if not pace:
            return f"{text}; none has finished on this device, so how long they take is unknown"
        usual = statistics.median(pace.values())
        return f"{text}, about {duration(sum(pace.get(one.recipe, usual) * one.updates for one in runs))}"

    def make(self, one: Run, left: float) -> int:
        """Make a run, or go on with it, for at most ``left`` seconds; 0, or 128 + N after signal N."""
        folder = self.work / one.stem(self.rows.digest)
        argv = [f"--{name}={value}" for name, value in one.flags.items()]
        argv += [f"--data_dir={self.data_dir}", f"--device={self.device}", f"--out_dir={folder}"]
        argv += ["--init_from=auto", "--log_interval=1", "--keep_checkpoints=1"]
        argv.append(f"--max_hours={left / 3600 if left < math.inf else 0}")  # always: a resumed run keeps its old limit
        planned = Planned(one.recipe, {}, argv, folder, one.updates)
        log = folder / "output.txt"
        status, diverged = 0, False
        if not is_complete(planned):
            folder.mkdir(parents=True, exist_ok=True)
            before = log.stat().st_size if log.exists() else 0
            with log.open("ab") as output:
                status = launch([sys.executable, "-m", "fastgpt.train", *argv], output)
            diverged = status == 1 and DIVERGED_ADVICE.encode() in log.read_bytes()[before:]
        if status and status <= 128 and not diverged:
            raise RequestError(f"the run {one.words} has failed with status {status}; its output is {log}")
        if diverged or (not status and is_complete(planned)):
            self.rows.add(one, self.row(one, folder, diverged))
            shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)  # 70 MB and more
        return status if status > 128 else 0

    def row(self, one: Run, folder: Path, diverged: bool) -> Record:
        """The record of a run that has ended."""
        metrics = read_metrics(folder / run_folder.METRICS)
        updates, start = metrics["train"], metrics["start"][-1]
        places = {(each.get("device"), each.get("threads")) for each in metrics["start"]}
        whole = len(updates) == one.updates and len(places) == 1  # one machine has timed every update
        final = None if diverged else self.evaluate(folder)
        record = begin("loss", "bench.loss", self.argv, self.device, start["dtype"])
        record["run"] = {
            "recipe": one.recipe,
            "options": list(one.options),
            "key": one.key,
            "flags": one.flags,
            "seed": one.seed,
            "updates": one.updates,
            "tokens": updates[-1]["tokens"],
            "dataset": {
                "digest": self.rows.digest,
                "tokens": sum(map(len, self.dataset.train)),
                "val_tokens": sum(map(len, self.dataset.val)),
                "vocab_size": self.dataset.vocab_size,
            },
            "parameters": start["parameters"],
            "device": device_key(self.device),
            "diverged": diverged,
            "curve": [[e["step"], e["val_loss"]] for e in metrics["eval"] if e["val_loss"] is not None],
            "final_loss": None if final is None else final.nats,  # over the whole validation split
            "final_error": None if final is None else final.error,
            "seconds": sum(u["ms"] for u in updates) / 1e3 if whole else None,  # of training, without evaluations
            "wall_seconds": sum(e["seconds"] for e in metrics["end"]) if whole else None,
            "ms": statistics.median(u["ms"] for u in updates[len(updates) // 10 :]) if whole else None,
        }
        return record

    def evaluate(self, folder: Path) -> Any:
        """The loss of a run's last checkpoint on the whole validation split."""
        model = open_model(str(folder)).model.to(self.device)
        tokens = np.concatenate([np.asarray(shard) for shard in self.dataset.val])
        return text_loss(model, tokens, None, batch_size=COMMON["batch_size"])


def device_key(device: torch.device) -> str:
    """Times are compared between rows of the same key only."""
    return results_folder(device).name + conditions(device)


def outcome(one: Record) -> str:
    """What came of a run, in words."""
    if one["diverged"]:
        return f"diverged after {one['tokens'] // (COMMON['batch_size'] * COMMON['block_size']):,} updates"
    took = f", {duration(one['seconds'])} of training, {number(one['ms'])} ms an update" if one["seconds"] else ""
    return f"validation loss {one['final_loss']:.4f}{took}"


# ---- the text ----


def sources() -> Iterator[Path]:
    """The Python files of the standard library and of ``PACKAGES``.

    Raises:
        RequestError: a package is not installed.
    """
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        found = find_spec(name)
        if found is None or found.origin is None:
            raise RequestError(f"the text has the sources of {name}, which is not installed: pip install {name}")
        roots.append(Path(found.origin).parent)
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            # installed packages, and what describes how this Python was built
            built = parts[0].startswith(("config-", "_sysconfigdata"))
            if not built and not {"site-packages", "dist-packages"} & set(parts):
                yield path


def make_data(work: Path, data_dir: Path) -> Path:
    """Make the dataset. Its files are in the order of their digests, so that validation is a sample of them."""
    texts: dict[str, str] = {}
    for path in sources():
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue  # tests of other encodings
        if text.strip():
            texts[hashlib.sha256(content).hexdigest()] = text
    work.mkdir(parents=True, exist_ok=True)
    rows = work / f"{COMMON['dataset']}.jsonl"
    with written_whole(rows) as partial, partial.open("w", encoding="utf-8") as file:
        for digest in sorted(texts):
            file.write(json.dumps({"text": texts[digest]}) + "\n")
    return prepare(
        "text", [rows], tokenizer="train", vocab_size=VOCABULARY, val_fraction=VAL_FRACTION, name=COMMON["dataset"],
        data_dir=data_dir,
    )  # fmt: skip


# ---- the command ----

COMMANDS = ("data", "rates", "compare", "ablate", "show")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are asked for, or show what there is."""
    parser = Parser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of the baseline (default {UPDATES})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many (default: at the end)")
    parser.add_argument("--work", type=Path, default=Path("build/loss"), help="folder of the runs (build/loss)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of datasets (data)")
    parser.add_argument("--results", type=Path, default=DEFAULT_FOLDER, help="folder of the rows (bench/results/loss)")
    parser.add_argument("--digest", help="of show: the dataset, if there are rows of several")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (auto)")
    flags = parser.parse_args(argv)
    if flags.updates < 2:
        parser.error("--updates must be at least 2")
    if not flags.minutes > 0:
        parser.error("--minutes must be above 0")
    if flags.command == "data":
        path = make_data(flags.work, flags.data_dir)
        dataset = open_dataset(path)
        train, val = (count(sum(map(len, shards))) for shards in (dataset.train, dataset.val))
        print(f"{path}: {train} training and {val} validation tokens, digest {dataset.identity[:8]}")
        return 0
    if flags.command == "show":
        return show(Rows(flags.results, flags.digest), flags.updates)

    hardware.use_threads()
    dataset = _dataset(flags.data_dir, flags.updates)
    rows = Rows(flags.results, dataset.identity)
    deadline = time.monotonic() + 60 * flags.minutes
    device = hardware.find_device(flags.device)
    session = Session(rows, dataset, flags.work, flags.data_dir, device, argv, deadline)
    if flags.command == "compare":
        return session.take(compare_runs(flags.updates, rows))
    if flags.command == "ablate":
        tables = ablation_runs(flags.updates, rows)
        return session.take([one for table in tables.values() for runs in table.values() for one in runs])
    while runs := next_rate_runs(flags.updates, rows):
        status = session.take(runs)
        if status or any(rows.of(one) is None for one in runs):
            return status
    for recipe in RECIPES:
        print(f"{recipe}: the best rate is {number(best_rate(recipe, flags.updates, rows), 2)}")
    return 0


def _dataset(data_dir: Path, updates: int) -> Dataset:
    """The study's dataset, which must be long enough for runs of less than an epoch."""
    try:
        dataset = open_dataset(COMMON["dataset"], data_dir)
    except RequestError as error:
        raise RequestError(f"{error}; the study's own is made by python -m bench.loss data") from error
    tokens = updates * COMMON["batch_size"] * COMMON["block_size"]
    there = sum(map(len, dataset.train))
    if tokens > there:
        raise RequestError(
            f"--updates {updates} take {count(tokens)} tokens, and {dataset.path} has {count(there)}: the runs would "
            f"see text twice; at most {there // (tokens // updates)} updates"
        )
    return dataset


def show(rows: Rows, updates: int) -> int:
    """Write and print the tables, and draw the picture."""
    if not any(rows.of(rate_run(recipe, k, updates)) for recipe in RECIPES for k in RATE_STEPS):
        there = count_of(len(rows.by_key) + rows.others, "run")
        raise RequestError(
            f"{rows.folder} has no runs of a study of {updates:,} updates ({there} of others): make them with "
            "python -m bench.loss rates, or choose another with --updates"
        )
    grids = {
        recipe: {RATE * RATE_FACTOR**k: row["run"] for k, row in grid(recipe, updates, rows).items()}
        for recipe in RECIPES
    }  # fmt: skip
    tuned = not next_rate_runs(updates, rows)

    def finished(runs: Sequence[Run]) -> list[Record]:
        return [row["run"] for one in runs if (row := rows.of(one)) is not None]

    compared: dict[str, list[Record]] = {recipe: [] for recipe in RECIPES}
    ablated: dict[str, dict[str, list[Record]]] = {}
    if tuned:
        runs = compare_runs(updates, rows)
        compared = {recipe: finished([one for one in runs if one.recipe == recipe]) for recipe in RECIPES}
        ablated = {
            recipe: {option: finished(runs) for option, runs in table.items()}
            for recipe, table in ablation_runs(updates, rows).items()
        }
    facts = loss_page.Facts(
        BASELINE, MODERN, updates, rows.digest, RECIPES, grids, tuned, compared, ablated, len(SEEDS)
    )
    summary = loss_page.summarise(facts)
    stem = rows.folder / f"{COMMON['dataset']}-{COMMON['n_layer']}x{COMMON['n_embd']}-{updates}-{rows.digest[:8]}"
    page = loss_page.page(facts, summary, f"{stem.name}.png")
    with written_whole(stem.with_name(f"{stem.name}.json")) as partial:
        partial.write_text(json.dumps(summary, indent=1) + "\n")
    with written_whole(stem.with_name(f"{stem.name}.md")) as partial:
        partial.write_text(page)
    loss_page.draw(facts, stem.with_name(f"{stem.name}.png"))
    print(page)
    if rows.others:
        print(f"{count_of(rows.others, 'run')} of other datasets left out")
    return 0


if __name__ == "__main__":
    run(main)
