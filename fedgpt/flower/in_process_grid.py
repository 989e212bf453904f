"""A Grid without processes or threads, which calls the ClientApp while the server waits."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedgpt.core.errors import FedGPTError
from fedgpt.core.messages import JobTime
from fedgpt.flower.local_grid import FIRST_NODE, LocalGrid
from fedgpt.flower.pool.shared_memory import NdArray


class InProcessGrid(LocalGrid):
    """Messages queue until `wait` runs the oldest one; so at most one reply is kept at a time.

    An exception of the ClientApp becomes an error reply, as on every grid, and its traceback goes
    to stderr unless its message is meant for the user.
    """

    workers = 1

    def __init__(
        self, app: ClientApp, num_clients: int, run_config: Mapping[str, Any], state_dir: str
    ):
        """`state_dir` is the folder in which clients keep their state."""
        super().__init__(num_clients)
        self._app, self._run_config, self._state_dir = app, dict(run_config), state_dir
        self._numbers, self._warm = itertools.count(), False
        self._queue: dict[str, Message] = {}
        self._replies: dict[str, tuple[Message, JobTime]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; returns their new ids in order."""
        ids = []
        for message in messages:
            message_id = f"message {next(self._numbers)} of grid {id(self)}"
            message.metadata.__dict__["_message_id"] = message_id  # like a SuperLink
            self._queue[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each once, in the order of the ids; runs nothing."""
        ready = [message_id for message_id in message_ids if message_id in self._replies]
        return [self._replies.pop(message_id)[0] for message_id in ready]

    def wait(self, timeout: float | None = None, message_ids: Iterable[str] | None = None) -> bool:
        """Run the oldest wanted message, unless a reply is ready; a job has no time limit."""
        wanted = None if message_ids is None else set(message_ids)
        if any(wanted is None or message_id in wanted for message_id in self._replies):
            return True
        oldest = next((i for i in self._queue if wanted is None or i in wanted), None)
        if oldest is None or (timeout is not None and timeout <= 0):
            return False
        began = time.monotonic()
        reply = self._reply(self._queue.pop(oldest))
        # the first job also reads data and compiles, so it is slower than the next ones
        took = JobTime(time.monotonic() - began) if self._warm else JobTime(measured=False)
        self._replies[oldest], self._warm = (reply, took), True
        return True

    def ready(self) -> list[str]:
        """Ids of the messages whose replies can be pulled now."""
        return list(self._replies)

    def time_of(self, message_id: str) -> JobTime:
        """The seconds that the ClientApp took."""
        return self._replies[message_id][1] if message_id in self._replies else JobTime()

    def discard(self, message_ids: Iterable[str]) -> None:
        """Cancel messages that have not run, and drop replies."""
        for message_id in message_ids:
            self._queue.pop(message_id, None)
            self._replies.pop(message_id, None)

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if not 0 <= node - FIRST_NODE < self.num_clients:
            error = Error(ErrorCode.NODE_UNAVAILABLE, f"there is no node {node}")
            return Message(error, reply_to=message)
        config = {
            "partition-id": node - FIRST_NODE,
            "num-partitions": self.num_clients,
            "state-dir": self._state_dir,
        }
        context = Context(self.run.run_id, node, config, RecordDict(), self._run_config)
        try:
            reply = self._app(message, context)
        except Exception as error:
            if not isinstance(error, FedGPTError):  # its message says all, and the server shows it
                traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(failure, reply_to=message)
        for record in reply.content.array_records.values() if reply.has_content() else ():
            for key, array in list(record.items()):
                if isinstance(array, NdArray):  # any other holds bytes of its own, maybe damaged
                    # the client reuses the buffer of its update for its next job
                    record[key] = NdArray(array.numpy().copy())
        return reply
