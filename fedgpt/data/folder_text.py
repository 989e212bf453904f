"""The text below a folder, in one file or in the files of a pattern: plain text, or records.

The client is a file or its top-level folder, or a field of a record; the label is the top-level
folder, or a field of a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from fedgpt.core.errors import ConfigError
from fedgpt.data.beginnings import check_beginning
from fedgpt.data.corpora.base import Corpus, Document, cut_document
from fedgpt.data.reading import Unreadable, shown, text_chunks
from fedgpt.data.record_text import RecordFields, RecordText
from fedgpt.data.records import OWNERS, Field
from fedgpt.data.sources import LeftOut, find_files, listing, sort_files, stem_of

NO_TEXT = "no text in it"


@dataclass(frozen=True)
class FolderText:
    """The text below `path`, cut into documents of at most `document_bytes`.

    `part` is that of every document; `option` names the path in messages.
    """

    path: str
    client: str = "file"  # file, folder, or a field of a record
    text_field: str = "text"
    label_field: str | None = None
    document_bytes: int = 4096
    bad_records: str = "refuse"  # refuse or skip
    part: str = ""
    option: str = "corpus.path"
    _told: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    def notes(self) -> list[str]:
        """What was left out when the documents were read last."""
        return [f"{self.option}={shown(self.path)}: {note}" for note in self._told]

    def documents(self) -> Iterator[Document]:
        """Yield the documents by file name and place in the file.

        Raises ConfigError if there is no text, or if a file or record cannot be read.
        """
        self._told.clear()
        try:
            yield from self._documents()
        except Unreadable as error:
            raise ConfigError(f"{self.option}={shown(self.path)}: {error}") from error

    def files(self) -> dict[str, Path]:
        """Return the files below the path by name; raises ConfigError."""
        try:
            return find_files(Path(self.path).expanduser(), LeftOut())[1]
        except Unreadable as error:
            raise ConfigError(f"{self.option}={shown(self.path)}: {error}") from error

    def _documents(self) -> Iterator[Document]:
        left = LeftOut()
        path = Path(self.path).expanduser()
        root, files = find_files(path, left)
        found = sort_files(files, path.is_file(), left)
        named = self.client not in OWNERS
        if found.records and (named or not found.texts):
            documents = self._from_records(root, _checked(found.records), left)
            left.add_all("text, while records are read", found.texts)
        elif named and found.texts:
            have = "has" if len(found.texts) == 1 else "have"
            raise Unreadable(
                f"corpus.client={self.client} is a field of records, and {listing(found.texts)}"
                f" {have} no fields; use corpus.client=file or corpus.client=folder"
            )
        elif found.texts and (typed := list(self._options_of_records())):
            raise Unreadable(
                f"{', '.join(typed)}: only for records, and text is read here"
                f" ({listing(found.texts)}); leave it out"
                + (f", or read the records with {self._records}" * bool(found.records))
            )
        else:
            documents = self._from_texts(root, _checked(found.texts), left)
            left.add_all(f"records, while text is read; {self._records} reads them", found.records)
        empty = True
        for document in documents:
            empty = False
            yield document
        self._told[:0] = left.notes()
        if empty:
            why = "; ".join(["name a folder with UTF-8 text or a file of records", *self._told])
            raise Unreadable(f"contains no text; {why}")

    @property
    def _records(self) -> str:
        """The option with which records are read beside text."""
        return f"{self.option}='FOLDER/*.jsonl'"

    def _options_of_records(self) -> Iterator[str]:
        """Yield the options that were set and are for records only, as they are typed."""
        if self.text_field != FolderText.text_field:
            yield f"corpus.text_field={self.text_field}"
        if self.label_field is not None:
            yield f"corpus.label_field={self.label_field}"
        if self.bad_records != FolderText.bad_records:
            yield f"corpus.bad_records={self.bad_records}"

    def _from_records(
        self, root: Path, files: dict[str, Path], left: LeftOut
    ) -> Iterator[Document]:
        """Yield the documents of files of records, as if they were one file."""
        fields = RecordFields(
            client=None if self.client in OWNERS else Field(self.client),
            text=Field(self.text_field),
            label=Field(self.label_field) if self.label_field else None,
        )
        direct = Path(self.path).expanduser().is_file()
        text = RecordText(fields, self.client, self.bad_records == "skip", direct)
        owners = Owners(root, self.client, files)
        for row in text.rows(files, left):
            client = owners.of(row.file) if row.client is None else row.client
            label = top_folder(row.file) if row.label is None else row.label
            document = Document(client, row.id, row.text, label, self.part)
            yield from cut_document(document, self.document_bytes)
        self._told.extend(text.notes())

    def _from_texts(self, root: Path, texts: dict[str, Path], left: LeftOut) -> Iterator[Document]:
        """Yield the documents of text files."""
        owners = Owners(root, self.client, texts)
        for name, path in texts.items():
            document = Document(owners.of(name), name, "", top_folder(name), self.part)
            empty = True
            try:
                for piece in cut_document(document, self.document_bytes, text_chunks(path)):
                    empty = False
                    yield piece
            except Unreadable as error:
                raise Unreadable(f"{name} {error}") from error
            if empty:
                left.add(NO_TEXT, name)


@dataclass(frozen=True)
class FolderCorpus(Corpus):
    """A corpus of folders; the server's own text may be in two folders of its own."""

    text_field: str = "text"
    label_field: str | None = None
    document_bytes: int = 4096
    bad_records: str = "refuse"  # refuse or skip
    public_path: str | None = None
    held_out_path: str | None = None

    too_few: ClassVar[str] = "add text or lower corpus.document_bytes"

    def __post_init__(self) -> None:
        if not self.text_field:
            raise ConfigError("corpus.text_field= is empty; name the field with the text")

    @property
    def source(self) -> str:
        """Always "files", because the cache key depends on the content and not on the path."""
        return "files"

    def notes(self) -> Iterator[str]:
        """What was left out when the documents were read last."""
        for each in self.folders:
            yield from each.notes()

    def documents(self) -> Iterator[Document]:
        """Yield the documents by folder, file name and place in the file.

        Raises ConfigError if there is no text, or if a file or record cannot be read.
        """
        for each in self.folders:
            yield from each.documents()

    @cached_property
    def folders(self) -> list[FolderText]:
        """The folders in the order in which they are read."""
        return self._folders()

    def _folders(self) -> list[FolderText]:
        own = {"public": self.public_path, "held_out": self.held_out_path}
        return [
            self.folder(path, part=part, option=f"corpus.{part}_path")
            for part, path in own.items()
            if path is not None
        ]

    def folder(self, path: str, **about: str) -> FolderText:
        """The text below a path, read with the options of this corpus."""
        return FolderText(
            path,
            text_field=self.text_field,
            label_field=self.label_field,
            document_bytes=self.document_bytes,
            bad_records=self.bad_records,
            **about,
        )


def _checked(files: dict[str, Path]) -> dict[str, Path]:
    """Return the files; raises Unreadable if one is not what its name says."""
    for name, path in files.items():
        check_beginning(name, path)
    return files


class Owners:
    """The owner of each file: the file itself, or its top-level folder."""

    def __init__(self, root: Path, client: str, files: dict[str, Path]):
        self._root, self._client = root, client
        self._stems = Counter(map(stem_of, files))

    def of(self, name: str) -> str:
        """Return the owner of a file."""
        if self._client == "folder":
            return top_folder(name) or self._root.absolute().name
        stem = stem_of(name)
        return stem if self._stems[stem] == 1 else name  # a.txt and a.md are two clients


def top_folder(name: str) -> str:
    """Return the top-level folder of a file below the root; empty for a file without one."""
    return name.split("/", maxsplit=1)[0] if "/" in name else ""
