"""A tokenizer as ``meta.json`` and ``config.json`` describe it."""

import json
from typing import Any

from fastgpt.data.tokenizer_json import JsonTokenizer
from fastgpt.data.tokenizers import CharTokenizer, Tokenizer, build_tokenizer
from fastgpt.errors import RequestError


def tokenizer_from_meta(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that ``Tokenizer.to_meta`` described. ``RequestError`` if it is unknown."""
    name, vocabulary = meta.get("name"), meta.get("vocabulary")
    if not isinstance(name, str):
        raise RequestError(f"the tokenizer's description has no name: {str(meta)[:60]}")
    if name == "json":
        return JsonTokenizer(json.dumps(meta.get("content")), "the tokenizer of meta.json or config.json")
    if name != CharTokenizer.name:
        return build_tokenizer(name, "")
    if not isinstance(vocabulary, str) or len(set(vocabulary)) != len(vocabulary) or not vocabulary:
        raise RequestError("the tokenizer's vocabulary is not a text of different characters")
    return CharTokenizer(vocabulary)
