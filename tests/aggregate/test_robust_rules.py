"""Robust rules: equality with plain Python, identities, hand values, known defects."""

from __future__ import annotations

import math
import statistics
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.cohorts import d_of, root_of, start, turn, update_of, updates

from fedgpt.aggregate import blocks
from fedgpt.aggregate.centred_clip import CentredClip
from fedgpt.aggregate.fltrust import FLTrust
from fedgpt.aggregate.geometric_median import GeometricMedian
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.norm_clip import NormClip
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.core.errors import ConfigError, StoppedEarly
from fedgpt.core.messages import Pacing, ServerState

RULES = [Median(), TrimmedMean(), Krum(), GeometricMedian(), NormClip(), CentredClip(), FLTrust()]
every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
HUGE = 1e12  # a clipping radius that clips nothing
# cohorts of updates; their values are far from underflow, so norms and ratios are exact to rounding
matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(5, 9), st.integers(1, 12)),
    elements=st.floats(-4, 4).map(lambda x: round(x, 6)),
)


@pytest.fixture(params=[5, blocks.BLOCK], ids=["small blocks", "one block"])
def any_block(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", request.param)


def zeros(rows):
    return ServerState(np.zeros(np.shape(rows)[1]))


def combined(rule, rows, root=None, **memory):
    """D in float64 of updates given as rows."""
    cohort = update_of(*rows)
    state = replace(zeros(rows), memory=memory)
    return rule.combine(cohort, state, None if root is None else update_of(root)[0])


# Slow references in plain Python, one number at a time.


def norm(row):
    return math.sqrt(math.fsum(x * x for x in row))


def difference(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def average(rows, weights):
    total, columns = math.fsum(weights), zip(*rows, strict=True)
    return [
        math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in columns
    ]


def slow_median(rows, root):
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def slow_trimmed(rows, root):
    return [statistics.fmean(sorted(column)[1:-1]) for column in zip(*rows, strict=True)]


def slow_krum(rows, root, attackers=1):
    scores = []
    for i, row in enumerate(rows):
        near = sorted(norm(difference(row, other)) ** 2 for j, other in enumerate(rows) if j != i)
        scores.append(math.fsum(near[: len(rows) - attackers - 2]))
    kept = sorted(range(len(rows)), key=scores.__getitem__)[: len(rows) - attackers]
    return average([rows[i] for i in kept], [1] * len(kept))


def slow_geometric(rows, root):
    z = average(rows, [1] * len(rows))
    for _ in range(8):
        z = average(rows, [1 / max(1e-6, norm(difference(row, z))) for row in rows])
    return z


def slow_norm_clip(rows, root):
    clip = statistics.median(map(norm, rows))
    return average([[x * min(1, clip / norm(row)) for x in row] for row in rows], [1] * len(rows))


def slow_centred(rows, root):
    v = [0.0] * len(rows[0])
    for _ in range(5):
        moves = [difference(row, v) for row in rows]
        tau = statistics.median(map(norm, moves))
        move = average([[x * min(1, tau / norm(m)) for x in m] for m in moves], [1] * len(rows))
        v = [a + b for a, b in zip(v, move, strict=True)]
    return v


def slow_fltrust(rows, root):
    trust = []
    for row in rows:
        dot = math.fsum(x * y for x, y in zip(row, root, strict=True))
        trust.append(max(0.0, dot / (norm(row) * norm(root))))
    return average([[x * norm(root) / norm(row) for x in row] for row in rows], trust)


SLOW = [slow_median, slow_trimmed, slow_krum, slow_geometric]
SLOW += [slow_norm_clip, slow_centred, slow_fltrust]


@pytest.mark.parametrize(
    "rule, slow", list(zip(RULES, SLOW, strict=True)), ids=[rule.name for rule in RULES]
)
@pytest.mark.parametrize("n", [5, 6, 9])
def test_a_rule_equals_its_slow_reference(rule, slow, n, any_block):
    rng = np.random.default_rng(n)
    root = rng.standard_normal(23)
    rows = rng.standard_normal((n, 23)) + root
    rows[1] *= 30
    np.testing.assert_allclose(
        combined(rule, rows, root), slow(rows.tolist(), root.tolist()), rtol=1e-12, atol=1e-13
    )


@every
def test_the_size_of_a_block_does_not_change_the_result(rule, monkeypatch):
    state, cohort = start(1000), updates(7, 1000)
    at_once = d_of(rule, cohort, state)
    monkeypatch.setattr(blocks, "BLOCK", 60)
    np.testing.assert_allclose(d_of(rule, cohort, state), at_once, rtol=1e-6, atol=1e-9)


@every
def test_the_memory_does_not_grow_with_the_cohort(rule):
    size, n = 1 << 19, 12
    cohort, state = updates(n, size), start(size)
    root = root_of(cohort) if rule.needs_root else None
    tracemalloc.start()
    rule.combine(cohort, state, root)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # a float64 copy of all updates would be 24 times params
    assert peak < 4 * state.params.nbytes + 8 * 8 * blocks.BLOCK


# The sorting network: one that sorts all sequences of 0 and 1 sorts every sequence (Knuth).


@pytest.mark.parametrize("count", range(1, 11))
def test_the_sorting_network_sorts_the_wanted_ranks(count):
    columns = (np.arange(2**count)[None, :] >> np.arange(count)[:, None]) & 1
    for cut in range((count + 1) // 2):
        rows = columns.copy()
        for low, high in blocks.comparators(count, range(cut, count - cut)):
            pair = rows[[low, high]]
            rows[low], rows[high] = pair.min(axis=0), pair.max(axis=0)
        wanted = slice(cut, count - cut)
        assert np.array_equal(rows[wanted], np.sort(columns, axis=0)[wanted])


# Identities.


def mean_of(rows):
    return np.mean(rows, axis=0)


@given(matrices, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 100.0]))
@settings(max_examples=50, deadline=None)
def test_rules_that_clip_nothing_are_the_mean(rows, seed, length):
    centre = length * np.random.default_rng(seed).standard_normal(rows.shape[1])  # any value of v
    np.testing.assert_allclose(
        blocks.middle(update_of(*rows), 0, zeros(rows).params), mean_of(rows), rtol=0, atol=1e-14
    )
    for rule, memory in (
        (NormClip(), {"norms": np.array([np.inf])}),
        (CentredClip(tau=HUGE, passes=1), {"centre": centre}),
    ):
        np.testing.assert_allclose(
            combined(rule, rows, **memory), mean_of(rows), rtol=0, atol=1e-14
        )


@given(matrices)
@settings(max_examples=50, deadline=None)
def test_rules_that_coincide_in_special_cases(rows):
    odd = rows[: len(rows) - 1 + len(rows) % 2]
    cut = (len(odd) - 1) // 2
    assert combined(TrimmedMean(trim=cut), odd).tolist() == combined(Median(), odd).tolist()
    assert combined(Median(), rows).tolist() == np.median(rows, axis=0).tolist()
    one_pass = combined(CentredClip(passes=1), rows)
    np.testing.assert_allclose(one_pass, combined(NormClip(), rows), rtol=0, atol=1e-15)


@given(matrices, st.integers(-20, 20))
@settings(max_examples=50, deadline=None)
def test_d_scales_with_the_updates(rows, exponent):
    for rule in (Median(), TrimmedMean(), Krum(), NormClip(), CentredClip(), FLTrust()):
        root = np.ones(rows.shape[1])
        scaled = combined(rule, rows * 2.0**exponent, root * 2.0**exponent)
        assert (scaled == combined(rule, rows, root) * 2.0**exponent).all()


@given(matrices)
@settings(max_examples=50, deadline=None)
def test_d_stays_within_the_updates(rows):
    largest = max(np.linalg.norm(rows, axis=1))
    for rule in RULES:
        d = combined(rule, rows, rows[0])
        assert np.isfinite(d).all() and np.linalg.norm(d) <= largest * (1 + 1e-12) + 1e-12
    for rule in (Median(), TrimmedMean(), Krum(), GeometricMedian()):
        d = combined(rule, rows)
        assert (d >= rows.min(axis=0) - 1e-12).all() and (d <= rows.max(axis=0) + 1e-12).all()


@every
def test_a_unanimous_update_is_applied_unchanged(rule):
    state, (update,) = start(dtype=np.float64), updates(1)
    cohort = [replace(update, client=f"client{i}") for i in range(7)]
    np.testing.assert_allclose(
        state.params - turn(rule, cohort, state).params, update.delta, rtol=1e-6
    )


# Median and trimmed mean.


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two():
    assert combined(Median(), [[1], [2], [3], [4]]).tolist() == [2.5]


def test_a_trim_that_removes_nothing_is_refused():
    """A fraction 0.2 of 4 clients would be rounded to 0, and (0, 0, 0, 100) would give 25."""
    assert combined(TrimmedMean(trim=1), [[2], [0], [0], [100]]).tolist() == [1.0]
    assert combined(TrimmedMean(trim=1), [[0], [0], [0], [100]]).tolist() == [0.0]
    for trim in (0, 0.2):
        with pytest.raises(ConfigError, match=rf"strategy\.trim={trim}: must be .*at least 1"):
            TrimmedMean(trim=trim)


# Krum.

LINE = [[0.0], [1.0], [2.1], [3.3], [100.0]]


def test_krum_by_hand():
    scores = Krum().scores(update_of(*LINE))
    assert scores[:4] == pytest.approx([5.41, 2.21, 2.65, 6.73]) and scores[4] > 9000
    assert combined(Krum(keep=1), LINE).tolist() == [1.0]
    assert combined(Krum(keep=3), LINE)[0] == pytest.approx((0 + 1 + 2.1) / 3)
    assert combined(Krum(), LINE)[0] == pytest.approx((0 + 1 + 2.1 + 3.3) / 4)  # n - f


def test_krum_keeps_no_attacker_if_a_client_has_failed():
    """Eight clients were asked and seven replied, two of them attackers: only five may be kept."""
    rows = [[1.0], [1.1], [0.9], [1.2], [0.8], [-100.0], [-100.0]]
    assert list(Krum(attackers=2, keep=6).problems(Pacing("cohort", 8, 8))) == []
    assert combined(Krum(attackers=2, keep=6), rows)[0] == pytest.approx(1.0)


def test_krum_measures_small_updates_of_large_models():
    """Distances between float32 models (||w|| = 20, ||D|| = 0.01) are wrong by hundreds of percent.

    Krum expands norms as well, but on updates.
    """
    rng = np.random.default_rng(0)
    size, n = 10_000, 7
    weights = rng.standard_normal(size)
    weights = (weights * 20 / np.linalg.norm(weights)).astype(np.float32)
    deltas = rng.standard_normal((n, size))
    deltas = (deltas * 0.01 / np.linalg.norm(deltas, axis=1, keepdims=True)).astype(np.float32)
    true = ((deltas[:, None].astype(np.float64) - deltas[None]) ** 2).sum(axis=2)
    expected = np.sort(true, axis=1)[:, 1:5].sum(axis=1)
    np.testing.assert_allclose(
        Krum().scores(update_of(*deltas, dtype=np.float32)), expected, rtol=1e-5
    )
    models = weights - deltas
    squares = (models * models).sum(axis=1)
    expanded = squares[:, None] + squares[None] - 2 * models @ models.T
    assert np.abs(expanded - true).max() > 0.5 * true.max()  # the error that Krum must not make


# Geometric median.


def test_geometric_median_of_four_points_is_where_the_diagonals_cross():
    points = [[0, 0], [4, 0], [3, 3], [0, 2]]
    assert combined(GeometricMedian(), points) == pytest.approx([1.3476, 1.3352], abs=1e-4)
    converged = combined(GeometricMedian(iterations=200), points)
    assert converged == pytest.approx([4 / 3, 4 / 3], abs=1e-6)


def test_geometric_median_on_a_line_is_the_median():
    (d,) = combined(GeometricMedian(iterations=200), [[0], [1], [2.5], [7], [100]])
    assert d == pytest.approx(2.5, abs=1e-4)


def test_geometric_median_does_not_collapse_onto_one_client():
    rows = np.random.default_rng(4).standard_normal((8, 30))

    def cost(z):
        return np.linalg.norm(rows - z, axis=1).sum()

    z = combined(GeometricMedian(iterations=60), rows)
    assert min(np.linalg.norm(rows - z, axis=1)) > 1
    directions = np.random.default_rng(5).standard_normal((50, 30))
    assert all(cost(z) <= cost(z + 1e-2 * direction) for direction in directions)


# Norm clip and centred clip.


def test_norm_clip_follows_the_norms_of_earlier_versions():
    rule, state = NormClip(window=5), zeros([[0.0]])
    state = turn(rule, update_of(1, 2, 3), state)  # median 2: (1 + 2 + 2) / 3
    assert state.params[0] == pytest.approx(-5 / 3) and state.memory["norms"].tolist() == [1, 2, 3]
    # the limit is still 2: the norms of this version do not count yet
    state = turn(rule, update_of(10, 10, 10), state)
    assert state.params[0] == pytest.approx(-5 / 3 - 2)
    assert state.memory["norms"].tolist() == [2, 3, 10, 10, 10]
    # norms are remembered before clipping, so the limit can grow
    state = turn(rule, update_of(10, 10, 10), state)
    assert state.params[0] == pytest.approx(-5 / 3 - 12)


def test_centred_clip_starts_from_the_last_aggregate():
    rule, state = CentredClip(passes=1), zeros([[0.0]])
    state = turn(rule, update_of(1, 2, 3), state)
    assert state.memory["centre"].tolist() == pytest.approx([5 / 3])
    cohort = update_of(5 / 3, 5 / 3 + 1, 1000)
    # tau = 0 gives the median distance, 1
    assert d_of(rule, cohort, state).tolist() == pytest.approx([5 / 3 + 2 / 3])
    assert d_of(replace(rule, tau=0.3), cohort, state).tolist() == pytest.approx([5 / 3 + 0.2])
    still = rule.step(rule.combine([], state), state)
    # without updates the centre stays
    assert still.memory["centre"].tolist() == state.memory["centre"].tolist()


@given(matrices, st.floats(0.01, 10), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_an_attacker_moves_centred_clip_by_a_bounded_amount(rows, tau, passes):
    """Whatever one client sends, it moves v by at most tau / n in a pass."""
    rule, n = CentredClip(tau=tau, passes=1), len(rows)
    twin = rows.copy()
    twin[0] = 1e6
    assert np.linalg.norm(combined(rule, rows) - combined(rule, twin)) <= 2 * tau / n * (1 + 1e-9)
    assert np.linalg.norm(combined(replace(rule, passes=passes), twin)) <= passes * tau * (1 + 1e-9)


# FLTrust.


def test_fltrust_scales_agreeing_clients_to_the_norm_of_the_server():
    own = np.random.default_rng(0).standard_normal(30)
    d = combined(FLTrust(), [c * own for c in (0.1, 1, 7, 1e4)], own)
    np.testing.assert_allclose(d, own, rtol=1e-14)


def test_fltrust_does_not_move_if_no_client_agrees():
    own = np.random.default_rng(0).standard_normal(30)
    assert not combined(FLTrust(), [-own, -3 * own, 0 * own], own).any()
    assert not combined(FLTrust(), [own, 2 * own], 0 * own).any()


def test_fltrust_is_odd_in_updates_and_root():
    rows, own = np.random.default_rng(0).standard_normal((2, 5, 30))
    one, two = combined(FLTrust(), rows, own[0]), combined(FLTrust(), -rows, -own[0])
    assert one.any() and (one == -two).all()


def test_fltrust_without_a_root_update_fails():
    with pytest.raises(AssertionError, match="needs_root"):
        FLTrust().combine(updates(), start())


# Cohorts that are too small.

SMALL = [
    (Median(), 2, ["strategy=median", "at least 3", "pace.clients", "strategy=fedavg"]),
    (GeometricMedian(), 2, ["strategy=geometric_median", "at least 3", "pace.clients"]),
    (TrimmedMean(trim=2), 4, ["strategy.trim=2", "at least 5", "pace.clients", "at most 1"]),
    (TrimmedMean(), 2, ["strategy.trim=1", "at least 3", "strategy=fedavg"]),
    (Krum(attackers=2), 6, ["strategy.attackers=2", "at least 7", "pace.clients", "at most 1"]),
    (Krum(), 4, ["strategy.attackers=1", "at least 5", "strategy=median"]),
]


@pytest.mark.parametrize("rule, n, words", SMALL)
def test_a_cohort_that_is_too_small_is_reported_before_the_run(rule, n, words):
    # the goal counts, because the other updates may arrive too late
    (problem,) = rule.problems(Pacing("cohort", n + 5, n))
    assert all(word in problem for word in words), problem
    assert list(rule.problems(Pacing("cohort", n + 1, n + 1))) == []


@pytest.mark.parametrize("rule, n, words", SMALL)
def test_too_few_updates_stop_the_run(rule, n, words):
    state = start()
    with pytest.raises(
        StoppedEarly, match=rf"strategy={rule.name} needs at least {n + 1} .* {n} arrived"
    ):
        rule.combine(updates(n), state)
    assert np.isfinite(rule.combine(updates(n + 1), state)).all()


def test_krum_reports_that_attackers_could_be_kept():
    (problem,) = Krum(attackers=2, keep=7).problems(Pacing("cohort", 8, 8))
    for word in ("strategy.keep=7", "strategy.attackers=2", "at most 6"):
        assert word in problem
    assert list(Krum(attackers=2, keep=6).problems(Pacing("cohort", 8, 8))) == []


def test_updates_of_one_client_are_in_the_order_of_its_jobs():
    one, two = update_of(1, 2)
    cohort = [
        replace(two, client="a", number=1),
        replace(one, client="a"),
        replace(one, client="Z"),
    ]
    ordered = [(update.client, update.number) for update in blocks.in_order(Median(), cohort)]
    assert ordered == [("Z", 0), ("a", 0), ("a", 1)]
