import dataclasses
import errno
import threading

import pytest
import torch

from fastgpt import hardware
from fastgpt.errors import RequestError
from fastgpt.hardware import Bound
from fastgpt.model import GPT, GPTConfig
from fastgpt.train import checkpoint
from fastgpt.train.checkpoint_writer import CheckpointWriter
from fastgpt.train.parameters import ParameterStore

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8)
STATE = checkpoint.State(
    step=1, tokens=9, best_val_loss=None, best_step=None, loader={"epoch": 0, "visited": 3}, model=CONFIG
)


@pytest.fixture(params=[32, 8])
def store(request):
    """A store and its moments."""
    torch.manual_seed(1)
    store = ParameterStore(GPT(CONFIG))
    moments = store.moments(request.param)
    for flat in moments.values():
        flat.copy_(torch.rand_like(flat, dtype=torch.float32) * 200)
    return store, moments


class Disk:
    """One that waits for ``go`` before it takes a checkpoint."""

    def __init__(self, monkeypatch):
        self.go = threading.Event()
        self._write = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self.save_file)

    def save_file(self, *args, **options):
        assert self.go.wait(60)
        self._write(*args, **options)


def start(writer, store, before_writing=lambda: None, **changes):
    writer.start(dataclasses.replace(STATE, **changes), *store, 2, None, before_writing)


def test_what_is_saved_is_what_the_tensors_were_at_the_start(tmp_path, monkeypatch, store):
    parameters = {name: t.clone() for name, t in store[0].named(store[0].master).items()}
    moments = {
        kind: {name: t.clone() for name, t in store[0].named(flat, kind).items()} for kind, flat in store[1].items()
    }
    torch.manual_seed(7)
    disk, writer = Disk(monkeypatch), CheckpointWriter(tmp_path)
    start(writer, store)
    assert not writer.idle
    expected = torch.rand(3)
    for flat in (store[0].master, *store[1].values()):  # training goes on
        flat.zero_()
    disk.go.set()
    assert writer.wait() == STATE
    assert writer.idle
    path = checkpoint.newest(tmp_path)
    checkpoint.verify(path)
    for name, t in checkpoint.load_parameters(path).items():
        assert torch.equal(t, parameters[name]), name
    for kind, named in checkpoint.load_moments(path).items():
        for name, t in named.items():
            assert torch.equal(t, moments[kind][name]), (kind, name)
    checkpoint.set_random_state(checkpoint.load_random_state(path))
    assert torch.equal(torch.rand(3), expected)


def test_the_memory_of_the_copies_is_used_again(tmp_path, store, monkeypatch):
    addresses = []
    save = checkpoint.save

    def note(run_dir, state, parameters, *rest):
        addresses.append({t.data_ptr() for t in parameters.values()})
        return save(run_dir, state, parameters, *rest)

    monkeypatch.setattr(checkpoint, "save", note)
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        start(writer, store, step=step)
        writer.wait()
    assert addresses[0] == addresses[1]
    assert not addresses[0] & {t.data_ptr() for t in store[0].named(store[0].master).values()}


def test_where_memory_has_no_room_for_the_copies_the_loop_waits(tmp_path, monkeypatch, store):
    monkeypatch.setattr(hardware, "memory", lambda device: (Bound(5000, "RAM"), Bound(5000, "RAM")))
    writer = CheckpointWriter(tmp_path)
    start(writer, store)
    assert checkpoint.steps(tmp_path) == [1]  # before the wait
    assert writer.wait() == STATE


def test_what_the_disk_refuses_is_an_error_for_the_one_who_waits_and_the_next_is_tried(tmp_path, monkeypatch, store):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        start(writer, store)
        with pytest.raises(checkpoint.NotSaved, match="No space left"):
            writer.wait()
    assert writer.wait() is None
    start(writer, store)
    writer.wait()
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("can't allocate memory"), ValueError("x")])
def test_any_other_error_is_a_checkpoint_that_is_not_saved(tmp_path, monkeypatch, store, error):
    def fails(*_, **__):
        raise error

    writer = CheckpointWriter(tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", fails)
    start(writer, store)
    with pytest.raises(checkpoint.NotSaved, match=type(error).__name__):
        writer.wait()


def test_where_no_thread_can_be_started_the_loop_waits(tmp_path, monkeypatch, store):
    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    writer = CheckpointWriter(tmp_path)
    start(writer, store)
    assert checkpoint.steps(tmp_path) == [1]
    assert writer.wait() == STATE


def test_the_memory_of_the_copies_can_be_had_back(tmp_path, store):
    writer = CheckpointWriter(tmp_path)
    start(writer, store)
    assert writer.has_copies
    assert writer.free_copies()
    assert not writer.free_copies()
    writer.wait()
    start(writer, store, step=2)
    assert not writer.has_copies
    writer.wait()
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_nothing_is_written_of_what_is_not_ready(tmp_path, store):
    def damaged():
        raise RequestError("a shard is damaged")

    writer = CheckpointWriter(tmp_path)
    start(writer, store, damaged)
    with pytest.raises(RequestError, match="a shard is damaged"):
        writer.wait()
    assert checkpoint.steps(tmp_path) == []
