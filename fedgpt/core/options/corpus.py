"""Options of the group `corpus`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import (
    Group,
    arguments,
    between,
    member,
    one_of,
    option,
    share,
    target,
)


@dataclass
class CorpusOptions(Group):
    """The text of the run, and the owner of each part of it."""

    group = "corpus"

    name: str = member("sotu")
    client: str = option(
        "president",
        "Owner of a text. Texts of one owner belong to one client. sotu: president or address."
        " stdlib: package. files: file, folder (the top-level sub-folder of a file), or a field of"
        " the records.",
        only_with=("sotu", "stdlib", "files"),
    )
    path: str | None = option(
        None,
        "A folder, a file, or a pattern such as 'notes/*.txt': text, or records (.jsonl, .json,"
        " .csv, .tsv, .parquet).",
        only_with=("files", "custom"),
    )
    text_field: str = option(
        "text",
        "Field of a record that contains the text: its name, or a path such as"
        " messages[1].content or data.text.",
        only_with=("files",),
    )
    label_field: str | None = option(
        None,
        "Field of a record that contains the label of a text, for partition=dirichlet.",
        only_with=("files",),
    )
    bad_records: str = option(
        "refuse",
        "What happens to records without text or owner, and to lines that are not records. refuse:"
        " an error counts them. skip: they are left out and counted, if they are fewer than the"
        " others.",
        allowed=one_of("refuse", "skip"),
        only_with=("files",),
    )
    document_bytes: int = option(
        4096,
        "Size of a document. A longer text is cut at blank lines into documents of about this"
        " size, so that a held-out part can be taken from it.",
        unit="bytes",
        allowed=between(64, 10**9),
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
