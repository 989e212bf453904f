"""The server's state besides the model, as plain JSON values for checkpoints.

    RunIdentity   constants of the run: its id, environment and options
    RunTotals     sums over the run; immutable, every change makes a new object
    Clients       a table with one row per client; changed by its methods only
VersionLine   the newest version's line of metrics.jsonl, and how it is to be evaluated
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fedgpt.core.messages import ClientInfo, Update


@dataclass(frozen=True)
class RunIdentity:
    """Constants of a run, from its first version to its last."""

    run: str  # random id of the run
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions and machine
    options: Mapping[str, Any] = field(default_factory=dict)  # dotted name -> value
    privacy: Mapping[str, Any] = field(default_factory=dict)  # statement of a private run

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class RunTotals:
    """Sums over all versions so far, and the norms for the next version's norm limit."""

    tokens_done: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wall_seconds: float = 0.0
    seconds: float = 0.0  # the run's clock, wall or virtual
    dispatched: int = 0  # number of jobs sent
    rejected: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    norms: tuple[float, ...] = ()  # norms of the latest accepted updates
    pacing: str = ""  # the current pacing, if the strategy may change it
    begun_with: int = 0  # number of clients when the run began; 0: it has not begun

    def plus(self, **more: int) -> RunTotals:
        """A copy with some counters increased.

        >>> RunTotals(bytes_up=3).plus(bytes_up=4, dispatched=1).bytes_up
        7
        """
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})

    def plus_rejected(self, code: str) -> RunTotals:
        """A copy with one more rejected reply of this reason code."""
        counts = {**self.rejected, code: self.rejected.get(code, 0) + 1}
        return replace(self, rejected=MappingProxyType(counts))

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**vars(self), "rejected": dict(self.rejected)}


@dataclass(frozen=True)
class VersionLine:
    """A version's line of metrics.jsonl before its evaluation, and what to evaluate."""

    metrics: Mapping[str, Any]
    score: bool = True  # whether the version is scored
    sample: bool = True  # whether the version generates a sample


