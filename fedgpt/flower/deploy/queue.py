"""The runs of a server: a file for each in DIR/queue, from its submission to its result.

`fedgpt submit` makes a file, and only the server changes it afterwards. Files are written beside
and renamed, so that a reader sees a whole one at any moment. `fedgpt cancel` makes a second file,
which is there until the server has ended the run.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedgpt.config.compose import to_yaml
from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import PRIVATE, read_json, sync, type_word, write_text
from fedgpt.core.options import RunOptions
from fedgpt.flower.deploy.documents import create, now

QUEUE = "queue"
CANCELLED = "cancelled"  # suffix of the file of a run that is to end
log = logging.getLogger(__name__)


@dataclass
class QueuedRun:
    """A run of a server. Times are UTC, in ISO 8601."""

    number: int  # from 1, in the order of submission
    name: str
    config: str  # its options, as config.yaml has them
    run_dir: str
    dated: bool  # nobody chose the name of its folder, so it gets a new one
    resumed: bool  # it was submitted as resume=FOLDER
    once: bool  # of `fedgpt server DIR OPTIONS`, which ends with this run
    versions: int  # the version at which it ends; 0 where that is not known
    published_only: bool  # with privacy=client, metrics that tell of single clients are withheld
    submitted: str
    started: str | None = None
    starts: int = 0
    ended: str | None = None
    exit_code: int | None = None
    reason: str = ""  # why it ended before its last version

    @property
    def waits(self) -> bool:
        """Whether it has not begun."""
        return self.started is None and self.ended is None

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended; its server may be away."""
        return self.started is not None and self.ended is None


@dataclass(frozen=True)
class Wish:
    """The options of a run, as a user has typed them."""

    options: RunOptions
    dated: bool
    resumed: bool


def add(folder: Path, wish: Wish, once: bool = False) -> QueuedRun:
    """Put a run behind all others of a server's folder; raises FedGPTError if it cannot."""
    options = wish.options
    run = QueuedRun(
        number=0,
        name=options.name,
        config=to_yaml(options),
        run_dir=options.run_dir,
        dated=wish.dated,
        resumed=wish.resumed,
        once=once,
        versions=0 if options.tokens else options.rounds,
        published_only=options.privacy.unit == "client",
        submitted=now(),
        # at once, so that no server takes it from the queue
        started=now() if once else None,
    )
    path = folder / QUEUE
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        while True:
            run.number = max((int(one.stem) for one in _files(path)), default=0) + 1
            if _put(path, run):
                return run
    except OSError as error:
        raise FedGPTError(f"{path} cannot be written: {error.strerror}") from None


def _put(path: Path, run: QueuedRun) -> bool:
    """Write the file of a new run whole; False if another command has taken its number."""
    temporary = path / f".{secrets.token_hex(8)}"
    create(temporary, _text(run), PRIVATE)
    try:
        os.link(temporary, path / f"{run.number}.json")
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync(path)
    return True


def write(folder: Path, run: QueuedRun) -> None:
    """Replace the file of a run; raises FedGPTError if it cannot be written."""
    path = folder / QUEUE / f"{run.number}.json"
    try:
        write_text(path, _text(run), mode=PRIVATE)
    except OSError as error:
        raise FedGPTError(f"{path} cannot be written: {error.strerror}") from None


def read(folder: Path, number: int) -> QueuedRun:
    """A run by its number; raises FedGPTError if there is none, or its file is damaged."""
    path = folder / QUEUE / f"{number}.json"
    content = read_json(path)
    kinds = {"str": (str,), "int": (int,), "bool": (bool,)}
    kinds |= {f"{name} | None": (*kind, type(None)) for name, kind in kinds.items()}
    wrong = [
        field.name
        for field in fields(QueuedRun)
        if type(content.get(field.name, ...)) not in kinds[str(field.type)]
    ]
    if wrong:
        found = type_word(content.get(wrong[0]))
        raise FedGPTError(f"{path} is damaged: {wrong[0]} is {found}")
    return QueuedRun(**{field.name: content[field.name] for field in fields(QueuedRun)})


def cancel(folder: Path, run: QueuedRun) -> None:
    """Ask the server to end a run, or not to begin it; raises FedGPTError if that is no use."""
    if run.ended is not None:
        raise FedGPTError(f"RUN={run.number}: it has ended already, at {run.ended}")
    path = folder / QUEUE / f"{run.number}.{CANCELLED}"
    try:
        path.touch(PRIVATE)
    except OSError as error:
        raise FedGPTError(f"{path} cannot be written: {error.strerror}") from None


def cancelled(folder: Path) -> set[int]:
    """The numbers of the runs that are to end and have not ended."""
    return {int(path.stem) for path in _files(folder / QUEUE, CANCELLED)}


def end(folder: Path, run: QueuedRun, reason: str, exit_code: int) -> None:
    """Record the end of a run; raises FedGPTError if it cannot be written."""
    run.ended, run.reason, run.exit_code = now(), reason, exit_code
    write(folder, run)
    forget_cancel(folder, run.number)


def forget_cancel(folder: Path, number: int) -> None:
    """Note that what was asked for has been done, or is no use any more."""
    (folder / QUEUE / f"{number}.{CANCELLED}").unlink(missing_ok=True)


def runs(folder: Path) -> list[QueuedRun]:
    """All runs of a server in their order; a damaged file is left out, with a warning."""
    return list(_read_all(folder))


def _read_all(folder: Path) -> Iterator[QueuedRun]:
    for path in sorted(_files(folder / QUEUE), key=lambda path: int(path.stem)):
        try:
            yield read(folder, int(path.stem))
        except FedGPTError as damage:
            log.warning("%s; this run is left out", damage)


def _files(path: Path, suffix: str = "json") -> list[Path]:
    return [one for one in path.glob(f"*.{suffix}") if one.stem.isascii() and one.stem.isdigit()]


def _text(run: QueuedRun) -> str:
    content: dict[str, Any] = asdict(run)
    return json.dumps(content, indent=1) + "\n"
