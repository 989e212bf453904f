"""The interface of a partition, which divides the clients' documents into one shard per client.

    tokens     0 ....... 300 ....... 500 ....... 800 ....... 900     the prepared token array
    documents  [ann, 0-300) [ann, 300-500) [bob, 500-800) ...        rows: owner, label, span
    shards     client-000: [0, 300), [500, 650)                      spans of the same array
               client-001: [300, 500), [650, 800)

A shard is a list of spans of the one token array. No text is copied, and the same options and seed
give the same shards in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.data.names import Names

MANY = 10_000  # clients: to deal text out to more of them takes more than a second
ADD_TEXT = "add text"  # the remedy where no other value of an option helps


@dataclass(frozen=True, eq=False)
class Shard:
    """One client's tokens, as spans of the prepared token array."""

    client: str
    spans: np.ndarray  # (spans, 2) int64: first token, one past the last; sorted, not touching

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Return the shard's tokens, concatenated, (size,), copied out of `tokens`."""
        return np.concatenate([tokens[first:last] for first, last in self.spans])


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents to divide, in the order of the corpus: one row per document."""

    clients: Names  # owner of each document
    labels: Names  # label of each document
    spans: np.ndarray  # (documents, 2) int64: first token of each document, one past its last
    minimum: int  # tokens that a client needs: the larger one of the following two
    window: int = 2  # tokens of one training window: model.block_size + 1
    asked: int = 0  # partition.min_tokens

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def lower_minimum(self, size: int) -> str:
        """Return what to change so that `size` tokens are enough; an empty text if it is 0 or 1."""
        if size >= self.window:
            return f"lower partition.min_tokens to {size}"
        if size < 2:  # a token to predict, and one before it
            return ""
        rest = f" and partition.min_tokens to {size}" if self.asked > size else ""
        return f"lower model.block_size to {size - 1}{rest}"

    def divided(self, clients: int) -> str:
        """Return the options that divide all text among `clients` if there is enough of it, or
        among fewer; an empty text if there is too little for one.
        """
        if (pieces := self.size // self.minimum) == 0:
            return ""
        # of two pieces of `minimum` tokens only the last one of all may be shorter
        clients = max(1, min(clients, pieces // 2))
        iid = f"partition=iid partition.clients={clients} partition.piece={self.minimum}"
        return f"use {iid}, which divides all text"


class Partition(ABC):
    """One way to divide documents among clients: a frozen dataclass with its options.

    A partition outside of fedgpt is a file like this one, mine.py:

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from fedgpt.data.names import Names
    >>> from fedgpt.data.partitions.base import Documents, Partition, made_clients, shards_of
    >>> @dataclass(frozen=True)
    ... class Alternate(Partition):
    ...     clients: int = 2  # document d goes to client d % clients
    ...
    ...     def deal(self, documents, seed):
    ...         owners = np.arange(len(documents.spans)) % self.clients
    ...         return shards_of(made_clients(self.clients), documents.spans, owners)

    Three documents of 10 tokens, divided between two clients:

    >>> spans = np.array([[0, 10], [10, 20], [20, 30]])
    >>> owners, labels = Names.of(["ann", "ann", "bob"]), Names.of(["", "", ""])
    >>> documents = Documents(owners, labels, spans, minimum=1)
    >>> for shard in Alternate(clients=2).deal(documents, seed=0):
    ...     print(shard.client, shard.spans.tolist())
    client-000 [[0, 10], [20, 30]]
    client-001 [[10, 20]]

    With mine.py on the PYTHONPATH a run uses it by:

        fedgpt run partition=custom partition._target_=mine.Alternate \\
            'partition.arguments={clients: 3}' 'trusted_packages=[mine]'

    Every process calls `deal` itself. So the result must depend only on the arguments; draw random
    numbers from `fedgpt.core.seeds.numpy_generator(seed, "partition", ...)`. Options are checked in
    `__post_init__`, which raises ConfigError.
    """

    # what to change where a client has too few tokens
    remedy: ClassVar[str] = "change partition.arguments"

    @abstractmethod
    def deal(self, documents: Documents, seed: int) -> list[Shard]:
        """Return the clients' shards, in any order; raises ConfigError if that is impossible.

        No token may be in two shards, and all tokens must be from `documents`. The caller checks
        this and sorts the shards by client. It refuses a shard of fewer than `documents.minimum`
        tokens; a partition may exclude such clients.
        """

    def milder(self, documents: Documents) -> Iterator[Partition]:
        """Yield this partition with other values of its options, which may give every client
        enough tokens. An error names the first values of each option that do.
        """
        yield from ()


@dataclass(frozen=True)
class MadeClients(Partition):
    """A partition that makes its clients, where others keep those of the corpus."""

    clients: int = 8
    remedy: ClassVar[str] = ""  # fewer clients, which `milder` tries

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ConfigError(
                f"partition.clients={self.clients}: partition={type(self).__name__.lower()} makes"
                " clients; say how many, 1 or more"
            )

    def milder(self, documents: Documents) -> Iterator[Partition]:
        """Yield fewer clients."""
        for clients in self._fewer(documents):
            yield replace(self, clients=clients)

    def _fewer(self, documents: Documents, most: int = MANY) -> Iterator[int]:
        """Yield smaller numbers of clients for which there may be enough text."""
        clients = min(self.clients - 1, documents.size // documents.minimum, most)
        while clients > 0:
            yield clients
            clients //= 2


@dataclass(frozen=True)
class Pieces(MadeClients):
    """Deals pieces of text out to clients that it makes; a subclass sets the clients' shares."""

    piece: int = 1024  # tokens

    def milder(self, documents: Documents) -> Iterator[Partition]:
        """Yield fewer clients and shorter pieces, about eight for each client."""
        too_many = self.clients * documents.minimum > documents.size
        yield from super().milder(documents)
        for clients in [self.clients, *(self._fewer(documents) if too_many else ())]:
            piece = max(1, documents.size // (8 * clients))
            if piece < self.piece:
                yield replace(self, clients=clients, piece=piece)

    def deal_pieces(
        self, spans: np.ndarray, shares: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut spans (n, 2) into pieces and deal those out in random order, by shares that sum to 1.

        Returns the fragments of the pieces, (fragments, 2), and the client's index of each,
        (fragments,). Each of the `shares` (clients,) is met as nearly as whole pieces allow.
        """
        fragments, number = _cut(spans, self.piece)
        return fragments, _deal(int(number[-1]) + 1, shares, generator)[number]


def made_clients(count: int) -> list[str]:
    """Return names of `count` clients that sort as their numbers do.

    >>> made_clients(2)
    ['client-000', 'client-001']
    """
    digits = max(3, len(str(count - 1)))
    return [f"client-{number:0{digits}d}" for number in range(count)]


def shards_of(clients: Sequence[str], spans: np.ndarray, owners: np.ndarray) -> list[Shard]:
    """Return a shard for each of `clients`, given spans (n, 2) and the client's index (n,) of each.

    Spans may be in any order; those of one client that touch become one.
    """
    order = np.lexsort((spans[:, 0], owners))
    ends = np.cumsum(np.bincount(owners, minlength=len(clients)))
    each = np.split(order, ends[:-1])  # a copy of all spans in order would take much memory
    return [Shard(name, merged(spans[of])) for name, of in zip(clients, each, strict=True)]


def merged(spans: np.ndarray) -> np.ndarray:
    """Return sorted spans (n, 2) with touching neighbours made one, as int64.

    >>> merged(np.array([[0, 10], [10, 20], [30, 40]])).tolist()
    [[0, 20], [30, 40]]
    """
    if len(spans) == 0:
        return np.empty((0, 2), np.int64)
    apart = spans[1:, 0] != spans[:-1, 1]
    first = spans[np.concatenate([[True], apart]), 0]
    last = spans[np.concatenate([apart, [True]]), 1]
    return np.stack([first, last], axis=1).astype(np.int64)


def _cut(spans: np.ndarray, piece: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the concatenation of spans (n, 2) every `piece` tokens.

    Returns fragments (fragments, 2) and the number of the piece that each belongs to (fragments,).
    A piece that runs over the end of a document has several fragments.

    >>> fragments, number = _cut(np.array([[0, 7], [12, 20]]), 10)
    >>> fragments.tolist(), number.tolist()
    ([[0, 7], [12, 15], [15, 20]], [0, 0, 1])
    """
    lengths = spans[:, 1] - spans[:, 0]
    ends = np.cumsum(lengths)
    bounds = np.union1d(np.concatenate([[0], ends]), np.arange(0, ends[-1], piece))
    first = bounds[:-1]  # where each fragment starts in the concatenation
    span = np.searchsorted(ends, first, side="right")
    start = spans[span, 0] + first - (ends - lengths)[span]
    return np.stack([start, start + np.diff(bounds)], axis=1), first // piece


def _deal(count: int, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the client's index of each of `count` pieces, (count,), in random order.

    `shares` (clients,) sum to 1; the number of pieces of each client is as near to its share as
    possible.
    """
    exact = shares * count
    counts = np.floor(exact).astype(np.int64)
    largest_rest = np.argsort(-(exact - counts), kind="stable")
    counts[largest_rest[: count - counts.sum()]] += 1
    return generator.permutation(np.repeat(np.arange(len(shares)), counts))
