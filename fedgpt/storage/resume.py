"""The start of a run: at version 0, or at the newest usable checkpoint.

When a run is resumed, records after its checkpoint are deleted, because they will be written again.
A run whose options or environment have changed is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedgpt.core.errors import FedGPTError
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.journal import Journal
from fedgpt.storage.run_folder import RunFolder

log = logging.getLogger(__name__)


def open_or_resume(
    folder: RunFolder,
    keep: int,
    start: Callable[[], Snapshot],
    changed: Callable[[Mapping[str, Any]], str] = lambda options: "",
    environment: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Return the snapshot that a server starts from, and delete later records.

    `keep`: number of checkpoints that are kept; `start` makes version 0; `changed` returns the
    options (dotted name -> value) of a checkpoint that differ now; `environment`: versions and
    machine, on which bit-identity depends. Raises FedGPTError if the run cannot be continued.
    """
    checkpoints = Checkpoints(folder.checkpoints, keep)
    snapshot = checkpoints.recover()
    checkpoints.close()
    if checkpoints.retired is not None:  # replaying the journal would fail again
        Journal(folder.wal).forget(checkpoints.retired)
    if snapshot is None:
        snapshot = start()
        folder.metrics.keep([])
        folder.events.keep([])
        Journal(folder.wal).clear()
        return snapshot
    _refuse(folder, snapshot, changed)
    _refuse_other_base(folder, snapshot, environment or {})
    version = snapshot.state.version
    folder.metrics.keep(line for line in folder.metrics.read() if line["version"] < version)
    folder.events.keep(events_until(version, folder.events.read()))
    before, now = snapshot.identity.environment, environment or {}
    if differing := [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]:
        log.warning(
            "resuming under other conditions (%s): statistically equivalent, not bit-identical",
            ", ".join(differing),
        )
    return snapshot


def events_until(version: int, events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The events up to the server step that made `version`; later events will be written again."""
    ends = [
        i
        for i, event in enumerate(events)
        if event["event"] == "version" and event["version"] == version
    ]
    return events[: ends[-1] + 1] if ends else []


def _refuse(
    folder: RunFolder, snapshot: Snapshot, changed: Callable[[Mapping[str, Any]], str]
) -> None:
    """Raise FedGPTError if the run of a checkpoint cannot be continued."""
    if differences := changed(snapshot.identity.options):
        raise FedGPTError(
            f"{folder.path} cannot be continued: its config.yaml was changed after its checkpoint"
            f" was made ({differences}); change it back, or start again with another run_dir"
        )
    if snapshot.unsaved:
        raise FedGPTError(
            f"{folder.path} cannot be continued: its strategy has state"
            f" ({', '.join(snapshot.unsaved)}) that no checkpoint can contain; start again with"
            " another run_dir"
        )


def _refuse_other_base(
    folder: RunFolder, snapshot: Snapshot, environment: Mapping[str, Any]
) -> None:
    """Raise FedGPTError if the frozen weights differ from those at the start of the run."""
    before, now = snapshot.identity.environment.get("base", ""), environment.get("base", "")
    if before != now:
        raise FedGPTError(
            f"{folder.path} cannot be continued: its base weights differ, as the model of init_from"
            f" has changed ({before[:16]} -> {now[:16]}); restore that folder, or start again with"
            " another run_dir"
        )
