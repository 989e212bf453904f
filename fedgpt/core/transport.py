"""What the server loop needs of a network: the one seam between the loop and everything that
carries messages.

flower/ implements it over a Flower Grid; tests implement it over a script with virtual time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from fedgpt.core.messages import ClientInfo, Job, Reply


class Transport(Protocol):
    """Clients, jobs out, replies in. Failures arrive as replies with an error, never as
    exceptions.
    """

    virtual: bool  # whether `now` is modelled time
    # jobs that can run at the same time; None: every client has a machine of its own
    at_once: int | None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """Everybody who can be sampled, sorted by id; waits up to `timeout` seconds for them to
        appear.
        """
        ...

    def available(self, client: str) -> bool:
        """Whether a client takes jobs now."""
        ...

    def send(self, jobs: Sequence[Job]) -> None:
        """Start jobs; returns at once. Jobs of one version share one `params` object, which is sent
        once.
        """
        ...

    def receive(self, timeout: float | None) -> list[Reply]:
        """Replies that are there, each once; waits up to `timeout` seconds for the first (None:
        until one comes).
        """
        ...

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Nobody wants the replies to these (client, job number): stop what can be stopped."""
        ...

    def bytes_down(self, job: Job) -> int:
        """Size of the encoded message that carries `job`."""
        ...

    def now(self) -> float:
        """Seconds on a clock that only moves forward."""
        ...

    def close(self) -> None:
        """Free what the transport holds."""
        ...
