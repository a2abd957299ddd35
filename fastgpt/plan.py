"""``python -m fastgpt.plan``: predict memory, speed and hours of a run, before it runs.

python -m fastgpt.plan --preset gpt2-124m --gpu rtx-4070      # on any card of the table
python -m fastgpt.plan --preset gpt2-124m --vram 8GB          # on this machine's device, with less memory
python -m fastgpt.plan --preset gpt2-350m --gpu 4090 --tokens 10B
python -m fastgpt.plan --points                               # measured public steps beside the predictions
python -m fastgpt.plan --points --gpu rtx-4070                # those on one card

It accepts every flag of ``python -m fastgpt.train``. Times and sizes are predictions. Their error on measured steps is
printed too.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastgpt import hardware, limits
from fastgpt.cli import Parser, run
from fastgpt.data.dataset import open_dataset
from fastgpt.data.sources import SOURCES
from fastgpt.errors import RequestError
from fastgpt.gpus import GPUS, KERNELS_SINCE, find_gpu
from fastgpt.limits import Bound
from fastgpt.model import GPTConfig
from fastgpt.model.config import GPT2_VOCABULARY, padded_vocab_size
from fastgpt.train.config import TrainConfig, add_flags, resolve
from fastgpt.train.diagnose import CHINCHILLA, NAMED_SIZE, Facts, Finding, preflight, wanted_tokens_per_step
from fastgpt.train.predict import fit, micro_batch, roofline
from fastgpt.train.predict.points import CAUSES
from fastgpt.train.predict.programs import PROGRAMS, Workload, tokens_per_second
from fastgpt.train.predict.trace import Setup, trace_step
from fastgpt.train.presets import PRESETS
from fastgpt.units import GIB, count, duration, gib, parse_count, parse_gigabytes, tflops

# What a step takes beside its tensors, by type of device.
RESERVE = {"cuda": "CUDA's own, assumed", "cpu": "libraries in use, gaps in malloc's heap"}
LOADED = "Python and PyTorch, loaded"

OTHERS = ("nanoGPT, compiled", "nanoGPT")  # programs to compare with


@dataclass(frozen=True)
class Plan:
    """A planned run.

    Attributes:
        config: its flags, with micro-batch and recomputation filled in.
        gpt_config: its architecture.
        machine: the device that it runs on.
        memory: bytes that it may take, and what limits them.
        loaded: bytes of these that the process holds before the run.
        threads: of a CPU, and what limits them.
        parts: bytes that the process holds at the peak, by part.
        prediction: of a step's time.
        choices: micro-batches that fit, and the run's own.
        findings: problems that are known before the run.
        tokens: a budget to state the hours for; ``None`` if not requested.
        dtype: of the weights that the model computes with.
    """

    config: TrainConfig
    gpt_config: GPTConfig
    machine: roofline.Machine
    memory: Bound
    loaded: int
    threads: Bound | None
    parts: dict[str, int]
    prediction: roofline.Prediction
    choices: list[micro_batch.Choice]
    findings: list[Finding]
    tokens: int | None
    dtype: torch.dtype

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.peak <= self.memory.amount

    def is_planned(self, choice: micro_batch.Choice) -> bool:
        """Whether a choice is the run's own."""
        return (choice.batch_size, choice.recompute) == (self.config.batch_size, self.config.recompute)

    @property
    def tokens_per_second(self) -> float:
        """Predicted throughput."""
        return self.prediction.tokens_per_second(self.config.gradient_accumulation_steps)

    def seconds_for(self, tokens: int) -> float:
        """Predicted seconds of training on so many tokens, from the first on."""
        micro_batches = tokens / self.prediction.tokens
        return micro_batches * self.prediction.seconds_of_micro_step + (
            self.config.updates_for(tokens) * self.prediction.update
        )

    def milestones(self) -> dict[str, int]:
        """Numbers of tokens that get a line, by name."""
        found = {
            "Chinchilla": CHINCHILLA * self.gpt_config.n_params_without_positions,
            "max_iters": self.config.tokens_before(self.config.max_iters),
        }
        return found if self.tokens is None else {**found, "budget": self.tokens}


