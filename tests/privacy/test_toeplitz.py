"""Correlated noise: sensitivity by brute force, known noise levels, the recursion as a matrix."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from support.correlated import matrix, running_noise

from fedgpt.privacy.accounting import gaussian_mu
from fedgpt.privacy.toeplitz import coefficients, correlate, sensitivity


def test_the_coefficients_are_the_taylor_series_of_one_over_the_root_of_1_minus_x():
    np.testing.assert_allclose(
        np.convolve(coefficients(20), coefficients(20))[:20], np.ones(20), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("bands", "size", "apart", "most"), [(3, 12, 3, 3), (2, 10, 4, 2), (4, 9, 4, 5), (1, 8, 1, 3)]
)
def test_no_schedule_moves_the_series_further_than_the_sensitivity(bands, size, apart, most):
    columns = matrix(bands, size)
    worst = 0.0
    for count in range(1, most + 1):
        for times in combinations(range(size), count):
            if all(b - a >= apart for a, b in pairwise(times)):
                worst = max(worst, float(np.linalg.norm(columns[:, list(times)].sum(1))))
    assert sensitivity(bands, size, apart, most) == pytest.approx(worst, rel=1e-12)


def test_participations_that_could_overlap_are_refused():
    with pytest.raises(ValueError, match="separation=3 is below bands=4"):
        sensitivity(4, 10, 3, 2)


@pytest.mark.parametrize(
    ("releases", "apart", "most", "delta", "bands", "noise"),
    [
        (200, 20, 10, 1e-5, 1, 19.0),
        (200, 20, 10, 1e-5, 10, 7.7),
        (200, 20, 10, 1e-5, 20, 6.2),
        (200, 50, 4, 1e-5, 1, 12.0),
        (200, 50, 4, 1e-5, 50, 3.3),
        (100, 10, 10, 1e-4, 10, 5.2),
    ],
)
def test_the_noise_in_the_model_at_epsilon_8(releases, apart, most, delta, bands, noise):
    z = sensitivity(bands, releases, apart, most) / gaussian_mu(8.0, delta)
    assert z * running_noise(bands, releases) == pytest.approx(noise, abs=0.06)


def test_the_recursion_is_the_inverse_of_the_matrix():
    bands, size = 4, 12
    rng = np.random.default_rng(0)
    xi = rng.standard_normal((size, 5)).astype(np.float32)
    series: list[np.ndarray] = []
    for t in range(size):
        series.append(correlate(xi[t].copy(), series[::-1][: bands - 1], bands))
    np.testing.assert_allclose(
        np.stack(series), np.linalg.solve(matrix(bands, size), xi), atol=1e-5
    )
    assert math.isclose(running_noise(1, size), math.sqrt((size + 1) / 2)), (
        "the sum of independent noise is a random walk"
    )
