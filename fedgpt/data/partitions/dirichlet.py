"""partition=dirichlet: every client has its own mixture of labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedgpt.core.errors import ConfigError
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
class Dirichlet(Pieces):
    """Pieces of each label, divided by proportions drawn for that label from Dirichlet(alpha)."""

    alpha: float = 0.5  # concentration: a smaller one gives more uneven mixtures

    def milder(self, documents: Documents) -> Iterator[Partition]:
        """Yield shorter pieces, and more even mixtures."""
        yield from super().milder(documents)
        for alpha in (1.0, 10.0, 1000.0):
            if alpha > self.alpha:
                yield replace(self, alpha=alpha)

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return `clients` shards; raises ConfigError if all documents have one label."""
        names, label = documents.labels.sorted()
        if len(names) < 2:
            raise ConfigError(
                "partition=dirichlet: distributes labels unevenly, and all documents have the"
                " same one; set corpus.label_field for records, put files of text into"
                " sub-folders, or make sizes uneven with partition=quantity"
            )
        fragments, owners = [], []
        for index, name in enumerate(names):
            generator = numpy_generator(seed, "partition", "dirichlet", name)
            shares = generator.dirichlet(np.full(self.clients, self.alpha))
            spans, indices = self.deal_pieces(documents.spans[label == index], shares, generator)
            fragments.append(spans)
            owners.append(indices)
        clients = made_clients(self.clients)
        return shards_of(clients, np.concatenate(fragments), np.concatenate(owners))
