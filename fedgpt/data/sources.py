"""The files below a folder: which hold text, which hold records, and which are left out.

notes/ann.txt        text       its words are the text
notes/posts.jsonl    records    a field of each record is text
notes/page.html      left out   a model would learn its tags; refused if it is named itself
notes/ann2.txt       left out   if it is a link to ann.txt, whose text would count twice
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedgpt.core.errors import amount
from fedgpt.core.files import pointer_problem
from fedgpt.data.reading import PACKED, Unreadable, is_text, reason, shown
from fedgpt.data.records import format_of

# A file with one of these suffixes must be text. With a suffix that this module does not know, a
# file is text if it is UTF-8, such as source code.
TEXT_SUFFIXES = ("", ".txt", ".text", ".md", ".markdown", ".rst")
# what to do with files that are not text -> their suffixes
REMEDIES = {
    "convert it to plain text (.txt)": (
        *(".html", ".htm", ".xhtml", ".xml", ".svg", ".rtf", ".pdf", ".epub"),
        *(".doc", ".docx", ".odt", ".ppt", ".pptx", ".ipynb"),
    ),
    "save its records as .jsonl or .csv": (
        *(".yaml", ".yml", ".toml", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".avro"),
        *(".sqlite", ".db", ".pkl", ".npy", ".npz", ".psv"),
        *(".json5", ".jsonc", ".jsonld", ".geojson", ".topojson", ".har"),
    ),
    "give it the suffix .jsonl": (".jsonlines", ".ldjson"),
    "give it the suffix .tsv": (".tab",),
    "give it the suffix .gz, or unpack it": (".gzip",),
    "give it the suffix .zst, or unpack it": (".zstd",),
    "unpack it": (
        *(".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".lz4", ".br", ".lzma", ".z"),
        ".parquet",  # as .parquet.gz
    ),
}
REMEDY_OF = {suffix: remedy for remedy, suffixes in REMEDIES.items() for suffix in suffixes}
# what programs add to the name of a copy or of an unfinished file
COPY = re.compile(r"(\.(bak|backup|old|orig|save|tmp|part|\d+)|~)$", re.IGNORECASE)
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NAMED = 3  # number of files that a message names


@dataclass
class LeftOut:
    """The files that are not read, by the reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        """Note that the file `name` is not read."""
        self.names.setdefault(why, []).append(shown(name))

    def add_all(self, why: str, names: Iterable[str]) -> None:
        """Note that none of these files is read."""
        for name in names:
            self.add(why, name)

    def notes(self) -> list[str]:
        """Return one line for each reason, with the number of files and the first names."""
        return [
            f"left out {amount(len(names), 'file')}: {listing(names)} ({why})"
            for why, names in self.names.items()
        ]


def listing(names: Iterable[str], count: int = NAMED) -> str:
    """Return the first names.

    >>> listing("abcd")
    'a, b, c, ...'
    """
    every = list(names)
    return ", ".join(every[:count]) + (", ..." if len(every) > count else "")


def find_files(path: Path, left: LeftOut) -> tuple[Path, dict[str, Path]]:
    """Return the folder of a path and the files below it by name, in the order of their names.

    `path` is a folder, a file or a pattern such as notes/*.txt. Hidden files are not found, unless
    named. Raises Unreadable.
    """
    for parent in reversed(path.absolute().parents):
        _check_folder(parent, listed=False)
    _check_folder(path, listed=True)
    if path.is_dir():
        return path, _sorted(Walk(path, left).files())
    if path.is_file():
        return path.parent, {path.name: path}
    if path.exists():
        raise Unreadable("is neither a folder nor a file that can be read twice")
    if not glob.has_magic(str(path)):
        raise Unreadable(
            f"does not exist (looked at {shown(path.absolute())}); name a folder or file"
        )
    return _matching(path, left)


def _matching(pattern: Path, left: LeftOut) -> tuple[Path, dict[str, Path]]:
    """Return the folder above the first wildcard of a pattern, and the files that match."""
    parts = pattern.absolute().parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:first])
    for number in range(first, len(parts)):  # glob does not tell which folders it cannot read
        for folder in _glob(parts[:number]):
            _check_folder(folder, listed=glob.has_magic(parts[number]))
    found = _glob(parts)
    if not found:
        raise Unreadable("no file has such a name; name a folder, a file or a pattern")
    return root, _sorted(Walk(root, left).files(found))


def _glob(parts: Sequence[str]) -> list[Path]:
    """Return what matches a pattern; not by Path.glob, whose wildcards match hidden names."""
    names = glob.glob(str(Path(*parts)), recursive=True)  # noqa: PTH207
    return [Path(name) for name in sorted(names)]


def _check_folder(folder: Path, listed: bool) -> None:
    """Raise Unreadable if there is a folder that cannot be searched, or not listed."""
    try:
        (folder / "..").stat()  # as every name below it
        if listed:
            os.scandir(folder).close()
    except OSError as error:
        if error.errno not in ABSENT:
            raise Unreadable(f"the folder {shown(folder)} {reason(error)}") from error


