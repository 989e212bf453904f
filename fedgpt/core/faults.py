"""Fault injection: named points in server and client where a test, or a study, lets a process fail.

    FEDGPT_FAULT="checkpoint.renamed:2:kill"      the second time that any process comes to this point it kills itself
    FEDGPT_FAULT_MARKS=<folder>                   who came there and what has fired, for all processes of a run

Each fault fires once: a restarted process finds its mark and goes on. Without the variable a point
costs one look at an empty list. In the same process, `injected("aggregate:1:raise")` does it for
the time of a `with` block.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ACTIONS = ("kill", "raise", "hang")


class Injected(RuntimeError):
    """What the action `raise` raises."""


@dataclass
class Fault:
    """One failure that waits for its time."""

    point: str
    time: int  # which arrival at the point, from 1
    action: str
    marks: Path | None = None  # counts over all processes; None: of this process
    arrivals: int = 0
    fired: list[str] = field(default_factory=list)

    def reach(self) -> None:
        """Count an arrival; fail at the right one."""
        if self._count() != self.time:
            return
        self.fired.append(self.point)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "hang":
            time.sleep(3600)
        raise Injected(f"injected at {self.point}")

    def _count(self) -> int:
        if self.marks is None:
            self.arrivals += 1
            return self.arrivals
        # one byte an arrival: O_APPEND is atomic between processes, and survives a kill
        descriptor = os.open(
            self.marks / f"{self.point}.{self.time}", os.O_CREAT | os.O_APPEND | os.O_WRONLY
        )
        try:
            os.write(descriptor, b".")
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


def parse(text: str, marks: Path | None = None) -> tuple[Fault, ...]:
    """Faults of `point:time:action`, several with commas; raises ValueError for anything else.

    >>> parse("aggregate:2:raise")[0].time
    2
    """
    faults = []
    for part in filter(None, text.split(",")):
        point, _, rest = part.partition(":")
        count, _, action = rest.partition(":")
        if not point or not count.isdigit() or int(count) < 1 or action not in ACTIONS:
            allowed = f"point:time:action, time from 1, action one of {', '.join(ACTIONS)}"
            raise ValueError(f"FEDGPT_FAULT={part}: expected {allowed}")
        faults.append(Fault(point, int(count), action, marks))
    return tuple(faults)


def _from_environment() -> tuple[Fault, ...]:
    marks = os.environ.get("FEDGPT_FAULT_MARKS")
    return parse(os.environ.get("FEDGPT_FAULT", ""), Path(marks) if marks else None)


_faults = list(_from_environment())


def reach(point: str) -> None:
    """A named point of the program: fail here if that was asked for."""
    for fault in _faults:
        if fault.point == point:
            fault.reach()


@contextmanager
def injected(text: str) -> Iterator[tuple[Fault, ...]]:
    """Faults for the time of a block, counted in this process alone; yields them, to see what
    fired.
    """
    before, here = list(_faults), parse(text)
    _faults[:] = here
    try:
        yield here
    finally:
        _faults[:] = before
