"""``python -m fastgpt.eval MODEL… --data TEXT``: how good models are, side by side on the same text.

python -m fastgpt.eval runs/quickstart --data stdlib
python -m fastgpt.eval runs/a runs/b gpt2 --data book.txt --stride 512
python -m fastgpt.eval runs/gpt2-124m gpt2 --lambada lambada.jsonl --hellaswag hellaswag_val.jsonl

A MODEL is a run's folder, a folder with config.json and model.safetensors, or a name such as gpt2.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt import hardware, output
from fastgpt.cli import Parser, run
from fastgpt.data import text as texts
from fastgpt.data.dataset import open_dataset
from fastgpt.data.tokenizer_json import END_OF_TEXT
from fastgpt.data.tokenizers import Tokenizer, Tokens
from fastgpt.errors import RequestError
from fastgpt.evaluation import tasks
from fastgpt.evaluation.loss import Loss, text_loss
from fastgpt.files import reachable
from fastgpt.train.models import CHECKPOINTS, OpenedModel, open_model
from fastgpt.units import count

DTYPES = ("float32", "bfloat16", "float16")
TEXT_FILES = (".txt", ".md", ".text")  # no dataset is called so


@dataclass(frozen=True)
class Text:
    """What the models are evaluated on.

    Attributes:
        name: in words.
        documents: their texts; ``None`` for tokens whose tokenizer is unknown.
        tokens: as a dataset has them; ``None`` for text files.
        tokenizer: that made ``tokens``.
    """

    name: str
    documents: list[str] | None
    tokens: Tokens | None
    tokenizer: Tokenizer | None

    @property
    def n_bytes(self) -> int | None:
        """In UTF-8, without the marks between documents."""
        return len("".join(self.documents).encode()) if self.documents is not None else None

    def tokens_for(self, opened: OpenedModel) -> Tokens:
        """The text in the tokens of a model, with its own mark between documents, if it has one.

        Raises:
            RequestError: the model's tokenizer is unknown, or does not know all characters; or the tokens are of an
                unknown tokenizer, and not all in the model's vocabulary.
        """
        own = opened.tokenizer
        if self.tokens is not None and _same(own, self.tokenizer):
            V = opened.model.config.vocab_size
            if self.tokens.max(initial=0) >= V:
                raise RequestError(
                    f"{self.name} has the token {self.tokens.max()}, and {opened.name} knows {V} only: they are of "
                    "another tokenizer"
                )
            return self.tokens
        if self.documents is None or own is None:
            raise RequestError(f"the tokenizer of {opened.name if own is None else self.name} is unknown")
        mark = [] if own.eot is None else [own.eot]
        try:
            parts = [own.encode(document) for document in self.documents]
            between = np.array(mark, dtype=np.uint16)
            return np.concatenate([part for encoded in parts for part in (between, encoded)][1:])
        except RequestError as error:
            raise RequestError(f"{opened.name} cannot read {self.name}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of the models, or JSON."""
    parser = Parser(prog="python -m fastgpt.eval", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="what to evaluate")
    parser.add_argument(
        "--data", metavar="TEXT", help="a dataset's name or folder, or a file: text, .jsonl or .parquet"
    )
    parser.add_argument("--text_field", default="text", metavar="NAME", help="of .jsonl and .parquet (text)")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the dataset (val)")
    parser.add_argument("--data_dir", default="data", help="folder of prepared datasets (data)")
    parser.add_argument(
        "--max_tokens", type=int, metavar="N", help="take the text of the dataset's first N tokens only"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows (each model's context)")
    parser.add_argument("--windows", type=int, metavar="N", help="take N windows, evenly spaced (all)")
    parser.add_argument("--lambada", metavar="FILE", help="LAMBADA as JSONL: accuracy and perplexity of the last word")
    parser.add_argument("--hellaswag", metavar="FILE", help="HellaSwag as JSONL: acc and acc_norm")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N lines of those files (all)")
    parser.add_argument("--checkpoint", default="latest", metavar="WHICH", help=f"of runs: {CHECKPOINTS} (latest)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="windows at a time (8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    for name in ("max_tokens", "stride", "windows", "limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    if not (options.data or options.lambada or options.hellaswag):
        parser.error("nothing to evaluate on: give --data, --lambada or --hellaswag")

    hardware.use_threads()
    device = hardware.find_device(options.device)
    text = None
    if options.data:
        text = open_text(options.data, options.data_dir, options.split, options.max_tokens, options.text_field)
    rows = []
    for name in options.models:
        opened = open_model(name, options.checkpoint, options.data_dir)
        opened.model.to(device, getattr(torch, options.dtype))
        rows.append(_evaluate(opened, text, options))
        del opened  # before the next one is there
    if options.json:
        print(json.dumps({"data": text.name if text else None, "models": [_plain(row) for row in rows]}, indent=1))
    else:
        _show(text, rows)


def open_text(
    data: str, data_dir: str | Path, split: str, max_tokens: int | None = None, text_field: str = "text"
) -> Text:
    """The text of ``--data``.

    Args:
        data: a file of text or of rows, or a dataset's name or path.
        data_dir: folder of datasets.
        split: of a dataset.
        max_tokens: of a dataset, from its start; ``None`` for all.
        text_field: of a row, which is a document.

    Raises:
        RequestError: there is no such text.
    """
    path = reachable(Path(data))
    if path.is_file() and path.suffix != ".bin":
        if max_tokens is not None:
            raise RequestError(f"--max_tokens counts a dataset's tokens, and {path} is a text; --windows takes a part")
        documents = texts.documents(texts.of_files([path], text_field))
        return Text(str(path), [part for each in documents for part in each.split(END_OF_TEXT)], None, None)
    if path.suffix in TEXT_FILES and not any(place.exists() for place in (path, Path(data_dir, data))):
        raise RequestError(f"{path} cannot be read: No such file or directory")
    dataset = open_dataset(data, data_dir)
    tokens = np.concatenate([np.asarray(shard) for shard in getattr(dataset, split)])[:max_tokens]
    tokenizer = dataset.tokenizer()
    name = f"the {'validation' if split == 'val' else 'training'} split of {data}"
    return Text(name, None if tokenizer is None else _documents(tokenizer, tokens), tokens, tokenizer)


def _documents(tokenizer: Tokenizer, tokens: Tokens) -> list[str]:
    """The texts between the marks."""
    ends = np.flatnonzero(tokens == tokenizer.eot) if tokenizer.eot is not None else np.array([], dtype=np.int64)
    texts = [tokenizer.decode(part[part != tokenizer.eot]) for part in np.split(tokens, ends)]
    texts[-1] = texts[-1].rstrip("\N{REPLACEMENT CHARACTER}")  # a token budget may end inside a character
    return texts


def _same(one: Tokenizer | None, other: Tokenizer | None) -> bool:
    """Whether two tokenizers give the same tokens. Tokens of an unknown one are taken for the model's."""
    return one is None or other is None or one.to_meta() == other.to_meta()


def _evaluate(opened: OpenedModel, text: Text | None, options: Any) -> dict[str, Any]:
    """Everything that was asked about a model, by name."""
    row: dict[str, Any] = {
        "model": opened.name, "origin": opened.origin, "parameters": opened.model.config.n_params,
        "context": opened.model.config.block_size,
        "tokenizer": opened.tokenizer.name if opened.tokenizer is not None else None,
    }  # fmt: skip
    if text is not None:
        tokens = text.tokens_for(opened)
        start = time.perf_counter()
        row["loss"] = text_loss(
            opened.model, tokens, text.n_bytes, stride=options.stride, n_windows=options.windows,
            batch_size=options.batch_size,
        )  # fmt: skip
        row["tokens_per_s"] = row["loss"].tokens / (time.perf_counter() - start)
    for name, task in (("lambada", tasks.lambada), ("hellaswag", tasks.hellaswag)):
        path = getattr(options, name)
        if path is not None:
            if opened.tokenizer is None:
                raise RequestError(f"{opened.name} has no known tokenizer, which --{name} needs")
            row[name] = task(opened.model, opened.tokenizer, Path(path), limit=options.limit)
    return row


def _show(text: Text | None, rows: list[dict[str, Any]]) -> None:
    output.table(
        ["model", *_cells(rows[0])],
        [[row["model"], *_cells(row).values()] for row in rows],
        f"on {text.name}" if text is not None else None,
    )
    for row in rows:
        print(f"{row['model']}: {row['origin']}")
    if text is not None and text.tokens is not None and text.documents is None:
        print(f"{text.name}: its tokenizer is unknown, so its tokens are taken for each model's own")
    if text is not None and len({row["tokenizer"] for row in rows}) > 1:
        print("loss and perplexity count tokens, which differ here; bits a byte compare all models")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table by column."""
    cells = {
        "parameters": count(row["parameters"], 2),
        "context": str(row["context"]),
        "tokenizer": row["tokenizer"] or "?",
    }
    loss: Loss | None = row.get("loss")
    if loss is not None:
        cells |= {
            "tokens": f"{loss.tokens:,}",
            "loss": _with_error(loss.nats, loss.error, 4),
            "perplexity": f"{loss.perplexity:,.2f}",
            "bits a byte": _with_error(loss.bits_per_byte, loss.bits_per_byte_error, 4),
            "tokens/s": f"{row['tokens_per_s']:,.0f}",
        }
    for task in ("lambada", "hellaswag"):
        for name, value in row.get(task, {}).items():
            shown = _with_error(100 * value.value, 100 * value.error, 2) + " %" if hasattr(value, "error") else None
            cells[f"{task} {name}"] = shown or f"{value:,.2f}"
    return cells


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "?"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it."""
    plain = dict(row)
    loss: Loss | None = row.get("loss")
    if loss is not None:
        plain["loss"] = {
            "nats": loss.nats, "error": loss.error, "perplexity": loss.perplexity, "tokens": loss.tokens,
            "bits_per_byte": loss.bits_per_byte, "bits_per_byte_error": loss.bits_per_byte_error,
        }  # fmt: skip
    for task in ("lambada", "hellaswag"):
        if task in row:
            plain[task] = {
                name: {"value": value.value, "error": value.error, "examples": value.examples}
                if isinstance(value, tasks.Rate)
                else value
                for name, value in row[task].items()
            }
    return plain


if __name__ == "__main__":
    run(main)
