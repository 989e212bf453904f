"""The corpus of a run, and the problems of its options.

corpus.* -> corpus_of -> Corpus (corpora/) -> read_documents -> documents -> prepare.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fedgpt.core.errors import ConfigError
from fedgpt.core.members import Members
from fedgpt.core.options import CorpusOptions
from fedgpt.core.targets import calling, typed_class
from fedgpt.data.corpora.base import PARTS, Corpus, Document

CORPORA = Members("corpus", "corpus.name", Corpus)


def corpus_of(options: CorpusOptions, trusted: Sequence[str] = ()) -> Corpus:
    """Return the corpus of a run; `trusted` are the packages that `_target_` may name.

    Reads no text. Raises ConfigError.
    """
    return CORPORA.build(options, trusted)


def corpus_prompt(options: CorpusOptions, trusted: Sequence[str] = ()) -> str:
    """Return a short text in the corpus's style that samples continue; may be empty."""
    return corpus_of(options, trusted).prompt


def read_documents(corpus: Corpus) -> Iterator[Document]:
    """Yield the documents of a corpus in its order; only one of them is held in memory.

    Raises ConfigError if there is no document, or if the corpus yields an object that is not a
    Document with valid text.
    """
    number = -1
    with calling("corpus", corpus, "documents"):
        found: Any = corpus.documents()
        _check_corpus(corpus, found)
        for number, document in enumerate(found):
            if problem := _problem(document):
                name = type(corpus).__name__
                raise ConfigError(f"corpus: document {number} of {name} {problem}")
            yield document
    if number < 0:
        raise ConfigError(
            f"corpus: {type(corpus).__name__} from {corpus.source} has no documents;"
            f" {corpus.too_few}"
        )


def notes_of(corpus: Corpus) -> list[str]:
    """Return what a corpus has to tell of the documents that were read last."""
    with calling("corpus", corpus, "notes"):
        return [str(note) for note in corpus.notes()]


def _check_corpus(corpus: Corpus, found: Any) -> None:
    """Raise ConfigError unless `found` is iterable, and what the corpus says of itself is text."""
    if not isinstance(found, Iterable):
        what = "it must return an iterable of fedgpt.data.corpora.base.Document"
        raise ConfigError(
            f"{typed_class('corpus', corpus)}: documents returned {found!r:.60}; {what}"
        )
    for text in ("source", "owner", "prompt", "too_few"):
        with calling("corpus", corpus, text):
            value = getattr(corpus, text)
        if not isinstance(value, str):
            raise ConfigError(
                f"{typed_class('corpus', corpus)}: {text} is {value!r:.60}; it must be a text"
            )


def _problem(document: Any) -> str:
    """Return the problem of `document`, or an empty text."""
    if not isinstance(document, Document):
        return f"is {document!r:.60}; it must be a fedgpt.data.corpora.base.Document"
    for name in ("client", "id", "text", "label"):
        value = getattr(document, name)
        if not isinstance(value, str):
            return f"has {name}={value!r:.60}; it must be a text"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"has a {name} that is not valid UTF-8 ({error.reason})"
    if document.part not in ("", *PARTS):
        return f"has part={document.part!r:.60}; it must be {', '.join(PARTS)}, or empty"
    return ""
