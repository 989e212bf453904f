"""Combinations that have no correct accounting, or that look private and are not: refused, each
with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedgpt.core.options import RunOptions
from fedgpt.core.options.privacy import PRIVATE


def privacy_problems(o: RunOptions, strategy: Any) -> Iterator[str]:
    """What is wrong with `privacy` beside the other options; `strategy` is the rule of the run."""
    p = o.privacy
    if p.unit not in PRIVATE:
        return
    name = f"privacy={p.unit}"
    if p.target_epsilon is None and p.noise_multiplier is None:
        yield (
            f"{name}: how much? set privacy.target_epsilon, from which the noise follows, or"
            " privacy.noise_multiplier"
        )
    if o.tokens:
        yield (
            f"tokens={o.tokens}: the number of releases must be known before a private run; set"
            " rounds instead"
        )
    yield from {"example": _example, "client": _client, "local": _local}[p.unit](o, strategy)


def _example(o: RunOptions, strategy: Any) -> Iterator[str]:
    if o.local.precision == "bf16":
        yield (
            "local.precision=bf16: per-example gradients are computed in fp32; take"
            " local.precision=fp32"
        )
    if o.model.dropout:
        yield (
            f"model.dropout={o.model.dropout}: its masks go by the place in the batch, so that one"
            " block less would change the gradients of others, too; take model.dropout=0"
        )


def _local(o: RunOptions, strategy: Any) -> Iterator[str]:
    if o.update.error_feedback:
        yield (
            f"update.error_feedback=true ({o.update.compress}): it would carry what privacy=local"
            " has hidden into the next update; take update=int8, or set"
            " update.error_feedback=false"
        )


def _client(o: RunOptions, strategy: Any) -> Iterator[str]:
    p, rule = o.privacy, getattr(strategy, "name", type(strategy).__name__)
    if not getattr(strategy, "linear", False):
        yield (
            f"strategy={rule}: privacy=client needs a plain sum of clipped updates, and this rule"
            " is none: how far one client moves its result is not bounded by the clip; take"
            " fedavg, fedavgm, diloco, delta_sgd or fedbuff"
        )
    if getattr(strategy, "switches", False):
        yield (
            f"strategy={rule}: it may change the pacing, on which the accounting of privacy=client"
            " depends; name one"
        )
    if o.validate.clip:
        yield (
            f"validate.clip={o.validate.clip}: its length follows other clients' norms, which"
            " privacy=client must not reveal; set privacy.adaptive=true for a clip that follows"
            " them privately, or leave it out"
        )
    if o.pace.dylu:
        yield (
            "pace.dylu=true: how many steps others take would follow one client's speed; under"
            " privacy=client all take the same, leave it out"
        )
    if o.pace.rate is not None and p.participations is not None:
        yield (
            f"privacy.participations={p.participations}: with coins (pace.rate={o.pace.rate})"
            " anybody may come each time, and the accounting counts on it; leave it out"
        )
    if o.pace.name == "buffer":
        yield from _buffer(o)
    elif o.pace.rate is not None and o.pace.goal is not None:
        yield (
            f"pace.goal={o.pace.goal}: one client more would push another out of the cohort, so"
            " coins would amplify nothing; leave it out, or choose pace.clients instead of"
            " pace.rate"
        )
    if p.bands > 1:
        yield from _correlated(o)
    elif p.separation > 1 and o.pace.name == "cohort" and o.pace.rate is not None:
        yield (
            f"privacy.separation={p.separation}: coins cannot keep clients apart; set pace.clients,"
            " not pace.rate"
        )


def _buffer(o: RunOptions) -> Iterator[str]:
    p = o.privacy
    if p.participations is None:
        yield (
            "privacy.participations: who comes how often is not random in an asynchronous run, so"
            " sampling amplifies nothing and each client's updates must be counted; set how many"
            " one client may give"
        )
    if (o.pace.goal or 1) == 1 and not p.single:
        yield (
            f"pace.goal={o.pace.goal or 1}: every server step would carry one client's update"
            " alone, under as much noise as privacy=local; raise pace.goal, or say"
            " privacy.single=true"
        )


def _correlated(o: RunOptions) -> Iterator[str]:
    p = o.privacy
    if o.pace.rate is not None:
        yield (
            f"privacy.bands={p.bands}: correlated noise and coins have no common accounting; set"
            " pace.clients instead"
        )
    if p.separation < p.bands:
        yield (
            f"privacy.bands={p.bands}: a client must stay away for as many versions as noise is"
            f" correlated over; raise privacy.separation={p.separation} to {p.bands}, or lower the"
            " bands"
        )
    if p.adaptive:
        yield (
            "privacy.adaptive=true: the clip must not change within a series of correlated noise;"
            " leave one out"
        )
