"""Options of the group `validate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, above, at_least, option


@dataclass
class ValidateOptions(Group):
    """Limits on the norm of updates, and quarantine of failing clients."""

    group = "validate"

    norm: float = option(
        10.0,
        "Largest norm of an accepted update, as a multiple of the running median of the norms of"
        " accepted updates. A longer update is rejected. 0 leaves only the limit of ten times the"
        " norm of the model.",
        allowed=at_least(1, or_zero="off"),
    )
    clip: float = option(
        0.0,
        "Norm to which longer updates are scaled down, as a multiple of the running median of the"
        " norms of accepted updates.",
        allowed=above(0, or_zero="off"),
    )
    strikes: int = option(
        3,
        "Number of consecutive failed or rejected jobs after which a client is in quarantine and"
        " gets no jobs.",
        unit="jobs",
        allowed=at_least(0, zero="never"),
    )
    rest: int = option(10, "Length of a quarantine.", unit="rounds", allowed=at_least(1, "round"))

    def rules(self) -> Iterator[str]:
        """Updates that are rejected cannot be scaled down."""
        if self.norm and self.clip > self.norm:
            yield (
                f"validate.clip={self.clip}: above validate.norm={self.norm}, where updates are"
                " rejected, it clips none; lower it"
            )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Without strikes there is no quarantine."""
        if self.strikes == 0:
            yield "rest", "validate.strikes=0; add validate.strikes=3"
