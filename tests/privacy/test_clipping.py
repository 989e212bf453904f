"""Clipping to a norm, and the clip that adapts to the clients' norms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedgpt.privacy.clipping import AdaptiveClip, clipped


@example(np.float32([2.784899e37]), 0.015625)
@given(
    arrays.arrays(
        np.float32,
        st.integers(1, 40),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
    ),
    st.floats(1e-3, 1e3),
)
def test_no_result_is_longer_than_the_clip(delta, clip):
    found = clipped(delta, clip)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found.astype(np.float64)) <= clip
    if not np.isfinite(delta).all():
        assert not found.any()


def test_clipping_keeps_the_direction_and_short_vectors():
    delta = np.float32([3, 4])
    np.testing.assert_allclose(clipped(delta, 1.0), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(clipped(delta, 6.0), delta)
    huge = np.float32([3e25, 4e25])  # whose squares are infinite in float32
    np.testing.assert_allclose(clipped(huge, 1.0), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(clipped(np.zeros(3, np.float32), 1.0), np.zeros(3))


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_an_adaptive_clip_finds_the_median(start):
    norms, rule, clip = np.linspace(0.5, 1.5, 101), AdaptiveClip(), start
    for _ in range(100):
        clip = rule.next(
            clip, float(np.where(norms <= clip, 0.5, -0.5).sum()), len(norms), noise=0.0
        )
    assert clip == pytest.approx(1.0, abs=0.03)


def test_noise_on_the_bits_moves_the_clip():
    """One of 50 clients more than half is not clipped; the noise has a deviation of 0.05 * 50."""
    rule = AdaptiveClip()
    for noise, share in ((0.0, 0.52), (2.0, 0.62), (-1.0, 0.47)):
        assert rule.next(3.0, 1.0, 50, noise) == pytest.approx(3 * math.exp(-0.2 * (share - 0.5)))


def test_updates_and_bits_together_cost_the_given_noise_multiplier():
    rule = AdaptiveClip()
    z = rule.release_noise(1.0, 50)
    assert z == pytest.approx(1.0206, abs=1e-4)
    # the bits have sensitivity 1/2 and noise sigma, so mu_total^2 = 1/z^2 + (1/2 / sigma)^2
    assert 1 / z**2 + (0.5 / rule.sigma(50)) ** 2 == pytest.approx(1.0)
    assert rule.release_noise(5.0, 50) == math.inf, "z >= 2 sigma_b: the bits alone cost more"
