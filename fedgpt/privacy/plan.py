"""The privacy plan: the unit that a run protects, its noise and its epsilon.

It is computed before the run, from the options and the sizes of the clients' shards. The noise for
the target epsilon depends on the number of releases that may contain a unit, and on the sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, calibrate, epsilon_of
from fedgpt.privacy.clipping import AdaptiveClip
from fedgpt.privacy.toeplitz import sensitivity

# the default delta of n units is n^-EXPONENT; it must be below 1/n, because with a delta of 1/n a
# mechanism could simply publish the data of one unit
EXPONENT = 1.1


@dataclass(frozen=True)
class PrivacyPlan:
    """The mechanism of a run in numbers, and its cost if the run goes as planned."""

    unit: str  # example, client, local
    # poisson: each unit is in a release by a coin flip; bounded: a client is in at most
    # `participations` releases; correlated: the noise of a series of releases is one event
    sampling: str
    planned: Event  # the releases that contain a unit, if it takes part as often as allowed
    delta: float
    budget: float | None  # epsilon that is never exceeded; None: no limit
    protected: int  # number of clients (client, local) or of the largest client's blocks (example)
    # largest number of releases (client) or jobs (example, local) that one client takes part in
    participations: int
    cohort: float  # client: K, the constant that a sum is divided by
    # correlated: sensitivity of all releases together, as a multiple of the clip; scales the noise
    scale: float = 1.0

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise divided by the sensitivity of the sum."""
        return self.planned.noise_multiplier

    @property
    def epsilon(self) -> float:
        """Epsilon at `delta`, if the run goes as planned."""
        return epsilon_of((self.planned,), self.delta)


