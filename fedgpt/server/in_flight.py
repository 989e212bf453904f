"""Jobs that are sent and not answered, with the vectors they began from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from fedgpt.core.messages import Job

Key = tuple[str, int]  # (client, task)


class InFlight:
    """A client has at most one job; a base version is freed with the last job on it."""

    def __init__(self) -> None:
        self._jobs: dict[Key, Job] = {}  # oldest first
        self.busy: set[str] = set()  # clients

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def add(self, jobs: Iterable[Job]) -> None:
        """Note jobs as sent."""
        for job in jobs:
            self._jobs[job.client, job.number] = job
            self.busy.add(job.client)

    def pop(self, client: str, number: int) -> Job | None:
        """Take a job out; None where it is not in flight."""
        job = self._jobs.pop((client, number), None)
        if job is not None:
            self.busy.discard(client)
        return job

    def keys(self) -> list[Key]:
        """(client, task) of every job, sorted."""
        return sorted(self._jobs)

    def oldest(self) -> Job | None:
        """The job that was sent first."""
        return next(iter(self._jobs.values()), None)

    @property
    def bases(self) -> dict[int, np.ndarray]:
        """Version -> vector, of those that jobs began from."""
        return {job.version: job.params for job in self._jobs.values()}

    def as_json(self) -> tuple[dict[str, Any], ...]:
        """The jobs without their vectors, for a checkpoint."""
        return tuple(
            {
                "client": j.client,
                "number": j.number,
                "version": j.version,
                "sent": j.sent,
                "plan": asdict(j.plan),
            }
            for j in self._jobs.values()
        )
