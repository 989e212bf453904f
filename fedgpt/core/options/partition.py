"""Options of the group `partition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import (
    Group,
    above,
    arguments,
    at_least,
    member,
    option,
    target,
)


@dataclass
class PartitionOptions(Group):
    """Which client holds which text."""

    group = "partition"

    name: str = member("natural")
    clients: int = option(
        0,
        "Number of clients. natural: only the clients with the most text take part, this many of"
        " them; 0 means all. Otherwise: how many clients are made.",
        unit="clients",
        only_with=("natural", "grouped", "iid", "dirichlet", "quantity"),
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
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()
