"""``python -m fastgpt.export MODEL FOLDER``: a trained model for transformers, or for llama.cpp.

python -m fastgpt.export runs/gpt2-124m my-gpt2                   config, weights, tokenizer, as Hugging Face keeps them
python -m fastgpt.export runs/gpt2-124m my-gpt2 --format gguf     my-gpt2/model.gguf
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgpt.cli import Parser, run
from fastgpt.data.tokenizer_json import (
    END_OF_TEXT,
    FILE,
    JsonTokenizer,
    to_json,
    vocabulary_and_merges,
)
from fastgpt.data.tokenizers import BYTE_SPELLING, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from fastgpt.errors import RequestError
from fastgpt.files import written_whole
from fastgpt.model import gguf, huggingface, layouts
from fastgpt.train.models import CHECKPOINTS, OpenedModel, open_model

GGUF = "model.gguf"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model."""
    parser = Parser(prog="python -m fastgpt.export", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run's folder, a model's folder, or a name such as gpt2")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; is made")
    parser.add_argument("--format", choices=("hf", "gguf"), default="hf", help="transformers' or llama.cpp's (hf)")
    parser.add_argument("--checkpoint", default="latest", metavar="WHICH", help=f"of a run: {CHECKPOINTS} (latest)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in FOLDER")
    options = parser.parse_args(argv)

    folder = Path(options.folder)
    written = [huggingface.CONFIG, huggingface.WEIGHTS] if options.format == "hf" else [GGUF]
    there = [name for name in written if (folder / name).exists()]
    if there and not options.overwrite:
        raise RequestError(f"{folder / there[0]} exists: pass --overwrite to replace it, or another folder")
    opened = open_model(options.model, options.checkpoint)
    config = opened.model.config
    (layouts.layout_of if options.format == "hf" else gguf.layout_of)(config)  # or it is refused
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note = export_hf(opened, folder) if options.format == "hf" else export_gguf(opened, folder / GGUF)
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror or error}") from error
    print(f"{opened.origin}: written to {folder if options.format == 'hf' else folder / GGUF}")
    if note:
        print(note, file=sys.stderr)
    if config.end_of_text >= 0:
        print(
            "attention of the model stops at an end of text (document_mask), and that of what is written does not: "
            "give it one document at a time",
            file=sys.stderr,
        )


def export_hf(opened: OpenedModel, folder: Path) -> str | None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load. Returns what has to be said about it."""
    tokenizer = opened.tokenizer
    end = tokenizer.eot if tokenizer is not None else None
    model = opened.model
    huggingface.save(folder, dict(model.named_parameters()), model.config, opened.vocab_size, end)
    if tokenizer is None:
        return "there is no tokenizer: the model was trained on tokens without one"
    try:
        content = to_json(tokenizer)
    except RequestError as error:
        return f"the tokenizer is left out: {error}"
    special = {} if end is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False, **special,
    }  # fmt: skip
    for name, text in ((FILE, content), ("tokenizer_config.json", json.dumps(config, indent=2) + "\n")):
        with written_whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return None


def export_gguf(opened: OpenedModel, path: Path) -> str | None:
    """Write a GGUF file. Returns what has to be said about it."""
    vocabulary = _gguf_vocabulary(opened.tokenizer) if opened.tokenizer is not None else None
    gguf.save(path, dict(opened.model.named_parameters()), opened.model.config, vocabulary, Path(opened.name).name)
    if vocabulary is None:
        return "llama.cpp has no tokenizer like this model's: the file takes and gives token ids"
    return None


def _gguf_vocabulary(tokenizer: Tokenizer) -> gguf.Vocabulary | None:
    """The tokenizer as a byte-level encoding, ``None`` if it is not one."""
    if isinstance(tokenizer, ByteTokenizer):
        return gguf.Vocabulary([BYTE_SPELLING[byte] for byte in range(256)], [], None)
    if isinstance(tokenizer, CharTokenizer) and tokenizer.vocabulary.isascii():
        return gguf.Vocabulary([BYTE_SPELLING[ord(character)] for character in tokenizer.vocabulary], [], None)
    if isinstance(tokenizer, GPT2Tokenizer):
        ids, pairs = vocabulary_and_merges(tokenizer)
        return gguf.Vocabulary(sorted(ids, key=ids.__getitem__), [" ".join(pair) for pair in pairs], tokenizer.eot)
    if isinstance(tokenizer, JsonTokenizer):
        return _byte_level(tokenizer)
    return None


def _byte_level(tokenizer: JsonTokenizer) -> gguf.Vocabulary | None:
    content = json.loads(tokenizer.content)
    model = content.get("model", {})
    if model.get("type") != "BPE" or (content.get("pre_tokenizer") or {}).get("type") != "ByteLevel":
        return None
    ids = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    if sorted(ids.values()) != list(range(tokenizer.vocab_size)):
        return None
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return gguf.Vocabulary(sorted(ids, key=ids.__getitem__), merges, tokenizer.eot)


if __name__ == "__main__":
    run(main)
