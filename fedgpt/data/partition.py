"""Which client holds which tokens: partitioners over the clients' part of the token array.

A shard is a list of token ranges of the one memory-mapped array, so no text is copied and the same
options and seed give the same shards in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import PartitionOptions
from fedgpt.core.seeds import numpy_generator
from fedgpt.data.prepare import CLIENTS, Prepared


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's tokens, as ranges of the prepared token array."""

    client: str
    spans: np.ndarray  # (ranges, 2) int64: first token, one past the last; sorted, not touching

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """The shard's tokens, concatenated, (size,), copied out of `tokens`."""
        return np.concatenate([tokens[first:last] for first, last in self.spans])


def partition(prepared: Prepared, options: PartitionOptions, seed: int, window: int) -> list[Shard]:
    """Deal the clients' part out to clients; the shards are sorted by client id and share no token.

    `window` is block_size + 1, the fewest tokens a client can train on. A natural client below the
    minimum is left out; a made one is a ConfigError, because the options asked for it. Every token
    of the part is in exactly one shard, except those of natural clients left out or not among the
    largest `options.clients`.
    """
    if problems := list(options.problems()):
        raise ConfigError(problems)
    documents = np.flatnonzero(prepared.part == CLIENTS)
    # (documents, 2)
    spans = np.stack([prepared.starts[documents], prepared.starts[documents + 1]], axis=1)
    minimum = max(options.min_tokens, window)
    if options.name == "natural":
        return _natural([prepared.clients[d] for d in documents], spans, options, minimum)
    if options.name == "grouped":
        fragments = spans
        owners = _grouped([prepared.clients[d] for d in documents], spans, options)
    elif options.name == "dirichlet":
        fragments, owners = _dirichlet(
            [prepared.labels[d] for d in documents], spans, options, seed
        )
    else:
        fragments, owners = _even_or_skewed(spans, options, seed)
    shards = _shards(_made_names(options.clients), fragments, owners)
    _check_sizes(shards, options, minimum)
    return shards


def natural_owners(prepared: Prepared) -> int:
    """How many natural clients have text in the clients' part, large enough to train or not."""
    return len({prepared.clients[d] for d in np.flatnonzero(prepared.part == CLIENTS)})


def _natural(
    clients: list[str], spans: np.ndarray, options: PartitionOptions, minimum: int
) -> list[Shard]:
    names, owners = np.unique(np.array(clients, dtype=object), return_inverse=True)
    shards = _shards([str(name) for name in names], spans, owners)
    large = [shard for shard in shards if shard.size >= minimum]
    if not large:
        largest = max(shard.size for shard in shards)
        raise ConfigError(
            f"partition.min_tokens={options.min_tokens}: all {len(shards)} natural clients are"
            f" below {minimum} tokens (the largest has {largest}); lower partition.min_tokens or"
            " model.block_size, or use partition=iid"
        )
    if options.clients > len(large):
        raise ConfigError(
            f"partition.clients={options.clients}: the corpus has {len(large)} natural clients of"
            f" at least {minimum} tokens; use that many or fewer (0 = all), or partition=iid, which"
            " makes any number"
        )
    if options.clients:
        kept = sorted(large, key=lambda shard: (-shard.size, shard.client))[: options.clients]
        return sorted(kept, key=lambda shard: shard.client)
    return large


def _grouped(clients: list[str], spans: np.ndarray, options: PartitionOptions) -> np.ndarray:
    """Natural clients dealt whole, the largest first, each to the made client that has least:
    (documents,) owners.
    """
    names, natural = np.unique(np.array(clients, dtype=object), return_inverse=True)
    if len(names) < options.clients:
        raise ConfigError(
            f"partition.clients={options.clients}: partition=grouped deals whole natural clients,"
            f" and the corpus has {len(names)}; use that many or fewer, or partition=iid"
        )
    sizes = np.bincount(natural, spans[:, 1] - spans[:, 0]).astype(np.int64)
    group = np.empty(len(names), np.int64)
    totals = [0] * options.clients
    for owner in sorted(range(len(names)), key=lambda i: (-sizes[i], names[i])):
        group[owner] = totals.index(min(totals))
        totals[group[owner]] += int(sizes[owner])
    return group[natural]


