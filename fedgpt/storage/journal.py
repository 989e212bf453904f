"""The journal: a write-ahead log of the server's inputs since a checkpoint, on the real clock.

The server loop is a deterministic function of its snapshot and of its transport's return values:
replies, the time, and which clients are available. `RecordedTransport` logs these values in order,
and syncs them to disk before it sends the next job. A restarted server loads the snapshot and
replays the log, without sending a job to a client. It gets the same bits, and continues live at the
end of the log. So no accepted update is lost or counted twice, and a privacy ledger repeats the
same charges.

    wal/version-00000012.log    inputs after the server step that made version 12
    entry                       "FGJ2", length of the JSON, length of the payloads, CRC-32 of both,
                                JSON, payloads

A crash can truncate the last entry: the complete entries before it are replayed, and the rest is
deleted. The log starts at the oldest checkpoint that is kept, so a restart can use any checkpoint.
If a file is missing or an entry does not match the run, all later entries are deleted.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedgpt.core.faults import reach
from fedgpt.core.files import sync
from fedgpt.core.messages import ClientInfo, Job, JobTime, Reply
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport

HEAD = struct.Struct("<4sIQI")
MAGIC = b"FGJ2"
Key = tuple[str, int]  # (client, number of its job)
log = logging.getLogger(__name__)


def needs_journal(options: RunOptions, switches: bool, real_clients: bool) -> bool:
    """Whether a run keeps a journal: the value of `checkpoint.journal`, or, if it is null, whether
    the run has real clients or is not deterministic.

    Cohorts of simulated clients that wait for every client, and runs on the virtual clock, are
    deterministic. On the real clock a buffer is not (with `switches` the strategy may change to a
    buffer), and neither is a cohort that closes early or whose jobs depend on the clients' speeds.
    """
    if options.checkpoint.journal is not None:
        return options.checkpoint.journal
    pace = options.pace
    timed = pace.goal is not None or pace.deadline is not None or pace.dylu
    depends_on_time = pace.name == "buffer" or switches or timed
    return options.clock == "real" and (depends_on_time or real_clients)


@dataclass(frozen=True)
class Entry:
    """One call of the transport, and the values that the loop read since the previous entry."""

    call: str  # send, receive, join, or step: the end of a version
    jobs: tuple[Key, ...] = ()  # jobs sent
    replies: tuple[Reply, ...] = ()  # replies received
    times: tuple[float, ...] = ()  # readings of the clock
    away: frozenset[str] = frozenset()  # clients that were not available
    clients: int = 0  # number of clients of the run
    joined: tuple[ClientInfo, ...] = ()  # clients that joined
    asked: int = (
        0  # how often the loop had asked for newcomers since the last entry, when they came
    )


class Journal:
    """The files of the log."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._version = 0
        self._stream: IO[bytes] | None = None
        self._last = (0, 0)  # version and file offset of the entry that was read last

    def begin(self, version: int) -> None:
        """Append the next entries to the file of `version`, which the server has just made."""
        self.close()
        self._version = version

    def append(self, entry: Entry) -> None:
        """Write one entry; only `flush` guarantees that it is on disk."""
        if self._stream is None:
            path = self._path(self._version)
            fresh = not path.exists()
            self._stream = path.open("ab")
            if fresh:
                sync(self.folder)
        payloads = [_bytes_of(reply.payload) for reply in entry.replies]
        about = json.dumps(_as_json(entry)).encode()
        checksum = zlib.crc32(about)
        for payload in payloads:
            checksum = zlib.crc32(payload, checksum)
        self._stream.write(HEAD.pack(MAGIC, len(about), sum(map(len, payloads)), checksum))
        self._stream.write(about)
        reach("journal.half")
        for payload in payloads:
            self._stream.write(payload)
        self._stream.flush()

    def flush(self) -> None:
        """Sync all appended entries to disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def read(self, version: int) -> Generator[Entry, None, None]:
        """Yield the entries from `version` onwards, read one at a time.

        Everything after a damaged entry, or after a version without its last entry, is deleted.
        """
        # whether the last entry was a server step: then the next version's file continues the log
        stepped = True
        while stepped and self._path(version).exists():
            stepped, complete = False, 0
            with self._path(version).open("rb") as stream:
                while (entry := _read_entry(stream)) is not None:
                    self._last = (version, complete)
                    complete = stream.tell()
                    stepped = entry.call == "step"
                    yield entry
                rest = os.fstat(stream.fileno()).st_size - complete
            if rest:
                log.warning(
                    "%s: the last %d bytes are an incomplete entry; they are deleted",
                    self._path(version).name,
                    rest,
                )
                os.truncate(self._path(version), complete)
                stepped = False
            version += 1
        self.forget(version)

    def cut(self) -> None:
        """Delete the entry that was read last and all later entries."""
        version, place = self._last
        os.truncate(self._path(version), place)
        self.forget(version + 1)

    def drop(self, before: int) -> None:
        """Delete the files of versions before `before`, which no kept checkpoint needs."""
        for path in self._paths():
            if _version_of(path) < before:
                path.unlink(missing_ok=True)

    def forget(self, version: int) -> None:
        """Delete the files of `version` and of all later ones."""
        for path in self._paths():
            if _version_of(path) >= version:
                path.unlink(missing_ok=True)

    def set_aside(self, version: int) -> None:
        """Rename the files of `version` and of all later ones, so that they are not read again."""
        for path in self._paths():
            if _version_of(path) >= version:
                path.rename(path.with_suffix(".damaged"))

    def clear(self) -> None:
        """Delete the log, because the run is over or its jobs must be sent again."""
        self.close()
        self.forget(0)

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._stream is not None:
            self.flush()
            self._stream.close()
            self._stream = None

    def _path(self, version: int) -> Path:
        return self.folder / f"version-{version:08d}.log"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("version-*.log"))


class RecordedTransport:
    """A Transport that records what the inner one returns, or replays what was recorded."""

    virtual = False

    def __init__(self, inner: Transport, journal: Journal, version: int, now: float):
        """Continue from the snapshot of `version`, taken at `now` on the run's clock."""
        self.inner, self.journal, self.at_once = inner, journal, inner.at_once
        journal.begin(version)
        self._begun = False  # whether the jobs in flight at the snapshot were handed to `send`
        self._entries = journal.read(version)
        self._next: Entry | None = None  # next entry to replay; None: the transport is live
        self._times_read = 0  # number of its clock readings that have been replayed
        self._times: list[float] = []  # live: clock readings since the last entry
        self._available: dict[str, bool] = {}  # live: availability of clients since the last entry
        self._open: dict[Key, Job] = {}  # jobs sent in the log without a replayed reply
        self._last, self._offset = now, now - inner.now()
        self._clients: set[str] = set()  # ids of the clients of the run
        self._asked = 0  # questions for newcomers since the last entry

    def clients(self, timeout: float) -> list[ClientInfo]:
        """The inner transport's clients; the log is replayed only if the number of clients is
        unchanged.
        """
        infos = self.inner.clients(timeout)
        self._clients = {info.id for info in infos}
        return infos

    def newcomers(self) -> list[ClientInfo]:
        """Log and return the inner transport's newcomers."""
        if not self._begun:
            return []
        self._asked += 1
        infos: list[ClientInfo] = []
        if (entry := self._next) is None:
            # the inner transport does not know of those that have joined in the log
            infos = [info for info in self.inner.newcomers() if info.id not in self._clients]
            if infos:
                self._write("join", joined=tuple(infos), asked=self._asked)
        elif entry.call == "join" and entry.asked == self._asked:
            infos = list(entry.joined)
            self._advance()
        self._clients |= {info.id for info in infos}
        return infos

    def available(self, client: str) -> bool:
        """Availability from the inner transport; constant until the next `send` or `receive`."""
        if self._next is not None:
            return client not in self._next.away
        if client not in self._available:
            self._available[client] = self.inner.available(client)
        return self._available[client]

    def send(self, jobs: Sequence[Job]) -> None:
        """Sync the jobs and all earlier entries to disk, then send the jobs.

        The first call has the jobs in flight at the snapshot (none for a new run) and begins the
        log.
        """
        keys = tuple((job.client, job.number) for job in jobs)
        if not self._begun:
            self._begin(dict(zip(keys, jobs, strict=True)))
        elif self._replays("send", keys):
            self._open.update(zip(keys, jobs, strict=True))
            self._advance()
        else:
            self._write("send", jobs=keys)
            self.journal.flush()
            reach("send")
            self.inner.send(jobs)

    def receive(self, timeout: float | None) -> list[Reply]:
        """Log and return the inner transport's replies."""
        if (entry := self._next) and self._replays("receive"):
            for reply in entry.replies:
                self._open.pop((reply.client, reply.number), None)
            self._advance()
            return list(entry.replies)
        replies = [_plain(reply) for reply in self.inner.receive(timeout)]
        self.now()  # time of arrival: if this is the last entry, the clock continues from here
        self._write("receive", replies=tuple(replies))
        return replies

    def step(self, version: int) -> bool:
        """Begin the file of `version`; its snapshot contains the effects of all earlier entries.

        Returns whether the version is a new one, which is not in the log.
        """
        if self._replays("step"):
            self.journal.begin(version)
            self._advance()
            return False
        self._write("step")
        self.journal.begin(version)
        return True

    def abandon(self, keys: Iterable[Key]) -> None:
        """Tell the inner transport that replies to these jobs are not needed."""
        keys = list(keys)
        for key in keys:
            self._open.pop(key, None)
        if self._next is None:
            self.inner.abandon(keys)

    def bytes_down(self, job: Job) -> int:
        """Bytes of a job, as counted by the inner transport."""
        return self.inner.bytes_down(job)

    def now(self) -> float:
        """Seconds on the run's clock, which does not advance while no server runs."""
        if self._next is not None:
            if self._times_read < len(self._next.times):
                self._last = self._next.times[self._times_read]
                self._times_read += 1
        else:
            self._last = max(self._last, self._offset + self.inner.now())
            self._times.append(self._last)
        return self._last

    def over(self) -> None:
        """Delete the log at the end of the run, unless `send` was never called and the log was not
        read.
        """
        if self._begun:
            self.journal.clear()

    def close(self) -> None:
        """Close the log and the inner transport."""
        self._entries.close()  # a log that did not match, or that an interrupt left unread
        self.journal.close()
        self.inner.close()

    def _begin(self, jobs: dict[Key, Job]) -> None:
        """Send the jobs in flight at the snapshot, at once or after the log has been replayed."""
        self._begun, self._times, self._available, self._open = True, [], {}, jobs
        first = next(self._entries, None)
        if first is not None and first.clients != len(self._clients):
            log.warning(
                "the log was written with %d clients, %d are connected: it is deleted, and the"
                " clients are asked again",
                first.clients,
                len(self._clients),
            )
            self.journal.clear()
            first = None
        self._next = first
        if first is None:
            self._go_live()

    def _write(self, call: str, **about: Any) -> None:
        away = frozenset(client for client, available in self._available.items() if not available)
        clients = len(self._clients)
        entry = Entry(call, times=tuple(self._times), away=away, clients=clients, **about)
        self._times, self._available, self._asked = [], {}, 0
        self.journal.append(entry)

    def _replays(self, call: str, jobs: tuple[Key, ...] = ()) -> bool:
        """Whether the next entry belongs to this call; a log that does not match the run is cut
        there.
        """
        if self._next is None:
            return False
        if (self._next.call, self._next.jobs) == (call, jobs):
            return True
        log.warning(
            "the log does not match the run from here on (was it written by another version of"
            " fedgpt?): continuing without it"
        )
        self.journal.cut()
        self._go_live()
        return False

    def _advance(self) -> None:
        assert self._next is not None, "no entry to pass"
        self._last = self._next.times[-1] if self._next.times else self._last
        self._next, self._times_read = next(self._entries, None), 0
        self._asked = 0
        if self._next is None:
            self._go_live()

    def _go_live(self) -> None:
        """Send the jobs that have no reply in the log; the clock continues from its last
        reading.
        """
        self._next, self._times = None, []
        self._offset = self._last - self.inner.now()
        jobs, self._open = list(self._open.values()), {}
        if jobs:
            self.inner.send(jobs)


