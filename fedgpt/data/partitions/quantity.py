"""partition=quantity: all clients have the same mixture of text, but unequal amounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.seeds import numpy_generator
from fedgpt.data.partitions.base import Documents, Pieces, Shard, made_clients, shards_of


@dataclass(frozen=True)
class Quantity(Pieces):
    """Pieces of all text, shuffled; client i has a share proportional to (i + 1) ** -exponent."""

    exponent: float = 1.0
    remedies: ClassVar[tuple[str, ...]] = (*Pieces.remedies, "lower partition.exponent")

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards, the largest first."""
        shares = np.arange(1, self.clients + 1, dtype=np.float64) ** -self.exponent
        generator = numpy_generator(seed, "partition", "quantity")
        shares /= shares.sum()
        fragments, owners = self.deal_pieces(documents.spans, shares, generator)
        return shards_of(made_clients(self.clients), fragments, owners)
