"""``python -m bench.integrations``: a training step of transformers' GPT-2, as it is and patched, on this very device.

Two copies of one model with random weights, at GPT-2 124M's widths and without dropout, take the same tokens in
turns; a step is forward, backward and ``torch.optim.AdamW``. Medians count, and the losses are shown to agree.

Writes gpt2.json into bench/results/DEVICE; a CPU's is named after its threads too. Exit status: 0 done; 1 the losses
differ; 2 the request was wrong.
"""

import copy
import json
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median, quantiles

import torch

from bench.timing import CPUTimer, CUDATimer, Timer, Unit, conditions, interleave, provenance, results_folder
from fastgpt.cli import Parser, run
from fastgpt.hardware import find_device
from fastgpt.integrations import patch_gpt2

AGREE = 1e-4  # largest relative difference of two losses


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print its figures."""
    parser = Parser(prog="python -m bench.integrations", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--block_size", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model that are timed")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).to(device).train()
    models = {"transformers": plain, "patched": patch_gpt2(copy.deepcopy(plain))}
    losses: dict[str, list[float]] = {name: [] for name in models}

    def unit(name: str) -> Unit:
        model = models[name]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.Generator().manual_seed(1)

        def step() -> None:
            shape = (flags.batch_size, flags.block_size)
            ids = torch.randint(model.config.vocab_size, shape, generator=tokens).to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())

        return Unit(step)

    units = {name: unit(name) for name in models}
    timer: Timer = CPUTimer() if device.type == "cpu" else CUDATimer(device)
    for warmed in units.values():
        timer.warm_up(warmed)
    readings = interleave(units, timer, 0.0, (flags.rounds, flags.rounds))
    times = {}
    for name, ms in readings.items():
        if isinstance(ms, Exception):
            raise ms
        times[name] = ms
    apart = max(abs(a - b) / a for a, b in zip(losses["transformers"], losses["patched"], strict=True))
    record = {
        **provenance("bench.integrations", argv, device),
        "shapes": {"batch_size": flags.batch_size, "block_size": flags.block_size, **plain.config.to_diff_dict()},
        "dtype": "float32",
        "median_ms": {name: median(ms) for name, ms in times.items()},
        "quartiles_ms": {name: quantiles(ms, n=4)[::2] for name, ms in times.items()},
        "ratio": median(times["transformers"]) / median(times["patched"]),
        "losses": losses,
        "loss_difference": apart,
    }
    record["environment"]["transformers"] = version("transformers")
    folder = results_folder(device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpt2{conditions(device)}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, ms in times.items():
        print(f"{name:<14}{median(ms):>9.1f} ms a step")
    print(f"{'ratio':<14}{record['ratio']:>9.2f}      losses differ by at most {apart:.1e} of themselves")
    return int(apart > AGREE)


if __name__ == "__main__":
    run(main)
