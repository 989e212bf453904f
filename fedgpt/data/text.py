"""Documents as token ids, from which a task makes its examples.

A prepared corpus is one token array with the offset of each document (prepare.py). A `Text` is the
share of one party: a client's shard, the held-out part, or the public part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared


class LabelledTokens(NamedTuple):
    """One document, or the part of one that a partition handed out."""

    tokens: np.ndarray  # (n,) ids; a document that was not cut ends with the end token
    label: str  # label in the corpus; may be empty


@dataclass(frozen=True, eq=False)
class Text:
    """The documents of one party, in the order of the corpus.

    >>> text = Text.of([[5, 6, 0], [7, 0]], labels=["a", "b"])
    >>> [(document.tokens.tolist(), document.label) for document in text]
    [([5, 6, 0], 'a'), ([7, 0], 'b')]
    """

    tokens: np.ndarray  # (n,) all documents, concatenated
    starts: np.ndarray  # (documents + 1,) int64: document d is tokens[starts[d] : starts[d + 1]]
    labels: tuple[str, ...]  # one label per document

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[int] | np.ndarray], labels: Sequence[str] = ()
    ) -> Text:
        """A text from the token ids of its documents, for tests and examples."""
        sizes = [len(document) for document in documents]
        tokens = np.concatenate([np.asarray(document, np.int64) for document in documents])
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(tokens, starts, tuple(labels) or ("",) * len(documents))

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[LabelledTokens]:
        for document, label in enumerate(self.labels):
            span = slice(self.starts[document], self.starts[document + 1])
            yield LabelledTokens(self.tokens[span], label)


def shard_text(prepared: Prepared, shard: Shard) -> Text:
    """A client's text; each piece of a document that its partition has cut is a document here."""
    return _cut(prepared, shard.spans, shard.read(prepared.tokens))


def part_text(prepared: Prepared, part: int) -> Text:
    """The text of a part of the split: PUBLIC or HELD_OUT of prepare.py; it may be empty."""
    documents = np.flatnonzero(prepared.part == part)
    spans = np.stack([prepared.starts[documents], prepared.starts[documents + 1]], axis=1)
    pieces = [prepared.tokens[first:last] for first, last in spans]
    tokens = np.concatenate(pieces) if pieces else np.empty(0, prepared.tokens.dtype)
    return _cut(prepared, spans, tokens)


def _cut(prepared: Prepared, spans: np.ndarray, tokens: np.ndarray) -> Text:
    """`tokens`, those of the spans (ranges, 2), cut wherever a span or a document ends."""
    edges: list[np.ndarray] = []
    for first, last in spans:
        inner = prepared.starts[slice(*np.searchsorted(prepared.starts, [first + 1, last]))]
        edges.append(np.concatenate([[first], inner, [last]]))
    sizes = np.concatenate([np.diff(each) for each in edges]) if edges else np.empty(0, np.int64)
    begins = np.concatenate([each[:-1] for each in edges]) if edges else np.empty(0, np.int64)
    owners = np.searchsorted(prepared.starts, begins, side="right") - 1
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Text(tokens, starts, tuple(prepared.labels[document] for document in owners))
