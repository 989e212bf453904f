"""The interface of a corpus: documents in a fixed order, each with the client that owns it.

    client   id            label     text
    ann      ann/1.txt     letters   Dear Bob, ...        one row is one document: the unit that
    ann      ann/2.txt     diary     It rained. ...       is public, held out or a client's, and
    bob      bob/1.txt     letters   Dear Ann, ...        is never cut further

The split, the tokens and the clients are computed in the same way for every corpus (prepare.py,
partition.py).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

BLANK_LINES = re.compile(r"(?:\n[^\S\n]*)+\n")
LINES = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Document:
    """One text and its owner."""

    client: str
    id: str
    text: str
    label: str = ""  # label for partition=dirichlet; may be empty


class Corpus(ABC):
    """A source of documents: a frozen dataclass with its options.

    A corpus outside of fedgpt is a file like this one, mine.py:

    >>> from dataclasses import dataclass
    >>> from fedgpt.data.corpora.base import Corpus, Document
    >>> @dataclass(frozen=True)
    ... class Poems(Corpus):
    ...     stanzas: int = 2  # in each poem
    ...     prompt = "The river"
    ...
    ...     def documents(self):
    ...         for poet in ("ann", "bob", "eve"):
    ...             for poem in range(8):
    ...                 lines = [f"{poet} saw {poem + n} herons by the river.\\n" for n in range(9)]
    ...                 text = "\\n".join(["".join(lines)] * self.stanzas)
    ...                 yield Document(client=poet, id=f"{poet} {poem}", text=text)

    Its documents:

    >>> first, *others = Poems(stanzas=1).documents()
    >>> first.client, first.text[:22], len(others)
    ('ann', 'ann saw 0 herons by th', 23)

    With mine.py on the PYTHONPATH a run uses it by:

        fedgpt run corpus=custom corpus._target_=mine.Poems 'corpus.arguments={stanzas: 3}' \\
            'trusted_packages=[mine]'

    Several processes read the corpus, and a resumed run reads it again. So `documents` must give
    the same documents in the same order each time. Options are checked in `__post_init__`, which
    raises ConfigError; text is read in `documents` only.
    """

    prompt: ClassVar[str] = ""  # a short text in the corpus's style, which samples continue
    too_few: ClassVar[str] = "add text"  # what to do if there are too few documents

    @property
    def source(self) -> str:
        """The source of the text, with its version; it is printed and is part of the cache key."""
        return f"{type(self).__module__}.{type(self).__name__}"

    @property
    def owner(self) -> str:
        """The kind of owner, in a word for reports, such as president or package."""
        return "author"

    @abstractmethod
    def documents(self) -> Iterable[Document]:
        """Return all documents, in a deterministic order; raises ConfigError.

        Their texts are not blank. A long text should be cut into several documents (see `cut`),
        because a document is either used for training or held out.
        """


def cut(text: str, size: int) -> list[str]:
    """Cut `text` into pieces of at most `size` UTF-8 bytes; joined, they are the text.

    It is cut at blank lines, in longer paragraphs at line ends, in longer lines anywhere.

    >>> cut("One.\\n\\nTwo.\\n\\nThree.\\n", 14)
    ['One.\\n\\nTwo.\\n\\n', 'Three.\\n']
    """
    pieces: list[str] = []
    current: list[str] = []
    filled = 0
    for atom in _atoms(text, size):
        length = len(atom.encode())
        if current and filled + length > size:
            pieces.append("".join(current))
            current, filled = [], 0
        current.append(atom)
        filled += length
    return [*pieces, "".join(current)] if current else pieces


def cut_document(document: Document, size: int) -> Iterator[Document]:
    """Yield the document, or its pieces of at most `size` bytes with numbered ids; none if blank.

    A blank piece of a document that is not blank is kept, so that no text is lost.
    """
    if not document.text.strip():
        return
    pieces = cut(document.text, size)
    for number, piece in enumerate(pieces):
        name = document.id if len(pieces) == 1 else f"{document.id}#{number}"
        yield Document(document.client, name, piece, document.label)


def _atoms(text: str, size: int) -> Iterator[str]:
    """Yield the largest units of at most `size` bytes: paragraphs, else lines, else characters."""
    ends = [match.end() for match in BLANK_LINES.finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        paragraph = text[start:end]
        if len(paragraph.encode()) > size:
            for line in LINES.findall(paragraph):
                yield from _slices(line.encode(), size)
        elif paragraph:  # nothing follows blank lines at the end of the text
            yield paragraph


def _slices(line: bytes, size: int) -> Iterator[str]:
    """Yield a line in slices of at most `size` bytes that end between two characters."""
    begin = 0
    while begin < len(line):
        stop = min(begin + size, len(line))
        while stop < len(line) and line[stop] & 0xC0 == 0x80:  # inside a character: step back
            stop -= 1
        yield line[begin:stop].decode()
        begin = stop
