"""Jobs that were sent and have no reply yet, and the replies that have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedgpt.core.messages import Job, Reply, plan_as_json, plan_of_json
from fedgpt.core.transport import Transport

Key = tuple[str, int]  # (client, job number)


class InFlight:
    """The jobs in flight on a transport; a client has at most one.

    The vector that a job started from is freed when the last job that started from it ends.
    """

    def __init__(self, transport: Transport):
        self.transport = transport
        self.busy: set[str] = set()  # clients that have a job
        self._jobs: dict[Key, Job] = {}  # oldest first
        self._replies: deque[Reply] = deque()  # received, not taken yet

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def send(self, jobs: Sequence[Job]) -> None:
        """Send jobs and keep them until they are removed."""
        for job in jobs:
            self._jobs[job.client, job.number] = job
            self.busy.add(job.client)
        self.transport.send(jobs)

    @property
    def has_reply(self) -> bool:
        """Whether a reply is available without waiting."""
        return bool(self._replies)

    def next_reply(self, timeout: float | None) -> Reply | None:
        """The next reply; waits at most `timeout` seconds (None: without a limit)."""
        if not self._replies:
            self._replies.extend(self.transport.receive(timeout))
        return self._replies.popleft() if self._replies else None

    def pop(self, client: str, number: int) -> Job | None:
        """Remove and return a job; None if it is not in flight."""
        job = self._jobs.pop((client, number), None)
        if job is not None:
            self.busy.discard(client)
        return job

    def keys(self) -> list[Key]:
        """(client, number) of every job, sorted."""
        return sorted(self._jobs)

    def oldest(self) -> Job | None:
        """The job that was sent first."""
        return next(iter(self._jobs.values()), None)

    @property
    def bases(self) -> dict[int, np.ndarray]:
        """Version -> the vector that jobs in flight started from, (parameters,) float32."""
        return {job.version: job.params for job in self._jobs.values()}

    def as_json(self) -> tuple[dict[str, Any], ...]:
        """The jobs without their vectors, for a checkpoint."""
        return tuple(
            {
                "client": job.client,
                "number": job.number,
                "version": job.version,
                "sent": job.sent,
                "plan": plan_as_json(job.plan),
            }
            for job in self._jobs.values()
        )


def restored_jobs(
    listed: Iterable[Mapping[str, Any]], extra: Mapping[str, np.ndarray], newest: np.ndarray
) -> list[Job]:
    """The jobs of a checkpoint, with the vectors that they started from; `newest` is the last
    version.

    They contain the full model, because the model deltas for a client's cached version may no
    longer exist.
    """
    jobs = []
    for about in listed:
        plan = plan_of_json({**about["plan"], "held": -1})
        base = extra.get(f"base/{about['version']}", newest)
        client, number, version = about["client"], about["number"], about["version"]
        jobs.append(Job(client, number, version, base, plan, about["sent"]))
    return jobs
