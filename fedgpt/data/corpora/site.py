"""corpus=site: each client has its own text, on its own machine; the server has the rest."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.errors import ConfigError
from fedgpt.data.folder_text import FolderCorpus


@dataclass(frozen=True)
class Site(FolderCorpus):
    """The public and the held-out text, which the server owns."""

    def __post_init__(self) -> None:
        if not self.held_out_path:
            raise ConfigError(
                "corpus.held_out_path is not set: with corpus=site the clients' text never reaches"
                " the server, which evaluates the model on its own text; name a folder or file"
            )
        super().__post_init__()

    @property
    def owner(self) -> str:
        """The kind of owner of the clients' text."""
        return "site"
