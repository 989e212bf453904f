"""partition=natural: every owner of text is a client."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.errors import ConfigError, amount
from fedgpt.data.partitions.base import ADD_TEXT, Documents, Partition, Shard, shards_of


@dataclass(frozen=True)
class Natural(Partition):
    """The owners with enough tokens, or the `clients` largest of them."""

    clients: int = 0  # number of largest owners to keep; 0: all

    def __post_init__(self) -> None:
        if self.clients < 0:
            raise ConfigError(
                f"partition.clients={self.clients}: must be the number of largest clients to keep,"
                " or 0 for all"
            )

    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return the shards of the largest owners; owners below the minimum are excluded."""
        names, owners = documents.clients.sorted()
        shards = shards_of(names, documents.spans, owners)
        shards.sort(key=lambda shard: (-shard.size, shard.client))
        large = [shard for shard in shards if shard.size >= documents.minimum]
        if len(large) < max(1, self.clients):
            raise self._too_few(documents, [shard.size for shard in shards], len(large))
        return large[: self.clients or None]

    def _too_few(self, documents: Documents, sizes: list[int], large: int) -> ConfigError:
        """The error for owners of `sizes`, the largest first, of which `large` are large enough."""
        minimum, wanted = documents.minimum, max(1, self.clients)
        remedies = []
        if large:
            owners = f"{amount(large, 'natural client')} of at least {minimum} tokens"
            problem = f"partition.clients={self.clients}: the corpus has {owners}"
            remedies.append(f"use {large} or fewer (0 = all)")
        else:
            cause = f"model.block_size={documents.window - 1}"
            if documents.asked == minimum:
                cause = f"partition.min_tokens={minimum}"
            problem = (
                f"{cause}: none of {amount(len(sizes), 'natural client')} has {minimum} tokens"
            )
            problem += f" (the largest has {sizes[0]})"
        if wanted <= len(sizes):
            remedies.append(documents.lower_minimum(sizes[wanted - 1]))
        remedies.append(documents.divided(self.clients or 8))
        return ConfigError(f"{problem}; {', or '.join(filter(None, remedies)) or ADD_TEXT}")
