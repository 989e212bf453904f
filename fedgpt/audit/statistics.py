"""Lower bounds on the privacy loss of a mechanism, from an attacker's scores.

Each canary is a unit that takes part (is inside) or not by a fair coin, and the attacker gives it a
score that should be higher if it took part. Two bounds follow from the scores of one run:

- by means: the distance between the mean scores of both groups, in standard deviations, is an
  estimate of the mu of a Gaussian mechanism;
- by ranks: the number of right guesses among the most extreme scores refutes every epsilon that
  makes so many too unlikely (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846). This bound assumes
  nothing about the mechanism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99  # probability with which the bound by ranks is right
QUANTILE = 2.58  # two-sided 99 % quantile of the normal distribution, for the bound by means


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on mu and epsilon; each is wrong in at most one of a hundred audits."""

    mu: float  # estimate of mu, by means
    mu_bound: float  # lower bound on mu, by means
    epsilon_bound: float  # lower bound on epsilon, by ranks


def bounds(scores: np.ndarray, inside: np.ndarray, delta: float) -> Bounds:
    """Lower bounds from (m,) scores and (m,) bool, whether each canary was inside."""
    a, b = scores[inside], scores[~inside]
    squares = a.var(ddof=1) * (len(a) - 1) + b.var(ddof=1) * (len(b) - 1)
    spread = math.sqrt(squares / (len(scores) - 2))
    mu = float((a.mean() - b.mean()) / spread) if spread > 0 else math.inf
    error = 0.0
    if math.isfinite(mu):
        error = math.sqrt(1 / len(a) + 1 / len(b) + mu**2 / (2 * len(scores)))
    return Bounds(mu, mu - QUANTILE * error, rank_bound(scores, inside, delta))


def rank_bound(scores: np.ndarray, inside: np.ndarray, delta: float) -> float:
    """The largest epsilon that the number of right guesses refutes.

    The attacker guesses that the r/2 highest scores were inside and the r/2 lowest outside, for
    several r, which share the probability of an error.
    """
    order, m, best = np.argsort(scores), len(scores), 0.0
    shares = (m // 10, m // 4, m // 2, m)
    for guesses in shares:
        half = guesses // 2
        right = int(inside[order[m - half :]].sum() + (~inside[order[:half]]).sum())
        allowed = (1 - CONFIDENCE) / len(shares)
        low, high = 0.0, 20.0
        if _p_value(0.0, 2 * half, right, m, delta) > allowed:
            continue
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if _p_value(middle, 2 * half, right, m, delta) <= allowed
                else (low, middle)
            )
        best = max(best, low)
    return best


def _p_value(epsilon: float, guesses: int, right: int, m: int, delta: float) -> float:
    """Upper bound on the probability of `right` guesses under an (epsilon, delta) mechanism."""
    from scipy.special import bdtr, bdtrc

    p = 1 / (1 + math.exp(-epsilon))
    if right == 0:
        return 1.0
    below = bdtr(np.arange(right), guesses, p)  # P[Bin <= k] for k < right
    fewer = np.concatenate([below[:-1][::-1], [0.0]])  # P[Bin < right - i] for i = 1 .. right
    alpha = float(np.max((below[-1] - fewer) / np.arange(1, right + 1)))
    return float(bdtrc(right - 1, guesses, p)) + 2 * m * delta * alpha


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a random positive scores above a random negative; 0.5 if one is empty."""
    from scipy.stats import rankdata

    if not len(positive) or not len(negative):
        return 0.5
    ranks = rankdata(np.concatenate([positive, negative]))
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def rate_at(positive: np.ndarray, negative: np.ndarray, false: float = 0.01) -> float:
    """Share of the positives above the score that a share `false` of the negatives exceeds."""
    return float((positive > np.quantile(negative, 1 - false)).mean())
