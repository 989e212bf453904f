"""corpus=files: the user's own text, in a folder, one file, or the records of a .jsonl file."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.data.corpora.base import Corpus, Document, cut_document

JSONL_SUFFIXES = (".jsonl", ".ndjson")
# A file with one of these suffixes must be text; other files that are not text are skipped.
TEXT_SUFFIXES = ("", ".txt", ".text", ".md", ".markdown", ".rst")


@dataclass(frozen=True)
class Files(Corpus):
    """The text below `path`, cut into documents of at most `document_bytes`.

    In a folder the client is a file or its top-level folder; the label is the top-level folder. In
    a .jsonl file client and label are fields of a record.
    """

    path: str | None = None
    client: str = "file"  # file, folder, or the name of a field
    text_field: str = "text"
    label_field: str | None = None
    document_bytes: int = 4096

    too_few: ClassVar[str] = "add text or lower corpus.document_bytes"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "corpus.path is not set: corpus=files needs corpus.path=FOLDER (text files) or"
                " FILE.jsonl"
            )

    @property
    def source(self) -> str:
        """Always "files", because the cache key depends on the content and not on the path."""
        return "files"

    @property
    def owner(self) -> str:
        """Either file, folder or the name of a field."""
        return self.client

    def documents(self) -> Iterator[Document]:
        """Yield the documents by file name or line; raises ConfigError if there is no text.

        Warns (UserWarning) of files in a folder that are not text.
        """
        path = Path(self.path or "").expanduser()
        if not path.exists():
            raise ConfigError(
                f"corpus.path={self.path}: does not exist (looked at {path.absolute()}); name a"
                " folder or file"
            )
        if path.is_file() and path.suffix.lower() in JSONL_SUFFIXES:
            found = self._from_jsonl(path)
        elif self.client in ("file", "folder"):
            found = self._from_folder(path)
        else:
            raise ConfigError(
                f"corpus.client={self.client}: a folder of text files has corpus.client=file or"
                " corpus.client=folder; a field's name goes with a .jsonl file"
            )
        empty = True
        for document in found:
            empty = False
            yield document
        if empty:
            raise ConfigError(
                f"corpus.path={self.path}: contains no text; name a folder with UTF-8 text or a"
                " .jsonl file"
            )

    def _from_folder(self, path: Path) -> Iterator[Document]:
        """Yield the documents of every text file below `path`, or of the file `path`."""
        root = path if path.is_dir() else path.parent
        texts = self._texts(root, path.rglob("*") if path.is_dir() else [path])
        stems = Counter(name.removesuffix(Path(name).suffix) for name in texts)
        for name, text in texts.items():
            top = name.split("/")[0] if "/" in name else ""
            stem = name.removesuffix(Path(name).suffix)
            file_owner = stem if stems[stem] == 1 else name  # a.txt and a.md are two clients
            client = file_owner if self.client == "file" else top or root.absolute().name
            yield from cut_document(Document(client, name, text, top), self.document_bytes)

    def _texts(self, root: Path, found: Any) -> dict[str, str]:
        """Read the text files among `found`, which are not hidden: name below `root` -> text."""
        names = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
        texts, foreign = {}, []
        for name in sorted(names):
            if any(part.startswith(".") for part in name.split("/")):
                continue
            text = _read_text(names[name])
            if text is not None:
                texts[name] = text
            elif names[name].suffix.lower() in TEXT_SUFFIXES:
                raise ConfigError(
                    f"corpus.path={self.path}: {name} is not UTF-8; convert it "
                    "(`iconv -f ITS_ENCODING -t UTF-8`) or move it out of the folder"
                )
            else:
                foreign.append(name)
        if foreign:
            listing = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            warnings.warn(
                f"corpus.path={self.path}: skipped {len(foreign)} files that are not text:"
                f" {listing}",
                stacklevel=2,
            )
        return texts

    def _from_jsonl(self, path: Path) -> Iterator[Document]:
        """Yield the documents of a file with one JSON record per line; every record needs all named
        fields.
        """
        wanted = {"corpus.client": self.client, "corpus.text_field": self.text_field}
        if self.label_field:
            wanted["corpus.label_field"] = self.label_field
        with path.open(encoding="utf-8-sig") as stream:
            try:
                lines = list(stream)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"corpus.path={self.path}: not UTF-8 ({error}); convert it with iconv"
                ) from error
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            record = _record(line, f"corpus.path={self.path}, line {number}", wanted)
            label = record[self.label_field] if self.label_field else None
            document = Document(
                client=_valid(str(record[self.client])),
                id=f"line {number}",
                text=_valid(record[self.text_field]).replace("\r\n", "\n"),
                label="" if label is None else _valid(str(label)),
            )
            yield from cut_document(document, self.document_bytes)


def _read_text(path: Path) -> str | None:
    r"""Return a file's text with line ends \n and no byte order mark; None if it is not UTF-8.

    None also for records in a folder of text files: a model would learn JSON syntax from them.
    """
    data = path.read_bytes()
    if b"\0" in data or path.suffix.lower() in JSONL_SUFFIXES:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _record(line: str, place: str, wanted: dict[str, str]) -> dict[str, Any]:
    """Return the record of a line; raises ConfigError if it lacks a required field.

    `wanted` is option -> field; `place` is the path and line number for messages.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{place}: not JSON ({error}); a .jsonl file has one record per line"
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{place}: a record must be an object with fields, not {type(record).__name__}"
        )
    problems = []
    for option, field in wanted.items():
        if field not in record:
            names = ", ".join(record) or "none"
            problems.append(
                f"{option}={field}: {place} has no such field; its fields:"
                f" {names}{nearest(field, record)}"
            )
        elif option == "corpus.text_field" and not isinstance(record[field], str):
            problems.append(
                f"{option}={field}: in {place} it is {type(record[field]).__name__}, not text"
            )
        elif option == "corpus.client" and record[field] is None:
            problems.append(f"{option}={field}: in {place} it is null; every record needs an owner")
    if problems:
        raise ConfigError(problems)
    return record


def _valid(text: str) -> str:
    """Return text that can be encoded as UTF-8.

    JSON's escapes may leave half a surrogate pair, which becomes U+FFFD.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
