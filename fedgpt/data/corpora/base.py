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
from itertools import chain
from typing import ClassVar

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
LINES = re.compile(r"[^\n]*\n|[^\n]+")
# the parts of the text, numbered as in a prepared corpus
PUBLIC, HELD_OUT, CLIENTS = 0, 1, 2
PARTS = {"public": PUBLIC, "held_out": HELD_OUT, "clients": CLIENTS}


@dataclass(frozen=True)
class Document:
    """One text and its owner."""

    client: str
    id: str
    text: str
    label: str = ""  # label for partition=dirichlet; may be empty
    # public, held_out or clients; empty: by the hash of the text, so that each part has its share
    part: str = ""


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

    Several processes read the corpus, each of them several times, and a resumed run reads it again.
    So `documents` must give the same documents in the same order each time. Options are checked in
    `__post_init__`, which raises ConfigError; text is read in `documents` only.
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

    def notes(self) -> Iterable[str]:
        """What a user should know of the documents that were read last, such as files left out."""
        return ()

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
    return list(cut_chunks([text], size))


def cut_chunks(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Like `cut`, for a text that comes in parts, of which only one is held in memory."""
    if isinstance(chunks, list) and len(chunks) == 1 and not _is_longer(chunks[0], size):
        yield from filter(None, chunks)  # most records are this short
        return
    current: list[str] = []
    filled = 0
    for atom in _atoms(chunks, size):
        length = len(atom.encode())
        if current and filled + length > size:
            yield "".join(current)
            current, filled = [], 0
        current.append(atom)
        filled += length
    if current:
        yield "".join(current)


def cut_document(document: Document, size: int, chunks: Iterable[str] = ()) -> Iterator[Document]:
    """Yield the document, or its pieces of at most `size` bytes with numbered ids; none if blank.

    `chunks` is the text in parts, if the document has none. A blank piece of a document that is not
    blank is kept, so that no text is lost.
    """
    chunks = [document.text] if document.text else chunks
    client, name, label, part = document.client, document.id, document.label, document.part
    blank: list[str] = []  # the pieces before the first one that is not blank
    number, held = 0, ""  # a piece is held until it is known whether it is the only one
    for piece in cut_chunks(chunks, size):
        if not held and not piece.strip():
            # equal pieces are one object, so that long white space takes little memory
            blank.append(blank[-1] if blank and blank[-1] == piece else piece)
            continue
        for each in (*blank, piece):
            if held:
                yield Document(client, f"{name}#{number}", held, label, part)
                number += 1
            held = each
        blank = []
    if held:
        yield Document(client, f"{name}#{number}" if number else name, held, label, part)


def _atoms(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Yield the largest units of at most `size` bytes: paragraphs, else lines, else characters."""
    text = ""  # the rest of the current paragraph, and what follows it
    seen = ""  # the line ends, at most two, directly before `text` in its paragraph
    is_long = False  # whether the current paragraph has more than `size` bytes
    for chunk in chain(chunks, [None]):
        text += chunk or ""
        # a paragraph ends before a visible character; in white space at the end it may still go on
        last = len(text) + 1 if chunk is None else len(text.rstrip())
        begin, ended = 0, False
        for match in BLANK_LINES.finditer(seen + text):
            end = match.end() - len(seen)
            if end >= last:
                break
            yield from _units(text[begin:end], size, is_long)
            begin, is_long, ended = end, False, True
        text, seen = text[begin:], "" if ended else seen
        if chunk is None:
            yield from _units(text, size, is_long)
        elif is_long or _is_longer(text[: max(last - begin, text.rfind("\n") + 1)], size):
            is_long = True
            units, text, seen = _released(text, seen, size)
            yield from units


def _units(text: str, size: int, is_long: bool) -> Iterator[str]:
    """Yield a paragraph, or its lines or their slices if it is longer than `size` bytes."""
    if is_long or _is_longer(text, size):
        for line in LINES.findall(text):
            yield from _slices(line.encode(), size)
    elif text:  # nothing follows blank lines at the end of the text
        yield text


def _is_longer(text: str, size: int) -> bool:
    return 4 * len(text) > size and len(text.encode()) > size


def _released(text: str, seen: str, size: int) -> tuple[list[str], str, str]:
    """Return the units of a long paragraph that has not ended, and the new `text` and `seen`.

    The end of the last line is kept, as more of this line may follow.
    """
    complete = text.rfind("\n") + 1
    line = text[complete:]
    *slices, rest = list(_slices(line.encode(), size)) or [""]
    if line.strip():
        seen = ""
    else:
        before = seen + text[:complete]
        seen = "\n" * min(2, before[len(before.rstrip()) :].count("\n"))
    return [*_units(text[:complete], size, True), *slices], rest, seen


def _slices(line: bytes, size: int) -> Iterator[str]:
    """Yield a line in slices of at most `size` bytes that end between two characters."""
    begin = 0
    while begin < len(line):
        stop = min(begin + size, len(line))
        while stop < len(line) and line[stop] & 0xC0 == 0x80:  # inside a character: step back
            stop -= 1
        yield line[begin:stop].decode()
        begin = stop
