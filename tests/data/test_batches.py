import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgpt.data.batches import IGNORE, Batches, windows


def test_targets_are_inputs_one_token_later():
    batches = Batches(np.arange(100, dtype=np.uint16), block_size=8, batch_size=5, seed=1)
    for _ in range(20):
        x, y = batches.next()
        assert x.shape == y.shape == (5, 8)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y)
        assert x.min() >= 0 and y.max() <= 99


def test_every_window_can_be_drawn_and_no_other():
    batches = Batches(np.arange(11), block_size=8, batch_size=64, seed=0)
    assert {int(row[0]) for row in batches.next()[0]} == {0, 1, 2}


def test_same_seed_same_batches():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(draws))  # the global generator must not matter
        batches = Batches(np.arange(1000), 16, 4, seed)
        draws.append(torch.cat([batches.next()[0] for _ in range(5)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_shard_of_exactly_one_window_works_and_less_is_an_error():
    x, y = Batches(np.arange(5), block_size=4, batch_size=2, seed=0).next()
    assert x.tolist() == [[0, 1, 2, 3]] * 2 and y.tolist() == [[1, 2, 3, 4]] * 2
    with pytest.raises(ValueError, match="4 tokens are too few for block_size=4: a window needs 5"):
        Batches(np.arange(4), block_size=4, batch_size=2, seed=0)


@given(st.integers(2, 200), st.integers(1, 40))
def test_windows_contain_every_target_once(length, block_size):
    tokens = np.random.default_rng(length).integers(0, 500, length).astype(np.uint16)
    x, y = windows(tokens, block_size)
    assert x.shape == y.shape == (-(-(length - 1) // block_size), block_size)
    real = y != IGNORE
    assert np.array_equal(y[real].numpy(), tokens[1:])
    assert np.array_equal(x[real].numpy(), tokens[:-1])
    assert not real.flatten()[length - 1 :].any()


def test_windows_of_less_than_two_tokens_are_an_error():
    with pytest.raises(ValueError, match="1 tokens have no target"):
        windows(np.array([3]), 4)


def test_memory_mapped_tokens_are_accepted(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(50, dtype=np.uint16))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert Batches(tokens, 4, 2, 0).next()[0].shape == (2, 4)
    assert windows(tokens, 7)[0].shape == (7, 7)
