"""Pacing: when jobs start and when a server step happens. Arithmetic is elsewhere (aggregate/)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedgpt.core.options import PaceOptions
from fedgpt.core.seeds import numpy_generator


@dataclass(frozen=True)
class Progress:
    """What a pacing decides from: counts since the last server step, and how long that is ago."""

    version: int
    started: int  # jobs sent for this version
    accepted: int
    failed: int  # rejected or without a reply
    seconds: float


class Pace(Protocol):
    """One loop asks these questions, whatever the pacing."""

    def start(self, progress: Progress, clients: Sequence[str]) -> list[str]:
        """Clients that get a job now."""
        ...

    def due(self, progress: Progress) -> bool:
        """Whether the server steps now."""
        ...

    def patience(self, progress: Progress) -> float | None:
        """Seconds that the loop may wait for the next reply; None: until one comes."""
        ...

    def most(self, clients: int) -> int:
        """The largest number of updates that one server step can have."""
        ...


@dataclass(frozen=True)
class Cohort:
    """Sample clients for each version; close it when all have replied, on a goal, or on a deadline."""

    options: PaceOptions
    seed: int

    def start(self, progress: Progress, clients: Sequence[str]) -> list[str]:
        """The whole cohort at once, at the start of a version; stateless in the version, so a resumed run agrees."""
        if progress.started:
            return []
        draw = numpy_generator(self.seed, "cohort", progress.version)
        if self.options.rate is not None:
            coins = draw.random(len(clients))
            return [client for client, coin in zip(clients, coins, strict=True) if coin < self.options.rate]
        count = self.options.clients or len(clients)
        chosen = draw.choice(len(clients), size=min(count, len(clients)), replace=False)
        return [clients[int(i)] for i in sorted(chosen)]

    def due(self, progress: Progress) -> bool:
        """When everybody has answered, the goal is reached or the deadline has passed."""
        goal = self.options.goal
        if progress.accepted + progress.failed >= progress.started:
            return True
        if goal is not None and progress.accepted >= goal:
            return True
        return self.options.deadline is not None and progress.seconds >= self.options.deadline

    def patience(self, progress: Progress) -> float | None:
        """Until the deadline."""
        return None if self.options.deadline is None else max(0.0, self.options.deadline - progress.seconds)

    def most(self, clients: int) -> int:
        """The sample, or everybody where coins decide."""
        return clients if self.options.rate is not None else min(self.options.clients or clients, clients)
