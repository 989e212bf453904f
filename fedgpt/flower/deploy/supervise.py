"""Keeps a server's link up, and brings one run after the other to its end on it.

    start the link -> submit the run -> watch it -> its end: complete, refused, stopped early
          ^                              |
          +---- pause <------ crash <----+   at most MOST_STARTS without a new version

A crash is an end of the link or of the ServerApp without a reason that a repetition could not
change. The run is then submitted again as it was, and continues from its folder. Its server
writes a reason to DIR/failure.json, and saves itself and ends when DIR/stop appears: when this
server is stopped, or `fedgpt cancel` was typed for the run.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fedgpt.config.compose import LENGTH, from_yaml, of_run, refuse_another_run
from fedgpt.core.errors import (
    ConfigError,
    FedGPTError,
    Interrupted,
    StoppedEarly,
    resume_command,
)
from fedgpt.core.files import PRIVATE
from fedgpt.core.options import RunOptions
from fedgpt.flower.deploy import audit, queue
from fedgpt.flower.deploy.control import Control, LinkDown, RunStatus
from fedgpt.flower.deploy.link_process import FAILURE, STOP, LinkProcess, continued_at
from fedgpt.flower.deploy.queue import QueuedRun
from fedgpt.flower.failure import raise_failure
from fedgpt.flower.launch import extend
from fedgpt.storage.run_folder import made_folder, read_lines

MOST_STARTS = 5  # of a run without a new version, and of a link without an answer
LONGEST_PAUSE = 60.0  # seconds before the next start; the first pauses are 1, 2, 4, ...
SILENT_SECONDS = 60.0  # for which a link may not answer
STOP_SECONDS = 60.0  # for the checkpoint of a run that is to stop
OUTPUT_SECONDS = 10.0  # for the last lines of a run that has ended
POLL_SECONDS = 0.5
LOCK = "server.lock"
LOCK_SECONDS = 2.0  # `fedgpt status` holds the lock for a moment


class _Crash(FedGPTError):
    """A start of a run ended, and another may come further."""


class ServerFailed(FedGPTError):
    """The server cannot go on: its link does not start, or its folder cannot be written."""


class Supervisor:
    """The server of a folder, with its link; a signal handler sets `stopped` to end it."""

    def __init__(self, folder: Path, link: LinkProcess):
        self.folder, self.link = folder, link
        # not an Event, whose lock the handler may find taken by the code that it interrupts
        self.stopped = False
        self._number: int | None = None  # of the run under way

    def serve(self) -> None:
        """Take the runs of the queue one after the other, until `stopped` is set.

        A run that is interrupted so is continued by the next server. Raises ServerFailed.
        """
        while not self.stopped:
            self._keep_link()
            self.end_cancelled()
            run = next((one for one in queue.runs(self.folder) if one.ended is None), None)
            if run is not None:
                try:
                    self.carry_out(run)
                except ServerFailed:
                    raise
                except Interrupted as error:
                    what = f"interrupted in run {run.number}, which the next server here continues"
                    if run.ended is not None:
                        what = f"run {run.number}: {error}"
                    print(f"fedgpt: {what}", file=sys.stderr, flush=True)
                except FedGPTError as error:
                    print(f"fedgpt: run {run.number}: {error}", file=sys.stderr, flush=True)
            self._pause(POLL_SECONDS)

    @property
    def _cancelled(self) -> bool:
        """Whether the run under way is to end."""
        return self._number in queue.cancelled(self.folder)

    @property
    def _stops(self) -> bool:
        """Whether the run under way is to end, or this server."""
        return self.stopped or self._cancelled

    def carry_out(self, run: QueuedRun) -> None:
        """Bring a run to its end, and record how it ended; raises the error with which it ends."""
        run.started = run.started or queue.now()
        audit.note(self.folder, "start", run=run.number, name=run.name)
        self._number = run.number
        try:
            self._to_the_end(run)
        except (ServerFailed, Interrupted) as error:
            # otherwise the next server continues it
            if run.once or (isinstance(error, Interrupted) and self._cancelled):
                self._ended(run, str(error), error.exit_code)
            raise
        except FedGPTError as error:
            self._ended(run, str(error), error.exit_code)
            raise
        finally:
            self._number = None
        self._ended(run, "", 0)

    def _to_the_end(self, run: QueuedRun) -> None:
        options = from_yaml(run.config)
        options.run_dir = run.run_dir
        if not run.dated and not run.resumed:
            refuse_another_run(options)
        with made_folder(options.run_dir, run.dated) as folder:
            options.run_dir = run.run_dir = str(folder)
            run.dated = False  # it is this folder from now on
            self._record(run)
            if run.resumed and _length(of_run(folder)) != _length(options):
                extend(options)
            self._repeat(run, options)

    def _repeat(self, run: QueuedRun, options: RunOptions) -> None:
        """Start the run again after each crash; raises FedGPTError when that leads nowhere."""
        seen, fruitless = newest_version(run.run_dir), 0
        while True:
            run.starts += 1
            self._record(run)
            try:
                self._once(options)
                return
            except _Crash as crash:
                reason = str(crash)
            if self._stops:  # it is the next server that continues it, or nobody
                raise self._interrupted(options)
            newest = newest_version(run.run_dir)
            fruitless = 0 if newest > seen else fruitless + 1
            seen = max(seen, newest)
            audit.note(self.folder, "crash", run=run.number, version=seen, reason=reason)
            if fruitless == MOST_STARTS:
                raise FedGPTError(
                    f"{reason}; the run was started {MOST_STARTS} times without a new version;"
                    f" remove the cause and continue with: {resume_command(options.run_dir)}"
                )
            print(f"fedgpt: {reason}; the run is continued", flush=True)
            self._pause(pause_before(fruitless))

    def _once(self, options: RunOptions) -> None:
        """Submit the run and wait until it is complete; raises _Crash, or why it ended."""
        for name in (FAILURE, STOP):
            (self.folder / name).unlink(missing_ok=True)
        self._keep_link()
        if self._stops:
            raise self._interrupted(options)
        try:
            with Control(self.folder) as control:
                run_id = control.submit(options)
                with _printing(self.folder, run_id):
                    status = self._watch(control, run_id)
        except FedGPTError as error:  # of the link
            raise _Crash(str(error)) from error
        try:
            raise_failure(self.folder / FAILURE)
        except (ConfigError, StoppedEarly):
            raise
        except FedGPTError as error:
            if self._stops:
                raise self._interrupted(options) from error
            raise _Crash(str(error)) from error
        if status.completed and (Path(options.run_dir) / "summary.json").exists():
            return
        if self._stops:
            raise self._interrupted(options)
        raise _Crash(f"the server of the run ended: {status.how} ({status.why or 'no reason'})")

    def _watch(self, control: Control, run_id: int) -> RunStatus:
        """The status of a run at its end; asks it to stop when this server or the run is to end.

        Raises _Crash as soon as the link or the process of the run's server has ended.
        """
        heard, stop_by = time.monotonic(), None
        status = RunStatus("pending")
        server = self.link.server_of_run()
        while True:
            if self.link.ended is not None:
                raise _Crash(f"the link ended ({self.link.ended})")
            now = time.monotonic()
            # looked at before the status, which a server that ends in order has told by then
            killed = server.has_ended()
            try:
                status = control.status(run_id)
                heard = now
                if status.finished:
                    return status
                if killed:  # Flower would notice it after a minute
                    control.stop(run_id)
                    raise _Crash("the server of the run was killed")
            except LinkDown:
                if now - heard > SILENT_SECONDS:
                    self.link.end()
                    raise
            self.end_cancelled()
            if self._stops:
                if stop_by is None:
                    (self.folder / STOP).touch()
                    stop_by = now + STOP_SECONDS
                elif now > stop_by:  # its folder has what it needs to continue
                    return status
            time.sleep(POLL_SECONDS)

    def _keep_link(self) -> None:
        """Return when the link answers, or the run or this server is to end; raises
        ServerFailed.
        """
        reason = ""
        if self.link.ended is None and self.link.answers():
            return
        for start in range(MOST_STARTS):
            if self._stops:
                return
            reason = self.link.start(lambda: self._stops)
            if not reason or self._stops:
                return
            audit.note(self.folder, "link failed", reason=reason)
            if self.link.has_refused:  # a wrong folder, a port in use: it has said what
                break
            self._pause(pause_before(start))
        raise ServerFailed(f"the link cannot be started: {reason}")

    def _pause(self, seconds: float) -> None:
        """Wait, unless the run or this server is to end."""
        end = time.monotonic() + seconds
        while not self._stops and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))

    def _interrupted(self, options: RunOptions) -> Interrupted:
        error = Interrupted(options.run_dir)
        if self._cancelled:
            error.args = (self._why_cancelled(options.run_dir, _has_begun(options.run_dir)),)
        elif not _has_begun(options.run_dir):  # its folder is removed
            error.args = ("interrupted before the run began",)
        return error

    def end_cancelled(self) -> None:
        """Record the end of the runs that were cancelled, but for the one under way."""
        for number in queue.cancelled(self.folder) - {self._number}:
            with suppress(FedGPTError):  # its file is gone or damaged, which `queue.runs` tells
                run = queue.read(self.folder, number)
                if run.ended is not None:  # at the moment at which it was cancelled
                    queue.forget_cancel(self.folder, number)
                    continue
                begun = not run.dated and _has_begun(run.run_dir)
                self._ended(run, self._why_cancelled(run.run_dir, begun), Interrupted.exit_code)

    def _why_cancelled(self, run_dir: str, begun: bool) -> str:
        if not begun:
            return "cancelled before it began"
        folder = shlex.quote(str(self.folder))
        return f"cancelled; continue with: fedgpt submit {folder} resume={shlex.quote(run_dir)}"

    def _ended(self, run: QueuedRun, reason: str, exit_code: int) -> None:
        try:
            queue.end(self.folder, run, reason, exit_code)
        except FedGPTError as error:
            raise ServerFailed(str(error)) from error
        audit.note(self.folder, "end", run=run.number, exit_code=exit_code, reason=reason)

    def _record(self, run: QueuedRun) -> None:
        try:
            queue.write(self.folder, run)
        except FedGPTError as error:
            raise ServerFailed(str(error)) from error


@contextmanager
def _printing(folder: Path, run_id: int) -> Iterator[None]:
    """Print what the server of a run prints, which Flower takes from it, while the block runs."""

    def work() -> None:
        with suppress(FedGPTError), Control(folder) as control:  # the link may end meanwhile
            for piece in control.output(run_id):
                sys.stdout.write(piece)
                sys.stdout.flush()

    thread = threading.Thread(target=work, name="output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(OUTPUT_SECONDS)


def pause_before(start: int) -> float:
    """Seconds before another start after `start` that led nowhere.

    >>> [pause_before(start) for start in (0, 1, 2, 9)]
    [1.0, 2.0, 4.0, 60.0]
    """
    return min(LONGEST_PAUSE, 2.0**start)


def newest_version(run_dir: str) -> int:
    """The newest version of a run in its folder; -1 if there is none."""
    lines = read_lines(Path(run_dir) / "metrics.jsonl", "version")
    return max((line["version"] for line in lines), default=-1)


def _length(options: RunOptions) -> list[int]:
    return [getattr(options, name) for name in LENGTH]


def _has_begun(run_dir: str) -> bool:
    return (Path(run_dir) / "config.yaml").exists()


@contextmanager
def serving(folder: Path, link: LinkProcess) -> Iterator[Supervisor]:
    """The server of a folder, the only one; its link ends with the block.

    The first SIGINT or SIGTERM sets `stopped`, a second one interrupts the block. Raises
    FedGPTError if another server has the folder.
    """
    supervisor = Supervisor(folder, link)
    with _lock(folder), _signals(supervisor), continued_at(folder):
        _give_up_abandoned(folder)
        try:
            yield supervisor
        finally:
            link.end()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=LOCK_SECONDS, mode=PRIVATE)
    try:
        lock.acquire()
    except Timeout:
        raise FedGPTError(
            f"{folder}: another server runs in this folder; give it a run with: fedgpt submit"
            f" {shlex.quote(str(folder))} OPTIONS"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _signals(supervisor: Supervisor) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        supervisor.stopped = True
        for one, handler in before.items():
            signal.signal(one, handler)

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _give_up_abandoned(folder: Path) -> None:
    """Record the end of runs whose server, which was theirs alone, was killed."""
    for run in queue.runs(folder):
        if run.once and run.ended is None:
            reason = "its server was killed before it began"
            if _has_begun(run.run_dir):
                reason = f"its server was killed; continue with: {resume_command(run.run_dir)}"
            queue.end(folder, run, reason, exit_code=1)
            audit.note(folder, "end", run=run.number, exit_code=1, reason=reason)


def is_served(folder: Path) -> bool:
    """Whether a server runs in a folder."""
    lock = FileLock(folder / LOCK, timeout=0, mode=PRIVATE)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
