"""``python -m fastgpt.sample RUN``: let a trained model write.

python -m fastgpt.sample runs/quickstart --prompt "def main("
"""

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
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")

    model, tokenizer = load(Path(options.run), hardware.find_device(options.device))
    for i in range(options.num_samples):
        if i:
            print("-" * 20)
        show(
            model, tokenizer, prompt=options.prompt, max_new_tokens=options.max_new_tokens, seed=options.seed + i,
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
    model = GPT(GPTConfig(**config["model"]))
    model.load_state_dict(checkpoint.load_parameters(checkpoint.newest(path)))
    return model.to(device), tokenizer_from_meta(config["tokenizer"])


def show(
    model: GPT, tokenizer: Tokenizer, *, prompt: str | None = None, max_new_tokens: int, seed: int,
    temperature: float = 0.8, top_k: int = 200,
) -> None:  # fmt: skip
    """Print a sample as it is drawn, the prompt first: a line break if none is given.

    Raises:
        RequestError: the prompt is empty, or holds what the tokenizer does not know.
    """
    prompt = _default_prompt(tokenizer) if prompt is None else prompt
    ids = [int(i) for i in tokenizer.encode(prompt)]
    if not ids:
        raise RequestError("--prompt is empty; give it at least one character")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
    )
    sys.stdout.write(prompt)
    for text in decode_stream(tokenizer, (int(token) for token in tokens)):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    model.train(training)


def _default_prompt(tokenizer: Tokenizer) -> str:
    """A line break, or the first character of a vocabulary that has none."""
    try:
        tokenizer.encode("\n")
    except RequestError:
        return tokenizer.decode([0])
    return "\n"


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character whose bytes span several tokens waits for its last one."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) >= 4:  # UTF-8 needs at most 4 bytes
            yield text
            pending.clear()
    yield tokenizer.decode(pending)


if __name__ == "__main__":
    run(main)
