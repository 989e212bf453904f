"""The simulated fleet: how long a client's job takes, whether it comes back, and when a client is there.

Everything is a function of the options, the seed, the client and the task, so that a virtual run has one course of
events however often and on however many workers it is computed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import Job
from fedgpt.core.options import FleetOptions, RunOptions
from fedgpt.core.seeds import numpy_generator
from fedgpt.engine.run_folder import read_lines

PUBLISHED = (0.58, 0.75, 1.51, 3.33)  # seconds per step of DeepMind's asynchronous workers (arXiv 2401.09135)
NAMES = ("none", "constant", "published", "lognormal", "trace", "replay")
MEGABYTE = 1e6


@dataclass(frozen=True)
class Trip:
    """One job's way through the fleet, in seconds of the run's clock."""

    arrives: float  # without the upload, where `per_byte` is above 0
    lost: str = ""  # why no reply comes; `arrives` is then when the server learns of it
    per_byte: float = 0.0  # seconds per byte of the reply
    leaves: float = math.inf  # the client goes away then
    order: int = 0  # of arrivals at one time, before client and task
    seconds: float | None = None  # how long the client was at it, where a record says so


class Timing(Protocol):
    """What the virtual clock asks of a fleet."""

    def meet(self, clients: Sequence[str]) -> None:
        """Learn who the clients are, in the order of their ids."""
        ...

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """When the job's reply arrives."""
        ...

    def there(self, client: str, now: float) -> bool:
        """Whether a client takes jobs."""
        ...

    def opening(self, now: float) -> float:
        """When the next client that is away comes back; inf where nobody does."""
        ...


class Fleet:
    """Modelled clients: constant, published or log-normal speeds, or a table of them."""

    def __init__(self, options: FleetOptions, seed: int):
        self.options, self.seed = options, seed
        self._speeds: dict[str, float] = {}
        self._phases: dict[str, float] = {}
        self._openings = np.zeros(0)  # when windows open, within one period, sorted

    def meet(self, clients: Sequence[str]) -> None:
        """Give every client its speed and its window's phase."""
        o = self.options
        table = _trace(o) if o.name == "trace" else {}
        listed = PUBLISHED if o.name == "published" else tuple(o.step_seconds)
        for index, client in enumerate(clients):
            if o.name == "trace":
                if client not in table:
                    raise ConfigError(f"fleet.path={o.path}: has no line for client {client!r}")
                self._speeds[client] = table[client]
            elif o.name == "lognormal":
                draw = numpy_generator(self.seed, "speed", client)
                self._speeds[client] = o.median * math.exp(o.spread * draw.standard_normal())
            else:
                self._speeds[client] = listed[index % len(listed)]
        if o.window:
            period = sum(o.window)
            self._phases = {c: period * numpy_generator(self.seed, "window", c).random() for c in clients}
            self._openings = np.sort(-np.array(list(self._phases.values())) % period)

    def step_seconds(self, client: str) -> float:
        """Seconds of one local step."""
        return self._speeds[client]

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """Download, local steps, upload; a job is lost by chance, or when its client's window closes."""
        o = self.options
        draw = numpy_generator(self.seed, "trip", job.client, job.task)
        factor = math.exp(o.jitter * draw.standard_normal())
        coin, part = draw.random(2)
        leaves = job.sent + self._left(job.client, job.sent)
        work = bytes_down * o.down / MEGABYTE + job.plan.steps * self._speeds[job.client] * factor
        if coin < o.dropout:
            return Trip(min(job.sent + part * work, leaves), lost="dropped out")
        if job.sent + work > leaves:
            return Trip(leaves, lost="went away")
        return Trip(job.sent + work, per_byte=o.up / MEGABYTE, leaves=leaves)

    def there(self, client: str, now: float) -> bool:
        """Whether the client's window is open."""
        return self._left(client, now) > 0

    def opening(self, now: float) -> float:
        """The next moment at which a window opens."""
        if not self.options.window:
            return math.inf
        period = sum(self.options.window)
        position = now % period
        index = int(np.searchsorted(self._openings, position, side="right"))
        following = self._openings[index] if index < self._openings.size else self._openings[0] + period
        return now + float(following - position) + 1e-6  # just past the edge

    def _left(self, client: str, now: float) -> float:
        """Seconds until the client's window closes; 0 where it is closed."""
        if not self.options.window:
            return math.inf
        position = (now + self._phases[client]) % sum(self.options.window)
        return max(0.0, self.options.window[0] - position)


