"""What a private run protects and what that will cost, known before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, calibrate, epsilon_of
from fedgpt.privacy.clipping import AdaptiveClip
from fedgpt.privacy.toeplitz import sensitivity

# delta = n^-1.1 by default: below 1/n, at which a mechanism may simply publish one of n
EXPONENT = 1.1


@dataclass(frozen=True)
class PrivacyPlan:
    """The mechanism of a run in numbers, and its cost if the run goes as planned."""

    unit: str  # example, client, local
    # poisson: everybody by a coin; bounded: whoever comes, so often at most; correlated: as one
    # event
    sampling: str
    planned: Event  # of one unit that takes part as often as it may
    delta: float
    budget: float | None  # epsilon that is never exceeded; None: no limit
    protected: int  # clients, or blocks of the largest client
    # releases (client) or jobs (example, local) that one client takes part in at most
    participations: int
    cohort: float  # client: K, the constant that a sum is divided by
    # correlated: how far one client moves the whole series, in clips; a factor on the noise
    scale: float = 1.0

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over how far one unit can move what it is added to."""
        return self.planned.noise_multiplier

    @property
    def epsilon(self) -> float:
        """If the run goes as planned."""
        return epsilon_of((self.planned,), self.delta)


def make_plan(o: RunOptions, shards: Sequence[int]) -> PrivacyPlan:
    """The plan of a run over clients with so many tokens each; raises ConfigError where no
    accounting is right.
    """
    unit, blocks = o.privacy.unit, [count_blocks(size, o) for size in shards]
    protected = max(blocks) if unit == "example" else len(shards)
    sampling = sampling_of(o)
    cohort = _cohort(o, len(shards))
    participations = o.privacy.participations or _participations(o, len(shards), cohort)
    delta = default_delta(protected) if o.privacy.delta is None else o.privacy.delta
    if problems := list(_problems(o, delta, protected, len(shards), cohort, sampling)):
        raise ConfigError(problems)
    probability, count, scale = 1.0, participations, 1.0
    if unit == "example":
        # the smallest shard pays most; all add the same noise
        probability = sampling_probability(o, min(blocks))
        count = participations * o.local.steps
    elif sampling == "poisson":
        probability, count = float(o.pace.rate or 1.0), o.rounds
    elif sampling == "correlated":
        scale = sensitivity(o.privacy.bands, o.rounds, o.privacy.separation, participations)
        count = 1
    noise = o.privacy.noise_multiplier
    if noise is None:
        assert o.privacy.target_epsilon is not None, (
            "one of the two is there: checked with the options"
        )
        noise = _calibrated(o.privacy.target_epsilon, probability, count, delta)
    if o.privacy.adaptive and not math.isfinite(AdaptiveClip().release_noise(noise, cohort)):
        raise ConfigError(
            f"privacy.adaptive=true: noise of {noise:.3g} needs more than"
            f" {noise / 2 / AdaptiveClip().share:.0f} clients in a cohort to count bits under, this"
            f" run has {cohort:g}; raise pace.rate or pace.clients, or leave it out"
        )
    planned = Event(noise, probability, count)
    budget = o.privacy.target_epsilon
    plan = PrivacyPlan(
        unit, sampling, planned, delta, budget, protected, participations, cohort, scale
    )
    if unit != "client" and budget is not None and plan.epsilon > budget:
        raise ConfigError(
            f"privacy.noise_multiplier={noise:g}: {count} releases would cost epsilon"
            f" {plan.epsilon:.3g}, and privacy.target_epsilon={budget:g}; leave the noise out, from"
            " which it follows, or lower rounds"
        )
    return plan


def sampling_of(o: RunOptions) -> str:
    """How a unit comes to take part, which decides the accounting."""
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
    """Blocks of a shard: block_size inputs and the target of the last, cut once, none
    overlapping.
    """
    return tokens // (o.model.block_size + 1)


def sampling_probability(o: RunOptions, blocks: int) -> float:
    """With which a block is in a batch, such that a batch has local.batch_size x local.accumulate
    on average.
    """
    return min(1.0, o.local.batch_size * o.local.accumulate / blocks)


def default_delta(units: int) -> float:
    """units^-1.1, and below one half for one or two."""
    return max(2, units) ** -EXPONENT


@lru_cache(maxsize=16)
def _calibrated(target: float, probability: float, count: int, delta: float) -> float:
    """Rounded up to four figures, so that it can be read and typed."""
    noise = calibrate(target, probability, count, delta)
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return round(math.ceil(noise / unit) * unit, 12)


def _cohort(o: RunOptions, clients: int) -> float:
    """K: the updates that a server step expects; never how many came."""
    if o.pace.name == "buffer":
        return float(o.pace.goal or 1)
    if o.pace.rate is not None:
        return o.pace.rate * clients
    size = min(o.pace.clients or clients, clients)
    return float(min(o.pace.goal or size, size))


def _participations(o: RunOptions, clients: int, cohort: float) -> int:
    """How often one client may come, where the options do not say: always; or its share and three
    deviations more.
    """
    if o.privacy.unit == "client":
        return -(-o.rounds // o.privacy.separation)
    share = o.rounds * cohort / clients
    if o.pace.name == "cohort" and cohort == clients and o.pace.rate is None:
        return o.rounds
    return min(
        o.rounds * (1 if o.pace.name == "cohort" else 10**9),
        math.ceil(share + 3 * math.sqrt(share)),
    )


def _problems(
    o: RunOptions, delta: float, protected: int, clients: int, cohort: float, sampling: str
) -> Iterator[str]:
    noun = "blocks of the largest client" if o.privacy.unit == "example" else "clients"
    if protected < 1:
        yield f"model.block_size={o.model.block_size}: no client has a whole block; lower it"
    elif delta >= 1 / protected and protected > 1:
        yield (
            f"privacy.delta={delta:g}: must be below 1/{protected}, one over the {noun}; a"
            " mechanism with more may publish one of them; leave it out for"
            f" {default_delta(protected):.2g}"
        )
    apart = o.privacy.separation
    if (
        o.privacy.unit == "client"
        and sampling != "poisson"
        and apart > 1
        and clients < cohort * apart
    ):
        yield (
            f"privacy.separation={apart}: {clients} clients cannot fill {cohort:g} places in each"
            f" of {apart} versions without coming back; lower it to"
            f" {max(1, int(clients // cohort))} at most, or lower pace.clients"
        )
    if min(cohort, clients) <= 0:
        yield "privacy: no client takes part; raise pace.clients or pace.rate"
