"""The metrics of versions and of the run: the lines of metrics.jsonl, and summary.json."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedgpt.core.messages import ServerState, Update
from fedgpt.core.score import Scoring
from fedgpt.server.collector import UpdateCollector
from fedgpt.server.diagnostics import Diagnostics
from fedgpt.server.in_flight import InFlight
from fedgpt.server.version import OpenVersion
from fedgpt.storage.checkpoint import Snapshot
from fedgpt.storage.tables import Clients, RunIdentity, RunTotals, VersionLine

# metrics of compression at the client; see update/feedback.py
STAGES = ("compress_error", "residual_norm")


# fields of every line, with their values at version 0 before its evaluation
FIRST: Mapping[str, Any] = {
    "version": 0,
    "tokens": 0,
    "wall_seconds": 0.0,
    "virtual_seconds": None,
    "bytes_up": 0,
    "bytes_down": 0,
    "accepted": 0,
    "rejected": {},
    "staleness": {},
    "train_loss": None,
    "lr": None,
    "update_norm": None,
    "update_tokens": None,
    "step_norm": 0.0,
    "cosine": None,
    "step_correlation": None,
    "mean_weight": None,
    "in_flight": 0,
    "bases": 0,
    "state_lost": 0,
    "micro_batch": None,
    "tokens_by_client": {},
    "idle_share": {},
    "clipped": 0,
    "quarantined": 0,
    "restored": None,
    "epsilon": None,
    "pacing": None,
    **dict.fromkeys(STAGES),
}


class RunMetrics:
    """The newest version's line, and the state from which the next line is computed."""

    def __init__(self, snapshot: Snapshot):
        self.line = snapshot.line
        self.diagnostics = Diagnostics(snapshot.state.params.size, snapshot.extra)
        self._began = time.monotonic()
        self._earlier = snapshot.totals.wall_seconds  # seconds of earlier starts of this run

    def wall_seconds(self) -> float:
        """Wall time of the run, over all its starts."""
        return self._earlier + time.monotonic() - self._began


def first_line(samples: int) -> VersionLine:
    """The line of version 0, before its evaluation; a single sample is that of the last version."""
    return VersionLine(FIRST, sample=samples > 1)


def line_of_version(
    version: OpenVersion, totals: RunTotals, clients: Clients, in_flight: InFlight
) -> dict[str, Any]:
    """The line of the version that was just made from the updates of `version`."""
    collector = version.collector
    return {
        **_position(version.start.version + 1, totals, clients, in_flight.transport.virtual),
        **_updates(collector, version.rejections),
        "in_flight": len(in_flight),
        # one model is kept for every version that a job in flight started from
        "bases": len({job.version for job in in_flight}),
        **_clients(collector.shown, clients, totals.seconds),
    }


def _position(version: int, totals: RunTotals, clients: Clients, virtual: bool) -> dict[str, Any]:
    """The run's progress and totals."""
    return {
        "version": version,
        "tokens": totals.tokens_done,
        "wall_seconds": round(totals.wall_seconds, 3),
        "virtual_seconds": round(totals.seconds, 6) if virtual else None,
        "bytes_up": totals.bytes_up,
        "bytes_down": totals.bytes_down,
        "quarantined": len(clients.resting),
        "restored": None,
    }


def _updates(collector: UpdateCollector, rejections: Counter[str]) -> dict[str, Any]:
    """Metrics of the replies of a version."""
    accepted = collector.accepted
    staleness = Counter(int(update.metrics["staleness"]) for update in accepted)
    means = ("train_loss", "lr", "update_norm", *STAGES)
    count = len(accepted)
    return {
        "accepted": count,
        "rejected": dict(rejections),
        "clipped": collector.clipped,
        "staleness": {str(tau): n for tau, n in sorted(staleness.items())},
        **{name: _mean(accepted, name) for name in means},
        "update_tokens": sum(u.tokens for u in accepted) / count if count else None,
        "mean_weight": math.fsum(collector.weights) / count if count else None,
        "state_lost": int(sum(update.metrics.get("state_lost", 0) for update in accepted)),
        "micro_batch": min(_values(accepted, "micro_batch"), default=None),
    }


def _clients(accepted: Sequence[Update], clients: Clients, seconds: float) -> dict[str, Any]:
    """Tokens trained and share of idle time so far, for the clients with an accepted update."""
    ids = sorted({update.client for update in accepted})
    idle = {}
    if seconds > 0:
        shares = {c: 1 - clients.seconds_at_work(c) / seconds for c in ids}
        idle = {c: round(max(0.0, share), 4) for c, share in shares.items()}
    return {"tokens_by_client": {c: clients.tokens_trained(c) for c in ids}, "idle_share": idle}


def summary(
    lines: Sequence[Mapping[str, Any]],
    state: ServerState,
    totals: RunTotals,
    identity: RunIdentity,
    scoring: Scoring,
    virtual: bool,
) -> dict[str, Any]:
    """The content of summary.json; `lines` are the lines of metrics.jsonl."""
    evaluated = scoring.evaluated(lines)
    ends = {"initial": evaluated[0], "final": evaluated[-1], "best": scoring.best(evaluated)}
    return {
        "versions": state.version,
        "tokens": totals.tokens_done,
        "wall_seconds": round(totals.wall_seconds, 3),
        "virtual_seconds": totals.seconds if virtual else None,
        "bytes_up": totals.bytes_up,
        "bytes_down": totals.bytes_down,
        "score": scoring.score.name,
        "higher_is_better": scoring.score.higher_is_better,
        **{end: {"version": line["version"], **scoring.of(line)} for end, line in ends.items()},
        "weights_sha256": weights_digest(state.params),
        "rejected": dict(totals.rejected),
        "epsilon": lines[-1].get("epsilon"),
        "delta": identity.privacy.get("delta"),
        "private": bool(identity.privacy.get("private")),
    }


def counted(rejections: Mapping[str, int]) -> str:
    """Reason codes with their counts, for a message.

    >>> counted({"no_reply": 2, "stale": 1})
    'no_reply x2, stale x1'
    """
    return ", ".join(f"{code} x{count}" for code, count in rejections.items())


def weights_digest(params: np.ndarray) -> str:
    """sha256 of the flat float32 vector."""
    return hashlib.sha256(params.tobytes()).hexdigest()


def _values(accepted: Sequence[Update], name: str) -> list[float]:
    return [update.metrics[name] for update in accepted if name in update.metrics]


def _mean(accepted: Sequence[Update], name: str) -> float | None:
    values = _values(accepted, name)
    return math.fsum(values) / len(values) if values else None
