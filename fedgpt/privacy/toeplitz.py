"""Correlated noise for a series of releases: later noise partly cancels earlier noise.

A model is the sum of all releases, so only the noise of that sum matters. Independent noise grows
like a random walk; noise that is negatively correlated grows more slowly. Its strategy matrix is
the Toeplitz matrix of (1 - x)^(-1/2) cut to b bands (banded matrix factorisation, Choquette-Choo et
al., arXiv 2306.08153). The noise of release t is

    y_t = xi_t - sum_{j=1}^{b-1} c_j y_{t-j}

with independent xi_t, scaled by the sensitivity of a client that takes part at most k times, at
least b releases apart. All releases of the run together are then ONE Gaussian mechanism.
"""

from __future__ import annotations

import math
from itertools import repeat

import numpy as np


def coefficients(bands: int) -> np.ndarray:
    """c_0 = 1, c_k = c_{k-1} (2k - 1) / (2k): (bands,) float64.

    >>> coefficients(4).tolist()
    [1.0, 0.5, 0.375, 0.3125]
    """
    k = np.arange(1, bands)
    return np.concatenate(([1.0], np.cumprod((2 * k - 1) / (2 * k))))


def sensitivity(bands: int, releases: int, separation: int, participations: int) -> float:
    """The sensitivity of all releases together to one client, as a multiple of the clip.

    This is || sum_j column(j * separation) || over j < participations. Raises ValueError if
    `separation` is below `bands`, because the columns of one client could then overlap.
    """
    if separation < bands:
        raise ValueError(f"separation={separation} is below bands={bands}")
    c = coefficients(bands)
    starts = range(0, releases, separation)[:participations]
    # only the last column can be cut off by the end of the run, as separation >= bands
    complete = repeat(float(np.square(c).sum()), len(starts) - 1)
    return math.sqrt(sum(complete) + float(np.square(c[: releases - starts[-1]]).sum()))


def correlate(fresh: np.ndarray, earlier: list[np.ndarray], bands: int) -> np.ndarray:
    """y_t from xi_t (`fresh`, changed in place) and the earlier noise, the newest first."""
    for c, y in zip(coefficients(bands)[1:], earlier, strict=False):
        fresh -= np.float32(c) * y
    return fresh
