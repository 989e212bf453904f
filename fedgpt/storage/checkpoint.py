"""Checkpoints: the files that a run is resumed from.

    checkpoints/version-00000012.safetensors  state, counters, base versions of jobs in flight
    checkpoints/version-00000012.sha256       its digest, written last: it commits the checkpoint
    checkpoints/best.safetensors              the best weights, with their score and digest
    checkpoints/starts.json                   how many starts in a row were from the newest
                                              checkpoint and made no new version

Each file is written under a temporary name, synced and renamed, so a crash leaves the old file or
the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedgpt.core.errors import FedGPTError, Unwritten
from fedgpt.core.faults import reach
from fedgpt.core.files import PRIVATE, replacing, sha256_of, write_text
from fedgpt.core.messages import ServerState
from fedgpt.storage.tables import Clients, RunIdentity, RunTotals, VersionLine

FORMAT = 4
MOST_STARTS = 3  # consecutive starts without a new version, after which an older checkpoint is used
# errors of reading a damaged file
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
UNUSABLE += (RecursionError,)  # of JSON that is nested too deeply
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A consistent state of the server: after a server step, before the first job of its
    version.
    """

    state: ServerState
    identity: RunIdentity
    line: VersionLine
    totals: RunTotals = field(default_factory=RunTotals)
    clients: Clients = field(default_factory=Clients)  # a copy that nothing changes
    in_flight: tuple[dict[str, Any], ...] = ()  # jobs in flight, without their vectors
    unsaved: tuple[str, ...] = ()  # names of strategy state that a checkpoint cannot contain
    # base/<version>: vectors that jobs in flight started from; other modules use other prefixes
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class Checkpoints:
    """The `checkpoints/` folder of a run: the newest `keep` checkpoints and the best weights."""

    def __init__(self, folder: Path, keep: int, committed: Callable[[int], None] | None = None):
        """`committed` is called in the writing thread after each new checkpoint, with the oldest
        version that is kept.
        """
        self.folder, self.keep, self._committed = folder, keep, committed
        # version of the checkpoint that `recover` renamed after MOST_STARTS failed starts
        self.retired: int | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start to write in the background; first waits for the previous checkpoint and raises its
        error.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, snapshot)

    def wait(self) -> None:
        """Return when the last checkpoint is committed; raises FedGPTError if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except (OSError, SafetensorError) as error:
                raise Unwritten("a checkpoint", self.folder.parent, error) from error

    def close(self) -> None:
        """Wait for the last write and end the writer."""
        self.wait()
        self._writer.shutdown()

    def load(self) -> Snapshot | None:
        """The newest checkpoint whose digest matches; unusable ones are skipped with a warning.

        Returns None if no checkpoint was committed; raises FedGPTError if all checkpoints are
        damaged. Changes no file, because a reader may call it while a run writes.
        """
        return self._newest()[0]

    def identity(self) -> RunIdentity | None:
        """The constants of the run, from its newest undamaged checkpoint, without its arrays.

        Returns None if there is none. Changes no file, and gives no warning.
        """
        for path in sorted(self.folder.glob("version-*.safetensors"), reverse=True):
            with suppress(*UNUSABLE):
                return RunIdentity(**_about(path)["identity"])
        return None

    def recover(self, check: Callable[[Snapshot], object] = lambda _: None) -> Snapshot | None:
        """Like `load`, for the server that holds the run's lock; also cleans the folder.

        `check` gets the snapshot before any file is changed, and may raise.
        Unusable checkpoints are renamed to .damaged, and also a checkpoint from which MOST_STARTS
        consecutive starts made no new version. Temporary files of a killed server are deleted.
        """
        snapshot, skipped = self._newest()
        if snapshot is not None:
            check(snapshot)
        for unusable in skipped:  # so that it is not the newest checkpoint at the next start
            if self._starts(unusable) >= MOST_STARTS:
                self.retired = _version_of(unusable)
            unusable.rename(unusable.with_suffix(".damaged"))
            _mark(unusable).unlink(missing_ok=True)
        for left in self.folder.glob(".*"):  # see core/files.py
            left.unlink()
        return snapshot

    def _newest(self) -> tuple[Snapshot | None, list[Path]]:
        """Return (the newest usable checkpoint, the unusable ones), without changing a file."""
        skipped: list[Path] = []
        tried: Snapshot | None = None  # undamaged, but no start from it made a new version
        damaged: list[str] = []
        paths = sorted(self.folder.glob("version-*.safetensors"), reverse=True)
        for path in paths:
            try:
                snapshot = self._read(path)
            except UNUSABLE as error:
                log.warning(
                    "checkpoint %s is damaged (%s); trying the previous one", path.name, error
                )
                skipped.append(path)
                damaged += [f"{path.name}: {error}"] if _mark(path).exists() else []
                continue
            if self._starts(path) >= MOST_STARTS and path is not paths[-1]:
                log.warning(
                    "%d starts from %s made no new version; trying the previous one",
                    MOST_STARTS,
                    path.name,
                )
                skipped.append(path)
                tried = snapshot
                continue
            return snapshot, skipped
        if tried is not None:
            return tried, []
        if damaged:
            reasons = "; ".join(damaged)
            raise FedGPTError(
                f"no checkpoint in {self.folder} can be used ({reasons}); start again with another"
                " run_dir"
            )
        return None, []

    def started(self, version: int) -> None:
        """Count a start from `version`; `ended` and the next checkpoint reset the count."""
        starts = self._starts(self._path(version)) + 1
        write_text(self.folder / "starts.json", json.dumps({"version": version, "starts": starts}))
        reach("open")

    def ended(self) -> None:
        """Reset the count of starts, because the server did not crash."""
        (self.folder / "starts.json").unlink(missing_ok=True)

    def save_best(self, params: np.ndarray, version: int, value: float, run: str) -> None:
        """Replace the best weights; raises FedGPTError if they cannot be written.

        `value` is their score, `run` the id of the run.
        """
        about = {"run": run, "version": version, "value": value, "sha256": _digest(params)}
        try:
            with replacing(self._best) as temporary:
                save_file({"params": params}, temporary, metadata={"fedgpt": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise Unwritten("the best weights", self.folder.parent, error) from error

    def load_best(self, run: str | None = None) -> tuple[np.ndarray, float] | None:
        """(best weights, (parameters,) float32, their score); None: missing, damaged, or of another
        run than that with the id `run`, if that is known.
        """
        try:
            with safe_open(self._best, framework="numpy") as stored:
                about = json.loads(stored.metadata()["fedgpt"])
                params = stored.get_tensor("params")
            value = about["value"] if "value" in about else about["loss"]  # its name in format 3
            ours = run is None or about.get("run", run) == run  # earlier versions did not store it
            return (params, float(value)) if ours and about["sha256"] == _digest(params) else None
        except UNUSABLE:
            return None

    @property
    def _best(self) -> Path:
        return self.folder / "best.safetensors"

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version:08d}.safetensors"

    def _starts(self, path: Path) -> int:
        try:
            counted = json.loads((self.folder / "starts.json").read_text())
            return int(counted["starts"]) if self._path(counted["version"]) == path else 0
        except UNUSABLE:
            return 0

    def _write(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        memory = {f"memory/{name}": array for name, array in state.memory.items()}
        tensors = {
            "params": state.params,
            **memory,
            **{f"extra/{n}": a for n, a in snapshot.extra.items()},
        }
        about = {
            "format": FORMAT,
            "version": state.version,
            "identity": snapshot.identity.as_json(),
            "line": asdict(snapshot.line),
            "totals": snapshot.totals.as_json(),
            "clients": snapshot.clients.as_json(),
            "in_flight": snapshot.in_flight,
            "unsaved": snapshot.unsaved,
        }
        path = self._path(state.version)
        reach("checkpoint.begin")
        with replacing(path, mode=PRIVATE) as temporary:
            # one metadata key: safetensors writes several in random order, and equal states must
            # give equal files
            tensors = {name: np.require(array, requirements="C") for name, array in tensors.items()}
            save_file(tensors, temporary, metadata={"fedgpt": json.dumps(about)})
            reach("checkpoint.written")
        reach("checkpoint.renamed")
        write_text(_mark(path), sha256_of(path) + "\n")
        reach("checkpoint.committed")
        if self._starts(path) == 0:  # another version than the one that was started from
            self.ended()
        paths = sorted(self.folder.glob("version-*.safetensors"))
        for old in paths[: -self.keep]:
            _mark(old).unlink(missing_ok=True)
            old.unlink()
        if self._committed is not None:
            self._committed(_version_of(paths[-self.keep :][0]))

    def _read(self, path: Path) -> Snapshot:
        about = _about(path)
        with safe_open(path, framework="numpy") as stored:
            arrays = {name: stored.get_tensor(name) for name in list(stored.keys())}
        memory, extra = (
            {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            for prefix in ("memory/", "extra/")
        )
        totals = {**about["totals"], "norms": tuple(about["totals"]["norms"])}
        return Snapshot(
            ServerState(arrays["params"], about["version"], memory),
            RunIdentity(**about["identity"]),
            VersionLine(**about["line"]),
            RunTotals(**totals),
            Clients(**about["clients"]),
            tuple(about["in_flight"]),
            tuple(about["unsaved"]),
            extra,
        )


def _about(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint; raises one of UNUSABLE if the file is damaged."""
    if not _mark(path).exists():
        raise ValueError("its digest file is missing")
    if _mark(path).read_text().strip() != sha256_of(path):
        raise ValueError("its digest does not match")
    with safe_open(path, framework="numpy") as stored:
        about = json.loads(stored.metadata()["fedgpt"])
    if about["format"] == 3:
        return converted(about)
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']}, this version reads 3 and {FORMAT}")
    return about


