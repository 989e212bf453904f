"""corpus=files: the user's own text, in a folder, one file, or records with a field of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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
BESIDE_TEXT = "records, while text is read; corpus.path='FOLDER/*.jsonl' reads them"


@dataclass(frozen=True)
class Files(Corpus):
    """The text below `path`, cut into documents of at most `document_bytes`.

    The client is a file or its top-level folder, or a field of a record; the label is the top-level
    folder, or a field of a record.
    """

    path: str | None = None
    client: str = "file"  # file, folder, or a field of a record
    text_field: str = "text"
    label_field: str | None = None
    document_bytes: int = 4096
    bad_records: str = "refuse"  # refuse or skip
    _told: list[str] = field(default_factory=list, init=False, compare=False, repr=False)

    too_few: ClassVar[str] = "add text or lower corpus.document_bytes"

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
        if not self.text_field:
            raise ConfigError("corpus.text_field= is empty; name the field with the text")

    @property
    def source(self) -> str:
        """Always "files", because the cache key depends on the content and not on the path."""
        return "files"

    @property
    def owner(self) -> str:
        """Either file, folder or the name of a field."""
        return self.client

    def notes(self) -> list[str]:
        """What was left out when the documents were read last."""
        return [f"corpus.path={shown(self.path or '')}: {note}" for note in self._told]

    def documents(self) -> Iterator[Document]:
        """Yield the documents by file name and place in the file.

        Raises ConfigError if there is no text, or if a file or record cannot be read.
        """
        self._told.clear()
        try:
            yield from self._documents()
        except Unreadable as error:
            raise ConfigError(f"corpus.path={shown(self.path or '')}: {error}") from error

    def _documents(self) -> Iterator[Document]:
        left = LeftOut()
        path = Path(self.path or "").expanduser()
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
                + (", or read the records with corpus.path='FOLDER/*.jsonl'" * bool(found.records))
            )
        else:
            documents = self._from_texts(root, _checked(found.texts), left)
            left.add_all(BESIDE_TEXT, found.records)
        empty = True
        for document in documents:
            empty = False
            yield document
        self._told[:0] = left.notes()
        if empty:
            why = "; ".join(["name a folder with UTF-8 text or a file of records", *self._told])
            raise Unreadable(f"contains no text; {why}")

    def _options_of_records(self) -> Iterator[str]:
        """Yield the options that were set and are for records only, as they are typed."""
        if self.text_field != Files.text_field:
            yield f"corpus.text_field={self.text_field}"
        if self.label_field is not None:
            yield f"corpus.label_field={self.label_field}"
        if self.bad_records != Files.bad_records:
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
        direct = Path(self.path or "").expanduser().is_file()
        text = RecordText(fields, self.client, self.bad_records == "skip", direct)
        owners = Owners(root, self.client, files)
        for row in text.rows(files, left):
            client = owners.of(row.file) if row.client is None else row.client
            label = top_folder(row.file) if row.label is None else row.label
            yield from cut_document(Document(client, row.id, row.text, label), self.document_bytes)
        self._told.extend(text.notes())

    def _from_texts(self, root: Path, texts: dict[str, Path], left: LeftOut) -> Iterator[Document]:
        """Yield the documents of text files."""
        owners = Owners(root, self.client, texts)
        for name, path in texts.items():
            document, empty = Document(owners.of(name), name, "", top_folder(name)), True
            try:
                for piece in cut_document(document, self.document_bytes, text_chunks(path)):
                    empty = False
                    yield piece
            except Unreadable as error:
                raise Unreadable(f"{name} {error}") from error
            if empty:
                left.add(NO_TEXT, name)


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
