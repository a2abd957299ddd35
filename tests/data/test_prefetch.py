"""The prefetcher: a loader's batches, one ahead on a GPU, and no state lost by it."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgpt.data.loader import BatchLoader
from fastgpt.data.prefetch import Prefetcher
from fastgpt.errors import RequestError

CPU = torch.device("cpu")


def loader(seed=0, **options):
    return BatchLoader([np.arange(5000, dtype=np.uint16)], 3, 8, seed, **options)


def same(batch, other):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(batch, other, strict=True))


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Prefetches on the CPU as if it were a GPU: streams and events that do nothing."""
    stream = SimpleNamespace(wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)

    def make(one):
        prefetcher = Prefetcher(one, CPU)
        prefetcher._stream = stream
        return prefetcher

    return make


def test_on_a_cpu_nothing_is_drawn_ahead():
    one, other = loader(), loader()
    prefetcher = Prefetcher(one, CPU)
    for _ in range(3):
        assert same(prefetcher.next(), other.next())
        assert one.state_dict() == other.state_dict()


def test_prefetched_batches_are_the_loaders_in_their_order(pretend_gpu):
    prefetcher, other = pretend_gpu(loader()), loader()
    for _ in range(5):
        assert same(prefetcher.next(), other.next())


def test_a_batch_is_under_way_before_it_is_asked_for(pretend_gpu):
    one, other = loader(), loader()
    pretend_gpu(one).next()
    other.next()
    other.next()
    assert one.state_dict() == other.state_dict()


def test_the_state_is_that_of_the_batches_handed_out(pretend_gpu):
    prefetcher = pretend_gpu(loader())
    for _ in range(4):
        prefetcher.next()
    state = prefetcher.state_dict()
    expected = [prefetcher.next() for _ in range(3)]
    resumed = pretend_gpu(loader(seed=99))
    resumed.next()
    resumed.load_state_dict(state)
    for batch in expected:
        assert same(resumed.next(), batch)


def test_before_the_first_batch_the_state_is_the_loaders(pretend_gpu):
    assert pretend_gpu(loader()).state_dict() == loader().state_dict()


@pytest.mark.needs_gpu
def test_on_a_gpu_batches_arrive_whole_while_it_is_busy():
    device = torch.device("cuda")
    prefetcher, other = Prefetcher(loader(pin_memory=True), device), loader()
    for _ in range(20):
        batch = prefetcher.next()
        torch.cuda._sleep(1_000_000)
        copies = [tensor.clone() for tensor in batch]  # read only after the GPU has woken
        del batch
        assert same(copies, other.next())


def test_a_bad_batch_is_an_error_for_the_one_who_asks_for_it(pretend_gpu):
    one = loader()
    draw, n_drawn = one.next, iter(range(100))

    def third_is_bad():
        if next(n_drawn) == 2:
            raise RequestError("a token outside the vocabulary")
        return draw()

    one.next = third_is_bad
    prefetcher = pretend_gpu(one)
    prefetcher.next()
    prefetcher.next()
    with pytest.raises(RequestError):
        prefetcher.next()
