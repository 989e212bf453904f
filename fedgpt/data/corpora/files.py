"""corpus=files: the user's own text, in a folder, one file, or records with a field of text."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.errors import ConfigError
from fedgpt.data.folder_text import FolderCorpus, FolderText


@dataclass(frozen=True)
class Files(FolderCorpus):
    """The text below `path`: all parts of it, or those that have no folder of their own."""

    path: str | None = None
    client: str = "file"  # file, folder, or a field of a record

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "corpus.path is not set: corpus=files needs corpus.path=FOLDER or FILE (text,"
                " .jsonl, .json, .csv, .tsv or .parquet)"
            )
        if not self.client:
            raise ConfigError(
                "corpus.client= is empty; use file, folder or the name of a field of the records"
            )
        super().__post_init__()

    @property
    def owner(self) -> str:
        """Either file, folder or the name of a field."""
        return self.client

    def _folders(self) -> list[FolderText]:
        assert self.path is not None, "checked when it was made"
        return [*super()._folders(), self.folder(self.path, client=self.client)]
