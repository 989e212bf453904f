"""The start of a run: at version 0, or at the newest usable checkpoint.

When a run is resumed, records after its checkpoint are deleted, because they will be written again.
A run whose options, text, tokenizer, shards or frozen weights have changed is refused before any
file is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import RunOptions
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import Prepared
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.content import CONTENT, content_of, refuse_other_content
from fedgpt.storage.journal import Journal
from fedgpt.storage.records import check_records, refuse_other_records
from fedgpt.storage.run_folder import RunFolder
from fedgpt.storage.tables import RunIdentity

log = logging.getLogger(__name__)


Changed = Callable[[Mapping[str, Any]], str]


def check_options(options: RunOptions, changed: Changed) -> RunIdentity | None:
    """Raise FedGPTError if the run in `run_dir` began with other options; `changed`: see
    `open_or_resume`. Returns the constants of that run; None if there is none.

    Uses no array of a checkpoint, and changes no file.
    """
    folder = Path(options.run_dir) / "checkpoints"
    identity = Checkpoints(folder, options.checkpoint.keep).identity()
    if identity is not None:
        _refuse_other_options(options, identity, changed)
    return identity


def checked_content(
    options: RunOptions, prepared: Prepared, shards: Sequence[Shard], changed: Changed
) -> dict[str, str]:
    """Return the digests of a run's content, for the environment of its checkpoints.

    Like `check_options`, and raises FedGPTError if the run began with other content.
    """
    content = content_of(options, prepared, shards)
    identity = check_options(options, changed)
    if identity is not None:
        refuse_other_content(options, identity.environment, content)
    return content


def open_or_resume(
    folder: RunFolder,
    options: RunOptions,
    start: Callable[[], Snapshot],
    changed: Changed = lambda options: "",
    environment: Mapping[str, Any] | None = None,
    scores: Sequence[str] = (),
) -> Snapshot:
    """Return the snapshot that a server starts from, and delete later records.

    `start` makes version 0; `changed` returns the options (dotted name -> value) of a checkpoint
    that differ now; `environment`: versions and machine, on which bit-identity depends, and the
    digests of what the run depends on; `scores`: the names of the run's scores. Raises FedGPTError
    if the run cannot be continued.
    """
    now = environment or {}
    metrics, events = folder.metrics.read(), folder.events.read()

    def check(snapshot: Snapshot) -> None:
        _refuse_other_options(options, snapshot.identity, changed)
        refuse_other_content(options, snapshot.identity.environment, now)
        _refuse_unsaved(folder, snapshot)
        check_records(folder, metrics, events, scores)
        if snapshot.state.version > 0:  # all records are written again after version 0
            refuse_other_records(folder, snapshot.line.metrics, metrics, events)

    checkpoints = Checkpoints(folder.checkpoints, options.checkpoint.keep)
    snapshot = checkpoints.recover(check)
    checkpoints.close()
    if checkpoints.retired is not None:  # replaying the journal would fail again
        Journal(folder.wal).set_aside(checkpoints.retired)
    if snapshot is None:
        snapshot = start()
        folder.metrics.keep([])
        folder.events.keep([])
        Journal(folder.wal).clear()
        return snapshot
    version = snapshot.state.version
    kept = [line for line in metrics if line["version"] < version]
    if len(kept) < version:
        log.warning(
            "%s has %d of the %d lines before version %d; the results of the run lack the others",
            *(folder.metrics.path, len(kept), version, version),
        )
    folder.metrics.keep(kept)
    folder.events.keep(events_until(version, events))
    _warn_of_other_conditions(snapshot.identity.environment, now)
    return _with_content(snapshot, now)


def events_until(version: int, events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The events up to the server step that made `version`; later events will be written again.

    If the file has been damaged and lacks that step, they end before the first job of `version`.
    """
    kinds = [(event["event"], event.get("version", -1)) for event in events]
    if ("version", version) in kinds:
        end = len(kinds) - kinds[::-1].index(("version", version))
    else:
        jobs = (i for i, (kind, of) in enumerate(kinds) if kind == "dispatch" and of >= version)
        end = next(jobs, len(kinds))
    return events[:end]


def _refuse_other_options(options: RunOptions, identity: RunIdentity, changed: Changed) -> None:
    """Raise FedGPTError if a checkpoint is of a run with other options."""
    if differences := changed(identity.options):
        raise FedGPTError(
            f"{options.run_dir} cannot be continued: its config.yaml was changed after its"
            f" checkpoint was made ({differences}); change it back, or start again with another"
            " run_dir"
        )


def _refuse_unsaved(folder: RunFolder, snapshot: Snapshot) -> None:
    """Raise FedGPTError if a checkpoint does not contain all of the strategy's state."""
    if snapshot.unsaved:
        raise FedGPTError(
            f"{folder.path} cannot be continued: its strategy has state"
            f" ({', '.join(snapshot.unsaved)}) that no checkpoint can contain; start again with"
            " another run_dir"
        )


def _warn_of_other_conditions(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Name the versions, machine and user's files that differ from those of the start."""
    differing = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and name not in (*CONTENT, "code") and before[name] != now[name]
    ]
    if differing:
        log.warning(
            "the run is resumed under other conditions than it began with: %s. It goes on, but its"
            " result may differ from that of an uninterrupted run",
            ", ".join(differing),
        )


def _with_content(snapshot: Snapshot, now: Mapping[str, Any]) -> Snapshot:
    """The snapshot, whose next checkpoint has the digests that earlier versions did not store."""
    identity = snapshot.identity
    environment = dict(identity.environment)
    for name in ("text", "tokenizer", "shards"):
        if name in now:
            environment.setdefault(name, now[name])
    return replace(snapshot, identity=replace(identity, environment=environment))
