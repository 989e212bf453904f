"""Options of the group `corpus`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

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
    # why a run of sites is not started by what starts its own clients
    ONLY_DEPLOYED: ClassVar[str] = (
        "corpus=site: each client has its own text on its own machine, so the run needs a server"
        " (fedgpt server DIR); to simulate it here, use corpus=files with corpus.path, a folder for"
        " each client, and corpus.client=folder"
    )

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
        only_with=("files", "site"),
    )
    label_field: str | None = option(
        None,
        "Field of a record that contains the label of a text, for partition=dirichlet.",
        only_with=("files", "site"),
    )
    bad_records: str = option(
        "refuse",
        "What happens to records without text or owner, and to lines that are not records. refuse:"
        " an error counts them. skip: they are left out and counted, if they are fewer than the"
        " others.",
        allowed=one_of("refuse", "skip"),
        only_with=("files", "site"),
    )
    document_bytes: int = option(
        4096,
        "Size of a document. A longer text is cut at blank lines into documents of about this"
        " size, so that a held-out part can be taken from it.",
        unit="bytes",
        allowed=between(64, 10**9),
        only_with=("files", "site"),
    )
    public_path: str | None = option(
        None,
        "The public text, if it is not a share of the other text: a folder, a file or a pattern."
        " With corpus=site it is all public text that there is.",
        only_with=("files", "site", "custom"),
    )
    held_out_path: str | None = option(
        None,
        "The held-out text, if it is not a share of the other text: a folder, a file or a pattern."
        " corpus=site needs it.",
        only_with=("files", "site", "custom"),
    )
    public: float = option(
        0.08,
        "Share of the text, counted in bytes, that is not private. It trains"
        " tokenizer=bpe, and no client trains on it.",
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

    @property
    def at_sites(self) -> bool:
        """Whether each client has its own text, which only the client itself can read."""
        return self.name == "site"

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """A part with a folder of its own has no share of other text, and sites keep all of it."""
        for part in ("public", "held_out"):
            if (path := getattr(self, f"{part}_path")) is not None:
                yield part, f"corpus.{part}_path={path}"
            elif self.at_sites:
                yield part, "corpus=site, where the sites keep all of their text"

    def rules(self) -> Iterator[str]:
        """The clients must have text to train on."""
        if self.public + self.held_out >= 1 and not self.at_sites:
            yield (
                f"corpus.public={self.public} and corpus.held_out={self.held_out} leave nothing"
                " to the clients: their sum must be below 1"
            )
