"""``python -m fastgpt.sample MODEL``: generate text with a trained model.

python -m fastgpt.sample runs/quickstart --prompt "def main("
python -m fastgpt.sample gpt2 --prompt FILE:start.txt --num_samples 3 --top_p 0.9

A MODEL is a run's folder, a folder with config.json and model.safetensors, or a name such as gpt2.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.data.stream import show
from fastgpt.data.tokenizer_json import END_OF_TEXT
from fastgpt.data.tokenizers import Tokenizer
from fastgpt.errors import RequestError
from fastgpt.train.models import CHECKPOINTS, open_model
from fastgpt.units import count_of


def main(argv: Sequence[str] | None = None) -> None:
    """Sample from a model."""
    parser = Parser(prog="python -m fastgpt.sample", description=__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what to sample from")
    parser.add_argument("--out_dir", metavar="RUN", help="the same, as nanoGPT has it")
    parser.add_argument("--init_from", default="resume", metavar="NAME", help="gpt2 and so on, as nanoGPT has it")
    parser.add_argument("--checkpoint", default="latest", metavar="WHICH", help=f"of a run: {CHECKPOINTS} (latest)")
    parser.add_argument(
        "--prompt", "--start", action="append", metavar="TEXT",
        help="the start of the text, or FILE:PATH; several are continued one after another (a line break)",
    )  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=500, metavar="N", help="tokens to generate (500)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="samples of each prompt (1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token (0.8)")
    parser.add_argument("--top_k", type=int, default=200, metavar="N", help="draw from the N likeliest tokens (200)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="X", help="draw from the likeliest of this share (1)"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, metavar="X", help="above 1: tokens repeat less (1)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a sample before this text")
    parser.add_argument(
        "--long_prompt", choices=("slide", "refuse"), default="slide", help="what to do beyond the context (slide)"
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="same seed, same text (1337)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (float32)"
    )
    options = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 1), ("temperature", 0)):
        if not getattr(options, name) >= least:  # NaN too
            parser.error(f"--{name} must be at least {least}")
    for name in ("top_p", "repetition_penalty"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name} must be above 0")
    if not 0 <= options.seed < 2**62:
        parser.error("--seed must be from 0 to 2**62")
    if "" in options.stop:
        parser.error("--stop is empty")
    if options.model and (options.out_dir or options.init_from != "resume"):
        parser.error(f"{options.model} is the model already: leave out --out_dir and --init_from")
    name = options.model or (options.init_from if options.init_from != "resume" else options.out_dir)
    if name is None:
        parser.error("give the MODEL to sample from, such as runs/quickstart")

    hardware.use_threads()
    opened = open_model(name, options.checkpoint)
    model = opened.model.to(hardware.find_device(options.device), getattr(torch, options.dtype))
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"{name} was trained on tokens without a tokenizer, so they cannot be turned into text")
    prompts = [encode_prompt(tokenizer, read_prompt(text)) for text in options.prompt or [None]]
    context = model.config.block_size
    for prompt in prompts:
        if len(prompt) > context and options.long_prompt == "refuse":
            raise RequestError(f"a prompt has {len(prompt)} tokens, more than the model's context of {context}")

    start, drawn = time.perf_counter(), 0
    for i, (prompt, sample) in enumerate((prompt, i) for prompt in prompts for i in range(options.num_samples)):
        if i:
            print("-" * 20)
        drawn += show(
            model, tokenizer, prompt, max_new_tokens=options.max_new_tokens, seed=options.seed + sample,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            repetition_penalty=options.repetition_penalty, stop=options.stop,
        )  # fmt: skip
    rate = drawn / (time.perf_counter() - start)
    print(f"{opened.origin}: {count_of(drawn, 'token')}, {rate:,.1f} tokens/s", file=sys.stderr)


def read_prompt(text: str | None) -> str | None:
    """The prompt itself, or as in nanoGPT the content of the file in ``FILE:PATH``.

    Raises:
        RequestError: the file cannot be read.
    """
    if text is None or not text.startswith("FILE:"):
        return text
    path = Path(text.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def encode_prompt(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """The tokens of a prompt. ``None`` is a line break, or the first character of a vocabulary without one.

    ``<|endoftext|>`` is the token that parts documents, if the tokenizer has one.

    Raises:
        RequestError: the prompt is empty, or has characters that the tokenizer does not know.
    """
    if text is None:
        try:
            return tokenizer.encode("\n").tolist()
        except RequestError:
            return [0]
    if not text:
        raise RequestError("--prompt is empty; give it at least one character")
    if tokenizer.eot is None:
        return tokenizer.encode(text).tolist()
    ids: list[int] = []
    for i, part in enumerate(text.split(END_OF_TEXT)):
        ids += ([tokenizer.eot] if i else []) + tokenizer.encode(part).tolist()
    return ids


if __name__ == "__main__":
    run(main)
