"""``python -m bench.integrations``: a training step of a model of transformers, unchanged and patched, on this device.

    python -m bench.integrations                    GPT-2 at 124M's widths
    python -m bench.integrations --model llama      a small Llama, with grouped queries

Two copies of one model with random weights and without dropout train on the same tokens in turns. A step is forward,
backward and ``torch.optim.AdamW``. Medians are reported, and the losses must agree.

Writes MODEL.json and .md into bench/results/DEVICE; a CPU's names also have the threads. Exit status: 0 done; 1 the
losses disagree; 2 the request was wrong.
"""

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from bench.contenders import AGREE, difference
from bench.pages import aligned, table
from bench.records import begin, conditions, results_folder, write
from bench.timing import CPUTimer, CUDATimer, Timer, Unit, contenders, turn_of
from fastgpt.cli import Parser, run
from fastgpt.hardware import find_device
from fastgpt.integrations import patch_gpt2, patch_llama


def gpt2() -> Any:
    """GPT-2 124M."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def llama() -> Any:
    """A Llama of 7.2M parameters, 4.2M of them in the embedding and the output layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"gpt2": (gpt2, patch_gpt2), "llama": (llama, patch_llama)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print its figures."""
    parser = Parser(prog="python -m bench.integrations", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2", help="of transformers (gpt2)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--block_size", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each model that are timed")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)
    make, patch = MODELS[flags.model]
    torch.manual_seed(0)
    plain = make().to(device).train()
    models = {"transformers": plain, "patched": patch(copy.deepcopy(plain))}
    losses: dict[str, list[float]] = {name: [] for name in models}

    def unit(name: str) -> Unit:
        model = models[name]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.Generator().manual_seed(1)  # the same tokens for both

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
    turns = {name: turn_of(unit, timer) for name, unit in units.items()}
    found = contenders(turns, flags.rounds, "patched")
    for name, one in found.items():
        one["losses"] = losses[name]
    record = begin("integrations", "bench.integrations", argv, device, "float32")
    record["versions"]["transformers"] = version("transformers")
    shapes = {"batch_size": flags.batch_size, "block_size": flags.block_size, **plain.config.to_diff_dict()}
    record["comparisons"] = [
        {"name": flags.model, "shapes": shapes, "ceilings": {}, "ours": "patched", "contenders": found}
    ]
    write(record, results_folder(device) / f"{flags.model}{conditions(device)}")
    print(aligned(table(record["comparisons"])))
    apart = difference(losses["patched"], losses["transformers"])
    print(f"losses differ by at most {apart:.1e}")
    return int(apart > AGREE["float32"])


if __name__ == "__main__":
    run(main)
