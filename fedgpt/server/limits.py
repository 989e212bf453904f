"""The norm limit of updates, computed from updates accepted before.

The limit is `validate.norm` times the running median of the accepted norms. The median is over
earlier versions, so the limit does not depend on the order of arrival.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fedgpt.core.messages import Update
from fedgpt.core.options import ValidateOptions

REMEMBERED = 64  # newest norms of accepted updates, over which the running median is computed
ENOUGH = 8  # norms that must be known before the limit from the median holds
ABSOLUTE = 10.0  # largest norm of an update, as a multiple of the global model's norm (at least 1)


@dataclass(frozen=True)
class Limits:
    """The limits on the updates of one version; fixed when the version opens."""

    norm: float  # a longer update is rejected
    clip: float | None  # a longer update is scaled down to this norm; None: no update is scaled
    max_updates: int  # the largest number of updates that one server step can have


def norm_limit(options: ValidateOptions, norms: tuple[float, ...], model: float) -> float:
    """The largest norm of an accepted update; `model` is the norm of the global model.

    >>> norm_limit(ValidateOptions(norm=10), (1.0,) * 8, 3.0)
    10.0
    """
    absolute = ABSOLUTE * max(1.0, model)
    if not options.norm or len(norms) < ENOUGH:
        return absolute
    return min(absolute, options.norm * statistics.median(norms))


def clip_length(options: ValidateOptions, norms: tuple[float, ...]) -> float | None:
    """The norm to which longer updates of a version are scaled down; None: no update is scaled."""
    return (
        options.clip * statistics.median(norms) if options.clip and len(norms) >= ENOUGH else None
    )


def remembered(norms: tuple[float, ...], accepted: Iterable[Update]) -> tuple[float, ...]:
    """The norms for the limit of the next version; they do not depend on the order of arrival."""
    new = sorted((u.client, u.number, u.metrics["update_norm"]) for u in accepted)
    return (*norms, *(norm for _, _, norm in new if norm > 0))[-REMEMBERED:]
