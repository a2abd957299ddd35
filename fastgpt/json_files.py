"""JSON files with a checksum, and dataclasses that are built from them.

:func:`write` adds the SHA-256 of the content, and :func:`read` checks it. A file without that entry is not checked, so
that a person may edit a file and remove the entry.
"""

import hashlib
import json
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastgpt.errors import RequestError, did_you_mean
from fastgpt.files import written_whole

T = TypeVar("T")

CHECKSUM = "sha256_of_the_rest"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``. An incomplete file never gets the name ``path``."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content | {CHECKSUM: _checksum(content)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The content of a file that :func:`write` wrote.

    Raises:
        RequestError: the file cannot be read, is not a table, or has changed since it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor may have added a byte-order mark
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path} is damaged: it does not hold a table")
    expected = content.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(content):
        raise RequestError(
            f"{path} is damaged: its content is not what was written; if you have edited it, remove {CHECKSUM}"
        )
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build(kind: type[T], content: Any, where: str, *, complete: bool = False) -> T:
    """An instance of the dataclass ``kind`` with the fields in ``content``.

    Fields may be numbers, text, booleans, ``None``, choices (``Literal``), lists, tables and other dataclasses.

    Args:
        kind: its ``__post_init__`` may raise ``ValueError`` for values out of range.
        content: a table, as JSON has it.
        where: the file, for messages.
        complete: every field must be there; otherwise those with a default may be missing. Tables inside are always
            complete. Fields of the metadata ``later`` may always be missing, as in files of versions before them.

    Raises:
        RequestError: a field is unknown, is missing, has another type, or is out of range.
    """
    if not isinstance(content, dict):
        raise RequestError(f"{where}: expected a table, got {_shown(content)}")
    own = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name in content.keys() - own.keys():
        raise RequestError(f"{where}: unknown entry {_shown(name)}{did_you_mean(name, list(own))}")
    for name, field in own.items():
        optional = field.default is not MISSING or field.default_factory is not MISSING
        if name not in content and not field.metadata.get("later") and (complete or not optional):
            raise RequestError(f"{where}: '{name}' is missing")
    hints = get_type_hints(kind)
    values = {name: convert(hints[name], value, f"{where}: {name}") for name, value in content.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """Convert a value from JSON to the type ``hint``. ``RequestError`` if it has another type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        for one in args:
            try:
                return convert(one, value, where)
            except RequestError as error:
                if is_dataclass(one) and isinstance(value, dict):
                    raise error
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
    elif origin is list and isinstance(value, list):
        return [convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {key: convert(args[1], item, f"{where}: {key}") for key, item in value.items()}
    elif is_dataclass(hint):
        return build(hint, value, where, complete=True)  # type: ignore[arg-type]
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # not NaN either
        return float(value)
    elif (hint is int and type(value) is int and abs(value) < 2**63) or (
        hint in (str, bool, NoneType) and type(value) is hint
    ):
        return value
    raise RequestError(f"{where}: expected {_named(hint)}, got {_shown(value)}")


def _named(hint: Any) -> str:
    """``an integer``, ``a list`` …"""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_named, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    names = {int: "an integer of 64 bits", float: "a finite number", str: "text", bool: "true or false", list: "a list"}
    return names.get(origin or hint, "null" if hint is NoneType else "a table")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