def _sorted(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    return dict(sorted(files))


class Walk:
    """Finds every file once, although links may lead to it several times or in a circle."""

    def __init__(self, root: Path, left: LeftOut):
        self.root, self.left = root, left
        self._seen: set[tuple[int, int]] = set()  # device and number of each file and folder
        self._links: deque[Path] = deque()  # links are followed last: a name of its own comes first

    def files(self, starts: Iterable[Path] = ()) -> Iterator[tuple[str, Path]]:
        """Yield the name below the root and the path of each file below `starts`."""
        for start in starts or [self.root]:
            yield from self._entry(start)
        while self._links:
            yield from self._entry(self._links.popleft(), followed=True)

    def _entry(self, path: Path, followed: bool = False) -> Iterator[tuple[str, Path]]:
        name = path.relative_to(self.root).as_posix()
        try:
            if path.is_symlink() and not followed and path != self.root:
                self._links.append(path)
                return
            about = path.stat()
        except FileNotFoundError:
            if problem := _missing_text(name, path):
                raise Unreadable(f"{shown(name)} {problem}") from None
            self.left.add("leads to nothing", name)
            return
        except OSError as error:
            if path.is_symlink():  # a link to itself
                self.left.add("leads to nothing", name)
                return
            raise Unreadable(f"{shown(name)} {reason(error)}") from error
        if about.st_ino and (about.st_dev, about.st_ino) in self._seen:
            self.left.add("a link to what is read anyway", name)
            return
        self._seen.add((about.st_dev, about.st_ino))
        if stat.S_ISDIR(about.st_mode):
            yield from self._folder(path, name)
        elif stat.S_ISREG(about.st_mode):
            yield name, path
        else:
            self.left.add("a pipe, socket or device", name)

    def _folder(self, path: Path, name: str) -> Iterator[tuple[str, Path]]:
        """Yield the files below a folder; those whose names begin with a dot are hidden."""
        try:
            inside = sorted(entry.name for entry in os.scandir(path))
        except OSError as error:
            raise Unreadable(f"the folder {shown(name)} {reason(error)}") from error
        for each in inside:
            if not each.startswith("."):
                yield from self._entry(path / each)


def _missing_text(name: str, link: Path) -> str:
    """Return the problem of a link that leads to nothing, if a tool fetches the text there."""
    if suffix_of(name) not in TEXT_SUFFIXES and format_of(name) is None:
        return ""
    return pointer_problem(os.fsencode(link.readlink())) if link.is_symlink() else ""


@dataclass(frozen=True)
class Sorted:
    """The files of a corpus by what they hold: name below the root -> path."""

    texts: dict[str, Path]
    records: dict[str, Path]


def sort_files(files: dict[str, Path], direct: bool, left: LeftOut) -> Sorted:
    """Divide files into texts and records; all others are left out, or refused if named directly.

    Raises Unreadable for a name that is not UTF-8, as owners have such names.
    """
    texts, records = {}, {}
    for name, path in files.items():
        holds_records = format_of(name) is not None
        if not holds_records and (remedy := _remedy(name)):
            if direct:
                raise Unreadable(f"{shown(name)} is not text; {remedy}")
            left.add("not text", name)
            continue
        named_so = holds_records or suffix_of(name) in TEXT_SUFFIXES
        if not named_so and not is_text_file(name, path):
            if direct:
                raise Unreadable(f"{shown(name)} is not text in UTF-8; convert it to a .txt file")
            left.add("not text", name)
            continue
        if shown(name) != name:
            raise Unreadable(f"the name of {shown(name)} is not UTF-8; rename it")
        (records if holds_records else texts)[name] = path
    return Sorted(texts, records)


def _remedy(name: str) -> str:
    """Return what to do with a file that is not text by its name; empty if it may be text.

    >>> _remedy("page.html"), _remedy("posts.jsonl.bak"), _remedy("main.c")
    ('convert it to plain text (.txt)', 'rename it to posts.jsonl', '')
    """
    original = COPY.sub("", name)
    if original != name and format_of(original):
        return f"rename it to {shown(Path(original).name)}"
    return REMEDY_OF.get(suffix_of(original), "")


def is_text_file(name: str, path: Path) -> bool:
    """Like is_text; raises Unreadable with the file's name."""
    try:
        return is_text(path)
    except Unreadable as error:
        raise Unreadable(f"{shown(name)} {error}") from error


def suffix_of(name: str) -> str:
    """Return the suffix that says what a file holds, in small letters.

    >>> suffix_of("notes/Ann.TXT"), suffix_of("posts.jsonl.gz"), suffix_of("backup.zip")
    ('.txt', '.jsonl', '.zip')
    """
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def stem_of(name: str) -> str:
    """Return a name without its suffixes.

    >>> stem_of("deep/ann.txt"), stem_of("posts.jsonl.gz")
    ('deep/ann', 'posts')
    """
    for suffix in reversed(Path(name).suffixes[-2:]):
        packed = Path(name).suffix.lower() in PACKED
        name = name.removesuffix(suffix)
        if not packed:
            break
    return name