class Replay:
    """The course of an earlier run, from its events.jsonl: every job arrives when and in the order that it did."""

    def __init__(self, path: str | Path):
        self.path = path
        self._trips: dict[tuple[str, int], Trip] = {}
        for order, event in enumerate(read_lines(Path(path))):
            if event["event"] not in ("accept", "reject") or event.get("code") in ("no_reply", "late", "duplicate"):
                continue
            key = event["client"], event["task"]
            lost = event.get("detail", "") if event.get("code") == "client_error" else ""
            self._trips[key] = Trip(event["seconds"], lost, order=order, seconds=event.get("train_seconds"))

    def meet(self, clients: Sequence[str]) -> None:
        """Nothing to learn: the record names them."""

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """As recorded; a job that nobody saw arrive never does."""
        return self._trips.get((job.client, job.task), Trip(math.inf, lost="not in the record"))

    def there(self, client: str, now: float) -> bool:
        """Always: who was asked is in the record."""
        return True

    def opening(self, now: float) -> float:
        """Never."""
        return math.inf


def make_timing(options: RunOptions) -> Timing:
    """The fleet that the options describe."""
    fleet = options.fleet
    return Replay(str(fleet.path)) if fleet.name == "replay" else Fleet(fleet, options.seed)


def _trace(options: FleetOptions) -> dict[str, float]:
    """client -> seconds per step of a CSV file; raises ConfigError with the line that is wrong."""
    speeds: dict[str, float] = {}
    with Path(str(options.path)).open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        if missing := {"client", "step_seconds"} - set(rows.fieldnames or ()):
            raise ConfigError(f"fleet.path={options.path}: its first line lacks {', '.join(sorted(missing))}")
        for row in rows:
            try:
                seconds = float(row["step_seconds"])
            except (TypeError, ValueError):
                seconds = math.nan
            if not 0 < seconds < math.inf:
                raise ConfigError(
                    f"fleet.path={options.path} line {rows.line_num}: step_seconds={row['step_seconds']} "
                    "must be a number above 0"
                )
            speeds[row["client"]] = seconds
    return speeds


def fleet_problems(options: RunOptions) -> Iterator[str]:
    """What is wrong with the fleet, alone and with the clock."""
    f = options.fleet
    if options.clock == "virtual" and f.name == "none":
        yield "clock=virtual: needs a fleet, which says how fast clients are; add fleet=published (or constant, ...)"
    if options.clock == "real" and f.name not in ("none", "constant", "published", "lognormal", "trace"):
        yield f"fleet={f.name}: a record is replayed on the virtual clock; add clock=virtual"
    if options.clock == "real" and (f.window or f.dropout or f.up or f.down or f.jitter):
        yield "fleet: window, dropout, up, down and jitter are modelled by clock=virtual only"
    if not f.step_seconds or not all(0 < s < math.inf for s in f.step_seconds):
        yield f"fleet.step_seconds={list(f.step_seconds)}: needs numbers above 0, one for each client in turn"
    if f.window and not (len(f.window) == 2 and min(f.window) > 0):
        yield f"fleet.window={list(f.window)}: must be [seconds there, seconds away], both above 0"
    if f.name in ("trace", "replay"):
        kind = "a CSV file with client,step_seconds" if f.name == "trace" else "a run's events.jsonl"
        if not f.path or not Path(f.path).is_file():
            yield f"fleet.path={f.path}: fleet={f.name} needs {kind}"


def replay_problems(options: RunOptions, switches: bool) -> Iterator[str]:
    """What a record cannot repeat: it holds arrivals, not moments between them; `switches`: the pacing may change."""
    if options.fleet.name != "replay":
        return
    why = "fleet=replay: a record holds when replies arrived"
    for name in ("grace", "deadline"):
        if (value := getattr(options.pace, name)) is not None:
            yield (
                f"pace.{name}={value:g}: {why}, not when the server stopped waiting for others; only runs without "
                f"pace.{name} can be replayed: leave it out in both"
            )
    if switches:
        yield (
            f"strategy=auto: {why}, not how long the others had been at work when it chose the pacing; only runs of "
            "one pacing can be replayed: name it, e.g. pace=buffer strategy=delta_sgd, in both"
        )


def nothing_left(waiting: int) -> FedGPTError:
    """The virtual clock has no event any more."""
    return FedGPTError(f"the virtual clock stands still: {waiting} jobs in flight and none of them ever arrives")
