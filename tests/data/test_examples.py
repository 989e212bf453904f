"""Examples as padded tensors, and the batches made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgpt.data.batches import IGNORE
from fedgpt.data.examples import Epochs, Examples, counted


def examples(count: int, width: int = 4) -> Examples:
    """Example i is the number i, `width` times."""
    rows = torch.arange(count)[:, None].repeat(1, width)
    return Examples((rows, rows))


def test_padding_is_not_counted_and_examples_without_targets_are_left_out():
    pairs = [
        (np.array([1, 2, 3]), np.array([2, 3, 4])),
        (np.array([5]), np.array([IGNORE])),
        (np.array([6, 7]), np.array([IGNORE, 8])),
    ]
    made = Examples.padded(pairs, 4)
    inputs, targets = made.take(np.array([1, 0]))
    assert inputs.tolist() == [[6, 7, 0, 0], [1, 2, 3, 0]]
    assert targets.tolist() == [[IGNORE, 8, IGNORE, IGNORE], [2, 3, 4, IGNORE]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert len(made) == 2 and int(counted(made.rows)) == 4


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([1, 2], [1], "2 inputs and 1 targets: as many of both, and at most 3"),
        ([1] * 4, [1] * 4, "4 inputs and 4 targets: as many of both, and at most 3"),
        ([1], [IGNORE], "no example with a counted target"),
    ],
)
def test_examples_that_do_not_fit_are_refused(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        Examples.padded([(np.array(inputs), np.array(targets))], 3)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 99))
def test_an_epoch_has_every_example_once_whatever_the_batch(count, batch_size, seed):
    source = Epochs(examples(count), batch_size, seed)
    drawn = [int(i) for _ in range(2 * count) for i in source.next()[0][:, 0]]
    for epoch in range(2):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 60), st.integers(0, 300))
def test_a_limit_takes_examples_at_equal_distances(count, limit):
    chosen = examples(count).spread(limit).rows[0][:, 0].tolist()
    if not 0 < limit <= 4 * count:
        assert chosen == list(range(count))
        return
    assert len(chosen) == max(1, limit // 4)
    if len(chosen) > 1:
        gaps = np.diff(chosen)
        assert chosen[0] == 0 and chosen[-1] == count - 1 and gaps.max() - gaps.min() <= 1
