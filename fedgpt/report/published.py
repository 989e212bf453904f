"""The numbers of a run with privacy=client that may be published.

The guarantee covers the models of all versions, and everything computed from them. It assumes that
nobody learns which clients took part in a version. Every field of a line of metrics and of the
summary is in one of two tables here; a field in neither is not published. The fields that are
withheld depend on who took part: counts, bytes and times tell it directly, norms and losses belong
to single clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedgpt.core.events import Event, MetricsReady, RunOpened

FROM_OPTIONS = "computed from the options: the same whoever took part"
RELEASED = "computed from released models, or released with noise"

# fields of metrics.jsonl, besides scores (RELEASED)
PUBLISHED: Mapping[str, str] = {
    "version": FROM_OPTIONS,
    "tokens": FROM_OPTIONS,  # the expected number, see server/privacy.py
    "epsilon": FROM_OPTIONS,  # without coins also from when clients take part, which is not covered
    "privacy_clip": RELEASED,
    "restored": RELEASED,
    "prompt": FROM_OPTIONS,
    "sample": RELEASED,
}
WITHHELD = frozenset(
    (
        "wall_seconds",
        "virtual_seconds",
        "bytes_up",
        "bytes_down",
        "accepted",
        "rejected",
        "staleness",
        "train_loss",
        "lr",
        "update_norm",
        "update_tokens",
        "step_norm",
        "cosine",
        "step_correlation",
        "mean_weight",
        "in_flight",
        "bases",
        "state_lost",
        "micro_batch",
        "tokens_by_client",
        "idle_share",
        "clipped",
        "quarantined",
        "pacing",
        "compress_error",
        "residual_norm",
    )
)

# fields of summary.json
SUMMARY: Mapping[str, str] = {
    "versions": FROM_OPTIONS,
    "tokens": FROM_OPTIONS,
    "score": FROM_OPTIONS,
    "higher_is_better": FROM_OPTIONS,
    "initial": RELEASED,
    "final": RELEASED,
    "best": RELEASED,
    "weights_sha256": RELEASED,
    "epsilon": FROM_OPTIONS,
    "delta": FROM_OPTIONS,
    "private": FROM_OPTIONS,
}
SUMMARY_WITHHELD = frozenset(
    ("wall_seconds", "virtual_seconds", "bytes_up", "bytes_down", "rejected")
)


def published(metrics: Mapping[str, Any], scores: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a line of metrics that may be shown; `scores` are names of scores.

    >>> published({"version": 3, "loss": 2.5, "accepted": 7, "bytes_up": 900}, ["loss"])
    {'version': 3, 'loss': 2.5}
    """
    allowed = {*PUBLISHED, *scores}
    return {name: value for name, value in metrics.items() if name in allowed}


def published_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with None for each field that may not be shown.

    >>> published_summary({"versions": 3, "bytes_up": 900})
    {'versions': 3, 'bytes_up': None}
    """
    return {name: value if name in SUMMARY else None for name, value in summary.items()}


def published_event(event: Event, scores: Iterable[str]) -> Event | None:
    """Return the event with the fields that may be published; None if no field may be published."""
    match event:
        case RunOpened():
            return replace(event, clients=(), seconds=0.0)
        case MetricsReady():
            return replace(event, metrics=published(event.metrics, scores))
    return None
