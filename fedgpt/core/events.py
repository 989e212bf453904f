"""The events of a run, which observers receive: one small dataclass for each kind of event.

An observer is a callable that takes one event, such as a progress display or a tracker. A separate
thread delivers the events of a run in order (server/observers.py). So an observer needs no lock,
and a slow observer does not delay training. The last event is RunClosed, also after an interrupt
and for an observer that has raised an exception. The end of a run waits for its observers for a
limited time; events that are not delivered by then are lost.

`as_json` is the event's line in events.jsonl, which the server loop writes before it continues.
`seconds` is the time on the run's clock, wall or virtual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from fedgpt.core.messages import ClientInfo


@dataclass(frozen=True)
class Event:
    """The interface of every event."""

    name: ClassVar[str]  # name of the event in events.jsonl

    def as_json(self) -> dict[str, Any]:
        """The line of events.jsonl.

        >>> PacingChanged("buffer", "stragglers", 3, seconds=1.5).as_json()["event"]
        'pacing'
        """
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True)
class RunOpened(Event):
    """The clients are known; training begins, or continues from a checkpoint."""

    name: ClassVar[str] = "open"
    clients: tuple[ClientInfo, ...]
    version: int  # the version at which the run starts or continues
    tokens_total: int  # tokens at which the learning-rate schedule ends
    seconds: float


@dataclass(frozen=True)
class ClientJoined(Event):
    """A client has joined while the run goes on; it may get jobs from now on."""

    name: ClassVar[str] = "join"
    client: str
    tokens: int  # of its text, as it says
    version: int
    seconds: float


@dataclass(frozen=True)
class JobSent(Event):
    """A job was sent to a client."""

    name: ClassVar[str] = "dispatch"
    client: str
    number: int
    version: int
    steps: int  # local optimiser steps
    seconds: float


@dataclass(frozen=True)
class UpdateAccepted(Event):
    """An update was accepted."""

    name: ClassVar[str] = "accept"
    client: str
    number: int
    version: int  # the version that the client started from
    tokens: int
    staleness: int
    train_seconds: float  # seconds of the client's job
    measured: bool  # False if the time includes a worker's start, so it is no measure of the speed
    seconds: float


@dataclass(frozen=True)
class ReplyRejected(Event):
    """A reply was rejected or is missing, which changes only counters; codes: update/wire.py."""

    name: ClassVar[str] = "reject"
    code: str
    client: str
    number: int
    detail: str
    seconds: float


@dataclass(frozen=True)
class VersionMade(Event):
    """The server has taken a step; `metrics` is the version's line of metrics.jsonl without
    scores.
    """

    name: ClassVar[str] = "version"
    metrics: Mapping[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The line's fields beside the event's own."""
        return {"event": self.name, **self.metrics, "seconds": self.seconds}


@dataclass(frozen=True)
class PacingChanged(Event):
    """The strategy has chosen another pacing."""

    name: ClassVar[str] = "pacing"
    pacing: str  # the new pacing
    reason: str
    version: int
    seconds: float


@dataclass(frozen=True)
class QuarantineBegun(Event):
    """A client is in quarantine, because too many consecutive jobs failed."""

    name: ClassVar[str] = "quarantine"
    client: str
    until: int  # the version at which the quarantine ends
    version: int
    seconds: float


@dataclass(frozen=True)
class QuarantineEnded(Event):
    """A client may get jobs again."""

    name: ClassVar[str] = "quarantine_end"
    client: str
    version: int
    seconds: float


@dataclass(frozen=True)
class MetricsReady(Event):
    """A version's line of metrics.jsonl is complete, with its scores if it was evaluated."""

    name: ClassVar[str] = "metrics"
    metrics: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The line's fields."""
        return {"event": self.name, **self.metrics}


@dataclass(frozen=True)
class RunClosed(Event):
    """The last event of a process: the run has ended or stopped; nothing follows."""

    name: ClassVar[str] = "closed"


class Observer(Protocol):
    """Gets every event of a run; it must ignore events of unknown classes."""

    def __call__(self, event: Event) -> None:
        """Called from the delivery thread only, for one event after the other."""
        ...
