"""``fastgpt VERB …``, the console script: the same as ``python -m fastgpt.VERB …``."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastgpt import __version__
from fastgpt.cli import run
from fastgpt.errors import RequestError, did_you_mean

# The module whose main(argv) runs the command, and a summary.
VERBS = {
    "plan": ("fastgpt.plan", "predict memory, speed and hours of a run"),
    "train": ("fastgpt.train.__main__", "train a GPT"),
    "data": ("fastgpt.data.__main__", "prepare a dataset"),
    "sample": ("fastgpt.sample", "generate text with a trained model"),
    "eval": ("fastgpt.eval", "compare models by loss, perplexity and bits a byte"),
    "sweep": ("fastgpt.sweep", "train one run for each value of a flag, and compare them"),
    "report": ("fastgpt.report", "write an HTML page about a run, or comparing several"),
    "export": ("fastgpt.export", "write a trained model for transformers or llama.cpp"),
    "doctor": ("fastgpt.doctor", "show what this machine has and what the kernels run on"),
}


def main() -> NoReturn:
    """Run the command that the first argument names."""
    run(_dispatch, sys.argv[1:])


def _dispatch(argv: Sequence[str] | None) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastgpt VERB [--help] …, or fastgpt --version\n\nverbs:")
        for verb, (_, purpose) in VERBS.items():
            print(f"  {verb:8} {purpose}")
        return 0 if argv else 2
    verb, *rest = argv
    if verb == "--version":
        print(f"fastgpt {__version__}")
        return 0
    if verb not in VERBS:
        raise RequestError(f"unknown verb '{verb}'{did_you_mean(verb, list(VERBS))} (there are {', '.join(VERBS)})")
    return importlib.import_module(VERBS[verb][0]).main(rest)


if __name__ == "__main__":
    main()
