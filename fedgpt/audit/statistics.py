"""What an attacker's guesses prove: lower bounds on the privacy that a mechanism can have given.

Canaries are units that are in or out by a fair coin and easy to find again. Two statistics over one
run: how far the scores of those that were in lie from the others', as the mu of a Gaussian
mechanism; and how many of the most extreme scores are guessed right (Steinke, Nasr & Jagielski
2023, arXiv 2305.08846), which assumes nothing of the mechanism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99
QUANTILE = 2.58  # two-sided 99 % of a normal


@dataclass(frozen=True)
class Bounds:
    """What a correct mechanism exceeds once in a hundred audits."""

    mu: float  # estimate
    mu_bound: float  # mu is at least this
    epsilon_bound: float  # epsilon is at least this, by ranks


def bounds(scores: np.ndarray, inside: np.ndarray, delta: float) -> Bounds:
    """Lower bounds from (m,) scores and who was inside, (m,) bool."""
    there, away = scores[inside], scores[~inside]
    spread = math.sqrt(
        (there.var(ddof=1) * (len(there) - 1) + away.var(ddof=1) * (len(away) - 1))
        / (len(scores) - 2)
    )
    mu = float((there.mean() - away.mean()) / spread) if spread > 0 else math.inf
    error = (
        math.sqrt(1 / len(there) + 1 / len(away) + mu**2 / (2 * len(scores)))
        if math.isfinite(mu)
        else 0.0
    )
    return Bounds(mu, mu - QUANTILE * error, rank_bound(scores, inside, delta))


def rank_bound(scores: np.ndarray, inside: np.ndarray, delta: float) -> float:
    """The largest epsilon that right guesses refute: the r/2 highest scores are guessed in, the r/2
    lowest out.
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
    """How likely so many right guesses are at most, of an (epsilon, delta) mechanism."""
    from scipy.special import bdtr, bdtrc

    p = 1 / (1 + math.exp(-epsilon))
    if right == 0:
        return 1.0
    below = bdtr(np.arange(right), guesses, p)  # P[Bin <= k] of k < right
    fewer = np.concatenate([below[:-1][::-1], [0.0]])  # P[Bin < right - i] of i = 1 .. right
    alpha = float(np.max((below[-1] - fewer) / np.arange(1, right + 1)))
    return float(bdtrc(right - 1, guesses, p)) + 2 * m * delta * alpha


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a random positive scores above a random negative; 0.5 tells nothing, as
    where there are none.
    """
    from scipy.stats import rankdata

    if not len(positive) or not len(negative):
        return 0.5
    ranks = rankdata(np.concatenate([positive, negative]))
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def rate_at(positive: np.ndarray, negative: np.ndarray, false: float = 0.01) -> float:
    """Share of the positives found where a share `false` of the negatives is taken for one."""
    return float((positive > np.quantile(negative, 1 - false)).mean())
