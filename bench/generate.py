"""``python -m bench.generate``: tokens a second when a text is generated, with and without a KV cache.

One model with random weights, at GPT-2 124M's shape, continues one prompt with the likeliest tokens: fastgpt with its
cache, fastgpt without (the whole context is computed for every token), and transformers' ``generate`` with the same
weights and its cache. They take turns. Medians are reported, and the tokens must be the same.

Writes generate.json and .md into bench/results/DEVICE; a CPU's names also have the threads. Exit status: 0 done; 1 the
tokens differ; 2 the request was wrong.
"""

import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bench.pages import aligned, table
from bench.records import begin, conditions, results_folder, write
from bench.timing import contenders, wall_ms
from fastgpt.cli import Parser, run
from fastgpt.hardware import find_device
from fastgpt.model import GPT, huggingface
from fastgpt.model.config import GPTConfig
from fastgpt.model.generate import generate

OURS, UNCACHED, THEIRS = "fastgpt", "fastgpt, no cache", "transformers"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record, print its figures."""
    parser = Parser(prog="python -m bench.generate", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--prompt_tokens", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--n_layer", type=int, default=12, help="layers of 768")
    parser.add_argument("--rounds", type=int, default=5, help="texts of each contender that are timed")
    flags = parser.parse_args(argv)
    device = find_device(flags.device)

    torch.manual_seed(0)
    config = GPTConfig(block_size=1024, vocab_size=50304, n_layer=flags.n_layer, n_head=12, n_embd=768)
    model = GPT(config).to(device).eval()
    prompt = torch.randint(config.vocab_size, (1, flags.prompt_tokens), device=device)
    texts = writers(model, prompt, flags.new_tokens)
    written: dict[str, Tensor] = {}

    def turn(name: str) -> list[float]:
        ms, written[name] = wall_ms(texts[name], device)
        return [ms]

    turns = {name: lambda name=name: turn(name) for name in texts}
    for warm_up in turns.values():
        warm_up()
    found = contenders(turns, flags.rounds, OURS)
    for one in found.values():
        one["tokens_per_s"] = flags.new_tokens / one["ms"] * 1e3
    record = begin("generation", "bench.generate", argv, device, "float32")
    record["versions"]["transformers"] = version("transformers")
    shapes = {"batch_size": 1, "block_size": flags.prompt_tokens + flags.new_tokens, "new_tokens": flags.new_tokens}
    shapes |= {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    record["comparisons"] = [{"name": "generate", "shapes": shapes, "ceilings": {}, "ours": OURS, "contenders": found}]
    write(record, results_folder(device) / f"generate{conditions(device)}")
    print(aligned(table(record["comparisons"])))
    differ = [name for name, tokens in written.items() if not torch.equal(tokens, written[OURS])]
    print(f"other tokens: {', '.join(differ)}" if differ else "the tokens are the same")
    return int(bool(differ))


def writers(model: GPT, prompt: Tensor, n: int) -> dict[str, Callable[[], Tensor]]:
    """Functions that continue ``prompt``, (1, T) int64, and return ``n`` token ids, by contender."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(Path(folder), model.state_dict(), model.config, model.config.vocab_size, None)
        theirs = GPT2LMHeadModel.from_pretrained(folder).to(prompt.device).eval()

    @torch.no_grad()
    def uncached() -> Tensor:
        context = prompt
        for _ in range(n):
            context = torch.cat((context, model(context).argmax(-1, keepdim=True)), dim=1)
        return context[0, prompt.shape[1] :]

    def by_transformers() -> Tensor:
        text = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, min_new_tokens=n, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return text[0, prompt.shape[1] :]

    return {
        OURS: lambda: torch.cat(list(generate(model, prompt, n, temperature=0.0))),
        UNCACHED: uncached,
        THEIRS: by_transformers,
    }


if __name__ == "__main__":
    run(main)
