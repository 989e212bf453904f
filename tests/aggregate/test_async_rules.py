"""The rules for pace=buffer: identities, values computed by hand, and divergence with momentum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from support.cohorts import d_of, eight_gradients, run, start, turn, updates

from fedgpt.aggregate.delayed_nesterov import DelayedNesterov
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.diloco import DiLoCo
from fedgpt.aggregate.fedasync import FedAsync
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Pacing, ServerState, Update

ZERO = ServerState(np.zeros(5))
discounted = pytest.mark.parametrize("cls", [DeltaSGD, FedAsync, FedBuff])


def zero_or_more(most):
    """Numbers that an option takes: other than 0, the smallest is 1e-12."""
    return st.just(0.0) | st.floats(1e-12, most)


# Staleness.


@discounted
@pytest.mark.parametrize(
    "staleness, table",
    [
        ("constant", {0: 1, 1: 1, 100: 1}),
        ("polynomial", {0: 1, 1: 0.7071, 3: 0.5, 8: 0.3333, 15: 0.25}),
        ("hinge", {0: 1, 4: 1, 5: 0.0909, 6: 0.0476, 12: 0.0123}),
    ],
)
def test_the_discount_by_staleness(cls, staleness, table):
    rule = cls(staleness=staleness)
    assert {tau: rule.discount(tau) for tau in table} == pytest.approx(table, abs=5e-5)


@discounted
@given(
    staleness=st.sampled_from(["constant", "polynomial", "hinge"]),
    power=st.floats(0.01, 3),
    slope=st.floats(0.01, 100),
    grace=zero_or_more(20),
    tau=st.integers(0, 1000),
)
def test_a_fresh_update_counts_fully_and_a_staler_one_never_more(
    cls, staleness, power, slope, grace, tau
):
    rule = cls(staleness=staleness, power=power, slope=slope, grace=grace)
    assert rule.discount(0) == 1.0
    assert 0 < rule.discount(tau + 1) <= rule.discount(tau) <= 1


def test_weights_depend_on_staleness_and_not_on_tokens():
    update = replace(updates(1)[0], tokens=1000)
    assert DeltaSGD().weight(update, 7) == 1.0
    assert FedBuff().weight(update, 3) == 0.5
    assert DelayedNesterov().weight(update, 3) == 1.0


@discounted
def test_an_unknown_discount_is_refused(cls):
    with pytest.raises(
        ConfigError, match=r"strategy\.staleness=linear: must be constant, polynomial or hinge"
    ):
        cls(staleness="linear")


# Delta-SGD and FedBuff.


def test_k_arrivals_of_one_update_move_delta_sgd_by_that_update():
    state, (update,), k = start(), updates(1), 4
    for _ in range(k):
        state = turn(DeltaSGD(), [update], state, Pacing("buffer", k, 1))
    np.testing.assert_allclose(start().params - state.params, update.delta, rtol=0, atol=1e-8)


def test_delta_sgd_of_a_cohort_divides_by_the_expected_number_of_clients():
    cohort, state = updates(4), start()
    mean = np.mean([update.delta for update in cohort], axis=0, dtype=np.float64)
    full, half = (d_of(DeltaSGD(), cohort[:n], state, Pacing("cohort", 4, 4)) for n in (4, 2))
    np.testing.assert_allclose(full, mean, rtol=1e-6)
    np.testing.assert_allclose(half, (cohort[0].delta + cohort[1].delta) / 4, rtol=1e-6)


def test_a_fresh_buffer_of_all_clients_equals_uniform_federated_averaging():
    cohort, state = [replace(update, tokens=1) for update in updates(4)], start()
    one = turn(FedBuff(), cohort, state, Pacing("buffer", 4, 4))
    assert one.params.tobytes() == turn(FedAvg(), cohort, state).params.tobytes()


def test_fedbuff_with_a_buffer_of_one_equals_delta_sgd():
    one = two = start()
    for update in updates(6):
        one = turn(FedBuff(staleness="constant", eta=1 / 4), [update], one, Pacing("buffer", 4, 1))
        two = turn(DeltaSGD(), [update], two, Pacing("buffer", 4, 1))
    assert one.params.tobytes() == two.params.tobytes()


def test_fedbuff_divides_by_its_size_not_by_its_weights():
    rule, pacing = FedBuff(power=1.0), Pacing("buffer", 4, 2)
    # server version 3, updates from versions 3 and 0
    update = updates(1)[0]
    weights = [rule.weight(replace(update, version=start), 3 - start) for start in (3, 0)]
    d = np.array([1.0, 0.0]) * weights[0] + np.array([0.0, 1.0]) * weights[1]
    new = rule.step(d / rule.divisor(weights, pacing), ServerState(np.zeros(2)))
    assert new.params.tolist() == [-0.5, -0.125]
    assert (
        rule.divisor(weights[:1], pacing) == 2
    )  # a buffer that a timer closed early is still divided by K


# FedAsync.


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_fedasync_with_shares_1_over_j_is_the_mean_of_the_models(n, seed):
    rng = np.random.default_rng(seed)
    base, deltas = rng.standard_normal(5), rng.standard_normal((n, 5))
    state = ServerState(rng.standard_normal(5))
    for j, delta in enumerate(deltas, 1):
        update = Update("one", j, 0, delta, 1, base=base)
        rule = FedAsync(alpha=1 / j, staleness="constant")
        state = rule.step(rule.combine([update], state), state)
    np.testing.assert_allclose(state.params, (base - deltas).mean(axis=0), rtol=0, atol=2e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_fedasync_of_fresh_updates_is_delta_sgd(k, dtype):
    one = two = start(dtype=dtype)
    for update in updates(6):
        one = turn(FedAsync(alpha=1 / k), [update], one)
        two = turn(DeltaSGD(), [update], two, Pacing("buffer", k, 1))
    assert one.params.tobytes() == two.params.tobytes()


def test_a_stale_model_pulls_fedasync_back_to_its_base():
    state = ServerState(np.array([2.0]), version=3)
    # the client's model is 0.5, and s(3) = 0.5
    update = Update("one", 0, 0, np.array([0.5]), 1, base=np.array([1.0]))
    d = FedAsync(alpha=0.6).combine([update], state)
    assert FedAsync().step(d, state).params[0] == pytest.approx(0.7 * 2 + 0.3 * 0.5)


def test_fedasync_mixes_several_updates_one_after_the_other_in_the_order_given():
    state, rng = replace(start(dtype=np.float64), version=5), np.random.default_rng(3)
    cohort = [replace(u, version=i, base=rng.standard_normal(40)) for i, u in enumerate(updates(3))]
    theta = state.params
    for update in cohort:
        share = 0.6 * (1 + 5 - update.version) ** -0.5
        theta = (1 - share) * theta + share * (update.base - update.delta)
    rule = FedAsync()
    np.testing.assert_allclose(
        rule.step(rule.combine(cohort, state), state).params, theta, rtol=0, atol=1e-15
    )
    assert np.abs(rule.combine(cohort, state) - rule.combine(cohort[::-1], state)).max() > 0.01


@given(st.floats(0.01, 1), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_fedasync_ends_between_the_two_models(alpha, tau, seed):
    rng = np.random.default_rng(seed)
    base, delta, params = rng.standard_normal((3, 5))
    state = ServerState(params, version=tau)
    rule = FedAsync(alpha=alpha)
    new = rule.step(rule.combine([Update("one", 0, 0, delta, 1, base=base)], state), state).params
    low, high = np.minimum(params, base - delta), np.maximum(params, base - delta)
    assert (low - 1e-12 <= new).all() and (new <= high + 1e-12).all()


def test_rho_of_fedasync_goes_to_the_clients():
    assert FedAsync(rho=0.5).client_numbers() == {"proximal_mu": 0.5}
    for alpha in (0, 1.1):
        with pytest.raises(ConfigError, match=r"strategy\.alpha"):
            FedAsync(alpha=alpha)


# Delayed Nesterov.


@given(zero_or_more(1), zero_or_more(0.99), st.floats(0.01, 2))
def test_delayed_nesterov_with_period_1_has_the_bits_of_diloco(c, mu, eta):
    one = run(DelayedNesterov(eta=eta, mu=mu, period=1, c=c), eight_gradients(), ZERO)
    assert np.array_equal(one, run(DiLoCo(eta, mu), eight_gradients(), ZERO))


def means_of_4():
    return eight_gradients().reshape(2, 4, 5).mean(axis=1)


def test_without_c_a_period_equals_one_step_of_nesterov_on_its_mean():
    delayed = run(DelayedNesterov(period=4), eight_gradients(), ZERO)
    np.testing.assert_allclose(delayed[3::4], run(DiLoCo(), means_of_4(), ZERO), rtol=0, atol=1e-15)


@pytest.mark.parametrize("c, expected", [(0.1, 0.1131), (0.25, 0.2827)])
def test_with_c_a_period_differs_from_one_step_of_nesterov(c, expected):
    delayed = run(DelayedNesterov(period=4, c=c), eight_gradients(), ZERO)
    nesterov = run(DiLoCo(), means_of_4(), ZERO)
    distance = np.linalg.norm(delayed[-1] - nesterov[-1]) / np.linalg.norm(nesterov[-1])
    assert distance == pytest.approx(expected, abs=5e-5)
    first = (1 + 0.9 * (1 - 4 * c + c)) / 1.9
    np.testing.assert_allclose(delayed[3] / nesterov[0], first, rtol=1e-12)


def test_a_resume_within_a_period_changes_no_bit():
    rule, state = DelayedNesterov(period=4, c=0.1), start()
    for update in updates(6):
        state = turn(rule, [update], state, Pacing("buffer", 4, 1))
    resumed = replace(state, memory=load(save(state.memory)))
    assert state.memory["arrivals"] == 6 and state.memory["arrivals"].shape == ()
    for update in updates(3, seed=9):
        state, resumed = (
            turn(rule, [update], each, Pacing("buffer", 4, 1)) for each in (state, resumed)
        )
    assert state.params.tobytes() == resumed.params.tobytes()
    assert {n: a.tobytes() for n, a in state.memory.items()} == {
        n: a.tobytes() for n, a in resumed.memory.items()
    }


def test_c_is_at_most_1_over_the_period():
    DelayedNesterov(period=4, c=0.25)
    with pytest.raises(ConfigError, match=r"strategy\.c=0.26: must be from 0 to .*, 1 / 4;"):
        DelayedNesterov(period=4, c=0.26)


# Nesterov on every arrival, which `diloco` refuses.


def moved(gradients, m0=0.0, mu=0.9):
    """How far DiLoCo moves in total, with one step for each gradient, in units of eta."""
    state = ServerState(np.zeros(1), memory={"momentum": np.array([m0])})
    return -run(DiLoCo(eta=1.0, mu=mu), [np.array([g]) for g in gradients], state)[-1][0]


@pytest.mark.parametrize("k, distance", [(2, 4.61), (4, 12.1441), (8, 33.868)])
def test_nesterov_on_every_arrival_moves_far_more_than_on_the_mean(k, distance):
    assert moved([1.0] * k) == pytest.approx(distance, abs=1e-3)
    assert moved([1.0] * k) == pytest.approx(k + sum((k + 1 - j) * 0.9**j for j in range(1, k + 1)))
    assert moved([1.0]) == pytest.approx(1.9)  # one step on the mean


def final_distance(rule, rounds=100, k=4):
    """Distance from the optimum after `rounds` arrivals of each of k clients, in turn.

    All clients have the loss |x|^2 / 2, and local steps that go a fifth of the way: a client's D is
    0.2 x for the x that it downloaded k - 1 arrivals ago.
    """
    state, divisor = ServerState(np.ones(1)), rule.divisor([1.0], Pacing("buffer", k, 1))
    bases = [state.params] * k
    for arrival in range(rounds * k):
        state = rule.step(0.2 * bases[arrival % k] / divisor, state)
        bases[arrival % k] = state.params
    return abs(state.params.item())


def test_on_quadratics_nesterov_on_every_arrival_diverges_and_delta_sgd_converges():
    assert final_distance(DeltaSGD(eta=0.7)) < 1e-3
    assert final_distance(DiLoCo(eta=0.7, mu=0.9)) > 1e9
    assert final_distance(DelayedNesterov(eta=0.7, mu=0.6, period=8)) < 1e-3


def test_smaller_weights_do_not_correct_nesterov_on_every_arrival():
    assert moved([1 / 4] * 4) == pytest.approx(3.036, abs=1e-3)
    assert moved([2 / 4] * 4) == pytest.approx(6.072, abs=1e-3)  # sqrt(k) / k
    # the momentum of earlier arrivals is applied k times as well
    from_momentum = moved([0.0] * 4, m0=1.0)
    assert from_momentum == pytest.approx(0.9**2 * (1 + 0.9 + 0.9**2 + 0.9**3), abs=1e-12)
    assert from_momentum == pytest.approx(2.7856, abs=1e-4)


def test_delayed_nesterov_moves_as_far_as_one_step_on_the_mean():
    new = run(DelayedNesterov(eta=1.0, period=4), [np.ones(1)] * 4, ServerState(np.zeros(1)))[-1]
    assert -new[0] == pytest.approx(1.9)


# Pacing.


@pytest.mark.parametrize(
    "rule, sizes, words",
    [
        (FedAsync(), (4, 2), ["pace.goal=2", "pace.goal=1", "strategy=fedbuff"]),
        (DelayedNesterov(), (4, 3), ["pace.goal=3", "pace.goal=1", "strategy=fedbuff"]),
        (DelayedNesterov(), (9, 1), ["strategy.period=8", "pace.clients, 9", "strategy.period=18"]),
    ],
)
def test_a_wrong_pacing_is_reported_with_an_alternative(rule, sizes, words):
    (problem,) = rule.problems(Pacing("buffer", *sizes))
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "rule, pacing",
    [
        (FedAsync(), Pacing("buffer", 4, 1)),
        (FedBuff(), Pacing("buffer", 4, 1)),
        (FedBuff(), Pacing("buffer", 4, 10)),
        (DeltaSGD(), Pacing("buffer", 4, 4)),
        (DeltaSGD(), Pacing("cohort", 4, 4)),
        (DelayedNesterov(), Pacing("buffer", 8, 1)),
    ],
)
def test_an_allowed_pacing_has_no_problem(rule, pacing):
    assert pacing.name in rule.paces and list(rule.problems(pacing)) == []


def test_all_problems_of_a_pacing_are_reported_at_once():
    assert len(list(DelayedNesterov(period=2).problems(Pacing("buffer", 4, 4)))) == 2
