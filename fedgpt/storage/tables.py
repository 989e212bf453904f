"""What a server knows beside the model, in a form that a checkpoint can hold: plain JSON values.

RunIdentity   what never changes: the run's id and what it was started with
RunTotals     sums over the whole run; frozen, every change makes a new one
Clients       one table with one row a client; changed by its methods only
VersionLine   the newest version's line of metrics.jsonl, and how it is to be evaluated
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fedgpt.core.messages import Update


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, from its first version to its last."""

    run: str  # a random id, made once
    environment: Mapping[str, Any] = field(default_factory=dict)  # what bit-identity depends on
    options: Mapping[str, Any] = field(default_factory=dict)  # dotted name -> value
    privacy: Mapping[str, Any] = field(default_factory=dict)  # the statement of a private run

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class RunTotals:
    """Sums over all versions so far, and what the next version is judged by."""

    tokens_done: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    wall_seconds: float = 0.0
    seconds: float = 0.0  # the run's clock, wall or virtual
    dispatched: int = 0  # jobs sent
    rejected: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    norms: tuple[float, ...] = ()  # norms of the latest accepted updates
    pacing: str = ""  # the present pacing, where the strategy may change it

    def plus(self, **more: int) -> RunTotals:
        """With some counters increased.

        >>> RunTotals(bytes_up=3).plus(bytes_up=4, dispatched=1).bytes_up
        7
        """
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})

    def plus_rejected(self, code: str) -> RunTotals:
        """With one rejected reply more, by its reason code."""
        counts = {**self.rejected, code: self.rejected.get(code, 0) + 1}
        return replace(self, rejected=MappingProxyType(counts))

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**vars(self), "rejected": dict(self.rejected)}


@dataclass(frozen=True)
class VersionLine:
    """A version's line of metrics.jsonl before its evaluation, and what the evaluation does."""

    metrics: Mapping[str, Any]
    score: bool = True  # whether the version is scored
    sample: bool = True  # whether the model writes a sample


class Clients:
    """What the server knows of each client: one table, kept by columns, changed by methods only.

    A client that nothing is known of has no entry. Copying the columns is what a snapshot of
    100,000 clients costs, so they are dictionaries of plain numbers.
    """

    def __init__(
        self,
        columns: Mapping[str, Mapping[str, Any]] | None = None,
        restorable: Iterable[Mapping[str, int]] = (),
    ):
        """Continue from what `as_json` wrote; raises KeyError for a column that does not exist."""
        self.ids: Sequence[str] = ()  # the clients that can be sampled, sorted
        self._next_number: dict[str, int] = {}
        self._accepted: dict[str, int] = {}  # number of the last accepted job
        self._cached_version: dict[str, int] = {}  # version of the model that the client has
        self._strikes: dict[str, int] = {}  # failed jobs in a row
        self._resting_until: dict[str, int] = {}  # version at which it leaves quarantine
        self._speed: dict[str, float] = {}  # local steps a second, smoothed
        self._tokens: dict[str, int] = {}  # tokens of its accepted updates
        self._charged: dict[str, float] = {}  # private steps or jobs asked for
        self._released: dict[str, int] = {}  # privacy=client: version its last update went into
        self._seconds: dict[str, float] = {}  # time at its accepted jobs
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
        }

    def __len__(self) -> int:
        return len(self.ids)

    def meet(self, ids: Iterable[str]) -> None:
        """These are the clients of the run; sorted, as every process samples from the same list."""
        self.ids = tuple(ids)

    # ---- jobs

    def take_number(self, client: str) -> int:
        """The number of the client's next job; it is taken from now on."""
        number = self._next_number.get(client, 0)
        self._next_number[client] = number + 1
        return number

    def accept(self, update: Update, seconds: float) -> None:
        """Note what a client has done for an accepted update, and in how many seconds."""
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
        """The reason code of a reply that answers no job in flight."""
        if number == self._accepted.get(client):
            return "duplicate"
        return "late" if 0 <= number < self._next_number.get(client, 0) else "unknown_job"

    def cached_version(self, client: str) -> int:
        """Version of the model that the client has cached; -1: none."""
        return self._cached_version.get(client, -1)

    # ---- client states: a restart may ask for those that an older checkpoint names

    def restorable_numbers(self, client: str) -> set[int]:
        """Accepted jobs whose client state a restart from a kept checkpoint would ask for."""
        return {table[client] for table in self._restorable if client in table}

    def remember_accepted(self, most: int | None = None) -> None:
        """Add the accepted jobs of now to what a restart may ask for; keep the newest `most`."""
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
        """Tokens of its accepted updates."""
        return self._tokens.get(client, 0)

    def seconds_at_work(self, client: str) -> float:
        """Time that it spent on accepted jobs."""
        return self._seconds.get(client, 0.0)

    # ---- failures

    def strike(self, client: str) -> int:
        """Count a failed job; returns how many have failed in a row."""
        self._strikes[client] = self._strikes.get(client, 0) + 1
        return self._strikes[client]

    def rest(self, client: str, until: int) -> None:
        """The client gets no job before version `until`; its strikes are forgotten."""
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
        """Let out who has rested until `version`; returns their ids, sorted."""
        free = sorted(c for c, until in self._resting_until.items() if until <= version)
        for client in free:
            del self._resting_until[client]
        return free

    # ---- privacy

    @property
    def charges(self) -> Mapping[str, float]:
        """Client -> private steps or jobs that it has been asked for."""
        return MappingProxyType(self._charged)

    def charge(self, client: str, amount: float) -> None:
        """The client has been asked for so many private steps or jobs more."""
        self._charged[client] = self._charged.get(client, 0.0) + amount

    def charged_at_least(self, client: str, amount: float) -> None:
        """The client says that it has paid for `amount` in all, maybe more than is known here."""
        self._charged[client] = max(amount, self._charged.get(client, 0.0))

    def released(self, client: str) -> int | None:
        """The version whose release the client's last update went into; None: never."""
        return self._released.get(client)

    def note_release(self, client: str, version: int) -> None:
        """An update of the client has gone into the release of a version."""
        self._released[client] = version

    # ---- checkpoints

    def frozen(self) -> Clients:
        """A copy that later changes do not reach."""
        return Clients(self._columns, self._restorable)

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint: plain JSON values, which the constructor takes."""
        return {"columns": self._columns, "restorable": self._restorable}
