"""``python -m fastgpt.data``: make a dataset for ``python -m fastgpt.train --dataset NAME``."""

from collections.abc import Sequence

from fastgpt.cli import Parser, run
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import DatasetMeta
from fastgpt.data.sources import SOURCES
from fastgpt.data.tokenizers import TOKENIZERS


def main(argv: Sequence[str] | None = None) -> int | None:
    """Prepare the dataset that ``argv`` (default: the command line) requests, and print a line about it."""
    table = "\n".join(
        f"  {name:<18}{source.summary}{f' (needs {source.needs})' if source.needs else ''}"
        for name, source in SOURCES.items()
    )
    parser = Parser(
        prog="python -m fastgpt.data",
        usage="python -m fastgpt.data prepare SOURCE [FILE …] [--flag=value …]",
        description=f"Make a dataset for python -m fastgpt.train --dataset NAME.\n\nsources:\n{table}",
    )
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("files", metavar="FILE", nargs="*", default=[], help="UTF-8 text, for the source text")
    parser.add_argument("--tokenizer", metavar="|".join(TOKENIZERS), help="default: the source's own")
    parser.add_argument("--name", help="name of the dataset (default: the source's, or the first file's)")
    parser.add_argument("--data_dir", default="data", help="folder of datasets (default: data)")
    parser.add_argument(
        "--val_fraction", type=float, metavar="F", help="part of the text for validation (default: 0.1)"
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards of fineweb10b, 100 M tokens each (default: all 103)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset of that name")
    args = parser.parse_args(argv)

    path = prepare(
        args.source,
        args.files,
        tokenizer=args.tokenizer,
        name=args.name,
        data_dir=args.data_dir,
        val_fraction=args.val_fraction,
        shards=args.shards,
        overwrite=args.overwrite,
    )
    meta = DatasetMeta.read(path)
    train, val = (sum(shard.tokens for shard in shards) for shards in (meta.train, meta.val))
    vocabulary = f"{meta.tokenizer['name']} vocabulary of {meta.vocab_size:,}"
    print(f"{path}: {train:,} training + {val:,} validation tokens, {vocabulary}")
    return 0


if __name__ == "__main__":
    run(main)
