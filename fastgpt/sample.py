"""``python -m fastgpt.sample RUN``: generate text with a trained model.

python -m fastgpt.sample runs/quickstart --prompt "def main("
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt import hardware
from fastgpt.cli import Parser, run
from fastgpt.data.stream import show
from fastgpt.data.tokenizers import Tokenizer, tokenizer_from_meta
from fastgpt.errors import RequestError
from fastgpt.model import GPT
from fastgpt.train import checkpoint, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Sample from the newest checkpoint of a run."""
    parser = Parser(prog="python -m fastgpt.sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, as given to --out_dir")
    parser.add_argument("--prompt", help="the start of the text (a line break)")
    parser.add_argument("--max_new_tokens", type=int, default=500, metavar="N", help="tokens to generate (500)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="number of samples (1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest token (0.8)")
    parser.add_argument("--top_k", type=int, default=200, metavar="N", help="draw from the N likeliest tokens (200)")
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="same seed, same text (1337)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    options = parser.parse_args(argv)
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 1), ("temperature", 0)):
        if not getattr(options, name) >= least:  # NaN too
            parser.error(f"--{name} must be at least {least}")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")

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
        RequestError: ``path`` is not a run, has no checkpoint or a damaged one, or was trained on tokens without a
            tokenizer.
    """
    tokenizer = run_folder.read_config(path).tokenizer
    if tokenizer is None:
        raise RequestError(f"{path} was trained on tokens without a tokenizer, so they cannot be turned into text")
    newest, damage = checkpoint.newest_good(path, ["model.safetensors", "state.json"])
    for problem in damage:
        print(f"{problem}: sampling from {newest}", file=sys.stderr)
    config = checkpoint.load_state(newest).model
    if config.n_params != checkpoint.n_parameters(newest):
        raise RequestError(
            f"{newest / 'model.safetensors'} does not hold the {config.n_params:,} parameters of its model"
        )
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = GPT(config)
    model.load_state_dict(checkpoint.load_parameters(newest, model.state_dict()), assign=True)
    return model.to(device), tokenizer_from_meta(tokenizer)


def encode_prompt(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """The tokens of a prompt. ``None`` is a line break, or the first character of a vocabulary without one.

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
    return tokenizer.encode(text).tolist()


if __name__ == "__main__":
    run(main)
