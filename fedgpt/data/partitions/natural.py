"""partition=natural: every owner of text is a client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import ConfigError, amount
from fedgpt.data.partitions.base import Documents, Partition, Shard, shards_of


@dataclass(frozen=True)
class Natural(Partition):
    """The owners with enough tokens, or the `clients` largest of them."""

    clients: int = 0  # number of largest owners to keep; 0: all
    min_tokens: int = 0  # used in a message only; `documents.minimum` already includes it

    def __post_init__(self) -> None:
        if self.clients < 0:
            raise ConfigError(
                f"partition.clients={self.clients}: must be the number of largest clients to keep,"
                " or 0 for all"
            )

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return the shards of the largest owners; owners below the minimum are excluded."""
        names, owners = np.unique(np.array(documents.clients, dtype=object), return_inverse=True)
        shards = shards_of([str(name) for name in names], documents.spans, owners)
        minimum = documents.minimum
        large = [shard for shard in shards if shard.size >= minimum]
        if not large:
            largest = max(shard.size for shard in shards)
            raise ConfigError(
                f"partition.min_tokens={self.min_tokens}: none of"
                f" {amount(len(shards), 'natural client')} has {minimum} tokens (the largest has"
                f" {largest}); lower partition.min_tokens or model.block_size, or use"
                " partition=iid"
            )
        if self.clients > len(large):
            raise ConfigError(
                f"partition.clients={self.clients}: the corpus has"
                f" {amount(len(large), 'natural client')} of at least {minimum} tokens; use"
                " that many or fewer (0 = all), or partition=iid, which makes any number"
            )
        if self.clients:
            large.sort(key=lambda shard: (-shard.size, shard.client))
            del large[self.clients :]
        return large
