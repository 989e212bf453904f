"""The state of the open version."""

from __future__ import annotations

from collections import Counter

from fedgpt.core.messages import ServerState
from fedgpt.server.collector import UpdateCollector
from fedgpt.server.pacing import Progress
from fedgpt.storage.tables import RunTotals


class OpenVersion:
    """A new object for every version, so that no state of the previous version remains."""

    def __init__(self, start: ServerState, collector: UpdateCollector, now: float):
        """`start` is the state as clients get it; `now` is the time on the run's clock."""
        self.start, self.collector, self.began = start, collector, now
        self.asked = False  # whether its clients have been chosen
        self.failed = 0  # jobs without a valid update
        self.skipped = False  # whether the version keeps the model, as those it chose are away
        self.goal_reached: float | None = None  # time at which the goal was reached
        self.rejections: Counter[str] = Counter()  # reason code -> count

    def progress(self, totals: RunTotals, in_flight: int, now: float) -> Progress:
        """The input of a pacing's decisions."""
        return Progress(
            self.start.version,
            totals.dispatched,
            self.asked,
            in_flight,
            len(self.collector),
            now - self.began,
            None if self.goal_reached is None else now - self.goal_reached,
        )
