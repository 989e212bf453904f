"""Simulated fleets: how long a client's job takes, whether it is lost, when a client is available.

All times are a function of the options, the seed, the client and the job number. So a run on the
virtual clock is deterministic, on any number of workers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Job, JobTime
from fedgpt.core.options import FleetOptions, RunOptions
from fedgpt.core.options.option import typed
from fedgpt.core.seeds import numpy_generator
from fedgpt.storage.run_folder import read_lines

# seconds per local step of the four kinds of workers in arXiv 2401.09135 (DeepMind)
PUBLISHED = (0.58, 0.75, 1.51, 3.33)
MEGABYTE = 1e6  # bytes


@dataclass(frozen=True)
class Trip:
    """The course of one job on the virtual clock; times are seconds on the run's clock."""

    arrives: float  # time at which the reply arrives, before the upload if `per_byte` is above 0
    lost: str = ""  # reason why no reply comes; the server learns of it at `arrives`
    per_byte: float = 0.0  # seconds of upload per byte of the reply
    leaves: float = math.inf  # time at which the client becomes unavailable
    order: int = 0  # order of arrivals at the same time, before client and job number
    job_time: JobTime | None = None  # recorded job time; None: the time since the job was sent


class Timing(Protocol):
    """The interface of a fleet to the virtual clock."""

    def meet(self, clients: Sequence[str]) -> None:
        """Take the ids of all clients, in order; called before all other methods."""
        ...

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """When the job's reply arrives, or why it is lost; `bytes_down` is the job's size."""
        ...

    def available(self, client: str, now: float) -> bool:
        """Whether a client is available at the time `now`."""
        ...

    def opening(self, now: float) -> float:
        """The next time after `now` at which an unavailable client returns; inf if none does."""
        ...


class Device(NamedTuple):
    """The speeds of one client."""

    step: float  # seconds per local step
    down: float  # seconds per megabyte of download
    up: float  # seconds per megabyte of upload


class Fleet:
    """Clients with constant, published or log-normal speeds, or with the speeds of a table."""

    def __init__(self, options: FleetOptions, seed: int):
        self.options, self.seed = options, seed
        self._devices: dict[str, Device] = {}
        self._phases: dict[str, float] = {}
        self._openings = np.zeros(0)  # sorted times within one period at which windows open

    def meet(self, clients: Sequence[str]) -> None:
        """Draw the speed of each client and the phase of its window."""
        o = self.options
        table = _trace(o) if o.name == "trace" else {}
        if missing := [client for client in clients if client not in table and o.name == "trace"]:
            some = ", ".join(map(repr, missing[:3])) + (", ..." if missing[3:] else "")
            raise ConfigError(
                f"fleet.path={o.path}: has no line for {len(missing)} of {len(clients)} clients:"
                f" {some}; add their lines"
            )
        listed = PUBLISHED if o.name == "published" else tuple(o.step_seconds)
        for index, client in enumerate(clients):
            step = listed[index % len(listed)]
            if o.name == "lognormal":
                draw = numpy_generator(self.seed, "speed", client)
                step = o.median * math.exp(o.spread * draw.standard_normal())
            self._devices[client] = table.get(client, Device(step, o.down, o.up))
        if o.window:
            period = sum(o.window)
            self._phases = {
                c: period * numpy_generator(self.seed, "window", c).random() for c in clients
            }
            self._openings = np.sort(-np.array(list(self._phases.values())) % period)

    def step_seconds(self, client: str) -> float:
        """Seconds of one local step."""
        return self._devices[client].step

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """Time of download, local steps and upload; a job may be lost, or its window may close."""
        o, device = self.options, self._devices[job.client]
        draw = numpy_generator(self.seed, "trip", job.client, job.number)
        factor = math.exp(o.jitter * draw.standard_normal())
        coin, part = draw.random(2)
        leaves = job.sent + self._left(job.client, job.sent)
        work = bytes_down * device.down / MEGABYTE + job.plan.local_steps * device.step * factor
        if coin < o.dropout:
            return Trip(min(job.sent + part * work, leaves), lost="dropped out")
        if job.sent + work > leaves:
            return Trip(leaves, lost="went away")
        return Trip(job.sent + work, per_byte=device.up / MEGABYTE, leaves=leaves)

    def available(self, client: str, now: float) -> bool:
        """Whether the client's window of availability is open."""
        return self._left(client, now) > 0

    def opening(self, now: float) -> float:
        """The next time at which a window opens."""
        if not self.options.window:
            return math.inf
        period = sum(self.options.window)
        position = now % period
        index = int(np.searchsorted(self._openings, position, side="right"))
        following = (
            self._openings[index] if index < self._openings.size else self._openings[0] + period
        )
        return now + float(following - position) + 1e-6  # just after the window opens

    def _left(self, client: str, now: float) -> float:
        """Seconds until the client's window closes; 0 if it is closed."""
        if not self.options.window:
            return math.inf
        position = (now + self._phases[client]) % sum(self.options.window)
        return max(0.0, self.options.window[0] - position)


