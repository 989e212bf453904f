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

# discretisation of the privacy losses; half of it changed epsilons of the tests by less than 1e-4
INTERVAL = 1e-4
COARSE = 1e-3  # discretisation while a noise multiplier is searched for: ten times as fast
PRECISE = 1e-3  # relative precision of a calibrated noise multiplier
MOST_NOISE = 1e6  # largest noise multiplier that calibration tries
# noise multiplier below which the loss distributions need too much memory; the looser Renyi bound
# is used instead
LEAST_NOISE = 0.2


@dataclass(frozen=True)
class Event:
    """`count` releases of the same kind."""

    noise_multiplier: float  # standard deviation of the noise over the sensitivity of the sum
    sampling_probability: float  # probability with which each unit is in a release
    count: int


def epsilon_of(events: Iterable[Event], delta: float) -> float:
    """Epsilon of all these releases together; math.inf if one has no noise."""
    events = [event for event in events if event.count]
    if any(event.noise_multiplier <= 0 for event in events):
        return math.inf
    if all(event.sampling_probability == 1 for event in events):
        return gaussian_epsilon(
            math.sqrt(sum(e.count / e.noise_multiplier**2 for e in events)), delta
        )
    if any(event.noise_multiplier < LEAST_NOISE for event in events):
        return renyi_epsilon(events, delta)
    return _composed(tuple(events), delta)


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


def calibrate(target: float, sampling_probability: float, count: int, delta: float) -> float:
    """The smallest noise multiplier, to 1e-3 of it, for `count` releases of epsilon `target`."""
    if sampling_probability == 1:
        return math.sqrt(count) / gaussian_mu(target, delta)

    from scipy.optimize import brentq

    def cost(z: float, interval: float = INTERVAL) -> float:
        return _composed((Event(z, sampling_probability, count),), delta, interval)

    high = _bracket(
        lambda z: renyi_epsilon((Event(z, sampling_probability, count),), delta), target
    )
    low = high / 2
    while cost(low, COARSE) <= target:
        low /= 2
    solve: Any = brentq  # typed as Any, because its annotations ask for numpy's floats
    found = float(solve(lambda z: cost(z, COARSE) - target, low, high, rtol=PRECISE))
    while cost(found) > target:  # both discretisations overestimate epsilon, the coarse one by more
        found *= 1 + PRECISE
    return found


def renyi_epsilon(events: Iterable[Event], delta: float) -> float:
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
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _single(noise_multiplier: float, sampling_probability: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_probability
    )


def _bracket(cost: Callable[[float], float], target: float) -> float:
    """A value, at most 2 % too large, at which a decreasing cost is within the target."""
    high = 1.0
    while cost(high) > target:
        high *= 2
        if high > MOST_NOISE:
            raise ValueError(f"no noise up to {MOST_NOISE:g} keeps epsilon within {target}")
    low = high / 2
    while cost(low) <= target:
        low, high = low / 2, low
    while high > 1.02 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu); in logarithms, because e^eps overflows."""
    from scipy.special import log_ndtr, ndtr

    return float(
        ndtr(mu / 2 - epsilon / mu) - math.exp(min(0.0, epsilon + log_ndtr(-mu / 2 - epsilon / mu)))
    )
