"""What happens in a run, as observers get it: one small dataclass an event.

An observer is a callable that takes one event: a progress display, a tracker. ONE thread, not the
server loop's, delivers the events of a run in the order in which they happened
(server/observers.py), so an observer needs no lock and a slow one does not slow training down.
RunClosed comes last, also where the run was interrupted or an observer has raised. The end of a run
waits for its observers, but not for ever: what they have not taken by then is lost.

`as_json` is the event's line in events.jsonl, which the loop itself writes before it goes on.
`seconds` is the run's clock, wall or virtual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from fedgpt.core.messages import ClientInfo


@dataclass(frozen=True)
class Event:
    """What every event has."""

    name: ClassVar[str]  # in events.jsonl

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
    version: int  # the version that it begins from
    tokens_total: int  # tokens at which the learning-rate schedule ends
    seconds: float


@dataclass(frozen=True)
class JobSent(Event):
    """A client has got a job."""

    name: ClassVar[str] = "dispatch"
    client: str
    number: int
    version: int
    steps: int  # local optimiser steps
    seconds: float


@dataclass(frozen=True)
class UpdateAccepted(Event):
    """An update is valid and counts."""

    name: ClassVar[str] = "accept"
    client: str
    number: int
    version: int  # the version that the client started from
    tokens: int
    staleness: int
    train_seconds: float  # how long the client was at work
    measured: bool  # False where the time includes a worker's start, so nothing is learnt from it
    seconds: float


@dataclass(frozen=True)
class ReplyRejected(Event):
    """A reply, or its absence, that changes nothing but counters; codes: update/codec.py."""

    name: ClassVar[str] = "reject"
    code: str
    client: str
    number: int
    detail: str
    seconds: float


@dataclass(frozen=True)
class VersionMade(Event):
    """The server has stepped; `metrics` is the version's line of metrics.jsonl without scores."""

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
    pacing: str  # the new one
    reason: str
    version: int
    seconds: float


@dataclass(frozen=True)
class QuarantineBegun(Event):
    """A client gets no job for a while, as too many of its jobs failed in a row."""

    name: ClassVar[str] = "quarantine"
    client: str
    until: int  # the version at which it is asked again
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
    """A version's line of metrics.jsonl is complete, with its scores where it was evaluated."""

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
    """Gets every event of a run; events of classes that it does not know are to be ignored."""

    def __call__(self, event: Event) -> None:
        """Called from the delivery thread only, for one event after the other."""
        ...
