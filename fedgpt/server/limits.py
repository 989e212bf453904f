"""How long an update may be: a limit that follows the updates accepted before.

An update may be as long as `validate.norm` times the running median of the accepted norms. The
median is that of the versions before, so a limit never depends on who answers first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fedgpt.core.messages import Update
from fedgpt.core.options import ValidateOptions

REMEMBERED = 64  # norms of accepted updates that the running median is taken over
ENOUGH = 8  # norms that must be known before the median limits anything
ABSOLUTE = 10.0  # lengths of the global model that no update exceeds, whatever the median is


@dataclass(frozen=True)
class Limits:
    """What the updates of one version are measured against; fixed when the version opens."""

    norm: float  # a longer update is rejected
    clip: float | None  # a longer update is scaled down to this length; None: never
    max_updates: int  # the largest number of updates that one server step can have


def norm_limit(options: ValidateOptions, norms: tuple[float, ...], model: float) -> float:
    """The longest update that a version accepts; `model` is the length of the global model.

    >>> norm_limit(ValidateOptions(norm=10), (1.0,) * 8, 3.0)
    10.0
    """
    absolute = ABSOLUTE * max(1.0, model)
    if not options.norm or len(norms) < ENOUGH:
        return absolute
    return min(absolute, options.norm * statistics.median(norms))


def clip_length(options: ValidateOptions, norms: tuple[float, ...]) -> float | None:
    """The length that longer updates of a version are scaled down to; None: none is scaled."""
    return (
        options.clip * statistics.median(norms) if options.clip and len(norms) >= ENOUGH else None
    )


def remembered(norms: tuple[float, ...], accepted: Iterable[Update]) -> tuple[float, ...]:
    """The norms that the next version is measured by; the order of arrival does not matter."""
    new = sorted((u.client, u.number, u.metrics["update_norm"]) for u in accepted)
    return (*norms, *(norm for _, _, norm in new if norm > 0))[-REMEMBERED:]
