"""Automatic pacing: the server chooses rounds or asynchrony during the run, from measurements.

In a round the fast clients wait for the slowest one. Asynchronous clients never wait, but their
updates are stale. This rule starts with rounds and estimates the gain of asynchrony. It switches
when the gain is large enough, and switches back when asynchrony gains nothing or does harm. The
server step is that of delta-SGD under both pacings.

Gain. With job times t_i, a round of k clients takes max t_i and handles k updates; k clients that
never wait handle sum 1 / t_i updates a second. gain = max t_i * mean(1 / t_i) is the factor by
which asynchrony increases the updates per second. It is computed whenever a reply arrives and, in a
round, again as time passes. A job in flight is timed as if its reply arrived now, and a client that
has not replied yet counts as that slowest client. So within the first round `gain` only grows
towards its true value.

    cohort -> buffer   gain >= `gain`; or a client does not reply within ENDLESS times the usual job
                       time, however recent the last switch
    buffer -> cohort   the clients have become alike: gain < `back` in all versions of STAY rounds;
                       the next STAY rounds are then synchronous in any case.
                       Or asynchrony does harm: the smoothed correlation (cosine) of a server step
                       with the previous one is below `correlation` (steps cancel out), or the
                       mean norm of the updates, per token and learning rate, is above `growth`
                       times its smoothed value; the next `rest` versions are then synchronous

The rule measures the harm of staleness and not the staleness, because with k jobs in flight the
mean staleness is k - 1 for any clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.core.messages import Choice, Observed, Pacing, ServerState
from fedgpt.core.options.option import Allowed, at_least, option

SMOOTH = 0.9  # share of the old value in smoothed statistics
# number of rounds for which the gain must be below `back` before the run returns to rounds, and
# smallest number of rounds that follow
STAY = 2
ENDLESS = 10  # median job times after which the server stops waiting for a client


@dataclass(frozen=True)
class Auto(DeltaSGD):
    """Starts with pace=cohort, watches job times and updates, and switches to buffer and back."""

    paces = frozenset({"cohort"})  # the pacing that it starts with
    refused_pacings = {
        "buffer": (
            "it starts with rounds, to measure how fast the clients are; leave pace out, or take"
            " strategy=delta_sgd"
        )
    }
    switches = True

    gain: float = option(
        1.2,
        "Training becomes asynchronous at this gain: the factor by which the number of updates a"
        " second would increase.",
        allowed=at_least(1),
    )
    back: float = option(
        1.05,
        "Training returns to rounds when the gain is below this factor.",
        allowed=at_least(1),
    )
    correlation: float = option(
        -0.3,
        "Training returns to rounds when the smoothed cosine of consecutive server steps is below"
        " this number, because such steps cancel each other.",
        allowed=Allowed("above -1 and below 0", lambda value: -1 < value < 0),
    )
    growth: float = option(
        3.0,
        "Training returns to rounds when the norm of updates exceeds this multiple of its smoothed"
        " value.",
        allowed=at_least(1),
    )
    rest: int = option(
        20,
        "Versions in rounds after asynchronous training was harmful.",
        unit="versions",
        allowed=at_least(1),
    )

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """The server must wait for the full cohort, so that it measures the slowest client."""
        if pacing.name == "cohort" and pacing.goal != pacing.clients:
            yield (
                f"pace.goal={pacing.goal}: strategy=auto must see every client of a round; leave"
                " it out"
            )
        if self.back > self.gain:
            yield (
                f"strategy.back={self.back}: above strategy.gain={self.gain}, so the run would"
                " switch back and forth at every check; lower it"
            )

    def choose_pacing(self, observed: Observed, state: ServerState) -> Choice:
        """The rule of the module's docstring."""
        seconds = list(observed.seconds.values())
        gain = updates_gained(seconds)
        if observed.pacing == "cohort":
            if seconds and observed.waited >= ENDLESS * median(seconds):
                return Choice("buffer", f"no reply of a client for {observed.waited:.1f} s")
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
        reason, rest = "", self.rest
        if correlation < self.correlation:
            reason = f"server steps cancel each other (smoothed correlation {correlation:.2f})"
        elif growth > self.growth:
            reason = f"updates have grown to {growth:.1f} times their usual norm"
        elif alike >= STAY * max(1, len(seconds)):
            reason = f"the clients are alike: asynchrony handles {gain:.2f} times the updates"
            rest = STAY
        if not reason:
            return Choice("buffer", memory=memory)
        back = {"auto_rest": state.version + rest, "auto_correlation": 0.0, "auto_alike": 0}
        return Choice(
            "cohort", reason, memory | {name: np.array(value) for name, value in back.items()}
        )

    def _smoothed(self, observed: Observed, state: ServerState) -> tuple[float, float, float]:
        """(correlation, usual norm, growth): smoothed with the newest version's metrics.

        The growth is the newest norm over the usual one.
        """
        correlation = float(state.memory.get("auto_correlation", 0.0))
        usual = float(state.memory.get("auto_norm", 0.0))
        record = observed.record
        if record.get("step_correlation") is not None:
            correlation = SMOOTH * correlation + (1 - SMOOTH) * record["step_correlation"]
        if not record.get("update_norm"):
            return correlation, usual, 1.0
        # per token and learning rate, because an AdamW step is as long as the learning rate allows:
        # warm-up and jobs of different length must not look like divergence
        norm = record["update_norm"] / (
            (record.get("lr") or 1.0) * (record.get("update_tokens") or 1.0)
        )
        growth = norm / usual if usual > 0 else 1.0
        return correlation, SMOOTH * usual + (1 - SMOOTH) * norm if usual > 0 else norm, growth


def updates_gained(seconds: list[float]) -> float:
    """max t * mean(1 / t): 1 for equal job times; 3.35 for the workers of Liu et al. (2024).

    >>> round(updates_gained([5.8, 7.5, 15.1, 33.3]), 2)
    3.35
    """
    positive = [t for t in seconds if t > 0]
    return max(positive) * sum(1 / t for t in positive) / len(positive) if positive else 1.0
