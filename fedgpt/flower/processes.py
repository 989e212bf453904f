"""Child processes in separate process groups; ending one also ends all processes that it
started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

END_SECONDS = 5.0  # seconds between SIGTERM and SIGKILL
_PR_SET_PDEATHSIG = 1  # of Linux, see prctl(2)


@contextmanager
def child(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    first: Callable[[], None] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program that is installed beside this interpreter; end its process group on leaving.

    Its output goes to the file `log`, or to this process's output if `log` is None. The new process
    calls `first` before the program.
    """
    stream: IO[bytes] | None = None if log is None else log.open("wb")
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        start_new_session=True,
        preexec_fn=first,  # noqa: PLW1509 (see `ends_with`)
    )
    try:
        yield process
    finally:
        _end_group(process)
        if stream is not None:
            stream.close()


def ends_with(parent: int) -> Callable[[], None]:
    """A function for `child` by which the kernel kills the program when the process `parent`, which
    starts it, ends in any way; does nothing on other systems than Linux.

    `parent` must have one thread only: the kernel takes the end of the one that starts the program.
    """
    system = ctypes.CDLL(None) if sys.platform == "linux" else None

    def ask() -> None:
        if system is not None:
            system.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it ended before the kernel knew
                os._exit(1)

    return ask


class Watched:
    """The process below `pid` that runs a program of Python's, from when it is first seen."""

    def __init__(self, pid: int, program: str):
        self._below, self._program = pid, program
        self._pid: int | None = None

    def has_ended(self) -> bool:
        """Whether it was seen and is gone, without another one; never on systems without /proc."""
        if self._pid is not None and _alive(self._pid):
            return False
        below = (one for one in _descendants(self._below) if _alive(one))
        found = next((one for one in below if _script(one) == self._program), None)
        seen, self._pid = self._pid, found or self._pid
        return seen is not None and found is None


def _script(pid: int) -> str:
    """The name of the program that a Python process runs; empty if it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return Path(os.fsdecode(words[1])).name if len(words) > 1 else ""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process's group and the groups of its descendants: SIGTERM, later SIGKILL."""
    # Flower's programs start others in separate sessions, which get no signal to the group
    descendants = _descendants(process.pid)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    deadline = time.monotonic() + END_SECONDS
    while descendants := [pid for pid in descendants if _alive(pid)]:
        if time.monotonic() > deadline:
            for pid in descendants:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    """Process ids of all descendants of `pid`; an empty list on systems without /proc."""
    parents = {int(path.name): _stat(int(path.name))[1] for path in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for parent in found:  # the list grows in the loop
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def _alive(pid: int) -> bool:
    return _stat(pid)[0] not in ("", "Z")


def _stat(pid: int) -> tuple[str, int]:
    """(state, parent id) of a process; ("", 0) if it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)
