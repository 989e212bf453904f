"""Correlated noise as explicit matrices, for comparison with fedgpt/privacy/toeplitz.py."""

from __future__ import annotations

import math

import numpy as np


def matrix(bands: int, size: int) -> np.ndarray:
    """The strategy matrix: Taylor coefficients of (1 - x)^(-1/2) on the first `bands` diagonals."""
    return sum(math.comb(2 * k, k) / 4**k * np.eye(size, k=-k) for k in range(min(bands, size)))


def running_noise(bands: int, releases: int) -> float:
    """Root mean square of the noise in the running sum of releases (the model), for unit xi."""
    sums = np.tri(releases) @ np.linalg.inv(matrix(bands, releases))
    return float(np.linalg.norm(sums)) / math.sqrt(releases)
