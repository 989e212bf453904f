"""Options of the group `fleet`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import (
    LONGEST,
    SMALLEST,
    Group,
    above,
    at_least,
    between,
    choice,
    option,
    share,
)

MODELLED = ("constant", "published", "lognormal", "trace")  # fleets whose links have options


@dataclass
class FleetOptions(Group):
    """Speed of the simulated clients and their links.

    With clock=virtual the time is modelled. With clock=real a client that finishes before its
    modelled time waits.
    """

    group = "fleet"

    name: str = choice("none", "constant", "published", "lognormal", "trace", "replay")
    step_seconds: list[float] = option(
        [1.0],
        "Time of a local step for each client, in the order of the clients. If there are more"
        " clients, the list is repeated.",
        unit="seconds",
        only_with=("constant",),
    )
    median: float = option(
        1.0,
        "Median over the clients of the time of a local step.",
        unit="seconds",
        allowed=above(0, "seconds", end=LONGEST),
        only_with=("lognormal",),
    )
    spread: float = option(
        0.5,
        "Standard deviation over the clients of the logarithm of the time of a local step. With 0"
        " all clients are equally fast.",
        allowed=between(0, 10),
        only_with=("lognormal",),
    )
    down: float = option(
        0.0,
        "Time to send the model to a client, for each megabyte.",
        unit="seconds per megabyte",
        allowed=at_least(0, "seconds per megabyte", end=LONGEST),
        only_with=MODELLED,
    )
    up: float = option(
        0.0,
        "Time to send an update to the server, for each megabyte of the compressed message.",
        unit="seconds per megabyte",
        allowed=at_least(0, "seconds per megabyte", end=LONGEST),
        only_with=MODELLED,
    )
    jitter: float = option(
        0.0,
        "Variation of the time of a job: standard deviation of the logarithm of a factor that is"
        " drawn for each job.",
        allowed=between(0, 10),
        only_with=MODELLED,
    )
    dropout: float = option(
        0.0,
        "Probability that the update of a job never arrives.",
        allowed=share(),
        only_with=MODELLED,
    )
    window: list[float] = option(
        [],
        "Availability of clients as a repeated cycle [seconds available, seconds away]. Each"
        " client starts at a different point of the cycle. An empty list means that all clients"
        " are always available.",
        unit="seconds",
        only_with=MODELLED,
    )
    path: str | None = option(
        None,
        "trace: a CSV file with the columns client and step_seconds, and optionally down and up."
        " replay: events.jsonl of an earlier run.",
        only_with=("trace", "replay"),
    )

    def rules(self) -> Iterator[str]:
        """The lists must have valid elements."""
        if not self.step_seconds or not all(map(_is_time, self.step_seconds)):
            yield (
                f"fleet.step_seconds={list(self.step_seconds)}: needs numbers above 0, one for each"
                f" client in turn; at most {LONGEST:g} seconds"
            )
        if self.window and not (len(self.window) == 2 and all(map(_is_time, self.window))):
            yield (
                f"fleet.window={list(self.window)}: must be [seconds available, seconds away], both"
                f" above 0; at most {LONGEST:g} seconds"
            )


def _is_time(seconds: float) -> bool:
    return SMALLEST <= seconds <= LONGEST
