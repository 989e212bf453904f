"""The corpus of a run, and the problems of its options.

corpus.* -> corpus_of -> Corpus (corpora/) -> load_documents -> documents -> prepare.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedgpt.core.errors import ConfigError
from fedgpt.core.members import Members
from fedgpt.core.options import CorpusOptions
from fedgpt.core.targets import calling, typed_class
from fedgpt.data.corpora.base import Corpus, Document

CORPORA = Members("corpus", "corpus.name", Corpus)


def corpus_of(options: CorpusOptions, trusted: Sequence[str] = ()) -> Corpus:
    """Return the corpus of a run; `trusted` are the packages that `_target_` may name.

    Reads no text. Raises ConfigError.
    """
    return CORPORA.build(options, trusted)


def corpus_prompt(options: CorpusOptions, trusted: Sequence[str] = ()) -> str:
    """Return a short text in the corpus's style that samples continue; may be empty."""
    return corpus_of(options, trusted).prompt


def load_documents(corpus: Corpus) -> list[Document]:
    """Return all documents of a corpus, in its order.

    Raises ConfigError if there is no document, or if the corpus yields an object that is not a
    Document with valid text.
    """
    with calling("corpus", corpus, "documents"):
        found: Any = corpus.documents()
        documents: list[Any] = list(found) if isinstance(found, Iterable) else []
    if not isinstance(found, Iterable):
        what = "it must return an iterable of fedgpt.data.corpora.base.Document"
        raise ConfigError(
            f"{typed_class('corpus', corpus)}: documents returned {found!r:.60}; {what}"
        )
    name = type(corpus).__name__
    for text in ("source", "owner", "prompt", "too_few"):
        with calling("corpus", corpus, text):
            value = getattr(corpus, text)
        if not isinstance(value, str):
            raise ConfigError(
                f"{typed_class('corpus', corpus)}: {text} is {value!r:.60}; it must be a text"
            )
    if not documents:
        raise ConfigError(f"corpus: {name} from {corpus.source} has no documents; {corpus.too_few}")
    for number, document in enumerate(documents):
        if problem := _problem(document):
            raise ConfigError(f"corpus: document {number} of {name} {problem}")
    return documents


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
    return ""
