"""Pacing: when jobs start and when the server takes a step. The step is computed in aggregate/.

`cohort` works in rounds. `buffer` keeps k jobs in flight and takes a step after every K updates (K
= 1: fully asynchronous).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedgpt.core.messages import Pacing
from fedgpt.core.options import PaceOptions
from fedgpt.core.seeds import numpy_generator

DRAWS = 32  # random draws for a free client before all clients are listed


@dataclass(frozen=True)
class Progress:
    """The input of a pacing's decisions: counts and seconds since the last server step."""

    version: int
    dispatched: int  # jobs sent since the start of the run
    asked: bool  # whether this version's clients have been chosen
    in_flight: int
    accepted: int
    seconds: float
    at_goal: float | None = None  # seconds since the goal was reached


@dataclass(frozen=True)
class Roster:
    """The clients that could get a job."""

    clients: Sequence[str]
    busy: Container[str]
    available: Callable[[str], bool]

    def free(self, client: str) -> bool:
        """Whether `client` is available and has no job."""
        return client not in self.busy and self.available(client)


class Pace(Protocol):
    """The interface of a pacing to the server loop."""

    keeps_jobs: bool  # whether jobs stay in flight at a server step; otherwise they are given up

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """Clients that get a job now; None: no client can get a job yet."""
        ...

    def due(self, progress: Progress) -> bool:
        """Whether the server takes a step now."""
        ...

    def patience(self, progress: Progress) -> float | None:
        """Seconds that the loop may wait for the next reply; None: without a limit."""
        ...

    def max_updates(self, clients: int) -> int:
        """The largest number of updates in one server step from jobs that were sent for it."""
        ...

    def pacing(self, clients: int) -> Pacing:
        """The pacing in numbers, for a strategy."""
        ...


# (version, clients) -> a uniform value for each client
Coins = Callable[[int, int], np.ndarray | None]


def make_pace(
    options: PaceOptions, seed: int, name: str | None = None, coins: Coins | None = None
) -> Pace:
    """The pacing that `options` name, or `name`. If secret `coins` are given, they choose the
    cohort instead of the run's seed.
    """
    if (name or options.name) == "buffer":
        return Buffer(options, seed)
    return Cohort(options, seed, coins)


@dataclass(frozen=True)
class Cohort:
    """Sample clients for each version, and close it after all replies, at the goal, or at the
    deadline.
    """

    options: PaceOptions
    seed: int
    secret: Coins | None = None
    keeps_jobs = False

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """The complete cohort, at the start of a version, or the rest of it if the version waits
        for clients. It is a function of seed and version, so a resumed run samples the same
        clients.
        """
        if progress.asked:
            return []
        clients = [client for client in roster.clients if roster.free(client)]
        if not clients and not progress.in_flight:
            return None
        draw = numpy_generator(self.seed, "cohort", progress.version)
        if self.options.rate is not None:
            # a coin for every client, so that absent clients do not change the coins of the others
            coins = (
                None if self.secret is None else self.secret(progress.version, len(roster.clients))
            )
            if coins is not None:
                tossed = zip(roster.clients, coins, strict=True)
                return [
                    client
                    for client, coin in tossed
                    if coin < self.options.rate and roster.free(client)
                ]
            coins = draw.random(len(clients))
            return [
                client
                for client, coin in zip(clients, coins, strict=True)
                if coin < self.options.rate
            ]
        present = progress.in_flight + progress.accepted
        count = max(0, (self.options.clients or len(roster.clients)) - present)
        chosen = draw.choice(len(clients), size=min(count, len(clients)), replace=False)
        return [clients[int(i)] for i in sorted(chosen)]

    def due(self, progress: Progress) -> bool:
        """True after all replies, after the goal and its grace time, or after the deadline."""
        if not progress.asked:
            return False
        if progress.in_flight == 0 or _goal_is_over(progress, self.options):
            return True
        return self.options.deadline is not None and progress.seconds >= self.options.deadline

    def patience(self, progress: Progress) -> float | None:
        """Seconds until the deadline, counted from the start of the cohort, or until the end of the
        grace time.
        """
        if not progress.asked:
            return None
        deadline = self.options.deadline
        left = [] if deadline is None else [deadline - progress.seconds]
        left += _grace_left(progress, self.options)
        return max(0.0, min(left)) if left else None

    def max_updates(self, clients: int) -> int:
        """The size of the sample; with coins, the number of all clients."""
        return (
            clients
            if self.options.rate is not None
            else min(self.options.clients or clients, clients)
        )

    def pacing(self, clients: int) -> Pacing:
        """The pacing in numbers; with coins the size of the cohort is its expected size."""
        size = self.max_updates(clients)
        if self.options.rate is not None:
            size = max(1, round(self.options.rate * clients))
        return Pacing(
            "cohort", size, min(self.options.goal or size, size), self.options.grace is not None
        )


@dataclass(frozen=True)
class Buffer:
    """Keep `clients` jobs in flight and take a step after every `goal` updates. A client that is
    done gets the newest model at once.
    """

    options: PaceOptions
    seed: int
    keeps_jobs = True

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """Free clients, drawn with a seed for each job, until `clients` jobs are in flight."""
        chosen: dict[str, None] = {}
        wanted = (
            min(self.options.clients or len(roster.clients), len(roster.clients))
            - progress.in_flight
        )
        for number in range(wanted):
            client = self._draw(progress.dispatched + number, roster, chosen)
            if client is None:
                break
            chosen[client] = None
        return list(chosen)

    def due(self, progress: Progress) -> bool:
        """True after the goal and its grace time."""
        return _goal_is_over(progress, self.options, default=1)

    def patience(self, progress: Progress) -> float | None:
        """Seconds until the end of the grace time."""
        left = _grace_left(progress, self.options)
        return max(0.0, left[0]) if left else None

    def max_updates(self, clients: int) -> int:
        """The goal, and the updates that may arrive during its grace time."""
        goal = self.options.goal or 1
        return (
            goal
            if self.options.grace is None
            else goal + min(self.options.clients or clients, clients)
        )

    def pacing(self, clients: int) -> Pacing:
        """The pacing in numbers: jobs in flight and updates per step."""
        size = min(self.options.clients or clients, clients)
        return Pacing("buffer", size, self.options.goal or 1, self.options.grace is not None)

    def _draw(self, number: int, roster: Roster, chosen: Container[str]) -> str | None:
        draw = numpy_generator(self.seed, "refill", number)
        count = len(roster.clients)
        for index in draw.integers(count, size=DRAWS):  # cheap where most clients are idle
            client = roster.clients[int(index)]
            if client not in chosen and roster.free(client):
                return client
        idle = [client for client in roster.clients if client not in chosen and roster.free(client)]
        return idle[int(draw.integers(len(idle)))] if idle else None


def versions_per_round(pacing: Pacing) -> int:
    """Number of versions in one round: as many as take one update of each client that trains."""
    return max(1, pacing.clients // pacing.goal) if pacing.name == "buffer" else 1


def _goal_is_over(progress: Progress, options: PaceOptions, default: int | None = None) -> bool:
    goal = options.goal or default
    if goal is None or progress.accepted < goal:
        return False
    return options.grace is None or (
        progress.at_goal is not None and progress.at_goal >= options.grace
    )


def _grace_left(progress: Progress, options: PaceOptions) -> list[float]:
    if options.grace is None or progress.at_goal is None:
        return []
    return [options.grace - progress.at_goal]
