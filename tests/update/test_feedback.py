"""Error feedback preserves the sum of the deltas: what is left out now is sent later, once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgpt.core.errors import UpdateRejected
from fedgpt.update.compress import make_codec
from fedgpt.update.feedback import BETA, feed, rest

LOSSY = [
    make_codec("bf16"),
    make_codec("int8", block=64),
    make_codec("int4", block=64),
    make_codec("e3m0", block=64),
    make_codec("topk", density=1 / 16),
    make_codec("sparse_loco"),
]


def deltas(count: int, size: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(np.float32) for _ in range(count)]


def send(codec, delta, residual, beta=BETA):
    """The update as the server decodes it, and the next residual."""
    fed = feed(delta, residual, beta)
    sent = codec.decode(codec.encode(fed), fed.size)
    return sent, rest(fed, sent)


def discounted(vectors: list[np.ndarray], beta: float) -> np.ndarray:
    return sum(
        beta ** (len(vectors) - 1 - t) * vector.astype(np.float64)
        for t, vector in enumerate(vectors)
    )


@given(
    count=st.integers(1, 8),
    size=st.integers(1, 50),
    beta=st.floats(0, 1),
    keep=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_is_preserved_whatever_is_sent(count, size, beta, keep, seed):
    rng = np.random.default_rng(seed)
    given_, sent, residual = [rng.standard_normal(size) for _ in range(count)], [], None
    for delta in given_:
        fed = feed(delta, residual, beta)
        q = fed * (rng.random(size) < keep) * rng.choice([1, 0.5, -3], size)
        sent.append(q)
        residual = rest(fed, q)
    np.testing.assert_allclose(
        residual + discounted(sent, beta), discounted(given_, beta), rtol=0, atol=1e-12 * 4**count
    )


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
@pytest.mark.parametrize("beta", [BETA, 1.0])
def test_the_sum_is_preserved_by_each_codec(codec, beta):
    given_, sent, residual = deltas(12, 500, 1), [], None
    for delta in given_:
        q, residual = send(codec, delta, residual, beta)
        sent.append(q)
    assert residual.dtype == np.float32
    np.testing.assert_allclose(
        residual + discounted(sent, beta), discounted(given_, beta), atol=1e-5
    )
    if codec.name == "topk":
        without = discounted([codec.decode(codec.encode(delta), 500) for delta in given_], beta)
        assert np.linalg.norm(without - discounted(given_, beta)) > 1, (
            "without feedback the sum differs"
        )


@pytest.mark.parametrize("name, options", [("none", {}), ("topk", {"density": 1.0})])
def test_a_lossless_codec_leaves_no_residual(name, options):
    codec, residual = make_codec(name, **options), None
    for delta in deltas(3, 100, 2):
        q, residual = send(codec, delta, residual)
        np.testing.assert_array_equal(q, delta)
        assert not residual.any()


@pytest.mark.parametrize("codec", LOSSY, ids=repr)
def test_a_constant_delta_arrives_in_the_mean(codec):
    delta, total, residual = deltas(1, 500, 3)[0], np.zeros(500), None
    for _ in range(400):
        q, residual = send(codec, delta, residual, beta=1.0)
        total += q
    np.testing.assert_allclose(total / 400, delta, atol=0.6)
    assert np.linalg.norm(total / 400 - delta) < 0.12 * np.linalg.norm(delta)


def test_a_dropped_job_changes_nothing_and_a_retry_sends_the_same_bytes():
    codec, given_ = make_codec("topk", density=1 / 16), deltas(6, 500, 4)
    dropped = {2, 3}
    accepted, sent, residual = [], [], None  # `residual` is that of the last accepted job
    for turn, delta in enumerate(given_):
        q, after = send(codec, delta, residual)
        again, _ = send(codec, delta, residual)
        np.testing.assert_array_equal(q, again)
        if turn not in dropped:
            residual = after
            accepted.append(delta)
            sent.append(q)
    np.testing.assert_allclose(
        residual + discounted(sent, BETA), discounted(accepted, BETA), atol=1e-5
    )


def test_inputs_are_not_changed_and_results_are_new_arrays():
    delta, residual = deltas(2, 10, 5)
    before = delta.copy(), residual.copy()
    first, fed = feed(delta, None), feed(delta, residual)
    left = rest(fed, delta)
    for new in (first, fed, left):
        assert (
            new.dtype == np.float32
            and not np.shares_memory(new, delta)
            and not np.shares_memory(new, residual)
        )
        new[:] = 0
    np.testing.assert_array_equal((delta, residual), before)
    np.testing.assert_array_equal(feed(delta, residual, 0.0), delta)


def test_a_sum_beyond_float32_is_refused_by_the_server():
    largest = np.full(3, np.finfo(np.float32).max)
    with pytest.raises(UpdateRejected, match="non_finite"):
        send(make_codec("int8"), largest, largest)


def test_a_residual_of_another_shape_is_an_error():
    with pytest.raises(AssertionError, match="residual"):
        feed(np.zeros(3), np.zeros(4))