def converted(old: dict[str, Any]) -> dict[str, Any]:
    """Convert the JSON of format 3 (fedgpt 0.1 before November 2026) to this version's format."""
    columns = {
        "next_number": "next_task",
        "accepted": "accepted",
        "cached_version": "held",
        "strikes": "strikes",
        "resting_until": "quarantine",
        "speed": "speeds",
        "tokens": "trained",
        "charged": "charged",
        "released": "last",
        "seconds": "busy",
    }
    codes = {"unknown_task": "unknown_job"}
    totals = {field.name: old[field.name] for field in fields(RunTotals) if field.name in old}
    totals["rejected"] = {codes.get(code, code): n for code, n in old["rejected"].items()}
    return {
        "version": old["version"],
        "identity": {name: old[name] for name in ("run", "environment", "options", "privacy")},
        "line": {"metrics": old["record"], **old["evaluation"]},
        "totals": totals,
        "clients": {
            "columns": {new: old[name] for new, name in columns.items()},
            "restorable": old["restorable"],
        },
        "in_flight": [{**job, "number": job["task"]} for job in old["in_flight"]],
        "unsaved": old["unsaved"],
    }


def _digest(params: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(params).data).hexdigest()


def _version_of(path: Path) -> int:
    return int(path.stem.removeprefix("version-"))


def _mark(path: Path) -> Path:
    return path.with_suffix(".sha256")
