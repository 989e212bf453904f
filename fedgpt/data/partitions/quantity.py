"""partition=quantity: all clients have the same mixture of text, but unequal amounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.seeds import numpy_generator
from fedgpt.data.partitions.base import (
    Documents,
    Partition,
    Shard,
    check_clients,
    cut_pieces,
    deal_pieces,
    made_clients,
    shards_of,
)


@dataclass(frozen=True)
class Quantity(Partition):
    """Pieces of all text, shuffled; client i has a share proportional to (i + 1) ** -exponent."""

    clients: int = 8
    exponent: float = 1.0
    piece: int = 1024  # tokens of a piece
    remedies: ClassVar[tuple[str, ...]] = (
        "lower partition.clients",
        "lower partition.piece",
        "lower partition.exponent",
    )

    def __post_init__(self) -> None:
        check_clients(self.clients, "quantity")

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards, the largest first."""
        fragments, number = cut_pieces(documents.spans, self.piece)
        shares = np.arange(1, self.clients + 1, dtype=np.float64) ** -self.exponent
        generator = numpy_generator(seed, "partition", "quantity")
        owners = deal_pieces(int(number[-1]) + 1, shares / shares.sum(), generator)[number]
        return shards_of(made_clients(self.clients), fragments, owners)