def _even_or_skewed(
    spans: np.ndarray, options: PartitionOptions, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled pieces dealt in equal numbers (iid) or by a power law (quantity)."""
    fragments, piece = _cut(spans, options.piece)
    pieces = int(piece[-1]) + 1
    ranks = np.arange(1, options.clients + 1, dtype=np.float64)
    shares = ranks ** (-options.exponent if options.name == "quantity" else 0.0)
    generator = numpy_generator(seed, "partition", options.name)
    return fragments, _deal(pieces, shares / shares.sum(), generator)[piece]


def _dirichlet(
    labels: list[str], spans: np.ndarray, options: PartitionOptions, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of each label dealt by proportions drawn for that label from Dirichlet(alpha)."""
    names, label = np.unique(np.array(labels, dtype=object), return_inverse=True)
    if len(names) < 2:
        raise ConfigError(
            "partition.name=dirichlet: skews labels, and all documents have the same one; set"
            " corpus.label_field (.jsonl) or put files in sub-folders, or skew sizes with"
            " partition=quantity"
        )
    fragments, owners = [], []
    for number, name in enumerate(names):
        generator = numpy_generator(seed, "partition", "dirichlet", str(name))
        pieces, piece = _cut(spans[label == number], options.piece)
        shares = generator.dirichlet(np.full(options.clients, options.alpha))
        fragments.append(pieces)
        owners.append(_deal(int(piece[-1]) + 1, shares, generator)[piece])
    return np.concatenate(fragments), np.concatenate(owners)


def _cut(spans: np.ndarray, piece: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the concatenation of `spans` every `piece` tokens.

    Returns fragments (fragments, 2) and the number of the piece each belongs to (fragments,); a
    piece that runs over the end of a document has several fragments.
    """
    lengths = spans[:, 1] - spans[:, 0]
    ends = np.cumsum(lengths)
    bounds = np.union1d(np.concatenate([[0], ends]), np.arange(0, ends[-1], piece))
    first = bounds[:-1]  # where each fragment starts in the concatenation
    span = np.searchsorted(ends, first, side="right")
    start = spans[span, 0] + first - (ends - lengths)[span]
    return np.stack([start, start + np.diff(bounds)], axis=1), first // piece


def _deal(pieces: int, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Client of each piece, (pieces,): shuffled, in numbers as near to the shares as whole pieces
    allow.
    """
    exact = shares * pieces
    counts = np.floor(exact).astype(np.int64)
    largest_rest = np.argsort(-(exact - counts), kind="stable")
    counts[largest_rest[: pieces - counts.sum()]] += 1
    return generator.permutation(np.repeat(np.arange(len(shares)), counts))


def _made_names(clients: int) -> list[str]:
    digits = max(3, len(str(clients - 1)))
    return [f"client-{number:0{digits}d}" for number in range(clients)]


def _shards(names: list[str], spans: np.ndarray, owners: np.ndarray) -> list[Shard]:
    """A shard for every name from the spans it owns, sorted and with touching spans merged."""
    order = np.lexsort((spans[:, 0], owners))
    spans, owners = spans[order], owners[order]
    limits = np.searchsorted(owners, np.arange(len(names) + 1))
    return [Shard(name, _merge(spans[limits[i] : limits[i + 1]])) for i, name in enumerate(names)]


def _merge(spans: np.ndarray) -> np.ndarray:
    """Sorted spans with touching neighbours made one."""
    if len(spans) == 0:
        return np.empty((0, 2), np.int64)
    apart = spans[1:, 0] != spans[:-1, 1]
    first = spans[np.concatenate([[True], apart]), 0]
    last = spans[np.concatenate([apart, [True]]), 1]
    return np.stack([first, last], axis=1).astype(np.int64)


def _check_sizes(shards: list[Shard], options: PartitionOptions, minimum: int) -> None:
    """Raise ConfigError where made clients are smaller than what they need."""
    small = [shard for shard in shards if shard.size < minimum]
    if not small:
        return
    least = min(small, key=lambda shard: shard.size)
    remedies = ["lower partition.clients", "lower partition.piece"]
    if options.name == "dirichlet":
        remedies.append("raise partition.alpha")
    if options.name == "quantity":
        remedies.append("lower partition.exponent")
    remedies.append(
        "lower partition.min_tokens" if options.min_tokens >= minimum else "lower model.block_size"
    )
    raise ConfigError(
        f"partition.name={options.name}, partition.clients={options.clients}: {len(small)} of"
        f" {len(shards)} clients have fewer than {minimum} tokens (the smallest, {least.client},"
        f" has {least.size}); {', or '.join(remedies)}"
    )
