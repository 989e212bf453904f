"""The fixed-point sum: the same bits in any order, the documented error, and its limits."""

import hashlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgpt.aggregate import exact, parallel
from fedgpt.aggregate.exact import ExactSum

BOUND, MAX_WEIGHT = 2.0, 1000.0
elements = st.floats(-BOUND, BOUND, width=32) | st.sampled_from(
    [0.0, -0.0, BOUND, -BOUND, 1e-45, -1e-45, 1e-38]
)
weights = st.floats(1e-3, MAX_WEIGHT) | st.sampled_from([1.0, MAX_WEIGHT])
cohorts = st.lists(
    st.tuples(st.lists(elements, min_size=3, max_size=3), weights), min_size=1, max_size=12
)


def summed(cohort, **limits):
    total = ExactSum(3, **{"bound": BOUND, "count": len(cohort), "max_weight": MAX_WEIGHT} | limits)
    for delta, weight in cohort:
        total.add(np.float32(delta), weight)
    return total


@given(cohorts, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_any_order_gives_the_same_bits(cohort, random):
    shuffled = random.sample(cohort, len(cohort))
    divisor = sum(weight for _, weight in cohort)
    assert summed(cohort).mean(divisor).tobytes() == summed(shuffled).mean(divisor).tobytes()


@given(cohorts)
@settings(max_examples=100, deadline=None)
def test_the_error_is_within_the_documented_bound(cohort):
    total = summed(cohort)
    divisor = sum(weight for _, weight in cohort)
    mean = total.mean(divisor)
    for index in range(3):
        parts = [Fraction(float(np.float32(d[index]))) * Fraction(w) for d, w in cohort]
        true, length = sum(parts) / Fraction(divisor), float(sum(abs(part) for part in parts))
        bound = (0.5 * len(cohort) * total.resolution + 2**-22.9 * length) / divisor
        bound += 2**-23.9 * abs(float(true)) + 1e-45
        assert abs(float(Fraction(float(mean[index])) - true)) <= bound


@given(st.floats(1e-6, 1e6), st.integers(1, 5000), st.floats(1e-3, 1e9))
def test_the_documented_resolution_holds_and_no_sum_can_overflow(bound, count, max_weight):
    total = ExactSum(1, bound, count, max_weight)
    assert total.resolution <= bound * max_weight * 2.0**-51 * max(2, count)
    assert bound * max_weight / total.resolution < 2**51
    assert count * bound * max_weight / total.resolution <= 2**53


def test_the_resolution_is_far_below_the_spacing_of_float32_weights():
    """With a thousand clients of the small model, and the largest bound that a run uses.

    That bound is ten times the norm of the model's parameters.
    """
    total = ExactSum(1, bound=360.0, count=1000, max_weight=5120.0)
    assert total.resolution / 5120 < np.spacing(np.float32(0.02)) / 10


def test_a_large_cohort_at_the_limit_is_exact():
    count = 5000
    total = ExactSum(2, bound=1.5, count=count, max_weight=3)
    for _ in range(count):
        total.add(np.float32([1.5, -1.5]), 3)
    assert total.mean(count).tolist() == [4.5, -4.5]
    with pytest.raises(OverflowError, match="count=5000"):
        total.add(np.float32([0, 0]))


def test_cancellation_is_exact():
    total = ExactSum(1, bound=1e6, count=3)
    for value in (1e6, 2**-20, -1e6):
        total.add(np.float32([value]))
    assert total.mean(1).tolist() == [2**-20]  # float32 in this order gives 0


@pytest.mark.parametrize("bad", [1.0000001, -1.1, np.inf, -np.inf, np.nan, np.float32(3.4e38)])
@pytest.mark.parametrize("position", [0, 7, 9])
@pytest.mark.parametrize("before", [0, 2])
def test_a_refused_update_changes_nothing(bad, position, before, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 4)
    rng = np.random.default_rng(0)
    updates = rng.uniform(-1, 1, (4, 10)).astype(np.float32)
    total, clean = ExactSum(10, 1.0, 4), ExactSum(10, 1.0, 4)
    spoiled = updates[0].copy()
    spoiled[position] = bad
    for index, update in enumerate(updates):
        if index == before:
            with pytest.raises(OverflowError, match="bound"):
                total.add(spoiled)
        total.add(update)
        clean.add(update)
    assert total.added == 4
    assert total.mean(4).tobytes() == clean.mean(4).tobytes()


@pytest.mark.parametrize("norm", [0.995, 1.0, 1.005, np.nan])
def test_a_norm_near_the_bound_does_not_replace_the_look_at_each_element(norm):
    """Rounded to float32, the norm may be slightly below an element."""
    total = ExactSum(2, bound=1.0, count=1)
    with pytest.raises(OverflowError, match=r"bound=1\.0"):
        total.add(np.float32([0.0, 1.005]), norm=norm)
    total.add(np.float32([0.0, 1.0]), norm=norm)


def test_invalid_arguments_are_refused():
    total = ExactSum(2, 1.0, 4, max_weight=2)
    ok = np.float32([0, 1])
    for wrong in (np.zeros(2), np.float32([0]), np.zeros((2, 1), np.float32)):
        with pytest.raises(ValueError, match="expected 2 float32"):
            total.add(wrong)
    for weight in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            total.add(ok, weight)
    with pytest.raises(OverflowError, match="max_weight"):
        total.add(ok, 2.5)
    total.add(ok)
    for divisor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="divisor"):
            total.mean(divisor)
    for limits in (
        {"bound": 0.0},
        {"bound": float("nan")},
        {"bound": float("inf")},
        {"count": 0},
        {"bound": -1.0},
    ):
        with pytest.raises(ValueError, match="no scale"):
            total.reset(**limits)


