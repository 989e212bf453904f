"""Clipping to an L2 norm, which bounds how far one unit moves a sum.

The noise of a release is proportional to the clip: a large clip needs much noise, a small one
shortens most updates. `AdaptiveClip` moves the clip towards a quantile of the clients' norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SMALLEST = 2.0**-100  # smallest factor that is applied in float32, far from its subnormal numbers
MARGIN = 1 - 1e-6  # factor that keeps a clipped vector within the clip in spite of rounding


def clipped(delta: np.ndarray, clip: float) -> np.ndarray:
    """`delta`, scaled down to L2 norm `clip` if it is longer; zeros if an element is not finite.

    `delta` is one flat float32 vector of all parameters, so the norm is that of the full update.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(float(np.dot(delta, delta)))
        if not math.isfinite(norm):  # the squares of large values overflow in float32
            norm = float(np.linalg.norm(delta.astype(np.float64)))
    if not math.isfinite(norm):
        return np.zeros_like(delta)
    if norm <= clip * MARGIN:
        return delta
    factor = clip / norm * MARGIN
    if factor < SMALLEST:
        return (delta.astype(np.float64) * factor).astype(np.float32)
    return delta * np.float32(factor)


@dataclass(frozen=True)
class AdaptiveClip:
    """A clip that moves to a quantile of the clients' norms (Andrew et al. 2021, arXiv 1905.03871).

    C <- C exp(-rate (b - quantile)), where b is the noisy share of clients whose update was NOT
    clipped: if most are not, the clip is too large and decreases. Each client contributes +1/2 (not
    clipped) or -1/2 (clipped), so that it moves the sum by 1/2 and an absent client by 0.
    """

    quantile: float = 0.5  # share of the updates that the clip should leave unclipped
    rate: float = 0.2  # learning rate of the clip's logarithm
    share: float = 0.05  # standard deviation of the noise on the sum of bits, over the cohort K

    def sigma(self, cohort: float) -> float:
        """Standard deviation of the noise on the sum of bits."""
        return self.share * cohort

    def release_noise(self, noise_multiplier: float, cohort: float) -> float:
        """Noise multiplier z_delta of the updates, so that updates and bits together cost z.

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2); math.inf if the bits alone cost more than z.
        """
        left = noise_multiplier**-2 - (2 * self.sigma(cohort)) ** -2
        return left**-0.5 if left > 0 else math.inf

    def next(self, clip: float, bits: float, cohort: float, noise: float) -> float:
        """The next clip; `bits` is sum_i (b_i - 1/2), `noise` a draw from N(0, 1)."""
        unclipped = 0.5 + (bits + self.sigma(cohort) * noise) / cohort
        return clip * math.exp(-self.rate * (unclipped - self.quantile))
