"""The privacy loss of a list of noisy releases: epsilon at a delta.

A release is a clipped sum plus Gaussian noise, and an attacker sees all releases of a run. The
privacy loss of all releases together follows from composition, in two cases:

- Without sampling (every unit may be in every release) they are Gaussian mechanisms. Their
  composition has a closed form: mu^2 adds up (Dong, Roth & Su, arXiv 1905.02383), even if a
  client's later updates depend on earlier releases.
- With Poisson sampling (every unit is in a release with a fixed probability) they are composed by
  dp-accounting's privacy loss distributions, which are tight, under add-or-remove-one adjacency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# discretisation of the privacy losses; half of it changed epsilons of the tests by less than 1e-4
INTERVAL = 1e-4
# number of discrete losses of one release, at most; three times as many changed epsilons of the
# tests by less than 1e-4
POINTS = 30_000
ROUGHLY = 10_000  # the same while a noise multiplier is searched for
PRECISE = 1e-3  # relative precision of a calibrated noise multiplier
FINE = 1e-5  # relative precision of an epsilon above LARGE, to which the discretisation is adapted
LARGE = 100.0
SMALL_LOSSES = 100.0  # noise multiplier above which the discretisation shrinks with the losses
# the loss distributions cannot tell epsilons from 709.8 to this from each other in float64
OVERFLOW = 745.2
# limits of the loss distributions, which then need too much memory or are inexact: with a delta of
# 1e-13 the rounding errors of their convolutions made epsilons too small; beyond the limits the
# looser Renyi bound is used
LEAST_NOISE, LEAST_DELTA, MOST_RELEASES = 0.01, 1e-12, 10**6


@dataclass(frozen=True)
class Event:
    """`count` releases of the same kind."""

    noise_multiplier: float  # standard deviation of the noise over the sensitivity of the sum
    sampling_probability: float  # probability with which each unit is in a release
    count: int


def epsilon_of(events: Iterable[Event], delta: float, points: int = POINTS) -> float:
    """Epsilon of all these releases together; math.inf if one has no noise.

    `points` limits the number of discrete privacy losses of a sampled release.
    """
    events = tuple(event for event in events if event.count)
    if any(event.noise_multiplier <= 0 for event in events):
        return math.inf
    unsampled = gaussian_epsilon(
        math.sqrt(sum(e.count / e.noise_multiplier**2 for e in events)), delta
    )
    if all(event.sampling_probability == 1 for event in events):
        return unsampled
    if not _is_exact(events, delta):
        return min(renyi_epsilon(events, delta), unsampled)
    least = min(event.noise_multiplier for event in events)
    longest = (1 / (2 * least) + 8) / least  # about the largest loss of one release
    interval = max(INTERVAL * min(1.0, SMALL_LOSSES / least), longest / points)
    if unsampled > LARGE and (rough := renyi_epsilon(events, delta)) > LARGE:
        interval = max(interval, min(FINE * rough, longest / 1000))
    return min(_composed(events, delta, interval), unsampled)


def accountant_of(events: Iterable[Event], delta: float) -> str:
    """How `epsilon_of` computes, in words.

    >>> accountant_of([Event(1.0, 1.0, 9)], 1e-5)
    'closed form of Gaussian mechanisms'
    """
    events = tuple(event for event in events if event.count)
    if all(event.sampling_probability == 1 for event in events):
        return "closed form of Gaussian mechanisms"
    if _is_exact(events, delta):
        return "dp-accounting, privacy loss distributions"
    return "dp-accounting, Renyi divergences (an upper bound), or without sampling if that is less"


def _is_exact(events: tuple[Event, ...], delta: float) -> bool:
    """Whether the loss distributions of sampled releases can be composed exactly enough."""
    least = min(event.noise_multiplier for event in events)
    releases = sum(event.count for event in events)
    return least >= LEAST_NOISE and delta >= LEAST_DELTA and releases <= MOST_RELEASES


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a mu-GDP mechanism, by bisection.

    Solves delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) for eps.

    >>> round(gaussian_epsilon(1.0, 1e-5), 2)
    4.38
    """
    if mu == 0:
        return 0.0
    low, high = 0.0, mu**2 / 2 + mu * (8 + math.sqrt(2 * math.log(1 / delta)))
    if _gaussian_delta(mu, low) <= delta:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose epsilon at `delta` is at most `epsilon`."""
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) < epsilon:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_epsilon(middle, delta) > epsilon else (middle, high)
    return low


@lru_cache(maxsize=16)
def calibrate(target: float, sampling_probability: float, count: int, delta: float) -> float:
    """The smallest noise multiplier, to 1e-3 of it, for `count` releases of epsilon `target`.

    It is rounded up to four digits, so that it is short to type. With sampling it is at least
    LEAST_NOISE.
    """

    def excess(z: float, points: int = POINTS) -> float:
        return epsilon_of((Event(z, sampling_probability, count),), delta, points) - target

    enough = math.sqrt(count) / gaussian_mu(target, delta)  # for releases without sampling
    if sampling_probability < 1:
        enough = _crossing(lambda z: excess(z, ROUGHLY), enough * (1 + PRECISE))
    unit = 10.0 ** (math.floor(math.log10(enough)) - 3)
    digits = math.ceil(enough / unit)
    while excess(round(digits * unit, 12)) > 0:  # the discretisation changes with the noise
        digits += 1
    return round(digits * unit, 12)


def _crossing(excess: Callable[[float], float], high: float) -> float:
    """Where a decreasing function of the noise crosses 0, to PRECISE; it is below 0 at `high`.

    The search comes from above, because much noise has few losses, which take little time.
    """
    from scipy.optimize import brentq

    low = max(high / 2, LEAST_NOISE)
    while excess(low) <= 0:
        if low == LEAST_NOISE:
            return low
        low, high = max(low / 2, LEAST_NOISE), low
    solve: Any = brentq  # typed as Any, because its annotations ask for numpy's floats
    return float(solve(excess, low, high, rtol=PRECISE))


@lru_cache(maxsize=256)
def renyi_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """An upper bound on epsilon by Renyi divergences (Mironov et al., arXiv 1908.10530); fast."""
    import absl.logging
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    # the accountant warns about orders that it leaves out, which is harmless
    absl.logging.set_verbosity(absl.logging.ERROR)
    accountant: Any = RdpAccountant()
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian), event.count
        )
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=256)
def _composed(events: tuple[Event, ...], delta: float, interval: float = INTERVAL) -> float:
    """Epsilon by privacy loss distributions; each event is first composed with itself."""
    total: Any = None
    for event in events:
        loss = _single(event.noise_multiplier, event.sampling_probability, interval).self_compose(
            event.count
        )
        total = loss if total is None else total.compose(loss)
    try:
        with np.errstate(over="raise"):
            return float(total.get_epsilon_for_delta(delta))
    except FloatingPointError:
        return OVERFLOW


@lru_cache(maxsize=64)
def _single(noise_multiplier: float, sampling_probability: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_probability
    )


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu); in logarithms, because e^eps overflows."""
    from scipy.special import log_ndtr, ndtr

    return float(
        ndtr(mu / 2 - epsilon / mu) - math.exp(min(0.0, epsilon + log_ndtr(-mu / 2 - epsilon / mu)))
    )
