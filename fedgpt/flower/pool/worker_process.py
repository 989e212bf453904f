"""A worker process as the server sees it: started, fed, and ended by its process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgpt.flower.pool.channel import Channel, Frame
from fedgpt.flower.pool.shared_memory import Memory

START_LIMIT = 300.0  # seconds a worker may take until it says ready
_TAIL = 4000  # bytes of stderr quoted when a start fails
_GRACE = 1.0  # seconds between the steps of `end`, each harder than the last


class WorkerProcess:
    """One running worker; `ready` once it has imported the ClientApp."""

    def __init__(
        self,
        setup: Mapping[str, Any],
        lifeline: int,
        environment: Mapping[str, str],
        gpu: str | None = None,
    ):
        """Start it and return at once. `lifeline` is the read end of the pipe that only the server
        holds open.

        `gpu` is the one that it may see, by its name in CUDA_VISIBLE_DEVICES; None leaves that as
        it is.
        """
        self.ready, self.gpu = False, gpu
        self.start_deadline = time.monotonic() + START_LIMIT
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # stderr until ready: quoted when a start fails
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        # -P: the folder we happen to be in must not shadow modules; the server's own path comes
        # with the setup.
        command = [
            sys.executable,
            "-P",
            "-m",
            "fedgpt.flower.pool.worker",
            str(theirs.fileno()),
            str(lifeline),
        ]
        with theirs, _interrupts_held():
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(), lifeline),
                env={**environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})},
            )
        ours.setblocking(False)
        self.channel.send(Frame(dict(setup), memory=_standard_error()))

    def joined(self) -> None:
        """The worker said ready; from now on its stderr is ours."""
        self.ready = True
        self._errors.close()

    def stderr_tail(self) -> str:
        """The end of what a worker that never got ready wrote."""
        size = os.fstat(self._errors.fileno()).st_size
        return (
            os.pread(self._errors.fileno(), _TAIL, max(0, size - _TAIL))
            .decode(errors="replace")
            .strip()
        )

    def kill(self) -> None:
        """Send SIGKILL; `reaped` tells when it is gone."""
        self.process.kill()

    def reaped(self) -> bool:
        """Whether the process has ended; never waits."""
        return self.process.poll() is not None

    def how_it_ended(self) -> str:
        """`exit code 3` or `signal SIGKILL`, of a worker whose socket has closed."""
        # The socket closes a moment before the process can be waited for; a process that lives on
        # without it is ended.
        wait_all([self], _GRACE)
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        code = self.process.returncode
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"signal {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")

    def close(self) -> None:
        """Close our end of the socket, which asks the worker to leave, and the stderr file."""
        self.channel.close()
        self._errors.close()


def end(workers: Sequence[WorkerProcess], at_rest: Sequence[WorkerProcess], lifeline: int) -> None:
    """End all workers by process id, each step harder than the last: leave, lifeline, SIGTERM,
    SIGKILL.

    `at_rest` run no job: they get the time to leave by themselves. Closes `lifeline`, the write
    end.
    """
    for worker in workers:
        worker.close()
    wait_all(at_rest, _GRACE)
    os.close(lifeline)
    wait_all([worker for worker in workers if worker.ready], _GRACE)
    for step in (subprocess.Popen.terminate, subprocess.Popen.kill):
        left = [worker for worker in workers if not worker.reaped()]
        for worker in left:
            step(worker.process)
        wait_all(left, _GRACE)
    for worker in workers:
        worker.process.wait()


def wait_all(workers: Sequence[WorkerProcess], seconds: float) -> None:
    """Wait until all of `workers` have ended, together at most `seconds`."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))


def worker_environment(threads: int, extra: Mapping[str, str] | None) -> dict[str, str]:
    """Our own environment with the thread count that math libraries read when they are loaded, then
    `extra`.
    """
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment.update(extra or {})
    root = str(Path(__file__).resolve().parents[3])  # where fedgpt is, should it not be installed
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([path, root]) if path else root
    return environment


def _standard_error() -> Memory | None:
    """Our stderr as something that can be sent; None where it is closed."""
    try:
        return Memory(os.dup(2))
    except OSError:
        return None


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; a child starts with this mask, so that none hits it before it ignores
    them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
