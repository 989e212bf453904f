"""How much one unit may move a sum: clipping to one L2 norm, and a clip that follows the norms it
sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SMALLEST = 2.0**-100  # factors that float32 holds in full
MARGIN = 1 - 1e-6  # float32's rounding shall not carry a clipped vector over its clip


def clipped(delta: np.ndarray, clip: float) -> np.ndarray:
    """`delta`, one vector over all parameters, scaled down to norm `clip` where it is longer; all
    zeros where it is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(float(np.dot(delta, delta)))
        if not math.isfinite(norm):  # of values whose squares float32 does not hold
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

    C <- C exp(-rate (b - quantile)), b the noisy share of clients whose update was NOT clipped:
    where most are not, the clip is too long and falls. Bits count from 1/2: a client moves their
    sum by 1/2, an absent one not at all.
    """

    quantile: float = 0.5
    rate: float = 0.2
    # noise on the count of bits, as a share of the cohort: its sigma is K * share
    share: float = 0.05

    def sigma(self, cohort: float) -> float:
        """Standard deviation of the noise on the sum of bits."""
        return self.share * cohort

    def release_noise(self, noise_multiplier: float, cohort: float) -> float:
        """Noise multiplier of the sum of updates, such that sum and bits together cost
        `noise_multiplier`.

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2); math.inf where the bits alone cost more than that.
        """
        left = noise_multiplier**-2 - (2 * self.sigma(cohort)) ** -2
        return left**-0.5 if left > 0 else math.inf

    def next(self, clip: float, bits: float, cohort: float, noise: float) -> float:
        """The next clip; `bits` is sum_i (b_i - 1/2), `noise` a draw from N(0, 1)."""
        unclipped = 0.5 + (bits + self.sigma(cohort) * noise) / cohort
        return clip * math.exp(-self.rate * (unclipped - self.quantile))
