"""Memory, open files and threads of processes over time, and whether they grow."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_SECONDS = 45.0  # of a process's life, in which it imports and does its first work
WINDOW_SECONDS = 30.0  # at either end of what is compared
LARGEST_GROWTH = 1.15  # of memory, in a process's life: an allocator's share
FREE_GROWTH = {"mb": 12.0, "files": 4, "threads": 4}  # below which nothing is said


@dataclass(frozen=True)
class Process:
    """A running process; `kind` is its program, or the command of fedgpt."""

    pid: int
    kind: str


@dataclass(frozen=True)
class Sample:
    """A process at one moment."""

    seconds: float  # of its life
    mb: float  # resident memory
    files: int  # open
    threads: int


def processes_in(folder: Path) -> Iterator[Process]:
    """The processes that work in a folder, and have not ended."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").readlink() == folder:
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield Process(int(path.name), kind_of(words))
        except OSError:  # it has just ended, or is another user's
            continue


def kind_of(words: list[str]) -> str:
    """The kind of a process by its command line.

    >>> kind_of(["python", "-m", "fedgpt", "client", "north.kit"])
    'client'
    >>> kind_of(["python", "-m", "fedgpt.flower.deploy.keeper", "flower-superexec"])
    'keeper'
    >>> kind_of(["/bin/python", "/bin/flwr-serverapp", "--token", "t"])
    'flwr-serverapp'
    """
    if words[1:3] == ["-m", "fedgpt"]:
        return words[3]
    if words[1:2] == ["-m"]:
        return words[2].rpartition(".")[2]
    return Path(words[1] if len(words) > 1 else words[0]).name


class Growth:
    """Samples of all processes that work in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._samples: dict[Process, list[Sample]] = defaultdict(list)
        self._most: Counter[str] = Counter()

    def look(self) -> None:
        """Take a sample of every process."""
        now: Counter[str] = Counter()
        for process in processes_in(self._folder):
            now[process.kind] += 1
            if (sample := sample_of(process.pid)) is not None:
                self._samples[process].append(sample)
        self._most |= now

    def figures(self) -> dict[str, dict[str, Any]]:
        """Of each kind of process how many lived long enough to be compared, the longest life, and
        the most growth of one: from after its start to its end.
        """
        found = {}
        for kind in sorted(self._most):
            all_of = [rows for process, rows in self._samples.items() if process.kind == kind]
            compared = [ends for rows in all_of if (ends := ends_of(rows)) is not None]
            found[kind] = {
                "processes": len(all_of),
                "most_at_once": self._most[kind],
                "longest_seconds": round(max(rows[-1].seconds for rows in all_of)),
                "largest_mb": round(max(row.mb for rows in all_of for row in rows), 1),
                "most_files": max(row.files for rows in all_of for row in rows),
                "most_threads": max(row.threads for rows in all_of for row in rows),
                "compared": len(compared),
                "growth": {
                    name: max(compared, key=lambda ends, name=name: grown(ends, name))[name]
                    for name in FREE_GROWTH
                }
                if compared
                else {},
            }
        return found

    def wrong(self) -> list[str]:
        """What grew."""
        problems = []
        for process, rows in self._samples.items():
            if (ends := ends_of(rows)) is None:
                continue
            problems += [
                f"{process.kind} {process.pid}: {name} grew from {ends[name][0]:g} to"
                f" {ends[name][1]:g} in {rows[-1].seconds:.0f} s"
                for name, most in FREE_GROWTH.items()
                if grown(ends, name) > most
                and (name != "mb" or ends[name][1] > LARGEST_GROWTH * ends[name][0])
            ]
        return problems


def sample_of(pid: int) -> Sample | None:
    """A sample of a process; None if it has ended."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        began = time.time() - Path(f"/proc/{pid}").stat().st_ctime
        return Sample(began, int(lines["VmRSS"].split()[0]) / 1024, files, int(lines["Threads"]))
    except (OSError, KeyError):  # a process that has ended has no memory
        return None


def ends_of(rows: list[Sample]) -> dict[str, tuple[float, float]] | None:
    """Medians of a process (after its start, before its end); None if it did not live for long."""
    first = [row for row in rows if WARM_SECONDS <= row.seconds < WARM_SECONDS + WINDOW_SECONDS]
    last = [row for row in rows if row.seconds >= rows[-1].seconds - WINDOW_SECONDS]
    if not first or rows[-1].seconds < WARM_SECONDS + 2 * WINDOW_SECONDS:
        return None
    return {
        name: tuple(
            round(statistics.median(getattr(row, name) for row in part), 1)
            for part in (first, last)
        )
        for name in FREE_GROWTH
    }  # pyright: ignore[reportReturnType]


def grown(ends: dict[str, tuple[float, float]], name: str) -> float:
    """The growth of a figure."""
    return ends[name][1] - ends[name][0]
