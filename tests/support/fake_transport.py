"""A transport that plays a script in virtual time: what each client does, and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fedgpt.core.messages import ClientInfo, Job, Reply, Update
from fedgpt.update.wire import encode

# a job -> (seconds until it arrives, reply), any number
Behaviour = Callable[[Job], list[tuple[float, Reply]]]
MOST_WAITS = 10_000  # between two replies; a server that waits more often waits for nothing


def honest(
    job: Job, seconds: float = 1.0, scale: float = 0.1, tokens: int = 512
) -> list[tuple[float, Reply]]:
    """A client whose update depends only on its name, the job number and the model."""
    rng = np.random.default_rng([*job.client.encode(), job.number])
    delta = (scale * rng.standard_normal(job.params.size)).astype(np.float32) + np.float32(
        0.01
    ) * job.params
    return [(seconds, reply_with(job, delta, tokens))]


def reply_with(job: Job, delta: np.ndarray, tokens: int = 512, **metrics: float) -> Reply:
    update = Update(
        job.client, job.number, job.version, delta, tokens, {"train_loss": 1.0, **metrics}
    )
    header, array = encode(job.plan.run, update)
    return Reply(job.client, job.number, header, array, bytes=array.nbytes + len(header))


class ScriptTransport:
    """Clients by name; time moves only when the server waits."""

    virtual = True
    at_once: int | None = None

    def __init__(self, behaviours: dict[str, Behaviour], now: float = 0.0, own_clock: bool = False):
        """`own_clock`: jobs begin at this transport's time, not at the time in `job.sent`."""
        self.behaviours, self.own_clock = behaviours, own_clock
        self.time = now
        self.jobs: list[Job] = []
        self._queue: list[tuple[float, int, Reply]] = []
        self._order = itertools.count()
        self._waits = 0  # since the last reply

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [ClientInfo(name, 10_000) for name in sorted(self.behaviours)]

    def newcomers(self) -> list[ClientInfo]:
        return []

    def available(self, client: str) -> bool:
        return True

    def abandon(self, keys) -> None:
        """As with a SuperNode: a job that was given up is still done, and its reply is late."""

    def send(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            for delay, reply in self.behaviours[job.client](job):
                heapq.heappush(
                    self._queue,
                    ((self.time if self.own_clock else job.sent) + delay, next(self._order), reply),
                )

    def receive(self, timeout: float | None) -> list[Reply]:
        if not self._queue or (timeout is not None and self._queue[0][0] > self.time + timeout):
            assert timeout is not None, "the server would wait forever"
            self.time += max(timeout, 1e-9)  # a clock that moves, as the real one does
            self._waits += 1
            assert self._waits < MOST_WAITS, "the server would wait forever"
            return []
        self._waits = 0
        self.time, _, reply = heapq.heappop(self._queue)
        return [reply]

    def bytes_down(self, job: Job) -> int:
        return job.params.nbytes

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        pass