def test_the_mean_of_no_updates_is_zero():
    assert ExactSum(2, 1.0, 4).mean(0.0).tolist() == [0.0, 0.0]


def test_reset_starts_again_with_the_same_accumulator(monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 4)
    rng = np.random.default_rng(1)
    updates = rng.uniform(-1, 1, (5, 11)).astype(np.float32)
    total = ExactSum(11, 0.5, 3)
    accumulator = total._sum
    for update in updates[:3]:
        total.add(update / 2)
    total.reset(bound=1.0, count=5)
    fresh = ExactSum(11, 1.0, 5)
    for update in updates:
        total.add(update)
        fresh.add(update)
    out = np.empty(11, np.float32)
    assert total.mean(5, out) is out
    assert out.tobytes() == fresh.mean(5).tobytes()
    assert total._sum is accumulator
    np.testing.assert_allclose(out, updates.astype(np.float64).mean(0), rtol=1e-6)


def test_rounding_is_to_even_as_in_rint():
    rng = np.random.default_rng(2)
    values = np.float32([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 3, *rng.uniform(-1000, 1000, 50)])
    total = ExactSum(values.size, bound=2.0**51 * 0.75, count=1)  # the scale is 1
    assert total.resolution == 1
    total.add(values)
    np.testing.assert_array_equal(total.mean(1), np.rint(values.astype(np.float64)))


def test_all_24_orders_of_four_replies_give_one_digest():
    rng = np.random.default_rng(0)
    replies = [
        (rng.standard_normal(1000).astype(np.float32), weight)
        for weight in (512.0, 300.0, 7.0, 1.0)
    ]
    digests, floats = set(), set()
    for order in itertools.permutations(replies):
        total = ExactSum(1000, bound=10.0, count=4, max_weight=512)
        for delta, weight in order:
            total.add(delta, weight)
        digests.add(hashlib.sha256(total.mean(820.0).tobytes()).hexdigest())
        plain = sum(
            (delta * np.float32(weight) for delta, weight in order), np.zeros(1000, np.float32)
        )
        floats.add(hashlib.sha256(plain.tobytes()).hexdigest())
    assert len(digests) == 1 and len(floats) > 1, "a floating-point sum depends on the order"


def test_several_threads_give_the_bits_of_one(monkeypatch):
    """A refused update changes nothing, even if its bad element is in the last slice."""
    size = parallel.SINGLE_THREAD_ELEMENTS + 12_345
    rng = np.random.default_rng(1)
    deltas = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]
    spoiled = deltas[0].copy()
    spoiled[-1] = 100.0
    means = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda threads=threads: threads)
        total = ExactSum(size, bound=10.0, count=4, max_weight=2)
        for number, delta in enumerate(deltas):
            total.add(delta, 1.5, norm=9.0 if number else np.inf)
            with pytest.raises(OverflowError, match="above bound"):
                total.add(spoiled)
        means.append(total.mean(4.5).tobytes())
    assert len(set(means)) == 1
