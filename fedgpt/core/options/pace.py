"""Options of the group `pace`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, above, at_least, choice, option


@dataclass
class PaceOptions(Group):
    """When clients get jobs, and when the server makes a new version of the model."""

    group = "pace"

    name: str = choice("cohort", "buffer")
    clients: int = option(
        8,
        "Number of clients at work. cohort: this many are sampled for each version. buffer: this"
        " many are at work at any time.",
        unit="clients",
        allowed=at_least(0, zero="all"),
    )
    rate: float | None = option(
        None,
        "Probability with which each client joins a version, independently of the others, instead"
        " of a fixed number pace.clients. null means a fixed number. Only with pace=cohort.",
        allowed=above(0, most=1),
    )
    goal: int | None = option(
        None,
        "Number of updates after which the server makes a new version. null means all sampled"
        " clients with pace=cohort, and 1 with pace=buffer.",
        unit="updates",
        allowed=at_least(1),
    )
    grace: float | None = option(
        None,
        "How long the server waits for more updates after pace.goal is reached. null means not at"
        " all.",
        unit="seconds",
        allowed=at_least(0, "seconds"),
    )
    deadline: float | None = option(
        None,
        "cohort: a version is made after this time with the updates that have arrived. buffer: a"
        " job that takes longer is given up. null means no limit.",
        unit="seconds",
        allowed=above(0, "seconds"),
    )
    minimum: int = option(
        1,
        "cohort: fewest updates of a version. With fewer updates the run stops with a message.",
        unit="updates",
        allowed=at_least(0),
    )
    max_staleness: int | None = option(
        None,
        "Largest staleness of an update, which is the number of versions made since its client"
        " received the model. An older update is dropped. null means no limit.",
        unit="versions",
        allowed=at_least(0, "versions"),
    )
    dylu: bool = option(
        False,
        "Whether slower clients take fewer local steps, so that all jobs take about as long"
        " (DyLU, arXiv 2401.09135).",
    )

    def rules(self) -> Iterator[str]:
        """Numbers that contradict each other, whatever the strategy."""
        if self.name == "buffer":
            if self.rate is not None:
                yield f"pace.rate={self.rate}: coins choose cohorts; leave it out with pace=buffer"
            return
        if self.goal is not None and 0 < self.clients < self.goal:
            yield (
                f"pace.goal={self.goal}: more than the pace.clients={self.clients} that are asked;"
                " raise pace.clients"
            )
        if 0 < self.clients < self.minimum:
            yield (
                f"pace.minimum={self.minimum}: more than the pace.clients={self.clients} that are"
                " asked; lower it"
            )
        if self.grace is not None and self.goal is None:
            yield (
                f"pace.grace={self.grace}: runs from the moment the goal is reached; set pace.goal"
            )
        if self.goal is not None and self.goal < self.minimum:
            yield (
                f"pace.minimum={self.minimum}: a version closes at pace.goal={self.goal} updates"
                " and would stop there; lower it"
            )

    def rules_of_pacing(self, switches: bool) -> Iterator[str]:
        """What depends on whether the strategy `switches` between cohort and buffer."""
        if switches and self.rate is not None:
            yield (
                f"pace.rate={self.rate}: the pacing may change to buffer, which has no coins; set"
                " pace.clients"
            )
        if self.max_staleness is not None and self.name == "cohort" and not switches:
            yield (
                f"pace.max_staleness={self.max_staleness}: updates of a cohort are never stale;"
                " leave it out"
            )
