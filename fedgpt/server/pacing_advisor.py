"""Asks a strategy that may change the pacing: at each arrival, at each version, as time passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedgpt.core.messages import Choice, Observed, ServerState
from fedgpt.server.in_flight import InFlight
from fedgpt.server.jobs import JobPlanner, job_seconds

GROWTH = 0.02  # share of the longest job time after which the strategy is asked again in a round


@dataclass(frozen=True)
class Advice:
    """The strategy's choice, and when to ask it again if no reply arrives."""

    choice: Choice
    look_again: float | None = None  # seconds until the next call; None: after the next reply


class PacingAdvisor:
    """Calls `Strategy.choose_pacing` with the job times that the server has measured."""

    def __init__(self, planner: JobPlanner):
        self.planner, self.parts = planner, planner.parts

    def advise(
        self,
        pacing: str,
        done: Iterable[str],
        in_flight: InFlight,
        state: ServerState,
        metrics: Mapping[str, Any],
    ) -> Advice:
        """The strategy's current advice.

        `done`: clients whose updates were accepted since the last version; `metrics`: the line of a
        version that was just made; empty while a version is open.
        """
        done, oldest, at_once = list(done), in_flight.oldest(), self.parts.transport.at_once
        if at_once is not None and len(in_flight) + len(done) > at_once:
            # jobs wait for workers, so all workers are busy and no pacing can handle more updates
            return Advice(Choice(pacing))
        now = self.parts.transport.now()
        steps, speeds = self.parts.options.local.steps, self.planner.clients.speeds
        seconds = job_seconds(steps, done, in_flight, speeds, now)
        waited = 0.0 if oldest is None else now - oldest.sent
        observed = Observed(pacing, seconds, metrics, waited)
        choice = self.parts.strategy.choose_pacing(observed, state)
        if choice.pacing == "cohort" and done and oldest is not None:
            return Advice(choice, GROWTH * max(seconds.values()))
        return Advice(choice)
