"""Where a run begins: at version 0, or at the newest checkpoint that can be used.

A resumed run continues as if nothing had happened: what came after its checkpoint is cut from the
records, as it will happen again, and a run that would not be the same one is refused.
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
    """The snapshot that a server starts from, the records cut to it.

    `keep`: checkpoints kept; `start` makes version 0; `changed` says which of a checkpoint's
    options (dotted name -> value) are others now; `environment` is what bit-identity depends on.
    Raises FedGPTError where the run in the folder cannot be continued.
    """
    checkpoints = Checkpoints(folder.checkpoints, keep)
    snapshot = checkpoints.recover()
    checkpoints.close()
    if checkpoints.retired is not None:  # the journal leads to where the starts failed
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
    """The events up to the server step that made `version`; later ones will happen again."""
    ends = [
        i
        for i, event in enumerate(events)
        if event["event"] == "version" and event["version"] == version
    ]
    return events[: ends[-1] + 1] if ends else []


def _refuse(
    folder: RunFolder, snapshot: Snapshot, changed: Callable[[Mapping[str, Any]], str]
) -> None:
    """Raise FedGPTError where a checkpoint belongs to a run that cannot be continued."""
    if differences := changed(snapshot.identity.options):
        raise FedGPTError(
            f"{folder.path} cannot be continued: its config.yaml was changed after its checkpoint"
            f" was made ({differences}); change it back, or start again with another run_dir"
        )
    if snapshot.unsaved:
        raise FedGPTError(
            f"{folder.path} cannot be continued: its strategy remembers"
            f" {', '.join(snapshot.unsaved)}, which no checkpoint holds; start again with another"
            " run_dir"
        )


def _refuse_other_base(
    folder: RunFolder, snapshot: Snapshot, environment: Mapping[str, Any]
) -> None:
    """Raise FedGPTError where the frozen weights are not those that the run began with."""
    before, now = snapshot.identity.environment.get("base", ""), environment.get("base", "")
    if before != now:
        raise FedGPTError(
            f"{folder.path} cannot be continued: its base weights differ, as the model of init_from"
            f" has changed ({before[:16]} -> {now[:16]}); restore that folder, or start again with"
            " another run_dir"
        )