def make(
    config: TrainConfig,
    machine: roofline.Machine,
    setup: Setup,
    memory: Bound,
    dataset_tokens: int | None,
    tokens: int | None,
    threads: Bound | None = None,
    loaded: int = 0,
) -> Plan:
    """Fill in what the flags leave to the device, and predict.

    Raises:
        RequestError: nothing fits, or no micro-batch divides the update.
    """
    kinds = micro_batch.kinds_of_recompute(config, setup.device_type)
    free = Bound(memory.amount - loaded, memory.source)
    found = micro_batch.choices(setup, machine, free.amount, config.tokens_per_step, kinds, config.tokens_at(0))
    config = micro_batch.fill_in(config, setup, free, found)
    setup = replace(setup, batch_size=config.micro_batch_size, recompute=config.recompute)
    traced = trace_step(setup)
    prediction = roofline.predict(setup, machine, traced)
    assert config.recompute != "auto", "fill_in chooses one of the kinds"
    own = micro_batch.Choice(setup.batch_size, config.recompute, config.gradient_accumulation_steps, prediction)
    if (own.batch_size, own.recompute) not in {(c.batch_size, c.recompute) for c in found}:
        found = sorted([*found, own], key=lambda c: (kinds.index(c.recompute), c.batch_size))
    parts = {**traced.memory, RESERVE[setup.device_type]: prediction.reserve, **({LOADED: loaded} if loaded else {})}
    facts = Facts(
        config, setup.gpt_config, dataset_tokens, prediction.seconds(config.gradient_accumulation_steps), machine.peak,
        machine.n_sm, wanted_tokens_per_step(config),
    )  # fmt: skip
    return Plan(
        config, setup.gpt_config, machine, memory, loaded, threads, parts, prediction, found, preflight.check(facts),
        tokens, setup.dtype,
    )  # fmt: skip


# ---- output ----


def lines(p: Plan) -> list[str]:
    """The plan as text, at most 100 columns wide."""
    c, m, accumulation = p.config, p.gpt_config, p.config.gradient_accumulation_steps
    parts = ", ".join(f"{name} {amount(n)}" for name, n in m.parameters_by_part.items())
    update = p.prediction.seconds(accumulation)
    peak = f" of {tflops(p.machine.peak)}, dense" if p.machine.peak else ""
    mfu = p.prediction.mfu(accumulation)
    ramp = [f"              {c.tokens_at(0):,} at first, all from update {c.batch_ramp:,} on"] if c.batch_ramp else []
    named = [finding.text for finding in p.findings if finding.code == NAMED_SIZE]
    text = [
        *named,
        f"{c.preset}: {count(m.n_params_without_positions, 2)} parameters, {count(m.n_params, 2)} with positions; "
        f"{m.n_layer} layers of {m.n_embd}",
        f"  {parts}",
        "",
        f"{p.machine.name}, "
        + (f"threads {p.threads.amount} ({p.threads.source}), " if p.threads else "")
        + f"{gib(p.memory.amount)} ({p.memory.source})",
        f"  an update   {c.tokens_per_step:,} tokens = {accumulation} x {c.batch_size} x {c.block_size}"
        f", recompute {c.recompute}",
        *ramp,
        f"  memory      {gib(p.peak, 2)} at the peak, predicted"
        + ("" if p.fits else f": {gib(p.peak - p.memory.amount, 2)} more than there is"),
        *(f"    {label:<50}{size / GIB:8.3f}" for label, size in sorted(p.parts.items(), key=lambda item: -item[1])),
        f"  speed       {p.tokens_per_second:,.0f} tokens/s, {update:.3g} s an update, predicted"
        + (f"; MFU {mfu:.1%}{peak}" if mfu is not None else "; no MFU, because the device's peak is unknown"),
        f"    by kind of call: {share(p.prediction)}",
        *(f"    {line}" for line in public_lines(p)),
        f"    {roofline.error_words(p.machine.name)}",
    ]
    for name, tokens in p.milestones().items():
        ratio = tokens / m.n_params_without_positions
        text.append(
            f"  {name:<12}{amount(tokens)} tokens, {ratio:.3g} a parameter ({ratio / CHINCHILLA:.2g} x Chinchilla), "
            f"{c.updates_for(tokens):,.0f} updates, {duration(p.seconds_for(tokens))}"
        )
    text += [f"  ! {finding.text}" for finding in p.findings if finding.code != NAMED_SIZE]
    own = "* this run's" + ("" if p.fits else ", which does not fit")
    text += ["", f"  micro-batches that fit and keep the update exact; {own}"]
    text.append(f"  {'batch':>7}{'accumulation':>14}  {'recompute':<11}{'GiB':>7}{'tokens/s':>12}{'MFU':>8}")
    for choice in p.choices:
        mfu = choice.prediction.mfu(choice.accumulation)
        rate = choice.prediction.tokens_per_second(choice.accumulation)
        held = choice.prediction.held + p.loaded
        text.append(
            f"{'*' if p.is_planned(choice) else ' '} {choice.batch_size:>7}{choice.accumulation:>14}  "
            f"{choice.recompute:<11}{held / GIB:>7.2f}{rate:>12,.0f}"
            + (f"{mfu:>8.1%}" if mfu is not None else f"{'-':>8}")
        )
    return text


