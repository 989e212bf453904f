"""One worker process as the server sees it: started, given jobs, and ended by its process id."""

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

START_LIMIT = 300.0  # largest time in seconds until a worker is ready
_TAIL = 4000  # bytes of stderr in the error message if a start fails
_GRACE = 1.0  # seconds that `end` waits for workers to exit before its next step


class WorkerProcess:
    """One running worker; `ready` once it has imported the ClientApp."""

    def __init__(
        self,
        setup: Mapping[str, Any],
        lifeline: int,
        environment: Mapping[str, str],
        gpu: str | None = None,
    ):
        """Start the process and return at once.

        `lifeline` is the read end of a pipe whose write end only the server has open. `gpu` is the
        value of CUDA_VISIBLE_DEVICES; None leaves the variable as it is.
        """
        self.ready, self.gpu = False, gpu
        self.start_deadline = time.monotonic() + START_LIMIT
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # its stderr until it is ready
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        # -P: a file in the working directory must not shadow a module; the server's sys.path comes
        # with the setup frame
        command = [
            sys.executable,
            "-P",
            "-m",
            "fedgpt.flower.pool.worker",
            str(theirs.fileno()),
            str(lifeline),
        ]
        with theirs, _interrupts_blocked():
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
        """Mark the worker as ready; from now on it writes to the server's stderr."""
        self.ready = True
        self._errors.close()

    def stderr_tail(self) -> str:
        """The last lines on stderr of a worker that is not ready."""
        size = os.fstat(self._errors.fileno()).st_size
        return (
            os.pread(self._errors.fileno(), _TAIL, max(0, size - _TAIL))
            .decode(errors="replace")
            .strip()
        )

    def kill(self) -> None:
        """Send SIGKILL; `reaped` says when the process has ended."""
        self.process.kill()

    def reaped(self) -> bool:
        """Whether the process has ended; never waits."""
        return self.process.poll() is not None

    def how_it_ended(self) -> str:
        """`exit code 3` or `signal SIGKILL`, of a worker whose socket has closed."""
        # the socket closes shortly before the process ends; a process that closed its socket and
        # does not end is killed
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
        """Close the stderr file and our end of the socket, which makes an idle worker exit."""
        self.channel.close()
        self._errors.close()


def end(workers: Sequence[WorkerProcess], at_rest: Sequence[WorkerProcess], lifeline: int) -> None:
    """End all workers: close the sockets, then the `lifeline` (its write end), SIGTERM, SIGKILL.

    Workers `at_rest` run no job and get time to exit after the first step.
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
    """Wait until all of `workers` have ended, at most `seconds` in total."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))


def worker_environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment, the thread counts that math libraries read at import, and `extra`."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment.update(extra)
    root = str(Path(__file__).resolve().parents[3])  # fedgpt's folder, in case it is not installed
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([path, root]) if path else root
    return environment


def _standard_error() -> Memory | None:
    """A copy of our stderr that can be sent over a channel; None if stderr is closed."""
    try:
        return Memory(os.dup(2))
    except OSError:
        return None


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT; a child inherits the mask, so that Ctrl-C cannot end it while it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
