"""The audit's statistics on mechanisms whose privacy is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedgpt.audit.statistics import auc, bounds, rank_bound, rate_at


def scores(mu: float, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inside = rng.random(m) < 0.5
    return rng.standard_normal(m) + mu * inside, inside


def test_the_estimate_of_mu_is_right_and_the_bound_is_seldom_above_mu():
    found = [bounds(*scores(1.0, 600, seed), delta=1e-6) for seed in range(200)]
    assert np.mean([b.mu for b in found]) == pytest.approx(1.0, abs=0.02)
    assert np.mean([b.mu_bound > 1.0 for b in found]) <= 0.02
    assert np.mean([b.mu_bound for b in found]) > 0.7, "the bound is close enough to be useful"


def test_the_rank_bound_is_seldom_above_the_epsilon_of_randomised_response():
    epsilon, wrong = 1.5, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        inside = rng.random(400) < 0.5
        answers = inside ^ (rng.random(400) < 1 / (1 + math.exp(epsilon)))
        wrong += rank_bound(answers + 0.01 * rng.random(400), inside, 1e-9) > epsilon
    assert wrong <= 4


def test_a_mechanism_without_noise_is_refuted_by_both_bounds():
    found = bounds(*scores(50.0, 600, 0), delta=1e-6)
    assert found.mu_bound > 40 and found.epsilon_bound > 3.7


def test_pure_noise_gives_no_lower_bound():
    found = bounds(*scores(0.0, 600, 0), delta=1e-6)
    assert found.mu_bound < 0.05 and found.epsilon_bound < 0.3


def test_auc_and_rate_of_cases_counted_by_hand():
    assert auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == 3.5 / 4, "a tie is half a win"
    assert auc(np.ones(5), np.ones(4)) == 0.5
    assert rate_at(np.array([1.0, 5.0, 9.0]), np.arange(5.0), false=0.0) == pytest.approx(2 / 3)
