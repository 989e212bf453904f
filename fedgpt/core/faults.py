"""Fault injection: named points in server and client at which a test can make a process fail.

    FEDGPT_FAULT="checkpoint.renamed:2:kill"   the process that is second to reach this point is
                                               killed
    FEDGPT_FAULT_MARKS=<folder>                counts the arrivals of all processes of a run

Each fault fires once: a restarted process reads from the folder that the fault has fired. Without
the variable a point only checks an empty list. Within one process, `injected("aggregate:1:raise")`
does the same in a `with` block.
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
    """The exception of the action `raise`."""


@dataclass
class Fault:
    """One failure at one point."""

    point: str
    time: int  # number of the arrival at which it fails, from 1
    action: str  # one of ACTIONS
    marks: Path | None = None  # folder that counts arrivals of all processes; None: count here
    arrivals: int = 0  # arrivals so far in this process, if `marks` is None
    fired: list[str] = field(default_factory=list)  # the point, once it has failed

    def reach(self) -> None:
        """Count an arrival, and fail if it is number `time`."""
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
        # one byte per arrival: appending is atomic between processes, and the file survives a kill
        descriptor = os.open(
            self.marks / f"{self.point}.{self.time}", os.O_CREAT | os.O_APPEND | os.O_WRONLY
        )
        try:
            os.write(descriptor, b".")
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)


def parse(text: str, marks: Path | None = None) -> tuple[Fault, ...]:
    """The faults in `point:time:action`, separated by commas; raises ValueError if it is malformed.

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
    """Mark the point `point` of the program; fail here if a fault asks for it."""
    for fault in _faults:
        if fault.point == point:
            fault.reach()


@contextmanager
def injected(text: str) -> Iterator[tuple[Fault, ...]]:
    """Set faults for the time of a block, counted in this process; yields them."""
    before, here = list(_faults), parse(text)
    _faults[:] = here
    try:
        yield here
    finally:
        _faults[:] = before
