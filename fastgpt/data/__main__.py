"""``python -m fastgpt.data``: make a dataset for ``python -m fastgpt.train --dataset NAME``."""

from collections.abc import Sequence

from fastgpt import output
from fastgpt.cli import Parser, run
from fastgpt.data.prepare import prepare
from fastgpt.data.progress import Progress
from fastgpt.data.shards import DatasetMeta
from fastgpt.data.sources import BPE_VOCABULARY, SOURCES
from fastgpt.data.text import END_OF_TEXT
from fastgpt.data.tokenizers import TOKENIZERS, TRAINED
from fastgpt.units import parse_count


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
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        help="text, .jsonl, .parquet, a folder, 'data/*.txt', or -, for the source text",
    )
    parser.add_argument(
        "--tokenizer", metavar="|".join((*TOKENIZERS, TRAINED, "PATH")),
        help="train: learn a byte-pair encoding; PATH: of a tokenizer.json (default: the source's own)",
    )  # fmt: skip
    parser.add_argument("--vocab_size", type=int, metavar="N", help=f"of --tokenizer train (default: {BPE_VOCABULARY})")
    parser.add_argument("--text_field", default="text", metavar="NAME", help="of .jsonl and .parquet (default: text)")
    parser.add_argument("--name", help="name of the dataset (default: the source's, or the first file's)")
    parser.add_argument("--data_dir", default="data", help="folder of datasets (default: data)")
    parser.add_argument(
        "--val_fraction", type=float, metavar="F", help="part of the text for validation (default: 0.1)"
    )
    parser.add_argument(
        "--val_file",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="for validation, instead of a part of the text",
    )
    parser.add_argument("--max_tokens", metavar="N", help="of the training split at most, such as 10M (default: all)")
    parser.add_argument("--special_tokens", action="store_true", help=f"{END_OF_TEXT} in the text is a token")
    parser.add_argument(
        "--num_proc", type=int, metavar="N", help="threads that tokenize (default: all cores of this process)"
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="training shards of fineweb10b, 100 M tokens each (default: all 103)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset of that name")
    args = parser.parse_args(argv)

    progress = Progress()
    path = prepare(
        args.source,
        args.files,
        val_files=args.val_file,
        tokenizer=args.tokenizer,
        name=args.name,
        data_dir=args.data_dir,
        val_fraction=args.val_fraction,
        shards=args.shards,
        text_field=args.text_field,
        vocab_size=args.vocab_size,
        special_tokens=args.special_tokens,
        max_tokens=None if args.max_tokens is None else int(parse_count("max_tokens", args.max_tokens)),
        num_proc=args.num_proc,
        overwrite=args.overwrite,
        progress=progress,
    )
    meta = DatasetMeta.read(path)
    train, val = (sum(shard.tokens for shard in shards) for shards in (meta.train, meta.val))
    vocabulary = f"{meta.tokenizer['name']} vocabulary of {meta.vocab_size:,}"
    print(f"{path}: {train:,} training + {val:,} validation tokens, {vocabulary}")
    if progress.tokens:  # otherwise another process has made it
        output.note(progress.summary())
    return 0


if __name__ == "__main__":
    run(main)
