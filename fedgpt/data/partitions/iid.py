"""partition=iid: every client has the same mixture and the same amount of text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.core.seeds import numpy_generator
from fedgpt.data.partitions.base import Documents, Pieces, Shard, made_clients, shards_of


@dataclass(frozen=True)
class Iid(Pieces):
    """Pieces of all text, shuffled, in equal numbers for each client."""

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards whose numbers of pieces differ by at most one."""
        shares = np.full(self.clients, 1 / self.clients)
        generator = numpy_generator(seed, "partition", "iid")
        fragments, owners = self.deal_pieces(documents.spans, shares, generator)
        return shards_of(made_clients(self.clients), fragments, owners)
