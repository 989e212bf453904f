"""The virtual clock: a Transport in which real clients compute and replies arrive in modelled time.

Replies are delivered in the order of (modelled arrival, client, job number), not in the order in
which they were computed. So a run has the same bits on one worker and on eight. Jobs in flight are
computed in parallel.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedgpt.core.errors import FedGPTError
from fedgpt.core.messages import ClientInfo, Job, JobTime, Reply
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport
from fedgpt.simulate.fleet import Fleet, Timing, Trip
from fedgpt.simulate.replay import Replay

Key = tuple[str, int]  # (client, job number)


@dataclass(order=True)
class _Event:
    """The arrival of a reply, or the earliest possible time of it."""

    time: float
    order: int
    client: str
    number: int
    settled: bool  # False: `time` does not include the upload yet, as its size is not known


class VirtualTransport:
    """A Transport around another one; its time advances only in `receive`, to the next arrival."""

    virtual = True
    at_once: int | None = None

    def __init__(self, inner: Transport, timing: Timing, now: float = 0.0):
        self.inner, self.timing, self._now = inner, timing, now
        self._events: list[_Event] = []
        self._trips: dict[Key, tuple[Trip, float]] = {}  # jobs in flight, and when each was sent
        self._computed: dict[Key, Reply] = {}  # replies that are computed but have not arrived yet
        self._someone_is_away = False

    def clients(self, timeout: float) -> list[ClientInfo]:
        """The inner transport's clients."""
        infos = self.inner.clients(timeout)
        self.timing.meet([info.id for info in infos])
        return infos

    def newcomers(self) -> list[ClientInfo]:
        """None: simulated clients are there from the start."""
        return []

    def available(self, client: str) -> bool:
        """Whether the client is available at the current virtual time."""
        available = self.timing.available(client, self._now)
        self._someone_is_away |= not available
        return available

    def send(self, jobs: Sequence[Job]) -> None:
        """Start to compute every job whose reply will arrive, and record when it arrives."""
        for job in jobs:
            trip = self.timing.trip(job, self.inner.bytes_down(job))
            settled = bool(trip.lost) or trip.per_byte == 0
            heapq.heappush(
                self._events, _Event(trip.arrives, trip.order, job.client, job.number, settled)
            )
            self._trips[job.client, job.number] = trip, job.sent
        trips = {id(job): self._trips[job.client, job.number][0] for job in jobs}
        real = [job for job in jobs if not trips[id(job)].lost]
        # in the order of arrival, so that few replies are stored for long
        self.inner.send(sorted(real, key=lambda job: trips[id(job)].arrives))

    def receive(self, timeout: float | None) -> list[Reply]:
        """The next reply; [] after `timeout` seconds or when an unavailable client returns."""
        until = math.inf if timeout is None else self._now + timeout
        if timeout and until == self._now:
            # a timeout below the clock's resolution must also end
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
            raise FedGPTError(
                f"the virtual clock cannot advance: {len(self._trips)} jobs are in flight and none"
                " of them ever arrives"
            )
        self._now = until
        return []

    def abandon(self, keys: Iterable[Key]) -> None:
        """Cancel these jobs."""
        keys = list(keys)
        for key in keys:
            self._trips.pop(key, None)  # their events are skipped
            self._computed.pop(key, None)
        self.inner.abandon(keys)

    def bytes_down(self, job: Job) -> int:
        """The size of a job's message, as the inner transport counts it."""
        return self.inner.bytes_down(job)

    def now(self) -> float:
        """Virtual seconds."""
        return self._now

    def close(self) -> None:
        """Close the inner transport."""
        self.inner.close()

    def _arrival(self, event: _Event) -> Reply | None:
        """The reply of an event; None if its job was cancelled or it is postponed by the upload."""
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
        return replace(reply, job_time=trip.job_time or JobTime(event.time - sent))

    def _wait_for(self, key: Key) -> Reply:
        """The real reply of a job; waits until it is computed."""
        while key not in self._computed:
            replies = self.inner.receive(None)
            # of clients on other machines, one may have come back
            if not replies and self.inner.at_once is not None:
                raise FedGPTError(f"the job {key} has no reply and is not in flight")
            arrived = {(reply.client, reply.number): reply for reply in replies}
            self._computed.update(
                {known: reply for known, reply in arrived.items() if known in self._trips}
            )
        return self._computed[key]


def make_timing(options: RunOptions) -> Timing:
    """The fleet that the options choose."""
    fleet = options.fleet
    return Replay(str(fleet.path)) if fleet.name == "replay" else Fleet(fleet, options.seed)
