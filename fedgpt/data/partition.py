"""The shards of the clients, made from the clients' part of the token array.

    Prepared -> Documents of the clients' part -> Partition.deal (partitions/) -> checked shards

No text is copied, and the same options and seed give the same shards in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedgpt.core.errors import ConfigError, amount
from fedgpt.core.members import Members
from fedgpt.core.options import PartitionOptions
from fedgpt.core.options.option import typed
from fedgpt.core.targets import CUSTOM, calling
from fedgpt.data.partitions.base import (
    ADD_TEXT,
    MANY,
    Documents,
    MadeClients,
    Partition,
    Shard,
    merged,
)
from fedgpt.data.prepare import CLIENTS, Prepared

PARTITIONS = Members("partition", "partition.name", Partition)


def partition_of(options: PartitionOptions, trusted: Sequence[str] = ()) -> Partition:
    """Return the partition of a run; `trusted` are the packages that `_target_` may name.

    Raises ConfigError.
    """
    return PARTITIONS.build(options, trusted)


def partition(
    prepared: Prepared,
    options: PartitionOptions,
    seed: int,
    window: int,
    trusted: Sequence[str] = (),
) -> list[Shard]:
    """Divide the clients' part; return shards without a common token, sorted by client id.

    `window` is block_size + 1, the smallest number of tokens to train on. Raises ConfigError if a
    client has too few tokens; partition=natural excludes such clients instead.
    """
    if problems := [*options.problems(), *PARTITIONS.problems(options, trusted)]:
        raise ConfigError(problems)
    documents = _documents(prepared, window, options.min_tokens)
    dealer = partition_of(options, trusted)
    if isinstance(dealer, MadeClients) and dealer.clients * documents.minimum > documents.size:
        raise _too_many(dealer, documents, options, seed)
    with calling("partition", dealer, "deal"):
        dealt: Any = dealer.deal(documents, seed)
        dealt = list(dealt) if isinstance(dealt, Iterable) else dealt
    _check_kind(dealt, options)
    shards = sorted(dealt, key=lambda shard: shard.client)
    _check_tokens(shards, documents, options)
    if small := [shard for shard in shards if shard.size < documents.minimum]:
        least = min(small, key=lambda shard: shard.size)
        remedies = _remedies(dealer, documents, options, seed, least.size)
        raise ConfigError(
            f"{_label(options)}: {len(small)} of {amount(len(shards), 'client')}"
            f" {'has' if len(shards) == 1 else 'have'} fewer than {documents.minimum} tokens (the"
            f" smallest, {least.client}, has {least.size}); {remedies}"
        )
    return shards


def natural_owners(prepared: Prepared) -> int:
    """Return the number of owners with text in the clients' part, including owners with too little
    text.
    """
    owners, _ = prepared.clients[prepared.part == CLIENTS].sorted()
    return len(owners)


def _documents(prepared: Prepared, window: int, asked: int) -> Documents:
    """Return the documents of the clients' part."""
    chosen = prepared.part == CLIENTS
    return Documents(
        clients=prepared.clients[chosen],
        labels=prepared.labels[chosen],
        spans=np.stack([prepared.starts[:-1][chosen], prepared.starts[1:][chosen]], axis=1),
        minimum=max(window, asked),
        window=window,
        asked=asked,
    )


def _label(options: PartitionOptions) -> str:
    """Return the options that name the partition, for a message."""
    if options.name == CUSTOM:
        return f"partition._target_={options._target_}"
    return f"partition.name={options.name}, partition.clients={options.clients}"


def _check_kind(dealt: Any, options: PartitionOptions) -> None:
    """Raise ConfigError unless `dealt` is a list of shards with names and spans."""
    wrong = [each for each in dealt if not _is_shard(each)] if isinstance(dealt, list) else [dealt]
    if not wrong:
        return
    raise ConfigError(
        f"{_label(options)}: deal returned {wrong[0]!r:.60}; it must return a list of"
        " fedgpt.data.partitions.base.Shard, each with a client's name and an array of spans"
    )


