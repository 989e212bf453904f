"""The interface that the grids of this package add to Flower's Grid: waiting, cancelling, job
times.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.core.messages import JobTime

FIRST_NODE = 1000  # node id of the client with partition 0
_RUN_ID, _TASK_ID = 1, 1  # Flower keeps them in global variables: one grid per process


class LocalGrid(Grid):
    """A Grid over virtual clients of this machine; node 1000 + i is the client with partition i."""

    workers: int  # number of jobs that run at the same time

    def __init__(self, num_clients: int):
        """Take Flower's global ids of the run and of the server's task."""
        self.num_clients = num_clients
        self.set_run(Run.create_empty(run_id=_RUN_ID))
        TaskIdentity.task_id, TaskIdentity.node_id = _TASK_ID, SUPERLINK_NODE_ID

    @abstractmethod
    def wait(self, timeout: float | None = None, message_ids: Iterable[str] | None = None) -> bool:
        """Whether a reply to one of `message_ids` (None: to any message) can be pulled.

        Returns as soon as there is one, at the latest after `timeout` seconds (None: when the ttl
        of all messages is over); returns at once if no such message is queued or running.
        """

    @abstractmethod
    def ready(self) -> list[str]:
        """Ids of the messages whose replies can be pulled now, oldest reply first."""

    @abstractmethod
    def time_of(self, message_id: str) -> JobTime:
        """The seconds of a client's work on a message whose reply is ready."""

    @abstractmethod
    def discard(self, message_ids: Iterable[str]) -> None:
        """Cancel messages: queued ones never run; the reply to a running one is dropped."""

    # Flower's Grid

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        TaskIdentity.run_id = run.run_id

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message; deprecated by Flower in favour of `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of all virtual nodes, in the order of their partitions."""
        return list(range(FIRST_NODE, FIRST_NODE + self.num_clients))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push the messages, then pull until all replies have come or `timeout` is over."""
        missing, replies = dict.fromkeys(self.push_messages(messages)), []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while missing:
            for reply in self.pull_messages(missing):
                del missing[reply.metadata.reply_to_message_id]
                replies.append(reply)
            left = None if timeout is None else deadline - time.monotonic()
            if not missing or not self.wait(left, set(missing)):
                break
        return replies
