"""The owners and labels of documents: each name is in memory once, however many documents have it.

documents   0     1     2     3
names       bob   ann   bob   bob
distinct    [bob, ann]
numbers     0     1     0     0
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Names(Sequence[str]):
    """The name of each document: reads like a list of texts, and takes 4 bytes a document.

    >>> names = Names.of(["bob", "ann", "bob", "bob"])
    >>> names[2], len(names), names.distinct, names.numbers.tolist()
    ('bob', 4, ['bob', 'ann'], [0, 1, 0, 0])
    """

    def __init__(self, distinct: list[str], numbers: np.ndarray):
        self.distinct = distinct  # no name twice
        self.numbers = numbers  # (documents,) int32: the place in `distinct` of each one's name

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The names of documents, in their order."""
        numbering = Numbering()
        for name in names:
            numbering.add(name)
        return numbering.names()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """The name of a document; with a slice or an array of places, the Names of those."""
        found = self.numbers[place]
        return Names(self.distinct, found) if np.ndim(found) else self.distinct[found]

    def sorted(self) -> tuple[list[str], np.ndarray]:
        """Return the names that occur, in alphabetical order, and each document's place in them.

        >>> names, places = Names.of(["bob", "ann", "bob", "bob"]).sorted()
        >>> names, places.tolist()
        (['ann', 'bob'], [1, 0, 1, 1])
        """
        occurring = np.flatnonzero(np.bincount(self.numbers, minlength=len(self.distinct)))
        order = sorted(occurring.tolist(), key=self.distinct.__getitem__)
        places = np.zeros(len(self.distinct), np.int32)
        places[order] = np.arange(len(order))
        return [self.distinct[number] for number in order], places[self.numbers]


class Numbering:
    """Collects the names of documents that are read one after the other."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._numbers = array("i")

    def add(self, name: str) -> None:
        """Take the name of the next document."""
        self._numbers.append(self._number.setdefault(name, len(self._number)))

    def names(self) -> Names:
        """Return the names of all documents so far."""
        return Names(list(self._number), np.frombuffer(self._numbers, np.int32))
