"""Options of the group `corpus`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, arguments, at_least, member, option, share, target


@dataclass
class CorpusOptions(Group):
    """The text of the run, and the owner of each part of it."""

    group = "corpus"

    name: str = member("sotu")
    client: str = option(
        "president",
        "Owner of a text. Texts of one owner belong to one client. sotu: president or address."
        " stdlib: package. files: file, folder (the top-level sub-folder of a file), or the name"
        " of a field of a JSONL file.",
        only_with=("sotu", "stdlib", "files"),
    )
    path: str | None = option(
        None,
        "A folder of text files, or a .jsonl file with one JSON object on each line.",
        only_with=("files", "custom"),
    )
    text_field: str = option(
        "text", "Name of the JSONL field that contains the text.", only_with=("files",)
    )
    label_field: str | None = option(
        None,
        "Name of the JSONL field that contains the label of a text, for partition=dirichlet.",
        only_with=("files",),
    )
    document_bytes: int = option(
        4096,
        "Size of a document. A longer text is cut at blank lines into documents of about this"
        " size, so that a held-out part can be taken from it.",
        unit="bytes",
        allowed=at_least(64, end=10**9),
        only_with=("files",),
    )
    public: float = option(
        0.08,
        "Share of the text, counted in bytes, that is not private. It trains the tokenizer, and"
        " no client trains on it.",
        allowed=share("a share of the bytes"),
    )
    held_out: float = option(
        0.05,
        "Share of the text, counted in bytes, on which the server evaluates the model. No client"
        " trains on it.",
        allowed=share(zero=False),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()

    def rules(self) -> Iterator[str]:
        """The clients must have text to train on."""
        if self.public + self.held_out >= 1:
            yield (
                f"corpus.public={self.public} and corpus.held_out={self.held_out} leave nothing"
                " to the clients: their sum must be below 1"
            )
