"""Combinations of options that are refused under privacy, each with the reason.

A combination is refused if its epsilon cannot be computed correctly, or if it would appear private
without a guarantee.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fedgpt.core.options import RunOptions
from fedgpt.core.options.privacy import PRIVATE


class Rule(NamedTuple):
    """The properties of the run's strategy that the accounting needs.

    The defaults hold for a strategy of another library, such as Flower's.
    """

    name: str
    linear: bool = False  # whether its result is a plain sum of the updates
    switches: bool = False  # whether it may change the pacing


def privacy_problems(o: RunOptions, rule: Rule) -> Iterator[str]:
    """The problems of the privacy options together with the other options and the strategy."""
    p = o.privacy
    if p.unit not in PRIVATE:
        return
    name = f"privacy={p.unit}"
    if p.target_epsilon is None and p.noise_multiplier is None:
        yield (
            f"{name}: the amount of noise is missing; set privacy.target_epsilon, from which the"
            " noise follows, or privacy.noise_multiplier"
        )
    if o.tokens:
        yield (
            f"tokens={o.tokens}: the number of releases must be known before a private run; set"
            " rounds instead"
        )
    if p.unit == "example":
        yield from _example(o)
    elif p.unit == "client":
        yield from _client(o, rule)
    else:
        yield from _local(o)


def _example(o: RunOptions) -> Iterator[str]:
    if o.local.precision == "bf16":
        yield (
            "local.precision=bf16: per-example gradients are computed in fp32; take"
            " local.precision=fp32"
        )
    if o.model.dropout:
        yield (
            f"model.dropout={o.model.dropout}: its masks depend on the position in the batch, so"
            " the gradient of one block would depend on the others; take model.dropout=0"
        )


def _local(o: RunOptions) -> Iterator[str]:
    if o.update.error_feedback:
        yield (
            f"update.error_feedback=true ({o.update.compress}): it would add data without noise"
            " to the next update; take update=int8, or set"
            " update.error_feedback=false"
        )


def _client(o: RunOptions, rule: Rule) -> Iterator[str]:
    p = o.privacy
    if not rule.linear:
        linear = "fedbuff" if o.pace.name == "buffer" else "fedavg, fedavgm, diloco"
        yield (
            f"strategy={rule.name}: privacy=client needs a plain sum of clipped updates, and this"
            " rule computes something else: the clip does not bound how far one client moves its"
            f" result; take {linear} or delta_sgd"
        )
    if rule.switches:
        yield (
            f"strategy={rule.name}: it may change the pacing, on which the accounting of"
            " privacy=client depends; take a strategy with a fixed pacing, such as delta_sgd"
        )
    if o.validate.clip:
        yield (
            f"validate.clip={o.validate.clip}: this limit follows other clients' norms, which"
            " privacy=client must not reveal; leave it out, and for a clip that follows them"
            " privately set privacy.adaptive=true"
        )
    if o.pace.dylu:
        yield (
            "pace.dylu=true: one client's speed would change the number of steps of others; under"
            " privacy=client all clients take the same number of steps; leave it out"
        )
    if o.pace.rate is not None and p.participations is not None:
        yield (
            f"privacy.participations={p.participations}: with coins (pace.rate={o.pace.rate}) any"
            " client may be in every release, and the accounting relies on that; leave it out"
        )
    if o.pace.name == "buffer":
        yield from _buffer(o)
    elif o.pace.rate is not None and o.pace.goal is not None:
        yield (
            f"pace.goal={o.pace.goal}: an additional client would push another out of the cohort,"
            " so there is no amplification by sampling; leave it out, or choose pace.clients"
            " instead of pace.rate"
        )
    if p.bands > 1:
        yield from _correlated(o)
    elif p.separation > 1 and o.pace.name == "cohort" and o.pace.rate is not None:
        yield (
            f"privacy.separation={p.separation}: coins cannot separate a client's"
            " participations; set pace.clients, not pace.rate"
        )


def _buffer(o: RunOptions) -> Iterator[str]:
    p = o.privacy
    if p.participations is None:
        yield (
            "privacy.participations: the participation of a client is not random in an asynchronous"
            " run, so there is no amplification by sampling and each client's updates must be"
            " counted; set the largest number of updates of one client"
        )
    if (o.pace.goal or 1) == 1 and not p.single:
        yield (
            f"pace.goal={o.pace.goal or 1}: every server step would contain one client's update"
            " alone, with as much noise as privacy=local needs; raise pace.goal, or set"
            " privacy.single=true to accept that"
        )


def _correlated(o: RunOptions) -> Iterator[str]:
    p = o.privacy
    if o.pace.rate is not None:
        yield (
            f"privacy.bands={p.bands}: correlated noise and sampling by coins have no common"
            " accounting; set pace.clients instead of pace.rate"
        )
    if p.separation < p.bands:
        yield (
            f"privacy.bands={p.bands}: at least as many versions as the noise is correlated over"
            f" must be between two updates of a client; raise privacy.separation={p.separation} to"
            f" {p.bands}, or lower privacy.bands"
        )
    if p.adaptive:
        yield (
            "privacy.adaptive=true: the clip must not change within a series of correlated noise;"
            " leave it out, or set privacy.bands=1"
        )
