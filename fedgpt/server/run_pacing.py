"""The pacing of a run: that of its options, or the one that its strategy has changed to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedgpt.core.events import Event, PacingChanged
from fedgpt.core.messages import Job, Pacing, ServerState, Update
from fedgpt.server.in_flight import InFlight
from fedgpt.server.jobs import JobPlanner
from fedgpt.server.pacing import Pace, Progress, make_pace, versions_per_round
from fedgpt.server.pacing_advisor import PacingAdvisor


class RunPacing:
    """The present pacing, and the times that follow from it."""

    def __init__(self, planner: JobPlanner, changed_to: str, tell: Callable[[Event], None]):
        """`changed_to`: what an earlier process of this run had changed to; "": nothing."""
        self.parts, self.clients, self.changed_to = planner.parts, planner.clients, changed_to
        self.advisor, self.tell = PacingAdvisor(planner), tell
        # seconds without a reply after which the strategy is asked again
        self.look_again: float | None = None
        self.pace = self._make_pace()

    @property
    def name(self) -> str:
        """cohort, buffer."""
        return self.changed_to or self.parts.options.pace.name

    @property
    def numbers(self) -> Pacing:
        """The present pacing in numbers."""
        return self.pace.pacing(len(self.clients))

    def versions_between(self, every: int | None) -> int:
        """Of evaluations or checkpoints; by default the versions that a round's updates make."""
        return versions_per_round(self.numbers) if every is None else every

    def patience(self, progress: Progress, oldest: Job | None) -> float | None:
        """Seconds to wait for a reply; None: until one comes."""
        of_pace = self.pace.patience(progress)
        own = self.seconds_left(oldest) if self.pace.keeps_jobs else self.look_again
        return min((seconds for seconds in (of_pace, own) if seconds is not None), default=None)

    def seconds_left(self, oldest: Job | None) -> float | None:
        """Until the oldest job is overdue, where jobs have a deadline of their own."""
        deadline = self.parts.options.pace.deadline
        if not self.pace.keeps_jobs or deadline is None or oldest is None:
            return None
        return oldest.sent + deadline - self.parts.transport.now()

    def advise(
        self,
        accepted: Iterable[Update],
        in_flight: InFlight,
        state: ServerState,
        metrics: Mapping[str, Any] | None = None,
    ) -> ServerState:
        """Ask a strategy that may change the pacing; the state, with what it remembers of this.

        `accepted`: the updates since the last version; `metrics`: the line of a new version.
        """
        if not self.parts.strategy.switches or (self.pace.keeps_jobs and metrics is None):
            return state
        done = {update.client for update in accepted}
        advice = self.advisor.advise(self.name, done, in_flight, state, metrics or {})
        choice, self.look_again = advice.choice, advice.look_again
        if choice.pacing != self.name:
            self.changed_to = choice.pacing
            self.pace = self._make_pace()
            now = self.parts.transport.now()
            self.tell(PacingChanged(choice.pacing, choice.reason, state.version, now))
        return replace(state, memory={**state.memory, **choice.memory}) if choice.memory else state

    def _make_pace(self) -> Pace:
        options = self.parts.options
        return make_pace(options.pace, options.seed, self.name, self.parts.privacy.coins)
