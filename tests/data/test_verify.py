"""Shards are compared with their SHA-256: at once or in a thread, and whoever waits can give up."""

import threading
import time

import pytest

from fastgpt.data import verify
from fastgpt.data.dataset import open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.verify import ShardVerifier
from fastgpt.errors import RequestError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose\n" * 200)
    return prepare("text", [tmp_path / "text.txt"], tokenizer="char", name="d", data_dir=tmp_path)


def damage(folder, name="train_000000.bin"):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("at_once", [1 << 30, 0])
def test_whole_shards_pass(folder, monkeypatch, at_once):
    monkeypatch.setattr(verify, "AT_ONCE", at_once)
    ShardVerifier(open_dataset(folder)).wait()


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_a_bit_is_noticed_before_the_run_begins(folder, name):
    damage(folder, name)
    with pytest.raises(RequestError, match=f"{name} is damaged: its SHA-256 is not the one in meta.json"):
        ShardVerifier(open_dataset(folder))


def test_in_a_large_dataset_it_is_noticed_by_whoever_waits(folder, monkeypatch):
    monkeypatch.setattr(verify, "AT_ONCE", 0)
    damage(folder)
    verifier = ShardVerifier(open_dataset(folder))
    with pytest.raises(RequestError, match="is damaged"):
        verifier.wait()
    with pytest.raises(RequestError, match="is damaged"):
        verifier.check()


def test_a_shard_that_is_gone_is_named(folder, monkeypatch):
    dataset = open_dataset(folder)
    (folder / "train_000000.bin").unlink()
    with pytest.raises(RequestError, match=r"train_000000.bin cannot be read: No such file"):
        ShardVerifier(dataset)


def test_waiting_can_be_given_up(folder, monkeypatch):
    monkeypatch.setattr(verify, "AT_ONCE", 0)
    released = threading.Event()
    monkeypatch.setattr(verify, "file_sha256", lambda path: released.wait(60) and "")
    verifier = ShardVerifier(open_dataset(folder))
    start = time.monotonic()
    verifier.wait(give_up=lambda: True)
    assert time.monotonic() - start < 30
    released.set()


def test_bare_files_have_nothing_to_be_compared_with(folder):
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes((folder / "train_000000.bin").read_bytes())
    (folder / "val.bin").write_bytes((folder / "val_000000.bin").read_bytes())
    ShardVerifier(open_dataset(folder / "train.bin")).wait()