def _trace(options: FleetOptions) -> dict[str, Device]:
    """client -> device of the CSV file fleet.path; raises ConfigError with the wrong line."""
    named, devices = f"fleet.path={options.path}", {}
    try:
        # spreadsheets write a byte order mark
        text = Path(str(options.path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{named}: is not UTF-8 text ({error.reason}); save it as CSV") from None
    rows = csv.DictReader(text.splitlines())
    found = rows.fieldnames or []
    if missing := [name for name in ("client", "step_seconds") if name not in found]:
        raise ConfigError(
            f"{named}: its first line lacks {', '.join(missing)}; it has"
            f" {', '.join(found) or 'nothing'}; name the columns there"
        )
    for row in rows:
        step = _number(row["step_seconds"])
        down, up = (_number(row.get(name, getattr(options, name))) for name in ("down", "up"))
        if not (0 < step < math.inf and 0 <= down < math.inf and 0 <= up < math.inf):
            values = ", ".join(
                f"{name}={row[name]}" for name in ("step_seconds", "down", "up") if name in row
            )
            raise ConfigError(
                f"{named} line {rows.line_num}: {values}: must be above 0, down and up at least 0"
            )
        devices[row["client"]] = Device(step, down, up)
    return devices


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def fleet_problems(options: RunOptions) -> Iterator[str]:
    """Yield the problems of the fleet together with the clock, and of its file."""
    f = options.fleet
    if options.clock == "virtual" and f.name == "none":
        yield (
            "clock=virtual: needs a fleet, which models the clients' speeds; add fleet=published"
            " (or constant, ...)"
        )
    if options.clock == "real" and f.name == "replay":
        yield f"fleet={f.name}: a record is replayed on the virtual clock; add clock=virtual"
    for name in ("window", "dropout", "up", "down", "jitter") if options.clock == "real" else ():
        if value := getattr(f, name):
            yield (
                f"fleet.{name}={typed(value)}: is modelled by clock=virtual only; add"
                " clock=virtual, or leave it out"
            )
    if f.name in ("trace", "replay"):
        kind = (
            "a CSV file with client,step_seconds" if f.name == "trace" else "a run's events.jsonl"
        )
        if not f.path or not Path(f.path).is_file():
            yield f"fleet.path={typed(f.path)}: fleet={f.name} needs {kind}; name such a file"
        elif f.name == "trace":
            yield from _trace_problems(options)
        elif not _is_a_record(Path(f.path)):
            yield f"fleet.path={f.path}: fleet=replay needs {kind}, and this is none; name another"


def _is_a_record(path: Path) -> bool:
    try:
        first = next(iter(read_lines(path)), None)
    except ValueError:
        return False
    return isinstance(first, dict) and "event" in first


def _trace_problems(options: RunOptions) -> Iterator[str]:
    try:
        devices = _trace(options.fleet).values()
    except ConfigError as error:
        yield from error.problems
    else:
        if options.clock == "real" and any(device.down or device.up for device in devices):
            yield (
                f"fleet.path={options.fleet.path}: down and up are modelled by clock=virtual only;"
                " add clock=virtual, or leave them out"
            )