def make_plan(o: RunOptions, shards: Sequence[int]) -> PrivacyPlan:
    """The plan of a run whose clients have `shards` tokens each.

    Raises ConfigError if there is no correct accounting, or the budget cannot be met.
    """
    unit, blocks = o.privacy.unit, [count_blocks(size, o) for size in shards]
    # a site says how much text it has down to a power of two
    largest = max(shards) * (2 if o.corpus.at_sites else 1)
    protected = count_blocks(largest, o) if unit == "example" else len(shards)
    sampling = sampling_of(o)
    cohort = _cohort(o, len(shards))
    participations = o.privacy.participations or _participations(o, len(shards), cohort)
    delta = default_delta(protected) if o.privacy.delta is None else o.privacy.delta
    if problems := list(_problems(o, delta, protected, len(shards), cohort)):
        raise ConfigError(problems)
    probability, count, scale = 1.0, participations, 1.0
    if unit == "example":
        # the smallest shard costs most, because all clients add the same noise; a site of one block
        # may report fewer tokens than a block has
        probability = sampling_probability(o, max(1, min(blocks)))
        count = participations * o.local.steps
    elif sampling == "poisson":
        probability, count = float(o.pace.rate or 1.0), o.rounds
    elif sampling == "correlated":
        scale = sensitivity(o.privacy.bands, o.rounds, o.privacy.separation, participations)
        count = 1
    noise = o.privacy.noise_multiplier
    if noise is None:
        assert o.privacy.target_epsilon is not None, "checked by privacy_problems"
        noise = calibrate(o.privacy.target_epsilon, probability, count, delta)
    if o.privacy.adaptive and not math.isfinite(AdaptiveClip().release_noise(noise, cohort)):
        raise ConfigError(
            f"privacy.adaptive=true: with noise of {noise:.3g}, adapting the clip needs more than"
            f" {noise / 2 / AdaptiveClip().share:.0f} clients in a cohort, this run has"
            f" {cohort:g}; raise {_cohort_option(o)}, or leave it out"
        )
    planned = Event(noise, probability, count)
    budget = o.privacy.target_epsilon
    plan = PrivacyPlan(
        unit, sampling, planned, delta, budget, protected, participations, cohort, scale
    )
    if unit != "client" and budget is not None and plan.epsilon > budget:
        least = replace(planned, count=count // participations)
        helps = epsilon_of((least,), delta) <= budget
        length = "rounds" if o.privacy.participations is None else "privacy.participations"
        raise ConfigError(
            f"privacy.noise_multiplier={noise:g}: {count} releases would cost epsilon"
            f" {plan.epsilon:.3g}, above privacy.target_epsilon={budget:g}; leave the noise out, so"
            f" that it follows from the target{f', or lower {length}' if helps else ''}"
        )
    return plan


def sampling_of(o: RunOptions) -> str:
    """The sampling of the units of a release, which determines the accounting."""
    if o.privacy.unit == "example":
        return "poisson"
    if o.privacy.unit == "client" and o.privacy.bands > 1:
        return "correlated"
    return (
        "poisson"
        if o.privacy.unit == "client" and o.pace.name == "cohort" and o.pace.rate
        else "bounded"
    )


def count_blocks(tokens: int, o: RunOptions) -> int:
    """Number of blocks of a shard; a block is block_size inputs and one more target.

    Blocks do not overlap, and are cut once for the run.
    """
    return tokens // (o.model.block_size + 1)


def sampling_probability(o: RunOptions, blocks: int) -> float:
    """Probability with which each block is in a batch.

    It gives batches of local.batch_size x local.accumulate blocks on average.
    """
    return min(1.0, o.local.batch_size * o.local.accumulate / blocks)


def default_delta(units: int) -> float:
    """units^-1.1; for one unit, the value for two."""
    return max(2, units) ** -EXPONENT


def _cohort(o: RunOptions, clients: int) -> float:
    """K: the number of updates that a server step expects; not the number that arrived."""
    if o.pace.name == "buffer":
        return float(o.pace.goal or 1)
    if o.pace.rate is not None:
        return o.pace.rate * clients
    size = min(o.pace.clients or clients, clients)
    return float(min(o.pace.goal or size, size))


def _cohort_option(o: RunOptions) -> str:
    """The option that determines `_cohort`."""
    if o.pace.name == "buffer":
        return "pace.goal"
    return "pace.clients" if o.pace.rate is None else "pace.rate"


def client_participations(o: RunOptions) -> int:
    """The participations of one client that a run with privacy=client is planned for: unless the
    options set them, in every version that privacy.separation allows.
    """
    return o.privacy.participations or math.ceil(o.rounds / o.privacy.separation)


def _participations(o: RunOptions, clients: int, cohort: float) -> int:
    """The participations of one client, if the options do not set them.

    With privacy at the clients: in every round if all clients are in every round, else its expected
    share of the jobs plus three standard deviations.
    """
    if o.privacy.unit == "client":
        return client_participations(o)
    share = o.rounds * cohort / clients
    if o.pace.name == "cohort" and cohort == clients and o.pace.rate is None:
        return o.rounds
    return min(
        o.rounds * (1 if o.pace.name == "cohort" else 10**9),
        math.ceil(share + 3 * math.sqrt(share)),
    )


def _problems(
    o: RunOptions, delta: float, protected: int, clients: int, cohort: float
) -> Iterator[str]:
    noun = "blocks of the largest client" if o.privacy.unit == "example" else "clients"
    if protected < 1:
        yield (
            f"model.block_size={o.model.block_size}: no client has enough tokens for a block;"
            " lower it"
        )
    elif delta >= 1 / protected and protected > 1:
        yield (
            f"privacy.delta={delta:g}: must be below 1/{protected}, one over the number of"
            f" {noun}, because with a larger delta a mechanism could publish one of them; leave it"
            f" out for {default_delta(protected):.2g}"
        )
    apart = o.privacy.separation
    if apart > 1 and clients < cohort * apart:  # only with privacy=client and without coins
        yield (
            f"privacy.separation={apart}: {clients} clients cannot fill {cohort:g} places in each"
            f" of {apart} versions without one taking part twice; lower it to"
            f" {max(1, int(clients // cohort))} at most, or lower pace.clients"
        )
