"""Pacing: when jobs start and when a server step happens. Arithmetic is elsewhere (aggregate/).

`cohort` is rounds; `buffer` keeps k clients in flight and steps every K arrivals (K = 1: fully
asynchronous).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedgpt.core.messages import Pacing
from fedgpt.core.options import PaceOptions
from fedgpt.core.seeds import numpy_generator

DRAWS = 32  # random clients that a refill tries before it looks for the idle ones one by one


@dataclass(frozen=True)
class Progress:
    """What a pacing decides from: counts since the last server step, and how long that is ago."""

    version: int
    dispatched: int  # jobs of the whole run
    asked: bool  # whether this version's clients have been chosen
    in_flight: int
    accepted: int
    seconds: float
    at_goal: float | None = None  # seconds since the goal was reached


@dataclass(frozen=True)
class Roster:
    """Who could get a job."""

    clients: Sequence[str]
    busy: Container[str]
    available: Callable[[str], bool]

    def free(self, client: str) -> bool:
        """Whether `client` is connected and without a job."""
        return client not in self.busy and self.available(client)


class Pace(Protocol):
    """One loop asks these questions, whatever the pacing."""

    keeps_jobs: bool  # whether jobs go on when the server steps; otherwise they are given up

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """Clients that get a job now; None: nobody can be asked yet."""
        ...

    def due(self, progress: Progress) -> bool:
        """Whether the server steps now."""
        ...

    def patience(self, progress: Progress) -> float | None:
        """Seconds that the loop may wait for the next reply; None: until one comes."""
        ...

    def max_updates(self, clients: int) -> int:
        """The largest number of updates that one server step can have, of jobs that were sent for
        it.
        """
        ...

    def pacing(self, clients: int) -> Pacing:
        """In numbers, for a strategy."""
        ...


# (version, clients) -> a uniform value for each client
Coins = Callable[[int, int], np.ndarray | None]


def make_pace(
    options: PaceOptions, seed: int, name: str | None = None, coins: Coins | None = None
) -> Pace:
    """The pacing that `options` name, or `name`; secret `coins` choose a cohort instead of the
    seed's, where given.
    """
    if (name or options.name) == "buffer":
        return Buffer(options, seed)
    return Cohort(options, seed, coins)


@dataclass(frozen=True)
class Cohort:
    """Sample clients for each version; close it when all have replied, on a goal, or on a
    deadline.
    """

    options: PaceOptions
    seed: int
    secret: Coins | None = None
    keeps_jobs = False

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """The whole cohort at once, at the start of a version; stateless in the version, so a
        resumed run agrees.
        """
        if progress.asked:
            return []
        clients = [client for client in roster.clients if roster.free(client)]
        if not clients and not progress.in_flight:
            return None
        draw = numpy_generator(self.seed, "cohort", progress.version)
        if self.options.rate is not None:
            # a coin for every client there is: who is away or resting must not change the others'
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
        count = max(0, (self.options.clients or len(roster.clients)) - progress.in_flight)
        chosen = draw.choice(len(clients), size=min(count, len(clients)), replace=False)
        return [clients[int(i)] for i in sorted(chosen)]

    def due(self, progress: Progress) -> bool:
        """When everybody has answered, the goal is reached and its grace over, or the deadline has
        passed.
        """
        if not progress.asked:
            return False
        if progress.in_flight == 0 or _goal_is_over(progress, self.options):
            return True
        return self.options.deadline is not None and progress.seconds >= self.options.deadline

    def patience(self, progress: Progress) -> float | None:
        """Until the deadline, which runs from the moment the cohort is asked, or the end of the
        grace.
        """
        if not progress.asked:
            return None
        deadline = self.options.deadline
        left = [] if deadline is None else [deadline - progress.seconds]
        left += _grace_left(progress, self.options)
        return max(0.0, min(left)) if left else None

    def max_updates(self, clients: int) -> int:
        """The sample, or everybody where coins decide."""
        return (
            clients
            if self.options.rate is not None
            else min(self.options.clients or clients, clients)
        )

    def pacing(self, clients: int) -> Pacing:
        """The cohort's size is its expected one where coins decide."""
        size = self.max_updates(clients)
        if self.options.rate is not None:
            size = max(1, round(self.options.rate * clients))
        return Pacing(
            "cohort", size, min(self.options.goal or size, size), self.options.grace is not None
        )


@dataclass(frozen=True)
class Buffer:
    """Keep `clients` jobs in flight; step every `goal` arrivals. Who is done gets the newest model
    at once.
    """

    options: PaceOptions
    seed: int
    keeps_jobs = True

    def start(self, progress: Progress, roster: Roster) -> list[str] | None:
        """Idle clients, drawn by the number of the job: whoever is free where all are in flight."""
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
        """At the goal, when its grace is over."""
        return _goal_is_over(progress, self.options, default=1)

    def patience(self, progress: Progress) -> float | None:
        """Until the end of the grace."""
        left = _grace_left(progress, self.options)
        return max(0.0, left[0]) if left else None

    def max_updates(self, clients: int) -> int:
        """The goal, and what comes in while its grace runs."""
        goal = self.options.goal or 1
        return (
            goal
            if self.options.grace is None
            else goal + min(self.options.clients or clients, clients)
        )

    def pacing(self, clients: int) -> Pacing:
        """Clients in flight and updates per step."""
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
    """Versions that take as many updates as clients train at once."""
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
