"""Options of the group `corpus`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, arguments, at_least, member, option, share, target


@dataclass
class CorpusOptions(Group):
    """The text that is trained on, and who owns which part of it."""

    group = "corpus"

    name: str = member("sotu")
    client: str = option(
        "president",
        "Who owns a text, and so which texts belong to one client. sotu: president or address."
        " stdlib: package. files: file, folder (the folder a file lies in), or the name of a field"
        " of a JSONL file.",
        only_with=("sotu", "stdlib", "files"),
    )
    path: str | None = option(
        None,
        "A folder of text files, or a .jsonl file with one JSON object on each line.",
        only_with=("files", "custom"),
    )
    text_field: str = option(
        "text", "Name of the field of a JSONL file that holds the text.", only_with=("files",)
    )
    label_field: str | None = option(
        None,
        "Name of the field of a JSONL file whose value partition=dirichlet takes as the label of"
        " a text.",
        only_with=("files",),
    )
    document_bytes: int = option(
        4096,
        "Size of a document. A longer text is cut at blank lines into documents of about this"
        " size, so that a held-out part can be taken from it.",
        unit="bytes",
        allowed=at_least(64),
        only_with=("files",),
    )
    public: float = option(
        0.08,
        "Share of the text, counted in bytes, that everybody may see. The tokenizer is trained on"
        " it, and no client trains on it.",
        allowed=share("a share of the bytes"),
    )
    held_out: float = option(
        0.05,
        "Share of the text, counted in bytes, that nobody trains on. The server evaluates the"
        " model on it.",
        allowed=share(zero=False),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()

    def rules(self) -> Iterator[str]:
        """Something must be left to train on."""
        if self.public + self.held_out >= 1:
            yield (
                f"corpus.public={self.public} and corpus.held_out={self.held_out} leave nothing"
                " to the clients: their sum must be below 1"
            )
