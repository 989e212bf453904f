"""Text files of a test, and the documents that corpus=files makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgpt.core.options import CorpusOptions
from fedgpt.data.corpora.base import Document
from fedgpt.data.corpus import corpus_of, notes_of, read_documents


def files(path: str | Path, **more: Any) -> CorpusOptions:
    return replace(CorpusOptions(name="files", client="file", path=str(path)), **more)


def load(options: CorpusOptions) -> list[Document]:
    return list(read_documents(corpus_of(options)))


def notes(options: CorpusOptions) -> list[str]:
    corpus = corpus_of(options)
    list(read_documents(corpus))
    return notes_of(corpus)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
