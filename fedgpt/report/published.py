"""The metrics of a run with privacy=client that its privacy guarantee covers and that may be
published.

The guarantee covers the models of all versions, and everything computed from them. It assumes that
nobody learns which clients took part in a version. Norms of single updates, counts, bytes, times,
training losses and tables by client depend on the participation, so they are only in the run's
folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedgpt.core.events import Event, MetricsReady, RunOpened

# fields of metrics.jsonl, besides scores, that are computed from options and released models
PUBLISHED = ("version", "tokens", "epsilon", "privacy_clip", "restored", "prompt", "sample")


def published(metrics: Mapping[str, Any], scores: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a line of metrics that may be shown; `scores` are names of scores.

    >>> published({"version": 3, "loss": 2.5, "accepted": 7, "bytes_up": 900}, ["loss"])
    {'version': 3, 'loss': 2.5}
    """
    allowed = {*PUBLISHED, *scores}
    return {name: value for name, value in metrics.items() if name in allowed}


def published_event(event: Event, scores: Iterable[str]) -> Event | None:
    """Return the event with the fields that may be published; None if no field may be published."""
    match event:
        case RunOpened():
            return replace(event, clients=(), seconds=0.0)
        case MetricsReady():
            return replace(event, metrics=published(event.metrics, scores))
    return None