def public_lines(p: Plan) -> list[str]:
    """The interval of the predicted speed, other programs' predicted speed, and public measurements on the card."""
    if not is_comparable(p):
        return []
    if has_interval(p):
        text = [f"{span(p.tokens_per_second)} with the error of nine of ten public programs (--points)"]
    else:
        text = ["no public step on such a card is known, so its shares are assumed: it may be a third slower"]
    rates = others(p)
    if rates:
        compiled, eager = (rates[name] for name in OTHERS)
        text.append(
            f"nanoGPT at this micro-batch: {compiled:,.0f} with torch.compile ({span(compiled)}), {eager:,.0f} without"
        )
    for c in fit.comparisons():
        if c.point.get("card") == p.machine.name and c.role in ("fitted", "judged"):
            text.append(f"{c.point['id']}: {c.measured:,.0f} measured by others, {c.predicted:,.0f} predicted")
    return text


def is_comparable(p: Plan) -> bool:
    """Whether public steps can be compared with this one: bf16, on a card of the table."""
    return p.machine.name in GPUS and p.dtype == torch.bfloat16


def has_interval(p: Plan) -> bool:
    """Whether the card's shares were fitted to public steps, so that their error is known."""
    return is_comparable(p) and GPUS[p.machine.name].family in roofline.GPU_SHARES


def span(rate: float) -> str:
    """``52,220 to 62,027``."""
    low, high = fit.interval(rate)
    return f"{low:,.0f} to {high:,.0f}"


def others(p: Plan) -> dict[str, float]:
    """Predicted tokens/s of other programs with the same model and micro-batch; none if they do not have the model."""
    if not is_comparable(p) or p.gpt_config.beyond_gpt2:
        return {}
    workload = Workload.of(p.gpt_config, p.config.micro_batch_size, p.config.gradient_accumulation_steps)
    return {name: tokens_per_second(PROGRAMS[name], workload, p.machine) for name in OTHERS}


def point_lines(card: str | None) -> list[str]:
    """Every public step beside its prediction, on all cards or on one; at most 110 columns."""
    titles = {"fitted": "the shares are fitted to these", "judged": "and tested on these"}
    titles |= {cause: f"not modelled: {cause}" for cause in CAUSES}
    text = ["public training steps, tokens/s of one GPU; points.json has their sources", ""]
    for role, title in titles.items():
        of_role = [c for c in fit.comparisons() if c.role == role and card in (None, c.point.get("card"))]
        if of_role:
            text.append(f"{title:<70}{'measured':>12}{'predicted':>12}{'error':>8}")
        for c in of_role:
            measured, predicted = (f"{rate:,.0f}" if rate is not None else "-" for rate in (c.measured, c.predicted))
            error = f"{c.error:+.1%}" if c.error is not None else "-"
            gpu = str(c.point.get("card", c.point["gpu"])).removeprefix("NVIDIA ").removeprefix("GeForce ")
            text.append(f"  {c.point['id']:<28}{gpu[:38]:<40}{measured:>12}{predicted:>12}{error:>8}")
    near = f"nine of ten pairs of a program and a card are within {fit.factor() - 1:.1%}"
    return [*text, "", fit.summary("fitted"), fit.summary("judged"), near]


