import dataclasses
import errno
import hashlib
import json
import pickle

import numpy as np
import pytest

from fastgpt import json_files
from fastgpt.data import shards
from fastgpt.data.dataset import open_dataset
from fastgpt.data.shards import DatasetMeta, Shard, read_shard, read_tokens, write_shard
from fastgpt.data.tokenizers import CharTokenizer
from fastgpt.errors import RequestError

TOKENS = np.array([3, 1, 4, 1, 65535], dtype=np.uint16)


def make_dataset(folder, train=TOKENS, val=TOKENS[:3]):
    folder.mkdir(parents=True)
    write_shard(folder / "train_000000.bin", train)
    write_shard(folder / "val_000000.bin", val)
    tokenizer = CharTokenizer("abcde")
    meta = DatasetMeta(
        source="a test",
        split="by hand",
        tokenizer=tokenizer.to_meta(),
        vocab_size=tokenizer.vocab_size,
        train=[Shard.of(folder / "train_000000.bin")],
        val=[Shard.of(folder / "val_000000.bin")],
    )
    meta.write(folder)
    return meta


def refusal(action, *args):
    """The one line that refuses ``action(*args)``."""
    with pytest.raises(RequestError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_shard_is_laid_out_as_in_llm_c(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS)
    content = (tmp_path / "s.bin").read_bytes()
    header = np.frombuffer(content[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 5]
    assert not header[3:].any()
    assert np.frombuffer(content[1024:], dtype="<u2").tolist() == TOKENS.tolist()


def test_a_shard_reads_back_read_only_and_mapped(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS.astype(np.int64))
    tokens = read_shard(tmp_path / "s.bin")
    assert tokens.tolist() == TOKENS.tolist()
    assert tokens.dtype == np.uint16
    assert isinstance(tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("function", ["fromfile", "memmap"])
@pytest.mark.parametrize("read", [read_shard, read_tokens])
def test_a_shard_without_the_right_to_read_it_is_named(tmp_path, monkeypatch, function, read):
    write_shard(tmp_path / "s.bin", TOKENS)

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(np, function, denied)
    assert refusal(read, tmp_path / "s.bin") == f"cannot read {tmp_path / 's.bin'}: Permission denied"


def test_tokens_may_be_a_view_with_gaps(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS[::2])
    assert read_shard(tmp_path / "s.bin").tolist() == [3, 4, 65535]


def test_an_empty_shard_reads_back(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS[:0])
    assert len(read_shard(tmp_path / "s.bin")) == 0


@pytest.mark.parametrize("tokens", [np.array([65536]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), int)])
def test_what_uint16_cannot_hold_is_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="tokens"):
        write_shard(tmp_path / "s.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_shard(tmp_path, monkeypatch):
    write_shard(tmp_path / "s.bin", TOKENS)

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "s.bin", TOKENS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["s.bin"]
    assert len(read_shard(tmp_path / "s.bin")) == 5


def corrupt(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(0, 7, "starts with 7, not the magic number"), (4, 2, "version 2"), (8, 6, "6 tokens.*hold 5")],
)
def test_a_false_header_is_refused_with_the_file_and_the_fault(tmp_path, at, value, said):
    path = tmp_path / "s.bin"
    write_shard(path, TOKENS)
    corrupt(path, at, value)
    with pytest.raises(RequestError, match=said) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_a_cut_shard_is_refused(tmp_path):
    path = tmp_path / "s.bin"
    write_shard(path, TOKENS)
    path.write_bytes(path.read_bytes()[:-3])
    assert "5 tokens" in refusal(read_shard, path)
    path.write_bytes(path.read_bytes()[:100])
    assert "100 bytes" in refusal(read_shard, path)
    path.unlink()
    assert "No such file" in refusal(read_shard, path)


def test_read_tokens_reads_a_shard_and_a_bare_file(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS)
    TOKENS.tofile(tmp_path / "bare.bin")
    assert read_tokens(tmp_path / "s.bin").tolist() == TOKENS.tolist()
    assert read_tokens(tmp_path / "bare.bin").tolist() == TOKENS.tolist()


def test_a_bare_file_of_odd_length_is_refused(tmp_path):
    (tmp_path / "bare.bin").write_bytes(b"abc")
    assert "odd" in refusal(read_tokens, tmp_path / "bare.bin")


def test_a_shard_record_has_the_hash_of_the_file(tmp_path):
    write_shard(tmp_path / "s.bin", TOKENS)
    expected = hashlib.sha256((tmp_path / "s.bin").read_bytes()).hexdigest()
    assert Shard.of(tmp_path / "s.bin") == Shard("s.bin", 5, expected)


def test_meta_reads_back(tmp_path):
    meta = make_dataset(tmp_path / "d")
    assert DatasetMeta.read(tmp_path / "d") == meta


def test_a_dataset_opens_by_name_and_by_path(tmp_path):
    make_dataset(tmp_path / "d")
    for dataset in (open_dataset("d", tmp_path), open_dataset(tmp_path / "d", "elsewhere")):
        assert [shard.tolist() for shard in dataset.train] == [TOKENS.tolist()]
        assert [shard.tolist() for shard in dataset.val] == [TOKENS[:3].tolist()]
        assert dataset.vocab_size == 5
        assert dataset.tokenizer().decode([0, 4]) == "ae"
        assert dataset.path == tmp_path / "d"


def test_nanogpt_files_open_by_name_with_unknown_vocabulary(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:2].tofile(tmp_path / "val.bin")
    dataset = open_dataset(tmp_path / "train.bin")
    assert dataset.train[0].tolist() == TOKENS.tolist()
    assert dataset.val[0].tolist() == TOKENS[:2].tolist()
    assert dataset.vocab_size is None
    assert dataset.tokenizer() is None


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("meta.pkl was unpickled",))