class Clients:
    """The server's state of each client: a table stored by columns, changed by methods only.

    A client without data has no entry. A snapshot copies all columns, so they are dictionaries of
    plain numbers, which are cheap to copy for 100,000 clients.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        restorable: Iterable[Mapping[str, int]] = (),
    ):
        """Continue from the output of `as_json`; raises KeyError for an unknown column."""
        self.ids: Sequence[str] = ()  # the clients that can be sampled, sorted
        self._next_number: dict[str, int] = {}
        self._accepted: dict[str, int] = {}  # number of the last accepted job
        self._cached_version: dict[str, int] = {}  # version of the model that the client has cached
        self._strikes: dict[str, int] = {}  # number of consecutive failed jobs
        self._resting_until: dict[str, int] = {}  # version at which the client leaves quarantine
        self._speed: dict[str, float] = {}  # local steps a second, smoothed
        self._tokens: dict[str, int] = {}  # tokens of the client's accepted updates
        self._charged: dict[str, float] = {}  # private steps or jobs sent to the client
        self._released: dict[str, int] = {}  # privacy=client: version of its last release
        self._seconds: dict[str, float] = {}  # seconds of the client's accepted jobs
        self._joined: dict[str, int] = {}  # tokens of a client that brings its own text
        self._restorable = tuple(dict(table) for table in restorable)
        for name, column in (columns or {}).items():
            self._columns[name].update(column)

    @property
    def _columns(self) -> dict[str, dict[str, Any]]:
        return {
            "next_number": self._next_number,
            "accepted": self._accepted,
            "cached_version": self._cached_version,
            "strikes": self._strikes,
            "resting_until": self._resting_until,
            "speed": self._speed,
            "tokens": self._tokens,
            "charged": self._charged,
            "released": self._released,
            "seconds": self._seconds,
            "joined": self._joined,
        }

    def __len__(self) -> int:
        return len(self.ids)

    def meet(self, ids: Iterable[str]) -> None:
        """These are the clients of the run; sorted, as every process samples from the same list."""
        self.ids = tuple(ids)

    def join(self, infos: Iterable[ClientInfo]) -> None:
        """Add clients that bring their own text, and remember them for a restart."""
        self._joined |= {info.id: info.tokens for info in infos}
        self.ids = tuple(sorted({*self.ids, *self._joined}))

    @property
    def joined(self) -> list[ClientInfo]:
        """The clients that have joined with their own text, sorted."""
        return [ClientInfo(client, self._joined[client]) for client in sorted(self._joined)]

    # ---- jobs

    def take_number(self, client: str) -> int:
        """Return the client's next job number and increment it."""
        number = self._next_number.get(client, 0)
        self._next_number[client] = number + 1
        return number

    def accept(self, update: Update, seconds: float) -> None:
        """Record an accepted update and the seconds of its job."""
        client = update.client
        self._accepted[client] = update.number
        self._cached_version[client] = update.version
        self._tokens[client] = self._tokens.get(client, 0) + update.tokens
        self._seconds[client] = self._seconds.get(client, 0.0) + seconds
        self._strikes.pop(client, None)

    def accepted_number(self, client: str) -> int:
        """Number of the client's last accepted job; -1: none yet."""
        return self._accepted.get(client, -1)

    def reason_for_stray(self, client: str, number: int) -> str:
        """The reason code of a reply whose job is not in flight."""
        if number == self._accepted.get(client):
            return "duplicate"
        return "late" if 0 <= number < self._next_number.get(client, 0) else "unknown_job"

    def cached_version(self, client: str) -> int:
        """Version of the model that the client has cached; -1: none."""
        return self._cached_version.get(client, -1)

    # ---- client states that a restart from an older checkpoint may need

    def restorable_numbers(self, client: str) -> set[int]:
        """Accepted jobs whose client state a restart from a kept checkpoint would need."""
        return {table[client] for table in self._restorable if client in table}

    def remember_accepted(self, most: int | None = None) -> None:
        """Add the current accepted jobs to those that a restart may need; keep the newest `most`
        tables.
        """
        tables = (*self._restorable, dict(self._accepted))
        self._restorable = tables if most is None else tables[-most:]

    # ---- speed and work done

    @property
    def speeds(self) -> Mapping[str, float]:
        """Client -> local steps a second; only clients that have been measured."""
        return MappingProxyType(self._speed)

    def learn_speed(self, client: str, speed: float, memory: float) -> float:
        """Smooth a client's speed, `memory` being the share of the old value; returns it."""
        old = self._speed.get(client)
        self._speed[client] = speed if old is None else memory * old + (1 - memory) * speed
        return self._speed[client]

    def tokens_trained(self, client: str) -> int:
        """Tokens of the client's accepted updates."""
        return self._tokens.get(client, 0)

    def seconds_at_work(self, client: str) -> float:
        """Seconds of the client's accepted jobs."""
        return self._seconds.get(client, 0.0)

    # ---- failures

    def strike(self, client: str) -> int:
        """Count a failed job; returns the number of consecutive failed jobs."""
        self._strikes[client] = self._strikes.get(client, 0) + 1
        return self._strikes[client]

    def rest(self, client: str, until: int) -> None:
        """Put the client in quarantine until version `until`, and set its strikes to 0."""
        self._strikes.pop(client, None)
        self._resting_until[client] = until

    def is_resting(self, client: str) -> bool:
        """Whether the client is in quarantine."""
        return client in self._resting_until

    @property
    def resting(self) -> Collection[str]:
        """The clients in quarantine."""
        return self._resting_until.keys()

    def end_rests(self, version: int) -> list[str]:
        """End the quarantines that last until `version`; returns the clients' ids, sorted."""
        free = sorted(c for c, until in self._resting_until.items() if until <= version)
        for client in free:
            del self._resting_until[client]
        return free

    # ---- privacy

    @property
    def charges(self) -> Mapping[str, float]:
        """Client -> number of private steps or jobs that were sent to it."""
        return MappingProxyType(self._charged)

    def charge(self, client: str, amount: float) -> None:
        """Add private steps or jobs that were sent to the client; negative: it refused them."""
        self._charged[client] = self._charged.get(client, 0.0) + amount

    def charged_at_least(self, client: str, amount: float) -> None:
        """Raise the client's count to `amount`, the total that the client reports."""
        self._charged[client] = max(amount, self._charged.get(client, 0.0))

    def released(self, client: str) -> int | None:
        """The version of the last release that contains an update of the client; None if there is
        none.
        """
        return self._released.get(client)

    def note_release(self, client: str, version: int) -> None:
        """Record that the release of a version contains an update of the client."""
        self._released[client] = version

    # ---- checkpoints

    def frozen(self) -> Clients:
        """A copy that later changes do not affect."""
        return Clients(self._columns, self._restorable)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values for a checkpoint, which the constructor accepts."""
        return {"columns": self._columns, "restorable": self._restorable}
