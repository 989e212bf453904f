"""The interface between the server loop and a network.

flower/ implements it with a Flower Grid; tests implement it with a script and virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from fedgpt.core.messages import ClientInfo, Job, Reply


class Transport(Protocol):
    """Sends jobs to clients and receives their replies; a failure is a reply with an error.

    A transport for two clients in memory. Each does its job at once: its update is a tenth of the
    model, where a real client trains.

    >>> import json, time
    >>> import numpy as np
    >>> from fedgpt.core.messages import Plan
    >>> class InMemory:
    ...     virtual = False
    ...     at_once = 1  # jobs are done one after the other
    ...
    ...     def __init__(self):
    ...         self.replies = []
    ...
    ...     def clients(self, timeout):
    ...         return [ClientInfo("ann", tokens=100), ClientInfo("bob", tokens=900)]
    ...
    ...     def newcomers(self):
    ...         return []
    ...
    ...     def available(self, client):
    ...         return True
    ...
    ...     def send(self, jobs):
    ...         for job in jobs:
    ...             header, delta = json.dumps({"version": job.version}), job.params / 10
    ...             self.replies.append(Reply(job.client, job.number, header, payload=delta))
    ...
    ...     def receive(self, timeout):
    ...         received, self.replies = self.replies, []
    ...         return received
    ...
    ...     def abandon(self, keys):
    ...         unwanted = set(keys)
    ...         self.replies = [
    ...             reply for reply in self.replies if (reply.client, reply.number) not in unwanted
    ...         ]
    ...
    ...     def bytes_down(self, job):
    ...         return job.params.nbytes
    ...
    ...     def now(self):
    ...         return time.monotonic()
    ...
    ...     def close(self):
    ...         self.replies = []

    One round of it. The server sends a job to every client:

    >>> network = InMemory()
    >>> params = np.float32([1, -2])
    >>> plan = Plan("run", local_steps=1, tokens_done=0, tokens_per_step=64, tokens_total=640)
    >>> jobs = [Job(info.id, 0, 0, params, plan) for info in network.clients(timeout=60)]
    >>> network.send(jobs)

    It has no use for bob's update any more, and receives the rest:

    >>> network.abandon([("bob", 0)])
    >>> for reply in network.receive(timeout=60):
    ...     print(reply.client, reply.number, reply.header, reply.payload)
    ann 0 {"version": 0} [ 0.1 -0.2]
    >>> network.receive(timeout=0)
    []
    """

    virtual: bool  # whether `now` is modelled time
    # number of jobs that can run at the same time; None: every client has its own machine
    at_once: int | None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """All clients that can be sampled, sorted by id; waits at most `timeout` seconds for them
        to connect.
        """
        ...

    def newcomers(self) -> list[ClientInfo]:
        """Clients that have joined the run since the last call of `clients` or of this method."""
        ...

    def available(self, client: str) -> bool:
        """Whether a client accepts jobs now."""
        ...

    def send(self, jobs: Sequence[Job]) -> None:
        """Send jobs without waiting. Jobs of one version share one `params` object, which is sent
        once.
        """
        ...

    def receive(self, timeout: float | None) -> list[Reply]:
        """The available replies, each once; waits at most `timeout` seconds for the first (None: no
        limit).
        """
        ...

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Give up the jobs (client, job number); jobs that can be cancelled are cancelled."""
        ...

    def bytes_down(self, job: Job) -> int:
        """Size of the encoded message of `job`, in bytes."""
        ...

    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...

    def close(self) -> None:
        """Free the transport's resources."""
        ...
