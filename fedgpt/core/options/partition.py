"""Options of the group `partition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import (
    Allowed,
    Group,
    above,
    arguments,
    at_least,
    between,
    member,
    option,
    target,
)


@dataclass
class PartitionOptions(Group):
    """How the text is divided among the clients."""

    group = "partition"

    name: str = member("natural")
    clients: int = option(
        0,
        "Number of clients. natural: number of owners that take part, those with the most text; 0"
        " means all owners.",
        unit="clients",
        allowed=Allowed("at most 1000000", lambda value: value <= 1_000_000),
        only_with=("natural", "grouped", "iid", "dirichlet", "quantity"),
    )
    alpha: float = option(
        0.5,
        "Concentration of the Dirichlet distribution over labels. With 0.1 a client has text of"
        " few labels; with 10 all clients have nearly the same mixture.",
        allowed=above(0, end=1e6),
        only_with=("dirichlet",),
    )
    exponent: float = option(
        1.0,
        "Inequality of the clients' sizes: client i (from 0) gets a share proportional to (i + 1)"
        " ** -exponent. 0 means equal sizes.",
        allowed=at_least(0, end=100),
        only_with=("quantity",),
    )
    piece: int = option(
        1024,
        "Length of the pieces of text that are assigned to clients.",
        unit="tokens",
        allowed=between(1, 10**9),
        only_with=("iid", "dirichlet", "quantity"),
    )
    min_tokens: int = option(
        0,
        "Smallest number of tokens of a client that takes part. 0 means one training window,"
        " which is model.block_size + 1 tokens.",
        unit="tokens",
        allowed=between(0, 10**9),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()
