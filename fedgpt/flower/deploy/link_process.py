"""The link as a child process of the server."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedgpt.core.errors import CONTINUES_WITH
from fedgpt.flower.deploy import keeper
from fedgpt.flower.deploy.control import Control
from fedgpt.flower.failure import FAILURE_FILE
from fedgpt.flower.grid_transport import STOP_FILE
from fedgpt.flower.launch import FLOWER_ENV, import_path
from fedgpt.flower.processes import Watched

START_SECONDS = 180.0  # to the first answer
END_SECONDS = 60.0  # to the end of all of its processes
POLL_SECONDS = 0.2
SERVER_APP = "flwr-serverapp"  # Flower's program in which the server of a run lives
FAILURE, STOP = "failure.json", "stop"  # in the server's folder, for the server of a run


def _continues_with(folder: Path) -> str:
    return shlex.join(["fedgpt", "server", str(folder)])


@contextmanager
def continued_at(folder: Path) -> Iterator[None]:
    """Let messages name the command that continues a run at the server of a folder."""
    before = os.environ.get(CONTINUES_WITH)
    os.environ[CONTINUES_WITH] = _continues_with(folder)
    try:
        yield
    finally:
        del os.environ[CONTINUES_WITH]
        if before is not None:
            os.environ[CONTINUES_WITH] = before


class LinkProcess:
    """Starts and ends the link of a folder, with `arguments` of its own such as --host.

    It and all that it starts end with this process, also if that is killed.
    """

    def __init__(self, folder: Path, arguments: Sequence[str] = ()):
        self.command = [sys.executable, "-m", "fedgpt.flower.deploy.link", str(folder), *arguments]
        self.has_refused = False  # it ended by itself, and had never answered before
        self._has_answered = False
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What its processes need besides the environment of this one."""
        return {
            **FLOWER_ENV,
            # Flower's own messages below that are about each request
            "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
            "FLWR_HOME": str(self._folder / "flower"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": import_path(),
            FAILURE_FILE: str(self._folder / FAILURE),
            STOP_FILE: str(self._folder / STOP),
            CONTINUES_WITH: _continues_with(self._folder),
        }

    @property
    def ended(self) -> str | None:
        """How it has ended; None while it runs."""
        if self._process is None:
            return "not started"
        code = self._process.poll()
        return None if code is None else f"exit code {code}"

    def server_of_run(self) -> Watched:
        """The process of the ServerApp at this link, which may be about to start."""
        assert self._process is not None, "a run needs a link"
        return Watched(self._process.pid, SERVER_APP)

    def answers(self) -> bool:
        """Whether it can take a run."""
        with Control(self._folder) as control:
            return control.healthy()

    def start(self, stopped: Callable[[], bool]) -> str:
        """Start it, again if need be; why it does not answer, or an empty text if it does.

        Returns at once when `stopped` says so.
        """
        self.end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", keeper.__name__, *self.command],
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server alone
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not stopped():
            if self.ended is not None:
                refused = self._process.poll() in (1, 2)  # not killed
                self.has_refused = refused and not self._has_answered
                return f"it ended with {self.ended}, for the reason above"
            if self.answers():
                self._has_answered = True
                return ""
            time.sleep(POLL_SECONDS)
        return f"it has not answered for {START_SECONDS:.0f} s"

    def end(self) -> None:
        """End it and all that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
