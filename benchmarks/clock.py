"""Events a second of the virtual clock and the sampler: 100,000 clients, 1,000 in flight.

    python benchmarks/clock.py            # about ten seconds
    python benchmarks/clock.py --quick    # a smoke run

The benchmark runs the server's pacing (pace=buffer), the simulated fleet and the event queue, with
empty vectors and clients that reply immediately, so nothing is trained. An event is one arrival:
it is taken from the queue, a server step is due, an idle client is drawn, and the time of its job
is modelled and queued. `events_per_second` is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence

import numpy as np
from common import machine

from fedgpt.core.messages import ClientInfo, Job, Plan, Reply
from fedgpt.core.options import FleetOptions, PaceOptions
from fedgpt.server.in_flight import InFlight
from fedgpt.server.pacing import Buffer, Progress, Roster
from fedgpt.simulate.fleet import Fleet
from fedgpt.simulate.virtual_clock import VirtualTransport

NOTHING = np.zeros(0, np.float32)
FLEETS = {
    "log-normal": FleetOptions("lognormal", spread=1.0, jitter=0.2),
    "log-normal, dropouts, windows": FleetOptions(
        "lognormal", spread=1.0, jitter=0.2, dropout=0.1, window=[8 * 3600.0, 16 * 3600.0]
    ),
}


class Instant:
    """A transport whose clients reply immediately."""

    virtual = False
    at_once: int | None = None  # every client

    def __init__(self, names: list[str]):
        self.names, self._done = names, list[Reply]()

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [ClientInfo(name, 1000) for name in self.names]

    def newcomers(self) -> list[ClientInfo]:
        return []

    def available(self, client: str) -> bool:
        return True

    def send(self, jobs: Sequence[Job]) -> None:
        self._done += [Reply(job.client, job.number) for job in jobs]

    def receive(self, timeout: float | None) -> list[Reply]:
        done, self._done = self._done, []
        return done

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        pass

    def bytes_down(self, job: Job) -> int:
        return 5_000_000

    def now(self) -> float:
        return 0.0

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1,000 clients")
    chosen = parser.parse_args()
    clients, in_flight, events = (1_000, 50, 200) if chosen.quick else (100_000, 1_000, 4_000)
    print(
        f"{clients:,} clients, {in_flight:,} in flight\nfleet                             events/s"
    )
    speeds = {}
    for name, fleet in FLEETS.items():
        speeds[name] = statistics.median(rounds(fleet, clients, in_flight, events))
        print(f"{name:<32} {speeds[name]:>9,.0f}", flush=True)
    figures = {"events_per_second": round(min(speeds.values())), "by_fleet": speeds}
    about = {"clients": clients, "in_flight": in_flight, "events": events, "model": "none"}
    print(json.dumps({**figures, **about, **machine()}))


def rounds(fleet: FleetOptions, clients: int, in_flight: int, events: int) -> list[float]:
    """Events a second in five rounds of `events` each, after the fleet has been filled."""
    names = [f"client{i:06d}" for i in range(clients)]
    clock = VirtualTransport(Instant(names), Fleet(fleet, seed=0))
    flight = InFlight(clock)
    clock.clients(0)
    pace = Buffer(PaceOptions("buffer", clients=in_flight), seed=0)
    plan = Plan("run", local_steps=40, tokens_done=0, tokens_per_step=1, tokens_total=1)
    roster = Roster(names, flight.busy, clock.available)
    dispatched = version = 0
    speeds = []
    for count in (in_flight, *[events] * 5):
        began, handled = time.perf_counter(), 0
        while handled < count:
            progress = Progress(version, dispatched, True, len(flight), 0, 0.0)
            chosen = pace.start(progress, roster) or []
            jobs = [
                Job(client, dispatched + i, version, NOTHING, plan, clock.now())
                for i, client in enumerate(chosen)
            ]
            flight.send(jobs)
            dispatched += len(jobs)
            for reply in clock.receive(None):
                flight.pop(reply.client, reply.number)
                handled, version = handled + 1, version + 1
        speeds.append(count / (time.perf_counter() - began))
    return speeds[1:]


if __name__ == "__main__":
    main()
