"""Options of the group `pace`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import LONGEST, Group, above, at_least, choice, option


@dataclass
class PaceOptions(Group):
    """When clients get jobs, and when the server makes a new version of the model."""

    group = "pace"

    name: str = choice("cohort", "buffer")
    clients: int = option(
        8,
        "cohort: number of clients sampled for each version. buffer: number of clients that train"
        " at any time.",
        unit="clients",
        allowed=at_least(0, zero="all"),
    )
    rate: float | None = option(
        None,
        "Probability with which each client independently takes part in a version, instead of the"
        " fixed number pace.clients. null means the fixed number. Only with pace=cohort. A version"
        " with fewer clients than the strategy needs leaves the model as it is.",
        allowed=above(0, most=1),
    )
    begin: int | None = option(
        None,
        "Number of clients that must be connected before the run begins; others join later. Only"
        " with corpus=site, which needs it: the clients of other runs are known from their text.",
        unit="clients",
        allowed=at_least(1, end=10**6),
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
        "Time for which the server waits for more updates after pace.goal is reached. null means"
        " that it does not wait.",
        unit="seconds",
        allowed=at_least(0, "seconds", end=LONGEST),
    )
    deadline: float | None = option(
        None,
        "cohort: time after which the server makes the version with the updates that have"
        " arrived. buffer: time after which a job is given up. null means no limit.",
        unit="seconds",
        allowed=above(0, "seconds", end=LONGEST),
    )
    minimum: int = option(
        1,
        "cohort: smallest number of updates of a version in which a job failed. With fewer updates"
        " the run stops with a message; while real clients are away, the version waits for them.",
        unit="updates",
        allowed=at_least(0),
    )
    max_staleness: int | None = option(
        None,
        "Largest staleness of an update: the number of versions since its client received the"
        " model. An update with a larger staleness is rejected. null means no limit.",
        unit="versions",
        allowed=at_least(0, "versions"),
    )
    dylu: bool = option(
        False,
        "Whether slower clients take fewer local steps, so that all jobs take about the same time"
        " (DyLU, arXiv 2401.09135).",
    )

    def rules(self) -> Iterator[str]:
        """Contradictions between numbers, independent of the strategy."""
        if self.name == "buffer":
            if self.rate is not None:
                yield f"pace.rate={self.rate}: coins choose cohorts; leave it out with pace=buffer"
            return
        asked = self.clients if self.rate is None else 0  # with coins any number may be asked
        if self.goal is not None and 0 < asked < self.goal:
            yield (
                f"pace.goal={self.goal}: more than the pace.clients={self.clients} that are asked;"
                " raise pace.clients"
            )
        if 0 < asked < self.minimum:
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
                " and would stop there; lower pace.minimum"
            )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """A buffer has no cohort that could be too small, and coins decide how many take part."""
        if self.name == "buffer":
            yield "minimum", "pace=buffer; choose pace=cohort"
        elif self.rate is not None and self.clients:
            yield "clients", f"pace.rate={self.rate}; add pace.rate=null"

    def rules_of_pacing(self, switches: bool) -> Iterator[str]:
        """Contradictions that depend on whether the strategy `switches` between the pacings."""
        if switches and self.rate is not None:
            yield (
                f"pace.rate={self.rate}: the pacing may change to buffer, which has no coins; set"
                " pace.clients instead"
            )
        if self.max_staleness is not None and self.name == "cohort" and not switches:
            yield (
                f"pace.max_staleness={self.max_staleness}: updates of a cohort are never stale;"
                " leave it out"
            )