def _plain(reply: Reply) -> Reply:
    """The reply with a payload that can be logged: an array of numbers, or none."""
    payload = reply.payload
    if payload is None or (isinstance(payload, np.ndarray) and payload.dtype.kind in "biufc"):
        return reply
    return replace(
        reply,
        payload=None,
        error=f"unreadable payload ({type(payload).__name__})",
        code="bad_encoding",
    )


def _bytes_of(payload: np.ndarray | None) -> memoryview:
    return (
        memoryview(b"")
        if payload is None
        else np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data
    )


def _as_json(entry: Entry) -> dict[str, Any]:
    replies = []
    for r in entry.replies:
        array = None if r.payload is None else [r.payload.dtype.str, list(r.payload.shape)]
        replies.append([r.client, r.number, r.header, r.error, r.code, r.bytes, _seconds(r), array])
    return {
        "call": entry.call,
        "jobs": entry.jobs,
        "replies": replies,
        "times": entry.times,
        "away": sorted(entry.away),
        "clients": entry.clients,
        "joined": [(info.id, info.tokens) for info in entry.joined],
        "asked": entry.asked,
    }


def _seconds(reply: Reply) -> float | None:
    """The reply's JobTime as one number, as in earlier versions; NaN means "not measured"."""
    return reply.job_time.seconds if reply.job_time.measured else nan


