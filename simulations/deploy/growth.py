"""Memory, open files and threads of processes over time, and whether they grow."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

WARM_SECONDS = 120.0  # of a process's life, in which it imports and does its first work
# At either end of what is compared: so long that at some time in it all clients are connected. The
# link answers each request of a moment in a thread of its own, with a connection to its database,
# so their number follows the number of clients, and what the machine does beside.
WINDOW_SECONDS = 120.0
# Growth that says nothing: by a factor, which is the share of an allocator, and by so many
# megabytes, connections or threads. A leak of one message for each update would be more in an hour.
LARGEST_GROWTH = 1.15
FREE = {"mb": 12.0, "files": 4.0, "threads": 4.0}
Ends = tuple[float, float]  # a figure after the start, and at the end


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
            if (sample := sample_of(process.pid)) is not None:  # otherwise it has just ended
                now[process.kind] += 1
                self._samples[process].append(sample)
        self._most |= now

    def figures(self) -> dict[str, dict[str, Any]]:
        """Of each kind of process: how many there were, how large, and from what to what they grew:
        the one that grew most in its life, and the last one against the first, both when warm.
        """
        found = {}
        for kind in sorted(self._most):
            all_of = self._rows(kind)
            rows = [row for one in all_of for row in one]
            found[kind] = {
                "processes": len(all_of),
                "most_at_once": self._most[kind],
                "longest_seconds": round(max(row.seconds for row in rows)),
                "most": {name: round(max(getattr(row, name) for row in rows), 1) for name in FREE},
            }
            for about, pairs in self._compared(kind).items():
                worst = {
                    name: max((one[name] for one in pairs), key=lambda ends: ends[1] - ends[0])
                    for name in FREE
                }
                found[kind] |= {about: {"compared": len(pairs), **worst}}
        return found

    def wrong(self) -> list[str]:
        """What grew more than an allocator's share and some open connections."""
        return [
            f"{kind}, {about}: {name} grew from {first:g} to {last:g}"
            for kind in sorted(self._most)
            for about, pairs in self._compared(kind).items()
            for pair in pairs
            for name, (first, last) in pair.items()
            if last - first > FREE[name] and last > LARGEST_GROWTH * first
        ]

    def _rows(self, kind: str) -> list[list[Sample]]:
        """The samples of each process of a kind, in the order of their starts."""
        return [rows for process, rows in self._samples.items() if process.kind == kind]

    def _compared(self, kind: str) -> dict[str, list[dict[str, Ends]]]:
        warm = [part for rows in self._rows(kind) if (part := warm_part(rows))]
        lives = [
            ends_of(warm_part(rows), last_part(rows))
            for rows in self._rows(kind)
            if rows[-1].seconds >= WARM_SECONDS + 2 * WINDOW_SECONDS and warm_part(rows)
        ]
        others = [ends_of(warm[0], warm[-1])] if len(warm) > 1 else []
        found = {"in_its_life": lives, "last_against_first": others}
        return {about: pairs for about, pairs in found.items() if pairs}


def sample_of(pid: int) -> Sample | None:
    """A sample of a process; None if it has ended."""
    try:
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        began = int(words[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began
        return Sample(age, int(lines["VmRSS"].split()[0]) / 1024, files, int(lines["Threads"]))
    except (OSError, KeyError):  # a process that has ended has no memory
        return None


def warm_part(rows: list[Sample]) -> list[Sample]:
    """The samples after a process's start."""
    end = WARM_SECONDS + WINDOW_SECONDS
    return [row for row in rows if WARM_SECONDS <= row.seconds < end]


def last_part(rows: list[Sample]) -> list[Sample]:
    """The samples at the end of what is known of a process."""
    return [row for row in rows if row.seconds > rows[-1].seconds - WINDOW_SECONDS]


def ends_of(first: list[Sample], last: list[Sample]) -> dict[str, Ends]:
    """The median of the memory and the most files and threads in two lists of samples."""
    return {
        name: (
            round(typical(getattr(row, name) for row in first), 1),
            round(typical(getattr(row, name) for row in last), 1),
        )
        for name, typical in (("mb", median), ("files", max), ("threads", max))
    }