def test_nanogpt_pickles_are_never_opened(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS.tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    assert open_dataset(tmp_path / "train.bin").vocab_size is None


def test_a_training_file_needs_a_validation_file(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS.tofile(tmp_path / "corpus.bin")
    assert "val.bin" in refusal(open_dataset, tmp_path / "train.bin")
    assert "has no 'train' in it: pass a file such as train.bin" in refusal(open_dataset, tmp_path / "corpus.bin")


def test_a_text_file_is_answered_with_how_to_prepare_it(tmp_path):
    (tmp_path / "book.txt").write_text("hello")
    assert "prepare text" in refusal(open_dataset, tmp_path / "book.txt")


@pytest.mark.parametrize("name", ["fineweb10b", "openwebtext", "shakespeare-char", "stdlib"])
def test_a_known_dataset_that_is_missing_is_answered_with_its_command(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    said = refusal(open_dataset, name)
    assert f"python -m fastgpt.data prepare {name}`" in said
    assert "prepare text FILE --tokenizer" in said
    assert f"prepare {name} --data_dir there`" in refusal(open_dataset, name, "there")


def test_an_unknown_dataset_is_answered_with_those_there_and_the_nearest(tmp_path):
    make_dataset(tmp_path / "shakespeare")
    make_dataset(tmp_path / "poems")
    (tmp_path / "not-one").mkdir()
    said = refusal(open_dataset, "shakespere", tmp_path)
    assert "(there are poems, shakespeare)" in said
    assert said.endswith("did you mean shakespeare?")
    assert "none yet" in refusal(open_dataset, "zzz", tmp_path / "not-one")


def test_a_folder_without_meta_is_no_dataset(tmp_path):
    make_dataset(tmp_path / "d")
    (tmp_path / "d" / "meta.json").unlink()
    assert "did not finish" in refusal(open_dataset, "d", tmp_path)


def test_a_shard_that_is_not_the_one_meta_knows_is_refused(tmp_path):
    make_dataset(tmp_path / "d")
    write_shard(tmp_path / "d" / "val_000000.bin", TOKENS)
    assert "val_000000.bin has 5 tokens, but meta.json says 3" in refusal(open_dataset, "d", tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", json.dumps({"train": [{"file": "x"}], "val": []})])
def test_a_damaged_meta_is_refused_with_its_path(tmp_path, content):
    make_dataset(tmp_path / "d")
    (tmp_path / "d" / "meta.json").write_text(content)
    assert str(tmp_path / "d" / "meta.json") in refusal(open_dataset, "d", tmp_path)


def test_a_folder_in_the_place_of_a_file_of_tokens_is_refused(tmp_path):
    make_dataset(tmp_path / "d")
    (tmp_path / "d" / "val_000000.bin").unlink()
    (tmp_path / "d" / "val_000000.bin").mkdir()
    assert "val_000000.bin: Is a directory" in refusal(open_dataset, "d", tmp_path)


@pytest.mark.parametrize("name", [300 * "x", 3000 * "x/"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    assert "File name too long" in refusal(open_dataset, name, tmp_path)
    assert "File name too long" in refusal(open_dataset, "d", tmp_path / name)


def test_meta_json_holds_what_the_format_promises(tmp_path):
    meta = make_dataset(tmp_path / "d")
    content = json.loads((tmp_path / "d" / shards.META_FILE).read_text())
    del content[json_files.CHECKSUM]
    assert content == dataclasses.asdict(meta)
    assert content["tokenizer"] == {"name": "char", "vocabulary": "abcde"}
