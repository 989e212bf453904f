"""What a server does now, read from its folder and, if it is there, asked of its link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedgpt.core.errors import FedGPTError
from fedgpt.core.score import RESERVED
from fedgpt.flower.deploy import queue
from fedgpt.flower.deploy.control import Control
from fedgpt.flower.deploy.keys import sites
from fedgpt.flower.deploy.queue import QueuedRun
from fedgpt.flower.deploy.supervise import is_served
from fedgpt.storage.run_folder import read_lines


@dataclass(frozen=True)
class Progress:
    """How far a run has come, from its folder."""

    version: int | None = None  # None before its first version
    tokens: int = 0
    accepted: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)  # reason -> number
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)  # of the newest scored version


@dataclass(frozen=True)
class Status:
    """A server at one moment; `approved` and `online` are names of sites."""

    serves: bool
    link: bool
    approved: tuple[str, ...]
    online: tuple[str, ...]
    runs: tuple[QueuedRun, ...]

    @property
    def running(self) -> QueuedRun | None:
        """The run that has begun and not ended; if no server runs, the next one continues it."""
        return next((run for run in self.runs if run.running), None)

    @property
    def waiting(self) -> list[QueuedRun]:
        """The runs that have not begun, in their order."""
        return [run for run in self.runs if run.waits]

    @property
    def ended(self) -> list[QueuedRun]:
        """The runs that have ended, in the order of their submission."""
        return [run for run in self.runs if run.ended is not None]

    @property
    def newest(self) -> QueuedRun | None:
        """The run that has begun last."""
        begun = [run for run in self.runs if run.started is not None]
        return max(begun, key=lambda run: str(run.started), default=None)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the progress of each run that has begun."""
        about = {name: value for name, value in asdict(self).items() if name != "runs"}
        offline = [name for name in self.approved if name not in self.online]
        return {**about, "offline": offline, "running": _about(self.running)} | {
            "queue": [_about(run) for run in self.waiting],
            "ended": [_about(run) for run in self.ended],
        }


def status_of(folder: Path) -> Status:
    """The status of a server's folder; raises FedGPTError for a folder that is none."""
    approved = sites(folder)
    try:
        with Control(folder) as control:
            link = control.healthy()
            keys = control.online() if link else set()
    except FedGPTError:  # it ends at this moment
        link, keys = False, set()
    online = tuple(name for name, key in approved.items() if key in keys)
    return Status(is_served(folder), link, tuple(approved), online, tuple(queue.runs(folder)))


def progress_of(run: QueuedRun) -> Progress:
    """How far a run has come; nothing is raised for a folder that is not there yet."""
    lines = list(read_lines(Path(run.run_dir) / "metrics.jsonl", "version"))
    if run.dated or not lines:
        return Progress()
    rejected: Counter[str] = Counter()
    for line in lines:
        rejected.update(line["rejected"])
    newest = lines[-1]
    scored = next((found for line in reversed(lines) if (found := _scores(line))), {})
    return Progress(
        version=newest["version"],
        tokens=newest["tokens"],
        accepted=sum(line["accepted"] for line in lines),
        rejected=dict(rejected),
        bytes_up=newest["bytes_up"],
        bytes_down=newest["bytes_down"],
        epsilon=next((line["epsilon"] for line in reversed(lines) if "epsilon" in line), None),
        scores=scored,
    )


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a version, which are all other fields of its line."""
    return {
        name: value
        for name, value in line.items()
        if name not in RESERVED and isinstance(value, int | float)
    }


def _about(run: QueuedRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    hidden = ("config", "dated", "once", "resumed", "published_only")
    about = {name: value for name, value in asdict(run).items() if name not in hidden}
    if run.started is None:
        return about
    return {**about, "progress": asdict(progress_of(run))}
