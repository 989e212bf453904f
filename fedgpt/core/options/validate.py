"""Options of the group `validate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, above, at_least, option


@dataclass
class ValidateOptions(Group):
    """Which updates the server refuses or shortens, and which clients it stops asking."""

    group = "validate"

    norm: float = option(
        10.0,
        "Longest update that is accepted, as a multiple of the running median of the norms of"
        " accepted updates. A longer update is rejected.",
        allowed=at_least(1, or_zero="off"),
    )
    clip: float = option(
        0.0,
        "Longest update that counts in full, as a multiple of the running median of the norms of"
        " accepted updates. A longer update is scaled down to this length.",
        allowed=above(0, or_zero="off"),
    )
    strikes: int = option(
        3,
        "Number of successive jobs of a client that fail or are rejected, after which the client"
        " is in quarantine and gets no jobs.",
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
