import json

import numpy as np
import pytest
import torch

from fastgpt.data.loader import BatchLoader
from fastgpt.data.shards import read_shard, write_shard
from fastgpt.errors import RequestError


def counting(start, stop):
    return np.arange(start, stop, dtype=np.uint16)


def test_a_batch_is_int64_and_y_is_x_shifted_by_one():
    x, y = BatchLoader([counting(0, 1000)], batch_size=4, block_size=8, seed=0).next()
    for tensor in (x, y):
        assert tensor.shape == (4, 8)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_ids_beyond_int16_keep_their_value():
    x, y = BatchLoader([counting(65000, 65500)], batch_size=2, block_size=8, seed=0).next()
    assert x.min() >= 65000
    assert y.max() < 65500


def test_batches_own_their_memory():
    loader = BatchLoader([counting(0, 1000)], batch_size=4, block_size=8, seed=0)
    x, y = loader.next()
    kept = x.clone(), y.clone()
    loader.next()
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def epochs_of(loader, n):
    """The starts of the blocks of each of the next ``n`` epochs, in the order in which they are visited."""
    found = [[] for _ in range(n)]
    for _ in range(10_000):
        x, y = loader.next()
        assert torch.equal(y, x + 1)  # so no block crosses from one shard to the next
        assert torch.equal(x, x[:, :1] + torch.arange(loader.block_size))
        epoch = loader.state_dict()["epoch"]
        if epoch == n:
            return found
        found[epoch] += x[:, 0].tolist()
    pytest.fail("an epoch does not end")


def one_by_one(shards, block_size, seed=0):
    """A loader whose every batch is of one epoch."""
    return BatchLoader(shards, 1, block_size, seed)


