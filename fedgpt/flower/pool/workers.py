"""All worker processes of the pool: started, watched, given jobs, replaced and ended.

In this module a job is a pair of a key and a frame. Only the grid handles Flower's messages.
"""

from __future__ import annotations

import math
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error
from flwr.common.constant import ErrorCode

from fedgpt.flower.pool.channel import Frame
from fedgpt.flower.pool.worker_process import WorkerProcess, end, worker_environment

FAILED_STARTS = 3  # number of consecutive failed starts after which the pool gives up
_LONGEST = 3600.0  # longest select in seconds; select raises an error for a timeout of months


@dataclass(frozen=True)
class WorkerSettings:
    """The ClientApp and the settings of the worker processes of a pool."""

    app: str  # the ClientApp, as `module:attribute`
    count: int  # number of processes
    threads: int = 1  # torch threads of each process
    run_config: Mapping[str, Any] = field(default_factory=dict)  # run config of every Context
    environment: Mapping[str, str] = field(default_factory=dict)  # additional variables
    # names as in CUDA_VISIBLE_DEVICES; each process gets the GPU with the fewest processes
    gpus: Sequence[str] = ()


class WorkerPool:
    """Worker processes that take jobs from `next_job` and pass results to `finished`.

    `next_job() -> (key, frame) | None` and `finished(key, reply frame or error)`, once per job, are
    called inside `pump`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        next_job: Callable[[], tuple[str, Frame] | None],
        finished: Callable[[str, Frame | Error], None],
    ):
        """Start all processes without waiting for them."""
        self._settings = settings
        self._environment = worker_environment(settings.threads, settings.environment)
        self._next_job, self._finished = next_job, finished
        self._failed_starts, self._failure = 0, ""
        self._lifeline_read, self._lifeline = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._ending: list[WorkerProcess] = []  # workers that were killed and not reaped yet
        self._busy: dict[WorkerProcess, str] = {}  # worker -> key of its job
        self._idle: deque[WorkerProcess] = deque()
        try:
            for _ in range(settings.count):
                self._start()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> list[str]:
        """Keys of the jobs that are running."""
        return list(self._busy.values())

    def pump(self, seconds: float) -> None:
        """Wait at most `seconds` for the workers, read what they sent, give idle ones a job.

        Raises RuntimeError if no worker can start.
        """
        if self._failure:
            raise RuntimeError(self._failure)
        self._feed()
        starting = min((w.start_deadline for w in self._workers if not w.ready), default=math.inf)
        timeout = min(seconds, _LONGEST, max(0.0, starting - time.monotonic()))
        for key, events in self._selector.select(timeout):
            worker: WorkerProcess = key.data
            if events & selectors.EVENT_WRITE:
                self._watch(worker, worker.channel.flush())
            if events & selectors.EVENT_READ:
                self._read(worker)
        if starting <= time.monotonic():
            self._end_late_starts()
        self._ending = [worker for worker in self._ending if not worker.reaped()]

    def stop(self, key: str) -> None:
        """Kill the worker that runs this job and start another; `finished` is not called."""
        for worker, job in list(self._busy.items()):
            if job == key:
                self._replace(worker)

    def close(self) -> None:
        """End all workers by process id, wait for each, and close every descriptor."""
        self._selector.close()
        end([*self._workers, *self._ending], list(self._idle), self._lifeline)
        os.close(self._lifeline_read)

    def _feed(self) -> None:
        while self._idle and (job := self._next_job()):
            worker = self._idle.popleft()
            self._busy[worker] = job[0]
            self._watch(worker, worker.channel.send(job[1]))

    def _watch(self, worker: WorkerProcess, all_sent: bool) -> None:
        events = selectors.EVENT_READ | (0 if all_sent else selectors.EVENT_WRITE)
        if self._selector.get_key(worker.channel).events != events:
            self._selector.modify(worker.channel, events, worker)

    def _read(self, worker: WorkerProcess) -> None:
        try:
            frames = worker.channel.receive()
        except EOFError:
            self._lost(worker)
            return
        for frame in frames:
            if frame.header["kind"] == "ready":
                worker.joined()
                self._failed_starts = 0
            else:
                self._finished(self._busy.pop(worker), frame)
            self._idle.append(worker)
        self._feed()

    def _lost(self, worker: WorkerProcess) -> None:
        """Replace a worker that has died; its job ends with an error."""
        how = worker.how_it_ended()
        if not worker.ready:
            self._start_failed(worker, how)
            return
        key = self._busy.get(worker)
        self._replace(worker)
        if key is not None:
            reason = f"worker process {worker.process.pid} ended with {how}"
            self._finished(key, Error(ErrorCode.CLIENT_APP_CRASHED, reason))

    def _end_late_starts(self) -> None:
        for worker in [
            w for w in self._workers if not w.ready and w.start_deadline <= time.monotonic()
        ]:
            self._start_failed(worker, "not ready in time")

    def _start_failed(self, worker: WorkerProcess, why: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            app, tail = self._settings.app, worker.stderr_tail()
            self._failure = f"no worker could start with the client app {app!r} ({why}):\n{tail}"
            raise RuntimeError(self._failure)
        self._replace(worker)

    def _replace(self, worker: WorkerProcess) -> None:
        """End a worker without waiting for it and start another."""
        self._workers.remove(worker)
        self._busy.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        self._selector.unregister(worker.channel)
        worker.close()
        worker.kill()
        self._ending.append(worker)
        self._start()

    def _start(self) -> None:
        settings = self._settings
        used = [worker.gpu for worker in self._workers]
        gpu = min(settings.gpus, key=used.count, default=None)
        setup = {
            "app": settings.app,
            "threads": settings.threads,
            "run_config": dict(settings.run_config),
            "path": sys.path,  # the current value, because a script may have changed it
        }
        worker = WorkerProcess(setup, self._lifeline_read, self._environment, gpu)
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
