"""Synchronous or asynchronous, chosen by the server while the run goes on. The arithmetic is
delta-SGD's under both.

Waits. With job times t_i, a round takes max t_i and brings k updates; k clients that never wait
bring sum 1 / t_i a second. gain = max t_i * mean(1 / t_i) is how many times more updates asynchrony
handles. It is looked at whenever a reply arrives and, in a round, as time goes by: a job that is
still out counts as if it came back now, and a client of which nothing is known as the slowest that
is. So within the first round `gain` only grows towards its true value.

    cohort -> buffer   gain >= `gain`: the sooner, the less is waited; or a client that is out for ENDLESS times the
                       usual time, however recent the last change
    buffer -> cohort   gain < `back` in all versions of STAY rounds: the clients have become alike; the next STAY
                       rounds are synchronous in any case. Or asynchrony does harm: the smoothed
                       correlation (cosine) of a server step with the one before is below
                       `correlation` (steps take each other back), or the mean norm of the updates,
                       per token and learning rate, is above `growth` times its smoothed value;
                       after harm the run stays synchronous for `rest` versions

Staleness is judged by that harm and not by its size: with k jobs in flight its mean is k - 1 on
every fleet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from fedgpt.aggregate.base import COUNT, POSITIVE, Range, check
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.staleness import RANGES
from fedgpt.core.messages import Choice, Observed, Pacing, ServerState

SMOOTH = 0.9  # share of the old value in smoothed statistics
STAY = 2  # rounds for which clients must be alike before rounds come back, and that these then last
ENDLESS = 10  # times the median job: nobody waits for that long
AT_LEAST_ONE = Range(lambda value: value >= 1, "a number of at least 1")


@dataclass(frozen=True)
class Auto(DeltaSGD):
    """Starts with pace=cohort, watches arrival times and update statistics, switches to buffer and
    back.
    """

    paces = frozenset({"cohort"})  # where it starts
    because = {
        "buffer": (
            "it starts with a round to learn how fast clients are; leave pace out, or"
            " strategy=delta_sgd"
        )
    }
    switches = True

    gain: float = 1.2  # times more updates per second from which asynchrony is worth its staleness
    back: float = 1.05  # and below which it is not
    correlation: float = -0.3  # of successive server steps, smoothed: below it they undo each other
    growth: float = 3.0  # of the update norm over its smoothed value: above it the run is diverging
    rest: int = 20  # versions without asynchrony after it did harm

    def __post_init__(self) -> None:
        negative = Range(lambda value: -1 < value < 0, "a number above -1 and below 0")
        ranges = {
            "gain": AT_LEAST_ONE,
            "back": AT_LEAST_ONE,
            "correlation": negative,
            "growth": AT_LEAST_ONE,
        }
        check(self, eta=POSITIVE, rest=COUNT, **ranges, **RANGES)

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """A cohort must be waited for in full, or there is nothing to learn of its slowest."""
        if pacing.name == "cohort" and pacing.goal != pacing.clients:
            yield f"pace.goal={pacing.goal}: strategy=auto watches whole rounds; leave it out"
        if self.back > self.gain:
            yield (
                f"strategy.back={self.back}: above strategy.gain={self.gain}, it would switch for"
                " ever; lower it"
            )

    def choose_pacing(self, observed: Observed, state: ServerState) -> Choice:
        """The rule of the module's docstring."""
        seconds = list(observed.seconds.values())
        gain = updates_gained(seconds)
        if observed.pacing == "cohort":
            if seconds and observed.waited >= ENDLESS * median(seconds):
                return Choice("buffer", f"a client has been out for {observed.waited:.1f} s")
            if gain >= self.gain and state.version >= int(state.memory.get("auto_rest", 0)):
                return Choice(
                    "buffer", f"asynchrony handles {gain:.2f} times as many updates a second"
                )
            return Choice("cohort")
        correlation, norm, growth = self._smoothed(observed, state)
        alike = int(state.memory.get("auto_alike", 0)) + 1 if gain < self.back else 0
        memory = {
            "auto_correlation": np.array(correlation),
            "auto_norm": np.array(norm),
            "auto_alike": np.array(alike),
        }
        why, rest = "", self.rest
        if correlation < self.correlation:
            why = f"server steps undo each other (smoothed correlation {correlation:.2f})"
        elif growth > self.growth:
            why = f"updates have grown to {growth:.1f} times their usual norm"
        elif alike >= STAY * max(1, len(seconds)):
            why = f"the clients are alike: asynchrony handles {gain:.2f} times the updates"
            rest = STAY
        if not why:
            return Choice("buffer", memory=memory)
        back = {"auto_rest": state.version + rest, "auto_correlation": 0.0, "auto_alike": 0}
        return Choice(
            "cohort", why, memory | {name: np.array(value) for name, value in back.items()}
        )

    def _smoothed(self, observed: Observed, state: ServerState) -> tuple[float, float, float]:
        """(correlation, usual update norm, how many times that the norm is), from the newest
        version's record.
        """
        correlation = float(state.memory.get("auto_correlation", 0.0))
        usual = float(state.memory.get("auto_norm", 0.0))
        record = observed.record
        if record.get("step_correlation") is not None:
            correlation = SMOOTH * correlation + (1 - SMOOTH) * record["step_correlation"]
        if not record.get("update_norm"):
            return correlation, usual, 1.0
        # an AdamW step is as long as the learning rate says: warm-up and shorter jobs are no
        # divergence
        norm = record["update_norm"] / (
            (record.get("lr") or 1.0) * (record.get("update_tokens") or 1.0)
        )
        growth = norm / usual if usual > 0 else 1.0
        return correlation, SMOOTH * usual + (1 - SMOOTH) * norm if usual > 0 else norm, growth


def updates_gained(seconds: list[float]) -> float:
    """max t * mean(1 / t): the published workers give 3.35, equal ones 1.

    >>> round(updates_gained([5.8, 7.5, 15.1, 33.3]), 2)
    3.35
    """
    positive = [t for t in seconds if t > 0]
    return max(positive) * sum(1 / t for t in positive) / len(positive) if positive else 1.0