def amount(number: float) -> str:
    """``2.47B``, ``38.63M``, ``9.2K``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def share(prediction: roofline.Prediction) -> str:
    """Where the time of a micro-batch goes."""
    total = sum(prediction.micro_step.values())
    kinds = sorted(prediction.micro_step.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in kinds)


def to_json(p: Plan) -> dict[str, Any]:
    """The plan as JSON. Bytes and seconds."""
    accumulation = p.config.gradient_accumulation_steps
    return {
        "preset": p.config.preset,
        "model": asdict(p.gpt_config),
        "parameters": p.gpt_config.n_params,
        "parameters_without_positions": p.gpt_config.n_params_without_positions,
        "parameters_by_part": p.gpt_config.parameters_by_part,
        "device": asdict(p.machine),
        "memory": p.memory.amount,
        "memory_limit": p.memory.source,
        "threads": p.threads and p.threads.amount,
        "threads_limit": p.threads and p.threads.source,
        "batch_size": p.config.batch_size,
        "gradient_accumulation_steps": accumulation,
        "tokens_per_step": p.config.tokens_per_step,
        "tokens_of_first_step": p.config.tokens_at(0),
        "recompute": p.config.recompute,
        "peak": p.peak,
        "memory_by_part": p.parts,
        "fits": p.fits,
        "predicted": {
            "seconds_per_update": p.prediction.seconds(accumulation),
            "tokens_per_second": p.tokens_per_second,
            "mfu": p.prediction.mfu(accumulation),
            "micro_step_seconds_by_kind": p.prediction.micro_step,
            "update_seconds": p.prediction.update,
            "interval": fit.interval(p.tokens_per_second) if has_interval(p) else None,
            "others": others(p),
        },
        "errors": [{**asdict(e), "time": e.time, "memory": e.memory} for e in roofline.errors()],
        "findings": [asdict(finding) for finding in p.findings],
        "milestones": {
            name: {
                "tokens": tokens,
                "tokens_per_parameter": tokens / p.gpt_config.n_params_without_positions,
                "updates": p.config.updates_for(tokens),
                "hours": p.seconds_for(tokens) / 3600,
            }
            for name, tokens in p.milestones().items()
        },
        "choices": [
            {
                "batch_size": c.batch_size,
                "gradient_accumulation_steps": c.accumulation,
                "recompute": c.recompute,
                "peak": c.prediction.held + p.loaded,
                "tokens_per_second": c.prediction.tokens_per_second(c.accumulation),
                "mfu": c.prediction.mfu(c.accumulation),
                "planned": p.is_planned(c),
            }
            for c in p.choices
        ],
    }


# ---- the command ----


def dataset_facts(config: TrainConfig) -> tuple[int, int | None]:
    """Vocabulary and number of tokens of the dataset; if it is not here, its usual vocabulary and ``None``."""
    try:
        dataset = open_dataset(config.dataset, config.data_dir)
    except RequestError:
        source = SOURCES.get(config.dataset)
        return (source.vocab_size if source is not None else None) or GPT2_VOCABULARY, None
    return dataset.vocab_size or GPT2_VOCABULARY, sum(map(len, dataset.train))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan."""
    parser = Parser(prog="python -m fastgpt.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpu", help="any card of the table, such as rtx-4070")
    parser.add_argument("--vram", help="memory to use instead of all: 8GB")
    parser.add_argument("--tokens", help="also state the hours for this many tokens: 10B")
    parser.add_argument("--points", action="store_true", help="print public measured steps beside their predictions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    gpu_name, vram, tokens, points, as_json = (flags.pop(name) for name in ("gpu", "vram", "tokens", "points", "json"))
    if points:
        print(*point_lines(find_gpu(gpu_name).name if gpu_name else None), sep="\n")
        return 0
    config = resolve(flags, PRESETS)
    threads, loaded = None, 0
    vocab_size, dataset_tokens = dataset_facts(config)
    model = config.gpt_config(padded_vocab_size(vocab_size), end_of_text=vocab_size - 1)  # whichever it is
    if gpu_name:
        gpu = find_gpu(gpu_name)
        if gpu.capability < KERNELS_SINCE:
            raise RequestError(
                f"the {gpu.name} has compute capability {gpu.capability / 10}, and the kernels need "
                f"{KERNELS_SINCE / 10} (Ampere): training runs there on plain PyTorch, which is not predicted"
            )
        dtype = config.torch_dtype(torch.bfloat16)  # every GPU that the kernels run on has all three dtypes
        device_type, machine = "cuda", roofline.machine(gpu, dtype)
        memory = Bound(machine.memory or 0, "the card's")
    else:
        device = hardware.find_device(config.device)
        dtype = config.torch_dtype(hardware.training_dtype(device))
        if device.type == "cpu":
            threads, loaded = hardware.use_threads(), limits.held()
        free, total = hardware.memory(device)
        device_type, machine = device.type, roofline.at_hand(device, dtype)
        memory = Bound(min(free.amount + loaded, total.amount), free.source)
    if vram:
        memory = Bound(int(parse_gigabytes("vram", vram) * GIB), "--vram")
    setup = Setup.of(config, model, device_type, dtype)
    budget = int(parse_count("tokens", tokens)) if tokens else None
    planned = make(config, machine, setup, memory, dataset_tokens, budget, threads, loaded)
    if as_json:
        print(json.dumps(to_json(planned), indent=1))
        return 0
    print(*lines(planned), sep="\n")
    return 0


if __name__ == "__main__":
    run(main)
