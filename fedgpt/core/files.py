"""Atomic writes: a new file is written beside the old one, synced, and renamed over it."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# mode of a file that tells of single clients: only its owner may read it
PRIVATE = 0o600
SUMS = "SHA256SUMS"  # a folder's list of digests, which `sha256sum -c` checks
# start of the small text that Git has in place of a large file, until the file is fetched
LFS_POINTER = b"version https://git-lfs"


@contextmanager
def replacing(path: str | Path, durable: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` if the block succeeds.

    If `durable`, file and folder are synced (fsync), so that the new content survives a power
    failure. Otherwise it survives only the end of the process. The file has `mode`, without the
    bits of the user's umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
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
