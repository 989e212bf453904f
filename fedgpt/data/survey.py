"""What must be known of all documents before the first of them is tokenised.

corpus -> read once -> digest of the text (the cache key), hash and size of each document
       -> read again -> the same texts, or an error that says that they changed
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import FedGPTError
from fedgpt.data.corpora.base import PARTS, Corpus, Document
from fedgpt.data.corpus import read_documents
from fedgpt.data.names import Names, Numbering

HASH = hashlib.sha256
BY_HASH = -1  # instead of a part
KEYS = 1 << 62  # number of keys: two texts with one key, which is unlikely, are in one part


@dataclass(frozen=True, eq=False)
class Survey:
    """The documents of a corpus without their texts."""

    corpus: Corpus
    digest: str  # of owner, id, label and text of every document
    keys: np.ndarray  # (documents,) uint64, below KEYS: the first bits of each text's hash
    sizes: np.ndarray  # (documents,) int64: UTF-8 bytes of each text
    clients: Names
    labels: Names
    parts: np.ndarray  # (documents,) int8: the part that the corpus names, or BY_HASH

    def texts(self) -> Iterator[str]:
        """Read the corpus again; raises FedGPTError if a document is not the one of the survey."""
        digest, number = HASH(), 0
        try:
            for number, document in enumerate(read_documents(self.corpus), start=1):
                _add(digest, document, document.text.encode())
                if number > len(self.sizes):
                    raise _changed(f"it has another document, {document.id}")
                yield document.text
        except FedGPTError as error:
            if isinstance(error, Changed):
                raise
            raise _changed(str(error)) from error
        if digest.hexdigest() != self.digest:
            raise _changed(
                "it has other words or names" if number == len(self.sizes) else "documents are gone"
            )


class Changed(FedGPTError):
    """The text is not what it was when it was read first."""


def survey_of(corpus: Corpus) -> Survey:
    """Read a corpus once; raises ConfigError if it has no valid documents."""
    digest, keys, sizes = HASH(), array("Q"), array("q")
    clients, labels, parts = Numbering(), Numbering(), array("b")
    for document in read_documents(corpus):
        data = document.text.encode()
        _add(digest, document, data)
        keys.append(key_of(HASH(data).digest()))
        sizes.append(len(data))
        clients.add(document.client)
        labels.add(document.label)
        parts.append(PARTS.get(document.part, BY_HASH))
    return Survey(
        corpus,
        digest.hexdigest(),
        np.frombuffer(keys, np.uint64),
        np.frombuffer(sizes, np.int64),
        clients.names(),
        labels.names(),
        np.frombuffer(parts, np.int8),
    )


def key_of(text_hash: bytes) -> int:
    """The key of a text; keys have the order of the hashes."""
    return int.from_bytes(text_hash[:8], "big") >> 2


def _add(digest: hashlib._Hash, document: Document, text: bytes) -> None:
    """Add a document to the digest of the corpus."""
    names = [document.client, document.id, document.label]
    if document.part:  # absent otherwise, so that older digests stay valid
        names.append(document.part)
    for data in (*(name.encode() for name in names), text):
        # the length first, so that text moved from one field to the next changes the digest
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)


def _changed(how: str) -> Changed:
    return Changed(
        f"corpus: the text changed while it was prepared: {how}; start again when it rests"
    )
