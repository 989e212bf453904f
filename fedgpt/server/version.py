"""A version under way: everything that belongs to one version and to no other."""

from __future__ import annotations

from collections import Counter

from fedgpt.core.messages import ServerState
from fedgpt.server.collector import UpdateCollector
from fedgpt.server.pacing import Progress
from fedgpt.storage.tables import RunTotals


class OpenVersion:
    """Made anew after every server step, so that nothing of the last version can be left over."""

    def __init__(self, start: ServerState, collector: UpdateCollector, now: float):
        """`start` is the state as clients get it; `now` a reading of the run's clock."""
        self.start, self.collector, self.began = start, collector, now
        self.asked = False  # whether its clients have been chosen
        self.failed = 0  # jobs that brought no valid update
        self.goal_reached: float | None = None  # when as many updates as the goal were accepted
        self.rejections: Counter[str] = Counter()  # reason code -> count

    def progress(self, totals: RunTotals, in_flight: int, now: float) -> Progress:
        """What a pacing decides from."""
        return Progress(
            self.start.version,
            totals.dispatched,
            self.asked,
            in_flight,
            len(self.collector),
            now - self.began,
            None if self.goal_reached is None else now - self.goal_reached,
        )
