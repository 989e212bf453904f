"""The averaging rules for pace=cohort: equality with torch.optim, hand values, identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cohorts import d_of, eight_gradients, run, start, torch_history, turn, updates

from fedgpt.aggregate.diloco import DiLoCo
from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedavgm import FedAvgM
from fedgpt.aggregate.fedprox import FedProx
from fedgpt.aggregate.fedyogi import FedYogi
from fedgpt.core.messages import ServerState


@pytest.mark.parametrize(
    "strategy, optimizer",
    [
        (FedAvg(eta=0.7), lambda p: torch.optim.SGD(p, lr=0.7)),
        (FedAvgM(eta=0.7, mu=0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9)),
        (
            DiLoCo(eta=0.7, mu=0.9),
            lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
        ),
    ],
)
def test_averaging_rules_equal_sgd_of_torch(strategy, optimizer):
    ds = eight_gradients()
    ours = run(strategy, ds, ServerState(np.zeros(5)))
    np.testing.assert_allclose(ours, torch_history(optimizer, ds), rtol=0, atol=1e-14)


def test_fedadam_equals_torch_adam_but_for_the_bias_correction():
    ds = eight_gradients()
    eta = 0.1
    tau = 1e-3
    state = ServerState(np.zeros(5), memory={"second_moment": np.zeros(5)})
    history = []
    for t, d in enumerate(ds, 1):  # Adam's bias correction, expressed by eta and tau
        root = (1 - 0.99**t) ** 0.5
        state = FedAdam(eta=eta * root / (1 - 0.9**t), tau=tau * root).step(d, state)
        history.append(state.params)
    expected = torch_history(lambda p: torch.optim.Adam(p, lr=eta, betas=(0.9, 0.99), eps=tau), ds)
    np.testing.assert_allclose(history, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cls, second", [(FedAdam, 0.1980198), (FedYogi, 0.1985136)])
def test_hand_values_of_the_adaptive_rules(cls, second):
    strategy = cls(eta=0.1)
    state = strategy.step(
        np.array([-1.0]), ServerState(np.zeros(1), memory={"second_moment": np.zeros(1)})
    )
    assert state.params[0] == pytest.approx(0.0990099, abs=1e-7)
    assert strategy.step(np.array([-0.1]), state).params[0] == pytest.approx(second, abs=1e-7)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi])
def test_adaptive_rules_equal_the_formula_of_the_paper(cls):
    """D is first large and then small, so that the sign in Yogi's rule takes both values."""
    ds = [1.0, -0.5, 0.01, 0.3, -0.002]
    eta, b1, b2, tau = 0.05, 0.9, 0.99, 0.1
    theta, m, v, expected = 0.0, 0.0, tau * tau, []
    for d in ds:
        m = b1 * m + (1 - b1) * d
        if cls is FedAdam:
            v = b2 * v + (1 - b2) * d * d
        elif v > d * d:
            v -= (1 - b2) * d * d
        else:
            v += (1 - b2) * d * d
        theta -= eta * m / (v**0.5 + tau)
        expected.append(theta)
    ours = run(
        cls(eta=eta, beta1=b1, beta2=b2, tau=tau),
        [np.array([d]) for d in ds],
        ServerState(np.zeros(1)),
    )
    np.testing.assert_allclose(np.ravel(ours), expected, rtol=1e-12)


def test_four_formulations_of_nesterov_agree():
    eta, mu, zero = 0.7, 0.9, np.zeros(5)
    by_momentum, photon, muloco = (zero, zero), (zero, zero), (zero, zero)
    for d in eight_gradients():
        theta, m = by_momentum  # equation 4 of DiLoCo
        by_momentum = theta - eta * (mu**2 * m + (1 + mu) * d), mu * m + d
        theta, v = photon
        photon = (1 + mu) * (theta - eta * d) - mu * v, theta - eta * d
        theta, u = muloco
        u = mu * u + eta * d
        muloco = theta - mu * u - eta * d, u
    ours = run(DiLoCo(eta, mu), eight_gradients(), ServerState(zero))[-1]
    for other, _ in (by_momentum, photon, muloco):
        np.testing.assert_allclose(ours, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "mu, gains",
    [
        (0.9, {1: 1.9, 2: 2.71, 5: 4.69, 10: 6.86, 24: 9.28, 50: 9.95, 400: 10}),
        (0.6, {1: 1.6, 2: 1.96, 5: 2.38}),
    ],
)
def test_the_gain_of_nesterov_on_a_constant_update(mu, gains):
    params = run(DiLoCo(eta=1.0, mu=mu), [np.ones(1)] * 400, ServerState(np.zeros(1)))
    history = [0.0, *np.ravel(params)]
    for t, gain in gains.items():
        assert history[t - 1] - history[t] == pytest.approx((1 - mu ** (t + 1)) / (1 - mu))
        assert history[t - 1] - history[t] == pytest.approx(gain, abs=0.006)


def test_nesterov_is_not_heavy_ball_but_one_step_ahead_on_a_constant_update():
    ds = eight_gradients()
    ball, nesterov = FedAvgM(eta=0.7, mu=0.9), DiLoCo(eta=0.7, mu=0.9)
    one, two = (run(rule, ds, ServerState(np.zeros(5)))[-1] for rule in (ball, nesterov))
    assert np.linalg.norm(one - two) / np.linalg.norm(two) == pytest.approx(0.174, abs=5e-4)
    constant = [ds[0]] * len(ds)
    one, two = (
        np.diff(run(rule, constant, ServerState(np.zeros(5))), axis=0) for rule in (ball, nesterov)
    )
    np.testing.assert_allclose(two[:-1], one[1:], rtol=1e-12)


def test_fedavg_is_the_weighted_mean_of_the_clients_models():
    state, cohort = start(), updates()
    tokens = np.array([update.tokens for update in cohort], np.float64)
    models = np.stack([state.params.astype(np.float64) - update.delta for update in cohort])
    new = turn(FedAvg(), cohort, state)
    np.testing.assert_allclose(
        new.params, (tokens[:, None] * models).sum(0) / tokens.sum(), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("twin", [FedAvgM(mu=0), DiLoCo(eta=1, mu=0), FedProx(mu=0)])
def test_rules_with_momentum_or_pull_of_zero_equal_fedavg(twin):
    state = start()
    ds = [d_of(FedAvg(), updates(seed=seed), state) for seed in range(3)]
    np.testing.assert_allclose(run(twin, ds, state), run(FedAvg(), ds, state), rtol=1e-6)


def test_eta_multiplies_the_update_and_not_the_parameters():
    state = start()
    d = d_of(FedAvg(), updates(), state)
    one, two = FedAvg().step(d, state), FedAvg(eta=2).step(d, state)
    np.testing.assert_allclose(
        two.params - state.params, 2 * (one.params - state.params), rtol=0, atol=1e-8
    )


def test_proximal_mu_goes_to_the_clients_by_name():
    assert FedProx(mu=0.5).client_numbers() == {"proximal_mu": 0.5}
    assert FedProx().client_numbers() == {"proximal_mu": 0.01}
