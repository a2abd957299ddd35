"""Token files of nanoGPT, llm.c and build-nanogpt."""

import pickle

import numpy as np
import pytest

from fastgpt.data.dataset import open_dataset
from fastgpt.data.shards import write_shard
from fastgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer
from fastgpt.errors import RequestError

TEXT = "to be, or not to be: that is the question\n" * 20
CHARACTERS = sorted(set(TEXT))


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(50257, size=n).astype(np.uint16)


@pytest.fixture
def shakespeare(tmp_path):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py leaves it."""
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    ids = np.array([stoi[character] for character in TEXT], dtype=np.uint16)
    ids[:700].tofile(folder / "train.bin")
    ids[700:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(stoi), "itos": dict(enumerate(CHARACTERS)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


@pytest.fixture
def fineweb(tmp_path):
    """A folder as llm.c's and modded-nanogpt's downloads leave it."""
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for i in range(1, 4):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", tokens(500, i))
    write_shard(folder / "fineweb_val_000000.bin", tokens(300))
    return folder


def test_nanogpts_folder_has_its_characters(shakespeare):
    dataset = open_dataset("shakespeare_char", shakespeare.parent)
    tokenizer = dataset.tokenizer()
    assert isinstance(tokenizer, CharTokenizer)
    assert dataset.vocab_size == len(CHARACTERS)
    assert tokenizer.decode(np.concatenate([*dataset.train, *dataset.val])) == TEXT
    assert dataset.files("val") == [shakespeare / "val.bin"]


def test_nanogpts_folder_without_a_pickle_has_gpt2s_tokens(shakespeare):
    before = open_dataset(shakespeare).identity
    (shakespeare / "meta.pkl").unlink()
    dataset = open_dataset(shakespeare)
    assert isinstance(dataset.tokenizer(), GPT2Tokenizer)
    assert dataset.identity != before


def test_a_name_with_an_underscore_means_a_dataset_with_a_hyphen_too(tmp_path):
    from fastgpt.data.prepare import prepare

    (tmp_path / "a.txt").write_text(TEXT)
    prepare("text", [tmp_path / "a.txt"], tokenizer="char", name="shakespeare-char", data_dir=tmp_path)
    assert open_dataset("shakespeare_char", tmp_path).path.name == "shakespeare-char"


class Harm:
    def __reduce__(self):
        import os

        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harm(), "names (posix|nt).mkdir, which is not loaded"), ({"itos": Harm()}, "which is not loaded"),
        ([1, 2], "does not map numbers"), ({}, "does not map numbers"), ({"itos": {1: "a"}}, "does not map numbers"),
        ({"itos": {0: "ab"}}, "not single characters"), ({"itos": {0: "a", 1: "a"}}, "not single characters"),
        ({"itos": {"0": "a"}}, "not single characters"), ({"itos": {0: 5}}, "not single characters"),
        (np.arange(3), "which is not loaded"),
    ],
)  # fmt: skip
def test_nothing_in_a_pickle_is_run(shakespeare, monkeypatch, content, message):
    monkeypatch.chdir(shakespeare.parent)
    (shakespeare / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(RequestError, match=message):
        open_dataset(shakespeare)
    assert not (shakespeare.parent / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95\xff\xff\xff\xff", b"(" * 100_000])
def test_a_damaged_pickle_is_refused(shakespeare, content):
    (shakespeare / "meta.pkl").write_bytes(content)
    with pytest.raises(RequestError, match=r"meta\.pkl"):
        open_dataset(shakespeare)


def test_a_folder_of_shards_is_taken_with_all_of_them(fineweb):
    dataset = open_dataset(fineweb)
    assert [len(shard) for shard in dataset.train] == [500] * 3
    assert [path.name for path in dataset.files("train")] == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]
    assert dataset.files("val") == [fineweb / "fineweb_val_000000.bin"]
    assert np.array_equal(dataset.val[0], tokens(300))
    assert isinstance(dataset.tokenizer(), GPT2Tokenizer)


def test_a_shard_stands_for_all_of_its_kind(fineweb):
    write_shard(fineweb / "other_train_000001.bin", tokens(100))
    write_shard(fineweb / "other_val_000000.bin", tokens(100))
    assert [len(shard) for shard in open_dataset(fineweb / "fineweb_train_000002.bin").train] == [500] * 3
    assert [len(shard) for shard in open_dataset(fineweb / "other_train_000001.bin").train] == [100]
    with pytest.raises(RequestError, match=r"several datasets, fineweb_\*\.bin, other_\*\.bin: pass one of the files"):
        open_dataset(fineweb)


def test_numpys_files_are_read(tmp_path):
    """As build-nanogpt writes them."""
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens(400))
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens(200, 1))
    dataset = open_dataset(tmp_path)
    assert np.array_equal(dataset.train[0], tokens(400))
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(5))
    with pytest.raises(RequestError, match="1-D int64; only 1-D uint16 is read"):
        open_dataset(tmp_path)
    (tmp_path / "edufineweb_val_000000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RequestError, match="cannot be read"):
        open_dataset(tmp_path)


def test_a_missing_split_is_named(fineweb, shakespeare):
    (fineweb / "fineweb_val_000000.bin").unlink()
    with pytest.raises(RequestError, match="no shard fineweb_val_000000"):
        open_dataset(fineweb)
    (shakespeare / "val.bin").unlink()
    with pytest.raises(RequestError, match=r"no val\.bin beside its train\.bin"):
        open_dataset(shakespeare)


def test_nanogpts_folder_trains_and_writes_text(trainer, shakespeare, capsys):
    one = trainer(dataset="shakespeare_char", data_dir=shakespeare.parent)
    assert one.train() == 0
    assert one.settled.tokenizer.decode([0, 1]) == "".join(CHARACTERS[:2])
    from fastgpt import sample

    capsys.readouterr()
    sample.main([str(one.run_dir), "--prompt", "to be", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("to be")
