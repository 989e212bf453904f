"""The simulated fleet: how long a client's job takes, whether it comes back, and when a client is
there.

Everything is a function of the options, the seed, the client and the task, so that a virtual run
has one course of events however often and on however many workers it is computed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import Job
from fedgpt.core.options import FleetOptions, RunOptions
from fedgpt.core.seeds import numpy_generator
from fedgpt.storage.run_folder import read_lines

# seconds per step of DeepMind's asynchronous workers (arXiv 2401.09135)
PUBLISHED = (
    0.58,
    0.75,
    1.51,
    3.33,
)
MEGABYTE = 1e6


@dataclass(frozen=True)
class Trip:
    """One job's way through the fleet, in seconds of the run's clock."""

    arrives: float  # without the upload, where `per_byte` is above 0
    lost: str = ""  # why no reply comes; `arrives` is then when the server learns of it
    per_byte: float = 0.0  # seconds per byte of the reply
    leaves: float = math.inf  # the client goes away then
    order: int = 0  # of arrivals at one time, before client and task
    # how long the client was at it, where a record says so; as in Reply
    seconds: float | None = None


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


class Device(NamedTuple):
    """What a client computes and sends with."""

    step: float  # seconds of a local step
    down: float  # seconds per megabyte to it
    up: float  # and from it


class Fleet:
    """Modelled clients: constant, published or log-normal speeds, or a table of them."""

    def __init__(self, options: FleetOptions, seed: int):
        self.options, self.seed = options, seed
        self._devices: dict[str, Device] = {}
        self._phases: dict[str, float] = {}
        self._openings = np.zeros(0)  # when windows open, within one period, sorted

    def meet(self, clients: Sequence[str]) -> None:
        """Give every client its device and its window's phase."""
        o = self.options
        table = _trace(o) if o.name == "trace" else {}
        if missing := [client for client in clients if client not in table and o.name == "trace"]:
            some = ", ".join(map(repr, missing[:3])) + (", ..." if missing[3:] else "")
            raise ConfigError(
                f"fleet.path={o.path}: has no line for {len(missing)} of {len(clients)} clients:"
                f" {some}"
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
        """Download, local steps, upload; a job is lost by chance, or when its client's window
        closes.
        """
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
        following = (
            self._openings[index] if index < self._openings.size else self._openings[0] + period
        )
        return now + float(following - position) + 1e-6  # just past the edge

    def _left(self, client: str, now: float) -> float:
        """Seconds until the client's window closes; 0 where it is closed."""
        if not self.options.window:
            return math.inf
        position = (now + self._phases[client]) % sum(self.options.window)
        return max(0.0, self.options.window[0] - position)


class Replay:
    """The course of an earlier run, from its events.jsonl: every job arrives when and in the order
    that it did.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._trips: dict[tuple[str, int], Trip] = {}
        for order, event in enumerate(read_lines(Path(path))):
            if event["event"] not in ("accept", "reject") or event.get("code") in (
                "no_reply",
                "late",
                "duplicate",
            ):
                continue
            # its name in older records
            number = event["number"] if "number" in event else event["task"]
            lost = event.get("detail", "") if event.get("code") == "client_error" else ""
            seconds = event.get("train_seconds") if event.get("measured", True) else math.nan
            self._trips[event["client"], number] = Trip(
                event["seconds"], lost, order=order, seconds=seconds
            )

    def meet(self, clients: Sequence[str]) -> None:
        """Nothing to learn: the record names them."""

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """As recorded; a job that nobody saw arrive never does."""
        return self._trips.get((job.client, job.number), Trip(math.inf, lost="not in the record"))

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


def _trace(options: FleetOptions) -> dict[str, Device]:
    """client -> device of a CSV file; raises ConfigError with the line that is wrong."""
    named, devices = f"fleet.path={options.path}", {}
    try:
        # a spreadsheet begins it with a mark
        text = Path(str(options.path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{named}: is no text in UTF-8 ({error.reason}); save it as CSV"
        ) from None
    rows = csv.DictReader(text.splitlines())
    found = rows.fieldnames or []
    if missing := [name for name in ("client", "step_seconds") if name not in found]:
        raise ConfigError(
            f"{named}: its first line lacks {', '.join(missing)}; it has"
            f" {', '.join(found) or 'nothing'}"
        )
    for row in rows:
        step = _number(row["step_seconds"])
        down, up = (_number(row.get(name, getattr(options, name))) for name in ("down", "up"))
        if not (0 < step < math.inf and 0 <= down < math.inf and 0 <= up < math.inf):
            told = ", ".join(
                f"{name}={row[name]}" for name in ("step_seconds", "down", "up") if name in row
            )
            raise ConfigError(
                f"{named} line {rows.line_num}: {told}: must be above 0, down and up at least 0"
            )
        devices[row["client"]] = Device(step, down, up)
    return devices


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def fleet_problems(options: RunOptions) -> Iterator[str]:
    """What is wrong with the fleet beside the clock, and with the file that it is read from."""
    f = options.fleet
    if options.clock == "virtual" and f.name == "none":
        yield (
            "clock=virtual: needs a fleet, which says how fast clients are; add fleet=published (or"
            " constant, ...)"
        )
    if options.clock == "real" and f.name == "replay":
        yield f"fleet={f.name}: a record is replayed on the virtual clock; add clock=virtual"
    if options.clock == "real" and (f.window or f.dropout or f.up or f.down or f.jitter):
        yield "fleet: window, dropout, up, down and jitter are modelled by clock=virtual only"
    if f.name in ("trace", "replay"):
        kind = (
            "a CSV file with client,step_seconds" if f.name == "trace" else "a run's events.jsonl"
        )
        if not f.path or not Path(f.path).is_file():
            yield f"fleet.path={f.path}: fleet={f.name} needs {kind}"
        elif f.name == "trace":
            yield from _trace_problems(options)
        elif not _is_a_record(Path(f.path)):
            yield f"fleet.path={f.path}: fleet=replay needs {kind}, and this is none"


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
                " leave them out"
            )


def replay_problems(options: RunOptions, switches: bool) -> Iterator[str]:
    """What a record cannot repeat: it holds arrivals, not moments between them; `switches`: the
    pacing may change.
    """
    if options.fleet.name != "replay":
        return
    why = "fleet=replay: a record holds when replies arrived"
    for name in ("grace", "deadline"):
        if (value := getattr(options.pace, name)) is not None:
            yield (
                f"pace.{name}={value:g}: {why}, not when the server stopped waiting for others;"
                f" only runs without pace.{name} can be replayed: leave it out in both"
            )
    if options.privacy.unit != "none" and options.privacy.rng == "secure":
        yield (
            f"privacy={options.privacy.unit}: {why}, and noise that nobody can know does not come"
            " again; only runs without privacy, or with privacy.rng=seeded in both, can be"
            " replayed"
        )
    if switches:
        yield (
            f"strategy=auto: {why}, not how long the others had been at work when it chose the"
            " pacing; only runs of one pacing can be replayed: name it, e.g. pace=buffer"
            " strategy=delta_sgd, in both"
        )


def nothing_left(waiting: int) -> FedGPTError:
    """The virtual clock has no event any more."""
    return FedGPTError(
        f"the virtual clock stands still: {waiting} jobs in flight and none of them ever arrives"
    )
