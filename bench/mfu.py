"""``python -m bench.mfu``: whole training steps against torch.compile, and the share of the device that they use.

    python -m bench.mfu --preset gpt2-124m                  # on a GPU if there is one
    python -m bench.mfu --preset gpt2-124m --vram 12GB      # and each contender at its largest micro-batch in 12 GB
    python -m bench.mfu --preset quickstart --device cpu --contenders eager fastgpt

Contenders:

- fastgpt's step: with CUDA graphs, without them, and with attention's backward in a single pass, which is not
  deterministic
- plain PyTorch as nanoGPT uses it (``model/reference.py`` under autocast, fused AdamW): eager, under torch.compile,
  with max-autotune, and with PyTorch's own linear + cross-entropy
- the strongest plain PyTorch: bf16 weights with fp32 masters, one graph, a compiled optimizer, and the faster fused
  attention

All run in one process, start from the same weights, train on the same tokens and take turns. Medians are reported. MFU
is the share of the device's dense peak (``fastgpt/gpus.py``). *of ceiling* is the share of the rate of a large matrix
product in the same run.

``--vram`` limits the memory of the process, including CUDA's own, and times each contender at the largest micro-batch
that fits. ``--profile`` adds the time by kind of kernel. ``--loss_steps N`` also trains each contender for N updates,
and plain PyTorch in fp32 for comparison.

Writes mfu-PRESET.json, .md and .png into bench/results/DEVICE; the names also have the micro-batch, the dtype, a CPU's
threads and the label. Exit status: 0 done; 1 fastgpt failed, the losses disagree, or no requested baseline could be
timed; 2 the request was wrong.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.contenders import CONTENDERS, GPU_ONLY, OURS, RECORDED, plain_update
from bench.largest import within
from bench.pages import Record, draw, tail
from bench.profiling import time_budget
from bench.records import begin, conditions, results_folder, write
from bench.steps import Contender, Request, compare, prepare, release, report, take_turns
from bench.timing import error_in_a_line
from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.errors import RequestError
from fastgpt.model.fused import RECOMPUTE
from fastgpt.train.config import TrainConfig
from fastgpt.train.predict import roofline, trace
from fastgpt.train.predict.trace import trace_step
from fastgpt.train.presets import PRESETS
from fastgpt.train.step import leave_default_stream
from fastgpt.units import GIB, dtype_name, gib, parse_gigabytes

EXACT = "eager, fp32"  # what the loss curves are compared with
Note = Callable[[Record], None]  # writes the comparison as far as it is known


# ---- the measurement ----


def measure(names: Sequence[str], request: Request, seconds: float, profiling: bool, note: Note) -> Record:
    """All contenders side by side. ``note`` gets the comparison after every stage, in case a later stage fails."""
    best = ceilings(request.device, request.dtype)
    contenders: dict[str, Contender] = {}
    for name in names:
        print(f"preparing {name}", flush=True)
        contenders[name] = prepare(name, request)
        alone = {name: replace(contenders[name], ms=[])}  # a first figure, in case the others take too long
        take_turns(alone, request, 0.0)
        note(comparison_of(contenders | alone, request, best))
    print(f"timing {', '.join(name for name, c in contenders.items() if c.update is not None)}", flush=True)
    take_turns(contenders, request, seconds)
    note(comparison_of(contenders, request, best))
    try:
        after = ceilings(request.device, request.dtype)
    except RuntimeError as error:  # an illegal access by a kernel makes the GPU unusable for the process
        print(f"ceilings not measured again: {error_in_a_line(error)}", flush=True)
        after = best
    comparison = comparison_of(contenders, request, {key: max(best[key], after[key]) for key in best})
    for name, contender in contenders.items() if profiling else ():
        note(comparison)
        try:
            comparison["contenders"][name]["time_budget_ms"] = time_budget(contender, request)
        except Exception as error:  # a machine may forbid profiling
            print(f"no profile of {name}: {error_in_a_line(error)}", flush=True)
    return comparison


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large product and B/s of a large copy."""
    return {
        "gemm_flops": hardware.gemm_ceiling(device, dtype, 1.0),
        "bandwidth": hardware.measure_bandwidth(device),
    }


def comparison_of(contenders: dict[str, Contender], request: Request, best: dict[str, float]) -> Record:
    """The comparison, and what the plan predicts for fastgpt; for a device that it does not know, from ``best``."""
    cuda, peak = request.device.type == "cuda", hardware.peak_flops(request.device, request.dtype)
    setup = request.setup()
    traced = trace_step(setup)
    n_sm = torch.cuda.get_device_properties(request.device).multi_processor_count if cuda else None
    rates = best["gemm_flops"], best["bandwidth"]
    machine = roofline.machine_of(hardware.device_name(request.device), request.dtype, *rates, peak, n_sm)
    predicted = roofline.predict(setup, machine, traced)
    return {
        **compare(request, contenders, {**best, "peak_flops": peak}),
        "state_bits": setup.state_bits,
        "recompute": setup.recompute,
        "predicted": {
            "ms": 1e3 * predicted.seconds(request.accumulation),
            "by_kind_ms": {kind: 1e3 * s * request.accumulation for kind, s in predicted.micro_step.items()},
            "update_ms": 1e3 * predicted.update,
            "peak_bytes": traced.peak,
            "memory": traced.memory,
        },
    }


