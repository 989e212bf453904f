"""Where the replies to the server's messages arrive: a mailbox for each kind of Flower Grid."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt.core.messages import JobTime
from fedgpt.flower.fetch import Fetcher
from fedgpt.flower.local_grid import LocalGrid

# seconds between two polls of a grid without `wait`; Flower's own send_and_receive sleeps 3 s
POLL_SECONDS = 0.05
NOT_MEASURED = JobTime()  # of a client on another machine


@dataclass(frozen=True)
class Arrival:
    """The reply to one message, or the exception with which reading it failed."""

    message_id: str
    reply: Message | Exception
    job_time: JobTime = NOT_MEASURED


class Mailbox(Protocol):
    """The replies to messages that were pushed to a Grid, each of them once."""

    def watch(self, message_id: str, largest: int) -> None:
        """Expect the reply to a message; `largest`: bytes of the longest valid one."""
        ...

    def take(self) -> list[Arrival]:
        """Replies that have arrived; does not wait. Few at a time, as each is a large array."""
        ...

    def wait(self, seconds: float | None) -> None:
        """Return when a reply may have arrived, at the latest after `seconds`."""
        ...

    def cancel(self, message_ids: Collection[str]) -> bool:
        """Drop messages, whose replies nobody needs; whether no reply to them will arrive."""
        ...

    def nodes(self) -> Collection[int]:
        """Ids of the nodes that are connected."""
        ...

    def close(self) -> None:
        """Stop receiving."""
        ...


def mailbox_of(grid: Grid) -> Mailbox:
    """The mailbox for a grid of this package, a SuperLink's, or any other."""
    if isinstance(grid, LocalGrid):
        return LocalMailbox(grid)
    return FetchingMailbox(grid) if isinstance(grid, HttpGrid) else PollingMailbox(grid)


class LocalMailbox:
    """Replies of processes on this machine, which are there as soon as the grid knows of them."""

    def __init__(self, grid: LocalGrid):
        self._grid = grid
        self._watched: set[str] = set()

    def watch(self, message_id: str, largest: int) -> None:
        """Expect a reply, which the pool reads into memory of its right size."""
        self._watched.add(message_id)

    def take(self) -> list[Arrival]:
        """The oldest reply."""
        for message_id in self._grid.ready():
            if message_id in self._watched:
                took = self._grid.time_of(message_id)
                if (reply := pulled(self._grid, message_id)) is not None:
                    self._watched.remove(message_id)
                    return [Arrival(message_id, reply, took)]
        return []

    def wait(self, seconds: float | None) -> None:
        """Return as soon as there is a reply."""
        self._grid.wait(seconds)

    def cancel(self, message_ids: Collection[str]) -> bool:
        """Cancel the jobs: queued ones never run."""
        self._grid.discard(message_ids)
        self._watched.difference_update(message_ids)
        return True

    def nodes(self) -> Collection[int]:
        """All clients."""
        return self._grid.get_node_ids()

    def close(self) -> None:
        """Do nothing, because the owner of the grid closes it."""


class PollingMailbox:
    """Replies of any other Grid, such as Flower's simulation engine, asked for one by one."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._watched: dict[str, None] = {}
        self._sweep = 0.0  # seconds that the last poll of all messages took

    def watch(self, message_id: str, largest: int) -> None:
        """Expect a reply."""
        self._watched[message_id] = None

    def take(self) -> list[Arrival]:
        """All replies; one that cannot be read does not lose the others."""
        began, arrived = time.monotonic(), []
        for message_id in list(self._watched):
            if (reply := pulled(self._grid, message_id)) is not None:
                del self._watched[message_id]
                arrived.append(Arrival(message_id, reply))
        self._sweep = time.monotonic() - began
        return arrived

    def wait(self, seconds: float | None) -> None:
        """Sleep; polls take at most half of the time."""
        pause = max(POLL_SECONDS, self._sweep)
        time.sleep(pause if seconds is None else min(pause, seconds))

    def cancel(self, message_ids: Collection[str]) -> bool:
        """Nothing can be cancelled: the jobs go on."""
        return False

    def nodes(self) -> Collection[int]:
        """The nodes that the grid lists."""
        return list(self._grid.get_node_ids())

    def close(self) -> None:
        """Do nothing, because the owner of the grid closes it."""


class FetchingMailbox:
    """Replies at a SuperLink, fetched by a thread, so that a slow upload delays no other reply."""

    def __init__(self, grid: HttpGrid):
        self._fetcher = Fetcher(grid)
        self.watch, self.nodes = self._fetcher.watch, self._fetcher.nodes
        self.close = self._fetcher.close

    def take(self) -> list[Arrival]:
        """The oldest complete reply."""
        found = self._fetcher.take()
        return [] if found is None else [Arrival(*found)]

    def wait(self, seconds: float | None) -> None:
        """Return as soon as there is a complete reply, or after one poll."""
        self._fetcher.wait(POLL_SECONDS if seconds is None else min(POLL_SECONDS, seconds))

    def cancel(self, message_ids: Collection[str]) -> bool:
        """The clients go on, but their replies are not fetched any more."""
        self._fetcher.cancel(message_ids)
        return False


def pulled(grid: Grid, message_id: str) -> Message | Exception | None:
    """The reply to one message, None if it has not arrived, or the exception of reading it."""
    try:
        replies: Iterable[Message] = grid.pull_messages([message_id])
        return next(iter(replies), None)
    except Exception as error:
        return error
