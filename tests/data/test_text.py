"""Text in pieces: what is read of files of all kinds, and that the pieces change no token."""

import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from fastgpt.data import text as module
from fastgpt.data import tokenizers
from fastgpt.data.dataset import open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.text import of_files, part, scan
from fastgpt.data.tokenizer_json import JsonTokenizer
from fastgpt.errors import RequestError

ONE = "It's the naïve façade: 1,234 cats\n\n  sat\ton 漢字 mats 🙂.\r\nThe end of all things is near.\n" * 3
TWO = "Another text,  with   spaces and\n\n\nlines"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, tmp_path):
    """Pieces of seven characters, so that a short text has many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 20)
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbf" + ONE.encode())
    (tmp_path / "two.txt").write_text(TWO, newline="")


def read(*names, **options):
    """The documents of some files."""
    documents = [""]
    for piece in of_files(names, **options).pieces():
        if piece is None:
            documents.append("")
        else:
            documents[-1] += piece
    return documents


UNIFIED = ONE.replace("\r\n", "\n")  # as Python reads text


def test_each_file_is_a_document_without_its_byte_order_mark():
    assert read("one.txt", "two.txt") == [UNIFIED, TWO]


def test_a_scan_finds_the_length_the_characters_and_a_digest_of_content_and_borders(tmp_path):
    found = scan(of_files(["one.txt", "two.txt"]))
    assert (found.n_characters, found.characters) == (len(UNIFIED + TWO), set(UNIFIED + TWO))
    (tmp_path / "both.txt").write_text(UNIFIED + TWO, newline="")
    both = scan(of_files(["both.txt"]))
    assert both.n_characters == found.n_characters
    assert both.sha256 != found.sha256


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 30, len(UNIFIED), len(UNIFIED) + 3])
@pytest.mark.parametrize("length", [0, 1, 7, 40, None])
def test_a_part_has_its_characters_and_the_borders_inside_it(start, length):
    stop = None if length is None else start + length
    pieces = list(part(of_files(["one.txt", "two.txt"]).pieces(), start, stop))
    assert "".join(piece for piece in pieces if piece is not None) == (UNIFIED + TWO)[start:stop]
    inside = start < len(UNIFIED) and (stop is None or stop > len(UNIFIED))
    assert pieces.count(None) == int(inside)
    assert None not in (pieces[:1] + pieces[-1:])


def tokens_of(name):
    dataset = open_dataset(name)
    return np.concatenate(dataset.train), np.concatenate(dataset.val), dataset.tokenizer()


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "train"])
def test_the_tokens_are_those_of_the_whole_text(tokenizer):
    prepare(
        "text", ["one.txt"], tokenizer=tokenizer, vocab_size=300 if tokenizer == "train" else None, val_fraction=0.3
    )
    train, val, used = tokens_of("one")
    cut = int(len(UNIFIED) * 0.7)
    assert np.array_equal(train, used.encode(UNIFIED[:cut]))
    assert np.array_equal(val, used.encode(UNIFIED[cut:]))


def test_documents_are_parted_by_the_end_of_text_where_there_is_one():
    for tokenizer in ("gpt2", "byte"):
        prepare("text", ["one.txt", "two.txt", "one.txt"], tokenizer=tokenizer, name=tokenizer, val_fraction=0.05)
        train, val, used = tokens_of(tokenizer)
        eot = [] if used.eot is None else [used.eot]
        whole = [*used.encode(UNIFIED), *eot, *used.encode(TWO), *eot]
        assert train[: len(whole)].tolist() == whole
        assert used.decode(np.concatenate([train[len(whole) :], val])) == UNIFIED


def test_a_byte_pair_encoding_is_learnt_or_taken_from_a_file():
    path = prepare("text", ["one.txt"], tokenizer="train", vocab_size=280)
    used = open_dataset(path).tokenizer()
    assert isinstance(used, JsonTokenizer)
    assert 257 < used.vocab_size <= 280
    with open("tokenizer.json", "w", encoding="utf-8") as file:
        file.write(used.content)
    other = open_dataset(prepare("text", ["two.txt"], tokenizer="tokenizer.json"))
    assert other.tokenizer().to_meta() == used.to_meta()
    assert other.tokenizer().decode(np.concatenate([*other.train, *other.val])) == TWO


def test_compressed_files_and_rows_are_read(tmp_path):
    with gzip.open("one.txt.gz", "wb") as file:
        file.write(ONE.encode())
    rows = [{"text": "first", "id": 1}, {"text": ""}, {"text": "third\nline"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.write(json.dumps({"content": "other"}))
    assert read("one.txt.gz") == [UNIFIED]
    assert read("rows.jsonl", "two.txt") == ["first", "", "third\nline", TWO]
    assert read("rows.jsonl.gz", text_field="content") == ["other"]
    assert prepare("text", ["one.txt.gz"]).name == "one"


def test_zstandard_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "one.txt.zst").write_bytes(zstandard.compress(ONE.encode()))
    assert read("one.txt.zst") == [UNIFIED]


def test_parquet_is_read():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["first", "second"], "n": [1, 2]}), "rows.parquet")
    assert read("rows.parquet") == ["first", "second"]
    with pytest.raises(RequestError, match=r"no column words \(it has text, n\): pass --text_field"):
        read("rows.parquet", text_field="words")
    with pytest.raises(RequestError, match="a row of the column n is not text"):
        read("rows.parquet", text_field="n")


def test_a_folder_gives_all_its_texts_by_name(tmp_path):
    (tmp_path / "f" / "sub").mkdir(parents=True)
    for name, content in (("b.txt", "b"), ("a.md", "a"), ("sub/c.txt", "c"), ("picture.png", "p")):
        (tmp_path / "f" / name).write_text(content)
    assert read("f") == ["a", "b", "c"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"empty has no \.jsonl, \.md, \.parquet, \.text, \.txt in it"):
        read("empty")


def test_standard_input_is_a_file_too(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(ONE.encode())

    monkeypatch.setattr(sys, "stdin", Stdin)
    path = prepare("text", ["-"], tokenizer="byte")
    assert path.name == "stdin"
    train, val, used = tokens_of("stdin")
    assert used.decode(np.concatenate([train, val])) == UNIFIED
    assert [entry.name for entry in path.parent.iterdir()] == ["stdin"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a long text and then caf\xe9", "x.txt is not UTF-8 text: byte 24 is 0xe9"),
        ("x.txt", "ä".encode() * 10 + b"\xc3", "x.txt is not UTF-8 text: byte 20 is 0xc3"),
        ("x.txt", b"a text with a \0 in it", "x.txt is not text: character 14 is NUL"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": 3}',
            r"x.jsonl, line 2: no text named text .it has text.: pass --text_field",
        ),
        ("x.jsonl", b'{"text": "a"}\nnothing', "x.jsonl, line 2: "),
        ("x.jsonl", b"[1]", "x.jsonl, line 1: no text named text: pass"),
        ("x.txt.gz", b"no gzip", "cannot read x.txt.gz: Not a gzipped file"),
        ("x.txt.gz", gzip.compress(ONE.encode())[:-20], "cannot read x.txt.gz"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(name)


def test_the_memory_does_not_grow_with_the_text(tmp_path):
    """In a process of its own, with pieces of their usual size."""
    line = "the quick brown fox jumps over the lazy dog, again and again\n"
    peaks = []
    for n_bytes in (2_000_000, 40_000_000):
        (tmp_path / "large.txt").write_text(line * (n_bytes // len(line)))
        code = (
            "import resource; from fastgpt.data.prepare import prepare; "
            "prepare('text', ['large.txt'], tokenizer='char', overwrite=True); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 120  # MB; whole, 40 MB of text took over 500
