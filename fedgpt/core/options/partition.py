"""Options of the group `partition`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import (
    Group,
    above,
    arguments,
    at_least,
    choice,
    option,
    target,
)


@dataclass
class PartitionOptions(Group):
    """Which client holds which text."""

    group = "partition"

    name: str = choice("natural", "grouped", "iid", "dirichlet", "quantity", "custom")
    clients: int = option(
        0,
        "Number of clients. natural: only the clients with the most text take part, this many of"
        " them; 0 means all. Otherwise: how many clients are made.",
        unit="clients",
    )
    alpha: float = option(
        0.5,
        "Concentration of the Dirichlet distribution over labels. With 0.1 a client has text of"
        " few labels, with 10 nearly the same mixture as everybody.",
        allowed=above(0),
        only_with=("dirichlet",),
    )
    exponent: float = option(
        1.0,
        "How unequal the clients' sizes are: client i (from 0) gets a share proportional to"
        " (i + 1) ** -exponent. 0 makes them equal.",
        allowed=at_least(0),
        only_with=("quantity",),
    )
    piece: int = option(
        1024,
        "Length of the pieces of text that are dealt out to clients.",
        unit="tokens",
        allowed=at_least(1),
        only_with=("iid", "dirichlet", "quantity"),
    )
    min_tokens: int = option(
        0,
        "Fewest tokens that a client needs in order to take part. 0 means one training window,"
        " which is model.block_size + 1 tokens.",
        unit="tokens",
        allowed=at_least(0),
    )
    _target_: str | None = target("a class or function")
    arguments: dict[str, Any] = arguments()

    def rules(self) -> Iterator[str]:
        """How many clients is needed where clients are made."""
        if self.name == "natural" and self.clients < 0:
            yield (
                f"partition.clients={self.clients}: the number of largest clients to keep, or 0"
                " for all"
            )
        if self.name not in ("natural", "custom") and self.clients < 1:
            yield (
                f"partition.clients={self.clients}: partition={self.name} makes clients; say how"
                " many, 1 or more"
            )
