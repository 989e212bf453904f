"""What is written of a version and of a run: the lines of metrics.jsonl and summary.json."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedgpt.core.messages import Job, ServerState, Update
from fedgpt.core.score import LANGUAGE, Scoring
from fedgpt.server.collector import UpdateCollector
from fedgpt.storage.checkpoint import RunTables

# what the stages of an update's way tell; see update/feedback.py
STAGES = (
    "compress_error",
    "residual_norm",
)


def first_record() -> dict[str, Any]:
    """Version 0, before its evaluation."""
    return {
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
        "tokens_by_client": {},
        "idle_share": {},
        "clipped": 0,
        "quarantined": 0,
        "restored": None,
        "epsilon": None,
        "pacing": None,
        **dict.fromkeys(STAGES),
    }


def line_of_version(
    version: int,
    tables: RunTables,
    collector: UpdateCollector,
    in_flight: Iterable[Job],
    virtual: bool,
) -> dict[str, Any]:
    """Where the run stands at a version, what came in for it, and what its clients have done so
    far.
    """
    return {
        **_version_record(version, tables, virtual),
        **_updates_record(collector, in_flight),
        # who was in a sample, by which privacy is amplified, is not for everybody's eyes
        **_clients_record([] if collector.private else collector.accepted, tables, tables.seconds),
    }


def _version_record(version: int, tables: RunTables, virtual: bool) -> dict[str, Any]:
    """Where the run stands."""
    return {
        "version": version,
        "tokens": tables.tokens_done,
        "wall_seconds": round(tables.wall_seconds, 3),
        "virtual_seconds": round(tables.seconds, 6) if virtual else None,
        "bytes_up": tables.bytes_up,
        "bytes_down": tables.bytes_down,
        "quarantined": len(tables.quarantine),
        "restored": None,
    }


def _updates_record(collector: UpdateCollector, in_flight: Iterable[Job]) -> dict[str, Any]:
    """What came in for a version."""
    accepted, jobs = collector.accepted, list(in_flight)
    staleness = Counter(int(update.metrics["staleness"]) for update in accepted)
    return {
        "accepted": len(accepted),
        "rejected": dict(collector.rejections),
        "clipped": collector.clipped,
        "staleness": {str(tau): count for tau, count in sorted(staleness.items())},
        **{name: _mean(accepted, name) for name in ("train_loss", "lr", "update_norm", *STAGES)},
        "update_tokens": sum(update.tokens for update in accepted) / len(accepted)
        if accepted
        else None,
        "mean_weight": math.fsum(collector.weights) / len(accepted) if accepted else None,
        "in_flight": len(jobs),
        # versions that jobs in flight began from, before the newest is sent: a model is kept for
        # each of them
        "bases": len({job.version for job in jobs}),
        "state_lost": int(sum(update.metrics.get("state_lost", 0) for update in accepted)),
    }


def _clients_record(
    accepted: Sequence[Update], tables: RunTables, seconds: float
) -> dict[str, Any]:
    """Tokens trained and idle share so far, of the clients of this version."""
    clients = sorted({update.client for update in accepted})
    idle = (
        {c: round(max(0.0, 1 - tables.busy[c] / seconds), 4) for c in clients}
        if seconds > 0
        else {}
    )
    return {"tokens_by_client": {c: tables.trained[c] for c in clients}, "idle_share": idle}


def summary(
    records: Sequence[Mapping[str, Any]],
    state: ServerState,
    tables: RunTables,
    wall: float,
    virtual: bool,
    scoring: Scoring = LANGUAGE,
) -> dict[str, Any]:
    """The machine-readable end of a run."""
    evaluated = scoring.evaluated(records)
    ends = {
        "initial": evaluated[0],
        "final": evaluated[-1],
        "best": scoring.best(evaluated),
    }
    return {
        "versions": state.version,
        "tokens": tables.tokens_done,
        "wall_seconds": round(wall, 3),
        "virtual_seconds": tables.seconds if virtual else None,
        "bytes_up": tables.bytes_up,
        "bytes_down": tables.bytes_down,
        "score": scoring.score.name,
        "higher_is_better": scoring.score.higher_is_better,
        **{end: {"version": r["version"], **scoring.of(r)} for end, r in ends.items()},
        "weights_sha256": weights_digest(state.params),
        "rejected": tables.rejected,
        "epsilon": records[-1].get("epsilon"),
        "delta": tables.privacy.get("delta"),
        "private": bool(tables.privacy.get("private")),
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


def _mean(accepted: Sequence[Update], name: str) -> float | None:
    values = [update.metrics[name] for update in accepted if name in update.metrics]
    return math.fsum(values) / len(values) if values else None
