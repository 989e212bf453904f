"""partition=quantity: all clients have the same mixture of text, but unequal amounts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedgpt.core.seeds import numpy_generator
from fedgpt.data.partitions.base import (
    Documents,
    Partition,
    Pieces,
    Shard,
    made_clients,
    shards_of,
)


@dataclass(frozen=True)
class Quantity(Pieces):
    """Pieces of all text, shuffled; client i has a share proportional to (i + 1) ** -exponent."""

    exponent: float = 1.0

    def milder(self, documents: Documents) -> Iterator[Partition]:
        """Yield shorter pieces, and more equal sizes."""
        yield from super().milder(documents)
        for exponent in (0.5, 0.0):
            if exponent < self.exponent:
                yield replace(self, exponent=exponent)

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards, the largest first."""
        shares = np.arange(1, self.clients + 1, dtype=np.float64) ** -self.exponent
        generator = numpy_generator(seed, "partition", "quantity")
        shares /= shares.sum()
        fragments, owners = self.deal_pieces(documents.spans, shares, generator)
        return shards_of(made_clients(self.clients), fragments, owners)
