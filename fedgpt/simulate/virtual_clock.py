"""The virtual clock: a Transport that lets real clients compute and delivers what they send in
modelled time.

Replies come out in the order of (modelled arrival, client, task), whatever the order in which they
were computed, so a run has the same bits on one worker and on eight. Jobs in flight are computed at
once, in parallel.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedgpt.core.errors import FedGPTError
from fedgpt.core.messages import ClientInfo, Job, Reply
from fedgpt.core.transport import Transport
from fedgpt.simulate.fleet import Timing, Trip, nothing_left

Key = tuple[str, int]  # (client, task)


@dataclass(order=True)
class _Event:
    """A reply's arrival, or the earliest moment that it can have."""

    time: float
    order: int
    client: str
    number: int
    settled: bool  # False: the upload is not in `time` yet, as its size is not known


class VirtualTransport:
    """Time moves only in `receive`, from one arrival to the next."""

    virtual = True
    at_once: int | None = None

    def __init__(self, inner: Transport, timing: Timing, now: float = 0.0):
        self.inner, self.timing, self._now = inner, timing, now
        self._events: list[_Event] = []
        self._trips: dict[Key, tuple[Trip, float]] = {}  # what is in flight, and when it was sent
        self._computed: dict[Key, Reply] = {}  # real replies whose time has not come
        self._someone_is_away = False

    def clients(self, timeout: float) -> list[ClientInfo]:
        """The inner transport's clients."""
        infos = self.inner.clients(timeout)
        self.timing.meet([info.id for info in infos])
        return infos

    def there(self, client: str) -> bool:
        """Whether the client takes jobs at this moment of the clock."""
        there = self.timing.there(client, self._now)
        self._someone_is_away |= not there
        return there

    def send(self, jobs: Sequence[Job]) -> None:
        """Start computing every job that will come back, and note when it arrives."""
        for job in jobs:
            trip = self.timing.trip(job, self.inner.bytes_down(job))
            settled = bool(trip.lost) or trip.per_byte == 0
            heapq.heappush(
                self._events, _Event(trip.arrives, trip.order, job.client, job.number, settled)
            )
            self._trips[job.client, job.number] = trip, job.sent
        trips = {id(job): self._trips[job.client, job.number][0] for job in jobs}
        real = [job for job in jobs if not trips[id(job)].lost]
        # in the order of arrival, so that few replies are computed long before their time
        self.inner.send(sorted(real, key=lambda job: trips[id(job)].arrives))

    def receive(self, timeout: float | None) -> list[Reply]:
        """The next reply; [] where `timeout` seconds pass without one, or a client comes back that
        was missed.
        """
        until = math.inf if timeout is None else self._now + timeout
        if timeout and until == self._now:
            # a wait shorter than the clock's last digit must end, too
            until = math.nextafter(self._now, math.inf)
        if self._someone_is_away:
            until = min(until, self.timing.opening(self._now))
        self._someone_is_away = False
        while self._events and self._events[0].time <= until and self._events[0].time < math.inf:
            event = heapq.heappop(self._events)
            reply = self._arrival(event)
            if reply is not None:
                self._now = max(self._now, event.time)
                return [reply]
        if until == math.inf:
            raise nothing_left(len(self._trips))
        self._now = until
        return []

    def abandon(self, keys: Iterable[Key]) -> None:
        """Clients stop with these jobs and are free."""
        keys = list(keys)
        for key in keys:
            self._trips.pop(key, None)  # their events are passed over
            self._computed.pop(key, None)
        self.inner.abandon(keys)

    def bytes_down(self, job: Job) -> int:
        """As the inner transport counts."""
        return self.inner.bytes_down(job)

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def close(self) -> None:
        """Close the inner transport."""
        self.inner.close()

    def _arrival(self, event: _Event) -> Reply | None:
        """The reply of an event; None where its job was abandoned or its time had to be put off."""
        key = event.client, event.number
        if key not in self._trips:
            return None
        trip, sent = self._trips[key]
        if trip.lost:
            del self._trips[key]
            return Reply(event.client, event.number, error=trip.lost)
        reply = self._wait_for(key)
        if not event.settled:
            arrives = event.time + trip.per_byte * reply.bytes
            if arrives > trip.leaves:
                self._trips[key] = replace(trip, lost="went away"), sent
                del self._computed[key]
                arrives = trip.leaves
            heapq.heappush(
                self._events, _Event(arrives, event.order, event.client, event.number, True)
            )
            return None
        del self._trips[key], self._computed[key]
        return replace(reply, seconds=event.time - sent if trip.seconds is None else trip.seconds)

    def _wait_for(self, key: Key) -> Reply:
        """The real reply of a job, computed by now or waited for."""
        while key not in self._computed:
            replies = self.inner.receive(None)
            if not replies:
                raise FedGPTError(f"the job {key} vanished: no reply and nothing under way")
            arrived = {(reply.client, reply.number): reply for reply in replies}
            self._computed.update(
                {known: reply for known, reply in arrived.items() if known in self._trips}
            )
        return self._computed[key]
