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


def test_every_start_over_all_shards_is_drawn_equally_often():
    shards = [counting(0, 10), counting(100, 103), counting(200, 207)]  # 6 starts, none, 3 starts
    x, y = BatchLoader(shards, batch_size=90_000, block_size=4, seed=1).next()
    starts, counts = np.unique(x[:, 0].numpy(), return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3, 4, 5, 200, 201, 202]
    assert np.all(np.abs(counts - 10_000) < 500)  # 5 standard deviations
    assert torch.equal(y, x + 1)  # so no crop crosses from one shard to the next


def test_the_last_token_of_a_shard_is_a_target_and_never_an_input():
    x, y = BatchLoader([counting(0, 20)], batch_size=500, block_size=4, seed=0).next()
    assert x.max() == 18
    assert y.max() == 19


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


def test_a_resumed_loader_draws_what_an_uninterrupted_one_would():
    shards = [counting(0, 500), counting(600, 1000)]
    loader = BatchLoader(shards, 3, 8, seed=5)  # an odd batch leaves half a draw in the generator
    for _ in range(7):
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [loader.next() for _ in range(5)]
    resumed = BatchLoader(shards, 3, 8, seed=99)
    resumed.load_state_dict(state)
    for (x, y), (x_resumed, y_resumed) in zip(expected, (resumed.next() for _ in range(5)), strict=True):
        assert torch.equal(x, x_resumed)
        assert torch.equal(y, y_resumed)


def test_memory_mapped_shards_are_not_copied(tmp_path):
    write_shard(tmp_path / "s.bin", counting(0, 1000))
    shard = read_shard(tmp_path / "s.bin")
    loader = BatchLoader([shard], 2, 8, seed=0)
    assert np.shares_memory(loader.shards[0], shard)
    x, y = loader.next()
    assert torch.equal(y, x + 1)
