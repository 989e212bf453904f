"""What is written of a version and of a run: the lines of metrics.jsonl and summary.json."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedgpt.core.messages import Job, ServerState, Update
from fedgpt.server.collector import Intake
from fedgpt.storage.checkpoint import Ledgers

STAGES = ("compress_error", "residual_norm")  # what the stages of an update's way tell; see update/feedback.py


def first_record() -> dict[str, Any]:
    """Version 0, before its evaluation."""
    return {
        "version": 0, "tokens": 0, "wall_seconds": 0.0, "virtual_seconds": None, "bytes_up": 0, "bytes_down": 0,
        "accepted": 0, "rejected": {}, "staleness": {}, "train_loss": None, "lr": None, "update_norm": None,
        "update_tokens": None, "step_norm": 0.0, "cosine": None, "step_correlation": None, "mean_weight": None,
        "in_flight": 0, "bases": 0, "state_lost": 0, "tokens_by_client": {}, "idle_share": {}, "clipped": 0,
        "quarantined": 0, "restored": None, "epsilon": None, "pacing": None, **dict.fromkeys(STAGES),
    }  # fmt: skip


def line_of_version(
    version: int, ledgers: Ledgers, intake: Intake, in_flight: Iterable[Job], virtual: bool
) -> dict[str, Any]:  # fmt: skip
    """Where the run stands at a version, what came in for it, and what its clients have done so far."""
    return {
        **_version_record(version, ledgers, virtual),
        **_updates_record(intake, in_flight),
        # who was in a sample, by which privacy is amplified, is not for everybody's eyes
        **_clients_record([] if intake.private else intake.accepted, ledgers, ledgers.seconds),
    }


def _version_record(version: int, ledgers: Ledgers, virtual: bool) -> dict[str, Any]:
    """Where the run stands."""
    return {
        "version": version,
        "tokens": ledgers.tokens_done,
        "wall_seconds": round(ledgers.wall_seconds, 3),
        "virtual_seconds": round(ledgers.seconds, 6) if virtual else None,
        "bytes_up": ledgers.bytes_up,
        "bytes_down": ledgers.bytes_down,
        "quarantined": len(ledgers.quarantine),
        "restored": None,
    }


def _updates_record(intake: Intake, in_flight: Iterable[Job]) -> dict[str, Any]:
    """What came in for a version."""
    accepted, jobs = intake.accepted, list(in_flight)
    staleness = Counter(int(update.metrics["staleness"]) for update in accepted)
    return {
        "accepted": len(accepted),
        "rejected": dict(intake.rejections),
        "clipped": intake.clipped,
        "staleness": {str(tau): count for tau, count in sorted(staleness.items())},
        **{name: _mean(accepted, name) for name in ("train_loss", "lr", "update_norm", *STAGES)},
        "update_tokens": sum(update.tokens for update in accepted) / len(accepted) if accepted else None,
        "mean_weight": math.fsum(intake.weights) / len(accepted) if accepted else None,
        "in_flight": len(jobs),
        # versions that jobs in flight began from, before the newest is sent: a model is kept for each of them
        "bases": len({job.version for job in jobs}),
        "state_lost": int(sum(update.metrics.get("state_lost", 0) for update in accepted)),
    }


def _clients_record(accepted: Sequence[Update], ledgers: Ledgers, seconds: float) -> dict[str, Any]:
    """Tokens trained and idle share so far, of the clients of this version."""
    clients = sorted({update.client for update in accepted})
    idle = {c: round(max(0.0, 1 - ledgers.busy[c] / seconds), 4) for c in clients} if seconds > 0 else {}
    return {"tokens_by_client": {c: ledgers.trained[c] for c in clients}, "idle_share": idle}


def summary(
    records: Sequence[Mapping[str, Any]], state: ServerState, ledgers: Ledgers, wall: float, virtual: bool
) -> dict[str, Any]:
    """The machine-readable end of a run."""
    score = [{k: r[k] for k in ("version", "loss", "perplexity", "bits_per_byte")} for r in records if "loss" in r]
    return {
        "versions": state.version,
        "tokens": ledgers.tokens_done,
        "wall_seconds": round(wall, 3),
        "virtual_seconds": ledgers.seconds if virtual else None,
        "bytes_up": ledgers.bytes_up,
        "bytes_down": ledgers.bytes_down,
        "initial": score[0],
        "final": score[-1],
        "best": min(score, key=lambda s: s["loss"]),
        "weights_sha256": weights_digest(state.params),
        "rejected": ledgers.rejected,
        "epsilon": records[-1].get("epsilon"),
        "delta": ledgers.privacy.get("delta"),
        "private": bool(ledgers.privacy.get("private")),
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
