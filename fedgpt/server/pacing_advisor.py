"""Asks a strategy that may change the pacing: at each arrival, at each version, and when time alone
has told more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedgpt.aggregate.base import Strategy
from fedgpt.core.messages import Choice, Observed, ServerState
from fedgpt.server.in_flight import InFlight
from fedgpt.server.jobs import JobPlanner
from fedgpt.storage.checkpoint import RunTables

GROWTH = 0.02  # of the longest wait, after which a round that goes on is looked at again


class PacingAdvisor:
    """What the server knows of its clients' times, for `Strategy.choose_pacing`."""

    def __init__(self, strategy: Strategy, planner: JobPlanner, at_once: int | None):
        """`at_once`: jobs that can run at the same time; None: each client has a machine of its
        own.
        """
        self.strategy, self.planner, self.at_once = strategy, planner, at_once
        # seconds without an arrival after which the answer may be another; None: only an arrival
        # can change it
        self.patience: float | None = None

    def ask(
        self,
        pacing: str,
        done: Iterable[str],
        flight: InFlight,
        tables: RunTables,
        state: ServerState,
        record: Mapping[str, Any],
        now: float,
    ) -> Choice:
        """The strategy's choice; `done` have been accepted since the last version, `record` is
        empty within one.
        """
        done, oldest, self.patience = list(done), flight.oldest(), None
        if self.at_once is not None and len(flight) + len(done) > self.at_once:
            # jobs queue for workers, and these never wait: no pacing would handle more
            return Choice(pacing)
        seconds = self.planner.job_seconds(done, flight, tables.speeds, now)
        waited = 0.0 if oldest is None else now - oldest.sent
        choice = self.strategy.choose_pacing(Observed(pacing, seconds, record, waited), state)
        if choice.pacing == "cohort" and done and oldest is not None:
            self.patience = GROWTH * max(seconds.values())
        return choice