def loss_curve(name: str, request: Request, n_updates: int) -> list[float]:
    """A contender's losses from the first update on; ``eager, fp32`` is plain PyTorch in fp32."""
    release()
    torch.manual_seed(1)
    try:
        if name == EXACT:
            update = plain_update(request.config, request.device, torch.float32, request.accumulation)
        else:
            update = request.make(name)
        losses = [update(batches) for batches in itertools.islice(request.batches(), n_updates)]
        return torch.stack(losses).tolist()  # read only here, so that no update waits for the host
    except Exception as error:
        print(f"{name}: {error_in_a_line(error)}")
        return [math.nan]


# ---- the request ----


def requested(flags: Any) -> Request:
    """The request that the flags make."""
    values = {**PRESETS[flags.preset]}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size"):
        if getattr(flags, name) is not None:
            values[name] = getattr(flags, name)
    if values["batch_size"] is None:  # by the memory of the device; a comparison needs the same size on all of them
        values["batch_size"] = 16
    values |= {"preset": flags.preset, "total_batch_size": 0}
    config = TrainConfig(**values)
    # GPT-2's 50257 tokens, padded to a multiple of 64; or bytes
    vocabulary = flags.vocab_size or (50304 if flags.preset.startswith("gpt2") else 256)
    model = replace(config.gpt_config(vocabulary), dropout=0.0)  # so that losses can be compared
    device = hardware.find_device(flags.device)
    dtype = hardware.training_dtype(device) if flags.dtype == "auto" else getattr(torch, flags.dtype)
    recompute = flags.recompute or ("none" if device.type == "cuda" else "cheap")
    return Request(flags.preset, model, config.batch_size, flags.accumulation, device, dtype, recompute)


def taking_part(asked: Sequence[str] | None, request: Request) -> list[str]:
    """The contenders, of those asked for or of all, that can run here and train correctly. Prints who is left out.

    Raises:
        RequestError: there are none.
    """
    names = [name for name in CONTENDERS if asked is None or name in asked]
    cuda = request.device.type == "cuda"
    if not cuda:
        names = [name for name in names if name not in GPU_ONLY]
    if not hasattr(F, "linear_cross_entropy"):
        names = [name for name in names if name != "compile, chunked loss"]
    left_out: dict[str, Sequence[str]] = {}
    if request.dtype == torch.float16:
        why = "they do not scale the loss, and gradients in float16 underflow"
        left_out[why] = [name for name in names if not name.startswith(OURS)]
    elif cuda and request.accumulation > 1:
        # pytorch/pytorch#169545 and #96693: weight.grad is an output of the graph, so the next replay overwrites it
        why = "the CUDA graphs that PyTorch records for them overwrite the gradients of the first micro-batch"
        left_out[why] = [name for name in names if name in RECORDED]
    for why, out in left_out.items():
        if out:
            print(f"without {', '.join(out)}: {why}", flush=True)
        names = [name for name in names if name not in out]
    if not names:
        raise RequestError("--contenders: none of these can run here")
    return names


def parse(argv: Sequence[str] | None) -> Any:
    """Parse the flags."""
    parser = Parser(prog="python -m bench.mfu", description=__doc__)
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="gpt2-124m", help="model and micro-batch; 16 if it sets none"
    )
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, help="overrides the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per update; default 1")
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=None, help="default all that can run here"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: as in training"
    )
    parser.add_argument(
        "--recompute", choices=RECOMPUTE, help="by fastgpt; default none on a GPU, cheap on a CPU and with --vram"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="time for the turns of all contenders; default 30")
    parser.add_argument("--vram", help="also find the largest micro-batch in so much GPU memory, such as 12GB")
    parser.add_argument("--profile", action="store_true", help="also measure the time by kind of kernel")
    parser.add_argument("--loss_steps", type=int, default=0, help="also train each contender for N updates")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/DEVICE")
    parser.add_argument("--label", help="the end of the record's name, to keep it apart from others")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print the table."""
    flags = parse(argv)
    request = requested(flags)
    vram = parse_gigabytes("vram", flags.vram) if flags.vram else None
    if vram and request.device.type != "cuda":
        raise RequestError("--vram limits a GPU's memory; there is none here")
    if vram and vram * GIB <= trace.CUDA_RESERVE:
        raise RequestError(f"--vram {flags.vram}: CUDA itself takes about {gib(trace.CUDA_RESERVE)}")
    names = taking_part(flags.contenders, request)
    dtype = dtype_name(request.dtype)
    size = f"{request.batch_size}x{request.config.block_size}"
    name = f"mfu-{request.name}-{size}-{dtype}{conditions(request.device)}"
    if flags.label:
        name += f"-{flags.label}"
    stem = (flags.out or results_folder(request.device)) / name
    leave_default_stream(request.device)
    record = begin("steps", "bench.mfu", argv, request.device, dtype)

    def note(comparison: Record) -> None:
        record["comparisons"] = [comparison]
        write(record, stem)

    comparison = measure(names, request, flags.seconds, flags.profile, note)
    note(comparison)
    status = report(record)  # now, because what follows may be interrupted
    draw(record, stem)
    if flags.loss_steps:
        comparison |= {"loss_steps": flags.loss_steps, "loss_curves": {}}
        for name in (*names, EXACT):
            comparison["loss_curves"][name] = loss_curve(name, request, flags.loss_steps)
            note(comparison)
        ends = ", ".join(f"{name} {tail(losses):.4f}" for name, losses in comparison["loss_curves"].items())
        print(f"mean loss of the last {min(flags.loss_steps, 10)} of {flags.loss_steps} updates: {ends}", flush=True)
    if vram:
        tensors = vram - trace.CUDA_RESERVE / GIB
        comparison |= {"vram_gib": vram, "vram_tensors_gib": tensors, "largest": {}}
        for name in names:
            within(vram, name, request, comparison, lambda: note(comparison))
    return status


if __name__ == "__main__":
    run(main)
