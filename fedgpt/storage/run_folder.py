"""A run's folder: its lock, and its JSON-lines files."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedgpt.core.errors import ConfigError, FedGPTError, Unwritten
from fedgpt.core.files import write_text
from fedgpt.data.tokenizer import Tokenizer
from fedgpt.storage.content import TOKENIZER, kept_tokenizer

log = logging.getLogger(__name__)


class RunFolder:
    """Exclusive access to `runs/<name>/`; the kernel releases the lock when the process ends."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self._lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FedGPTError(
                f"run_dir={self.path}: another fedgpt process is running in this folder; "
                "wait for it or name another run_dir"
            ) from None
        except OSError as error:  # Timeout is one, too
            raise _unusable(self.path, error) from error
        self.metrics = JsonLines(self.path / "metrics.jsonl", "version")
        self.events = JsonLines(self.path / "events.jsonl", "event")

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        path = self.path / "checkpoints"
        path.mkdir(exist_ok=True)
        return path

    @property
    def wal(self) -> Path:
        """The folder of the journal."""
        return self.path / "wal"

    def close(self) -> None:
        """Flush the records and release the lock."""
        try:
            self.metrics.close()
            self.events.close()
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


REFUSED = (".lock", "failure.json")  # files of a run that is refused before it begins


@contextmanager
def made_folder(path: str, dated: bool) -> Iterator[Path]:
    """Make the folder of a run, and remove what it left if the block fails before the run
    begins.

    If it is `dated`, the folder is a new one: `path`, or `path`-2, `path`-3 and so on, because
    several runs can begin in one second. Otherwise it may exist; then it stays, with what was in
    it. Raises ConfigError if it cannot be made.
    """
    folder = Path(path)
    number = 1
    while True:
        missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=not dated)
            before = {path.name for path in folder.iterdir()}
            break
        except FileExistsError as error:
            if not dated:
                raise _unusable(folder, error) from error
            number += 1
            folder = Path(f"{path}-{number}")
        except OSError as error:
            _remove_empty(missing)
            raise _unusable(folder, error) from error
    try:
        yield folder
    except BaseException:
        _discard(folder, folder in missing, before)
        _remove_empty(missing)
        raise


def _discard(folder: Path, is_new: bool, before: Collection[str]) -> None:
    """Empty a folder in which no run has begun, unless another process uses it.

    In a folder that is not new, others may write: only files of a refused run that were not there
    `before` are removed.
    """
    with suppress(OSError, Timeout), FileLock(folder / ".lock", timeout=0):
        new = [
            path
            for path in folder.iterdir()
            if is_new or (path.name in REFUSED and path.name not in before)
        ]
        if (folder / "config.yaml").exists():
            return
        for path in new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _unusable(folder: Path, error: OSError) -> FedGPTError:
    """The error for a folder that cannot be made or locked."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unwritten("the folder of the run", folder, error)
    return ConfigError(
        f"run_dir={folder}: cannot be written ({error.strerror or error}); name another folder"
    )


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a run's tokenizer into its folder, unless the folder has it."""
    if (kept := kept_tokenizer(folder)) is None or kept.digest != tokenizer.digest:
        tokenizer.save(folder / TOKENIZER)


class JsonLines:
    """A file with one JSON object per line, appended one at a time."""

    def __init__(self, path: Path, key: str = ""):
        """Every record has `key`; one without it is damaged."""
        self.path, self._key = path, key
        self._stream = None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record to the operating system, so that it is not lost if the process is
        killed.
        """
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def read(self) -> list[dict[str, Any]]:
        """All complete records; a line that a crash truncated is skipped."""
        return list(read_lines(self.path, self._key))

    def keep(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file's content; a resumed run deletes the records that it will write
        again.
        """
        self.close()
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def close(self) -> None:
        """Close the stream; a later append opens it again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def read_lines(path: Path, key: str = "") -> Iterable[dict[str, Any]]:
    """Complete records of a JSON-lines file; none if the file does not exist.

    Every record has `key`. A last line that a crash truncated is skipped. Any other damage ends
    the records, with a warning. Raises FedGPTError if there is something else than a file.
    """
    if not path.exists():
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FedGPTError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and (not key or key in record):
            yield record
            continue
        if number < len(lines):
            log.warning("%s: line %d is damaged; it and all later ones are ignored", path, number)
        return
