"""``python -m fastgpt.sample RUN``: let a trained model write.

python -m fastgpt.sample runs/quickstart --prompt "def main("
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.data.tokenizers import Tokenizer, tokenizer_from_meta
from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig
from fastgpt.model.generate import generate
from fastgpt.train import checkpoint, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Sample from the newest checkpoint of a run."""
    parser = Parser(prog="python -m fastgpt.sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, as given to --out_dir")
    parser.add_argument("--prompt", help="what the text starts with (a line break)")
    parser.add_argument("--max_new_tokens", type=int, default=500, metavar="N", help="length of a sample (500)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top_k", type=int, default=200, metavar="N", help="draw from the N likeliest tokens (200)")
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="same seed, same text (1337)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    options = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 1), ("temperature", 0)):
        if not getattr(options, name) >= least:  # NaN too
            parser.error(f"--{name} must be at least {least}")

    hardware.use_threads()
    model, tokenizer = load(Path(options.run), hardware.find_device(options.device))
    prompt = encode_prompt(tokenizer, options.prompt)
    for i in range(options.num_samples):
        if i:
            print("-" * 20)
        show(
            model, tokenizer, prompt, max_new_tokens=options.max_new_tokens, seed=options.seed + i,
            temperature=options.temperature, top_k=options.top_k,
        )  # fmt: skip


def load(path: Path, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model of a run's newest checkpoint, and the tokenizer that it was trained with.

    Raises:
        RequestError: ``path`` is no run, holds no checkpoint, or was trained on tokens of unknown origin.
    """
    config = run_folder.read_config(path)
    if config["tokenizer"] is None:
        raise RequestError(f"{path} was trained on a bare token file; nothing here turns its tokens into text")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = GPT(GPTConfig(**config["model"]))
    model.load_state_dict(checkpoint.load_parameters(checkpoint.newest(path)), assign=True)
    return model.to(device), tokenizer_from_meta(config["tokenizer"])


def show(
    model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], *, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int = 200,
) -> None:  # fmt: skip
    """Print a sample as it is drawn, the prompt (at least one token) first."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tokens = generate(
        model,
        torch.tensor([prompt], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    for text in decode_stream(tokenizer, itertools.chain(prompt, (int(token) for token in tokens))):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    model.train(training)


def encode_prompt(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """The tokens of a prompt; by default a line break, or the first character of a vocabulary without one.

    Raises:
        RequestError: the prompt is empty, or holds what the tokenizer does not know.
    """
    if text is None:
        try:
            return tokenizer.encode("\n").tolist()
        except RequestError:
            return [0]
    if not text:
        raise RequestError("--prompt is empty; give it at least one character")
    return tokenizer.encode(text).tolist()


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character whose bytes span several tokens waits for its last one."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            pending.clear()
        elif len(pending) == 4:  # UTF-8 needs at most 4 bytes: the first cannot become part of a character
            yield tokenizer.decode(pending[:1])
            pending.pop(0)
    yield tokenizer.decode(pending)


if __name__ == "__main__":
    run(main)
