"""partition=iid: every client has the same mixture and the same amount of text."""

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
class Iid(Partition):
    """Pieces of all text, shuffled, in equal numbers for each client."""

    clients: int = 8
    piece: int = 1024  # tokens of a piece
    remedies: ClassVar[tuple[str, ...]] = ("lower partition.clients", "lower partition.piece")

    def __post_init__(self) -> None:
        check_clients(self.clients, "iid")

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards whose numbers of pieces differ by at most one."""
        fragments, number = cut_pieces(documents.spans, self.piece)
        shares = np.full(self.clients, 1 / self.clients)
        generator = numpy_generator(seed, "partition", "iid")
        owners = deal_pieces(int(number[-1]) + 1, shares, generator)[number]
        return shards_of(made_clients(self.clients), fragments, owners)
