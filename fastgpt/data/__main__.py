"""Makes a dataset for ``python -m fastgpt.train --dataset NAME``:

    python -m fastgpt.data prepare SOURCE [FILE…]

sources:
  stdlib            Python's own library: on every machine, offline
  text FILE…        text of your own
  shakespeare-char  nanoGPT's smallest dataset (needs network)
  openwebtext       nanoGPT's GPT-2 dataset (needs network, 54 GB of cache and `pip install datasets`)
  fineweb10b        GPT-2 tokens of FineWeb, 200 MB a shard (needs network and `pip install huggingface_hub`)
"""

import itertools
import sys
from collections.abc import Sequence

from fastgpt.cli import Parser, run
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import DatasetMeta
from fastgpt.data.tokenizers import TOKENIZERS


def main(argv: Sequence[str] | None = None) -> int | None:
    """Prepare the dataset that ``argv`` (default: the command line) asks for; say in a line what it is."""
    parser = Parser(prog="python -m fastgpt.data", description=__doc__)
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("files", metavar="FILE", nargs="*", default=[], help="UTF-8 text, for the source text")
    parser.add_argument("--tokenizer", metavar="|".join(TOKENIZERS), help="by default what suits the source")
    parser.add_argument("--name", help="of the dataset (default: the source's, or the first file's)")
    parser.add_argument("--data_dir", default="data", help="where datasets live (default: data)")
    parser.add_argument("--val_fraction", type=float, metavar="F", help="kept for validation (default: 0.1)")
    parser.add_argument("--shards", type=int, metavar="N", help="of fineweb10b's 103, 100 M tokens each")
    args = parser.parse_args(_positionals_first(sys.argv[1:] if argv is None else argv))

    path = prepare(
        args.source,
        args.files,
        tokenizer=args.tokenizer,
        name=args.name,
        data_dir=args.data_dir,
        val_fraction=args.val_fraction,
        shards=args.shards,
    )
    meta = DatasetMeta.read(path)
    train, val = (sum(shard.tokens for shard in shards) for shards in (meta.train, meta.val))
    vocabulary = f"{meta.tokenizer['name']} vocabulary of {meta.vocab_size:,}"
    print(f"{path}: {train:,} training + {val:,} validation tokens, {vocabulary}")
    return 0


def _positionals_first(argv: Sequence[str]) -> list[str]:
    """``argv`` with its flags last: argparse takes FILEs only where they follow SOURCE directly."""
    positionals, flags = [], []
    rest = iter(argv)
    for arg in rest:
        if arg.startswith("-"):
            flags.append(arg)
            if arg.startswith("--") and "=" not in arg and arg != "--help":
                flags.extend(itertools.islice(rest, 1))  # the flag's value
        else:
            positionals.append(arg)
    return positionals + flags


if __name__ == "__main__":
    run(main)
