"""partition=grouped: natural clients are joined into a few larger ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.data.partitions.base import (
    ADD_TEXT,
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
            raise self._too_few(documents, len(names))
        sizes = np.bincount(natural, spans[:, 1] - spans[:, 0]).astype(np.int64)
        group = np.empty(len(names), np.int64)
        totals = [0] * self.clients
        for owner in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
            group[owner] = totals.index(min(totals))
            totals[group[owner]] += int(sizes[owner])
        return shards_of(made_clients(self.clients), spans, group[natural])

    def _too_few(self, documents: Documents, owners: int) -> ConfigError:
        """The error for fewer natural clients than there are to be larger ones."""
        remedies = [documents.divided(self.clients)]
        for clients in self._fewer(documents, owners):
            shards = replace(self, clients=clients).deal(documents, 0)
            if min(shard.size for shard in shards) >= documents.minimum:
                remedies.insert(0, f"set partition.clients={clients}")
                break
        return ConfigError(
            f"partition.clients={self.clients}: partition=grouped joins natural clients, and"
            f" the corpus has {owners}; {', or '.join(filter(None, remedies)) or ADD_TEXT}"
        )
