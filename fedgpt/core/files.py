"""Files: writes that are atomic, digests, and reading what may be missing or damaged.

A new file is written beside the old one, synced, and renamed over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedgpt.core.errors import FedGPTError

# mode of a file that tells of single clients: only its owner may read it
PRIVATE = 0o600
SUMS = "SHA256SUMS"  # a folder's list of digests, which `sha256sum -c` checks
RANDOM_BYTES = 8  # of the name of a temporary file
FETCH = "the file itself is elsewhere; fetch it with"
# how the small texts begin that tools have in place of a large file, until the file is fetched
POINTERS = {
    rb"version https://git-lfs": f"is a Git LFS pointer, and {FETCH}: git lfs pull",
    rb"((\.\./)*\.git)?/annex/objects/": f"is a git-annex pointer, and {FETCH}: git annex get",
}
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)\b", re.IGNORECASE)
BEGINNING = 1 << 10  # bytes of a file in which a pointer or a web page shows
DIGITS = 4000  # of a whole number in JSON; Python refuses to convert one with many more
WORDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bytes: "bytes without an encoding",
}


def typed_path(text: str | Path) -> Path:
    """A path as a user types it, in which ~ and ~name are home folders.

    Raises RuntimeError if there is no such home folder. `Path` takes ./~name for the same.

    >>> typed_path("./~folder").name
    '~folder'
    """
    return Path(text).expanduser() if str(text).startswith("~") else Path(text)


@contextmanager
def replacing(path: str | Path, durable: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if the block succeeds.

    If `durable`, file and folder are synced (fsync), so that the new content survives a power
    failure. Otherwise it survives only the end of the process. The file has `mode`, without the
    bits of the user's umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(RANDOM_BYTES)}"
    # not tempfile.mkstemp, which makes a file that only its owner can read
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes a new file, which only its owner can read
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Delete the files of a folder that `replacing` left when its process was killed."""
    for left in folder.glob(f".*.{'[0-9a-f]' * 2 * RANDOM_BYTES}"):
        left.unlink()


def write_text(path: str | Path, text: str, durable: bool = True, mode: int = 0o666) -> None:
    """Write `text` as UTF-8; a reader sees either the old or the new content."""
    with replacing(path, durable, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Write a file or folder to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sums_of(folder: Path) -> str:
    """The content of SHA256SUMS for all other files of a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names)


def is_there(path: Path) -> bool:
    """Whether something has this name, if only a link that leads nowhere; raises FedGPTError for a
    folder that cannot be read.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no possible name
        return False
    except OSError as error:
        raise FedGPTError(f"{path} cannot be read: {error.strerror}") from None
    return True


def read_file(path: Path) -> bytes:
    """The content of a file; raises FedGPTError if it cannot be read or is not there."""
    check_file(path)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; raises FedGPTError, naming the file and the reason."""
    try:
        text = read_file(path).decode("utf-8")
        content = json.loads(text, parse_int=_integer, object_pairs_hook=once)
    except (ValueError, RecursionError) as damage:
        raise FedGPTError(f"{path} is damaged: {damage}") from None
    if not isinstance(content, dict):
        raise FedGPTError(f"{path} is damaged: it has {type_word(content)}, not an object")
    return content


def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for the decoder's `object_pairs_hook`; raises ValueError if a name stands
    twice in it, as the decoder would take the last value without a word.

    >>> json.loads('{"n_layer": 2, "n_layer": 3}', object_pairs_hook=once)
    Traceback (most recent call last):
    ...
    ValueError: the name 'n_layer' stands twice in it
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.60} stands twice in it")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    """The whole number; raises ValueError if it has more than DIGITS digits."""
    if len(digits) > DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def type_word(value: Any) -> str:
    """Return the type of a value in words of JSON.

    >>> type_word(None), type_word(3), type_word([])
    ('null', 'a number', 'a list')
    """
    return "null" if value is None else WORDS.get(type(value), f"a {type(value).__name__}")


def pointer_problem(begin: bytes) -> str:
    """Return what a file is that begins so, or a link that leads there, if it is only a pointer
    to the file, and the command that fetches it; an empty text otherwise.
    """
    return next((POINTERS[each] for each in POINTERS if re.match(each, begin)), "")


def check_file(path: Path) -> None:
    """Raise FedGPTError unless the file can be read and is no pointer and no web page."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FedGPTError(f"{path} is not a file")
        with path.open("rb") as stream:
            head = stream.read(BEGINNING)
    except OSError as error:
        gone = isinstance(error, FileNotFoundError) and path.is_symlink()
        problem = pointer_problem(os.fsencode(path.readlink())) if gone else ""
        raise FedGPTError(f"{path} {problem or f'cannot be read: {error.strerror}'}") from None
    if not head:
        raise FedGPTError(f"{path} is empty")
    if problem := pointer_problem(head):
        raise FedGPTError(f"{path} {problem}")
    if PAGE.match(head):
        raise FedGPTError(f"{path} is a web page or XML; fetch the file again")
