"""partition=grouped: natural clients are joined into a few larger ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.data.partitions.base import (
    Documents,
    MadeClients,
    Shard,
    made_clients,
    shards_of,
)


@dataclass(frozen=True)
class Grouped(MadeClients):
    """Natural clients, the largest first, each assigned to the smallest new client."""

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards; the documents of a natural client are all in one of them."""
        spans = documents.spans
        names, natural = documents.clients.sorted()
        if len(names) < self.clients:
            raise ConfigError(
                f"partition.clients={self.clients}: partition=grouped joins natural clients, and"
                f" the corpus has {len(names)}; use {len(names)} or fewer, or partition=iid"
            )
        sizes = np.bincount(natural, spans[:, 1] - spans[:, 0]).astype(np.int64)
        group = np.empty(len(names), np.int64)
        totals = [0] * self.clients
        for owner in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
            group[owner] = totals.index(min(totals))
            totals[group[owner]] += int(sizes[owner])
        return shards_of(made_clients(self.clients), spans, group[natural])