@pytest.mark.parametrize("lengths", [[1000], [1001], [33, 500, 8, 9, 10, 17, 0, 400], [9], [16], [17], [24]])
def test_an_epoch_visits_each_token_once_but_a_remainder_at_the_ends_of_each_shard(lengths):
    T = 8
    firsts = [2000 * i for i in range(len(lengths))]
    shards = [counting(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    for starts in epochs_of(one_by_one(shards, T), 5):
        seen = sorted(start + i for start in starts for i in range(T))
        assert len(set(seen)) == len(seen)
        for first, length in zip(firsts, lengths, strict=True):
            here = [token - first for token in seen if first <= token < first + length]
            assert len(here) % T == 0
            assert here == list(range(here[0], here[0] + len(here))) if here else length <= T
            if here:
                assert here[0] < T  # the remainder before the first block
                assert length - 1 - len(here) - here[0] < T  # and after the last, but for its last target
                assert here[-1] < length - 1


def test_every_epoch_has_another_order_and_another_offset():
    epochs = epochs_of(one_by_one([counting(0, 2000)], 8), 6)
    assert len({starts[0] % 8 for starts in epochs}) > 1
    for starts in epochs:
        assert len({start % 8 for start in starts}) == 1
        assert starts != sorted(starts)
    ranks = {tuple(start // 8 for start in starts[:20]) for starts in epochs}
    assert len(ranks) == 6


def test_every_offset_and_every_place_in_the_order_is_as_likely_as_any_other():
    T, n = 8, 1000
    epochs = epochs_of(one_by_one([counting(0, 8 * T)], T), n)  # 7 blocks, from offset 0 on as well as from 7
    offsets = np.bincount([min(starts) for starts in epochs], minlength=T)
    assert np.all(np.abs(offsets - n / T) < 5 * np.sqrt(n / T))
    first_visited = np.bincount([starts[0] // T for starts in epochs], minlength=7)
    assert np.all(np.abs(first_visited - n / 7) < 5 * np.sqrt(n / 7))


def test_blocks_of_all_shards_are_mixed():
    (starts,) = epochs_of(one_by_one([counting(0, 4000), counting(5000, 9000)], 8), 1)
    half = starts[: len(starts) // 2]
    assert 0.4 < sum(start < 5000 for start in half) / len(half) < 0.6


def test_a_batch_may_begin_in_one_epoch_and_end_in_the_next():
    shards = [counting(0, 8 * 10 + 8)]  # ten blocks, whatever the offset
    alone, batched = one_by_one(shards, 8, seed=3), BatchLoader(shards, 4, 8, seed=3)
    expected = torch.cat([alone.next()[0] for _ in range(40)])
    assert torch.equal(torch.cat([batched.next()[0] for _ in range(10)]), expected)


def test_a_batch_may_be_longer_than_several_epochs():
    x, _ = BatchLoader([counting(0, 8 * 3 + 8)], 32, 8, seed=0).next()
    assert x.shape == (32, 8)
    _, counts = np.unique(x[:, 0].numpy() // 8, return_counts=True)
    assert counts.sum() == 32
    assert counts.max() <= 11  # once in each of ten epochs and a bit


def test_epochs_are_tokens_drawn_by_tokens_of_the_split():
    loader = BatchLoader([counting(0, 300), counting(400, 500)], 5, 8, seed=0)
    assert loader.epochs == 0.0
    for _ in range(25):
        loader.next()
    assert loader.epochs == 25 * 5 * 8 / 400


def test_evaluation_leaves_the_epoch_where_it_stands():
    loader, other = (BatchLoader([counting(0, 1000)], 4, 8, seed=2) for _ in range(2))
    list(loader.evenly_spaced(3, 5))
    assert loader.state_dict() == other.state_dict()
    assert torch.equal(loader.next()[0], other.next()[0])


def test_the_order_of_ten_million_blocks_takes_four_bytes_a_block():
    endless = np.lib.stride_tricks.as_strided(np.zeros(1, dtype=np.uint16), (10**10,), (0,))
    loader = BatchLoader([endless], 2, 1024, seed=0)
    assert loader._order.nbytes <= 4 * 10**10 / 1024
    assert loader.next()[0].shape == (2, 1024)


def test_a_shard_of_exactly_one_block_serves():
    x, _ = BatchLoader([counting(0, 5)], batch_size=3, block_size=4, seed=0).next()
    assert x.tolist() == [[0, 1, 2, 3]] * 3


def test_too_few_tokens_for_a_block_are_refused_with_both_numbers():
    with pytest.raises(RequestError, match=r"^the validation split has 40 tokens, too few for .* 64 \+ 1"):
        BatchLoader([counting(0, 40)], 1, 64, 0, what="the validation split")
    with pytest.raises(RequestError, match=r"no shard longer than 64 tokens.* 64 \+ 1"):
        BatchLoader([counting(0, 40), counting(0, 64)], 1, 64, 0)
    with pytest.raises(RequestError, match="0 tokens"):
        BatchLoader([], 1, 64, 0)


def test_the_seed_decides_the_batches():
    first, same, other = (BatchLoader([counting(0, 60_000)], 4, 8, seed).next()[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("before", [0, 7, 18, 37, 60])  # in the first epoch, at the end of one, in a later one
def test_a_resumed_loader_draws_what_an_uninterrupted_one_would(before):
    shards = [counting(0, 500), counting(600, 1000)]
    loader = BatchLoader(shards, 3, 8, seed=5)
    for _ in range(before):
        loader.next()
    state = json.dumps(loader.state_dict())
    assert len(state) < 100
    expected = [loader.next() for _ in range(45)]
    resumed = BatchLoader(shards, 3, 8, seed=99)
    resumed.next()
    resumed.load_state_dict(json.loads(state))
    for (x, y), (x_resumed, y_resumed) in zip(expected, (resumed.next() for _ in range(45)), strict=True):
        assert torch.equal(x, x_resumed)
        assert torch.equal(y, y_resumed)
    assert resumed.epochs == loader.epochs


def test_a_resumed_loader_may_draw_larger_batches():
    loader, larger = (BatchLoader([counting(0, 1000)], size, 8, seed=1) for size in (2, 4))
    loader.next()
    larger.load_state_dict(loader.state_dict())
    assert torch.equal(larger.next()[0], torch.cat([loader.next()[0], loader.next()[0]]))


@pytest.mark.parametrize("state", [{}, {"rng": {"state": 2**100}}, {"seed": 1, "epoch": 0}])
def test_the_state_of_another_version_is_refused(state):
    with pytest.raises(RequestError, match=r"^cannot resume: .*another version of fastgpt.*--init_from scratch$"):
        BatchLoader([counting(0, 1000)], 2, 8, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("seed", "first", "of_the_next_epoch"),
    [
        (0, [479, 895, 263, 991], [771, 603, 2085, 251]),
        (1337, [316, 732, 340, 100], [2068, 201, 785, 313]),
        (2**62 + 5, [2163, 433, 393, 177], [2294, 756, 708, 564]),
    ],
)
def test_the_order_that_follows_from_a_seed_never_changes(seed, first, of_the_next_epoch):
    """Not with the version of NumPy either. If it has to change, ``ORDER`` changes too."""
    loader = BatchLoader([counting(0, 1000), counting(2000, 2400)], 4, 8, seed)
    assert loader.next()[0][:, 0].tolist() == first
    while loader.state_dict()["epoch"] == 0:
        loader.next()
    assert loader.next()[0][:, 0].tolist() == of_the_next_epoch
    assert loader.state_dict()["order"] == 2


def test_the_state_of_another_order_is_refused():
    loader = BatchLoader([counting(0, 1000)], 2, 8, seed=1)
    with pytest.raises(RequestError, match="another version of fastgpt"):
        loader.load_state_dict(loader.state_dict() | {"order": 1})


def test_the_places_of_batches_are_told_and_nothing_moves():
    shards = [counting(0, 500), counting(600, 1000)]
    loader = BatchLoader(shards, 3, 8, seed=5, names=["one.bin", "two.bin"])
    for _ in range(25):
        loader.next()
    before = loader.state_dict()
    drawn = torch.cat([loader.next()[0] for _ in range(20)])  # beyond the end of the epoch
    after = loader.state_dict()
    assert after["epoch"] > before["epoch"]
    places = loader.places(before, 20)
    firsts = {"one.bin": 0, "two.bin": 600}
    assert [firsts[name] + token for name, token in places] == drawn[:, 0].tolist()
    assert {name for name, _ in places} == firsts.keys()
    assert loader.state_dict() == after
    other = BatchLoader(shards, 3, 8, seed=5)
    other.load_state_dict(after)
    assert torch.equal(loader.next()[0], other.next()[0])


def test_memory_mapped_shards_are_not_copied(tmp_path):
    write_shard(tmp_path / "s.bin", counting(0, 1000))
    shard = read_shard(tmp_path / "s.bin")
    loader = BatchLoader([shard], 2, 8, seed=0)
    assert np.shares_memory(loader.shards[0], shard)
    x, y = loader.next()
    assert torch.equal(y, x + 1)