def _is_shard(value: Any) -> bool:
    named = isinstance(value, Shard) and isinstance(value.client, str)
    return named and isinstance(value.spans, np.ndarray) and value.spans.dtype.kind in "iu"


def _check_tokens(shards: Sequence[Shard], documents: Documents, options: PartitionOptions) -> None:
    """Raise ConfigError unless every token belongs to at most one client and to the clients' part.

    No client may get a token of the public or the held-out part.
    """
    if problem := _wrong_tokens(shards, merged(documents.spans)):
        raise ConfigError(f"{_label(options)}: {problem}")


def _wrong_tokens(shards: Sequence[Shard], allowed: np.ndarray) -> str:
    """Return the problem of the shards' spans, or an empty text."""
    names = {shard.client for shard in shards}
    if not 0 < len(shards) == len(names):
        return "makes two clients with the same name" if shards else "makes no client"
    for shard in shards:
        if np.ndim(shard.spans) != 2 or np.shape(shard.spans)[1] != 2:
            return f"gives {shard.client} spans that are not an array (spans, 2)"
        if (shard.spans[:, 1] <= shard.spans[:, 0]).any():
            return f"gives {shard.client} a span without tokens"
        within = np.searchsorted(allowed[:, 0], shard.spans[:, 0], side="right") - 1
        if (within < 0).any() or (shard.spans[:, 1] > allowed[within, 1]).any():
            return f"gives {shard.client} a token that is not in the clients' part"
    # Spans have no token in common if each one ends before the next begins. Then ends are in the
    # order of beginnings, so it is enough to sort each.
    first, last = (np.sort(np.concatenate([s.spans[:, side] for s in shards])) for side in (0, 1))
    return "assigns a token twice" if (first[1:] < last[:-1]).any() else ""


def _too_many(
    dealer: MadeClients, documents: Documents, options: PartitionOptions, seed: int
) -> ConfigError:
    """The error for more clients than even equal shares are enough for."""
    least = _least(dealer, documents, seed) if dealer.clients <= MANY else 0
    return ConfigError(
        f"partition.clients={dealer.clients}: each needs {documents.minimum} tokens, and the"
        f" clients' part of the text has {documents.size:,};"
        f" {_remedies(dealer, documents, options, seed, least)}"
    )


def _remedies(
    dealer: Partition, documents: Documents, options: PartitionOptions, seed: int, least: int
) -> str:
    """Return what to change, where the smallest client has `least` tokens, which are too few."""
    helping: list[dict[str, Any]] = []  # options, of each the first values that help
    nearly, size = "", least
    for other in dealer.milder(documents):
        if isinstance(other, MadeClients) and other.clients > MANY:
            continue
        changed = {name: new for name, new in vars(other).items() if new != vars(dealer)[name]}
        if any(
            each.keys() == changed.keys() or each.items() <= changed.items() for each in helping
        ):
            continue
        found = _least(other, documents, seed)
        if found >= documents.minimum:
            helping.append(changed)
        elif found > size:
            nearly, size = _set(changed, options), found
    sets = [_set(changed, options) for changed in helping]
    remedies = [dealer.remedy, *sets, documents.lower_minimum(least)]
    if not any(remedies) and nearly:
        remedies = [f"{nearly}, and {documents.lower_minimum(size)}"]
    return ", or ".join(filter(None, remedies)) or ADD_TEXT


def _set(values: Mapping[str, Any], options: PartitionOptions) -> str:
    """Return how these options of a partition are set, as it is typed."""
    if options.name == CUSTOM:
        listing = ", ".join(f"{name}: {typed(value)}" for name, value in values.items())
        return f"set {listing} in partition.arguments"
    return "set " + " ".join(f"partition.{name}={typed(value)}" for name, value in values.items())


def _least(dealer: Partition, documents: Documents, seed: int) -> int:
    """Return the tokens of the smallest client; 0 if the text cannot be divided so."""
    try:
        with calling("partition", dealer, "deal"):
            return min((shard.size for shard in dealer.deal(documents, seed)), default=0)
    except ConfigError:
        return 0
