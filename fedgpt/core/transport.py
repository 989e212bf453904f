"""The interface between the server loop and a network.

flower/ implements it with a Flower Grid; tests implement it with a script and virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from fedgpt.core.messages import ClientInfo, Job, Reply


class Transport(Protocol):
    """Lists clients, sends jobs and receives replies. A failure is a reply with an error, not an
    exception.
    """

    virtual: bool  # whether `now` is modelled time
    # number of jobs that can run at the same time; None: every client has its own machine
    at_once: int | None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """All clients that can be sampled, sorted by id; waits at most `timeout` seconds for them
        to connect.
        """
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