def _read_entry(stream: IO[bytes]) -> Entry | None:
    """The next entry; None at the end of the file and for an incomplete or damaged entry."""
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    magic, about_size, payload_size, checksum = HEAD.unpack(head)
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    # a damaged length must not determine the size of a buffer
    if magic != MAGIC or about_size + payload_size > left:
        return None
    about, payload = stream.read(about_size), stream.read(payload_size)
    if zlib.crc32(payload, zlib.crc32(about)) != checksum:
        return None
    stored = json.loads(about)
    replies, start = [], 0
    for client, number, header, error, code, size, seconds, array in stored["replies"]:
        values = None
        if array is not None:
            values = np.ndarray(array[1], array[0], payload, start)
            start += values.nbytes
        took = JobTime(None, False) if seconds is not None and isnan(seconds) else JobTime(seconds)
        replies.append(Reply(client, number, header, values, error, code, size, took))
    jobs = tuple((client, number) for client, number in stored["jobs"])
    return Entry(
        stored["call"],
        jobs,
        tuple(replies),
        tuple(stored["times"]),
        frozenset(stored["away"]),
        stored["clients"],
        tuple(ClientInfo(client, tokens) for client, tokens in stored.get("joined", [])),
        stored.get("asked", 0),
    )


def _version_of(path: Path) -> int:
    return int(path.stem.removeprefix("version-"))
