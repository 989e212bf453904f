"""Flower's Grid over persistent worker processes of this machine.

Messages queue here, workers take them in order (workers.py), and arrays pass through anonymous
shared memory (shared_memory.py). The grid has no thread and does not poll: push_messages,
pull_messages and wait serve the sockets. A caller that computes for long between these calls may
call `pull_messages([])` so that idle workers get their next jobs.
"""

from __future__ import annotations

import atexit
import math
import os
import resource
import time
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedgpt.core.messages import JobTime
from fedgpt.flower.local_grid import FIRST_NODE, LocalGrid
from fedgpt.flower.pool.channel import Content, Frame, content_of, metadata_to_json, take_apart
from fedgpt.flower.pool.shared_memory import Memory, share
from fedgpt.flower.pool.workers import WorkerPool, WorkerSettings


@dataclass(eq=False)
class _Broadcast:
    """Arrays that are written once for all messages with the same Array objects.

    The memory is freed with the last of these messages.
    """

    memory: Memory
    specs: list[dict[str, Any]]
    sources: list[weakref.ref[Array]]  # weak references, because Python reuses ids of freed objects


@dataclass(eq=False)
class _Queued:
    """A message that waits in the queue or runs."""

    metadata: Metadata
    header: dict[str, Any]
    body: bytes
    broadcast: _Broadcast | None
    expires: float  # time on the monotonic clock, in seconds
    running: bool = False
    wanted: bool = True  # False: cancelled while running, so its reply is dropped


@dataclass(eq=False)
class _Answer:
    """An unread reply: a worker's frame, whose arrays are not mapped yet, or an error."""

    request: Metadata
    outcome: Frame | Error
    expires: float


class PoolGrid(LocalGrid):
    """A Grid of virtual clients whose jobs run in worker processes.

    All processes start at construction and take jobs as soon as they are ready. Every message gets
    a new Context: no state is passed from one message to the next (fedgpt's clients store their
    state in files), and two messages to one node may run at the same time. Array objects are
    written to shared memory when they are first pushed, and later changes in place are ignored. So
    share one record between messages, and make a new one for each version.

    Workers get no new job while as many replies are unread as there are workers, unless the caller
    waits for another reply. Otherwise replies would accumulate in memory if the caller is slower
    than the clients.

    Failures come back as error replies with Flower's codes: 2 the client raised an exception, 3 the
    message expired in the queue, 4 it expired while running (its worker is killed) or before the
    reply was pulled, 5 there is no such node, 8 the worker died. RuntimeError is raised only if no
    worker can start.
    """

    def __init__(self, num_clients: int, settings: WorkerSettings):
        """Start the workers."""
        workers, threads = settings.count, settings.threads
        if num_clients < 1 or workers < 1 or threads < 1:
            raise ValueError(f"need at least 1 each of {num_clients=}, {workers=}, {threads=}")
        self._owner, self._closed = os.getpid(), False
        self.workers = workers
        self._starving = False  # the caller waits for a reply that is not among the unread ones
        # message ids, oldest first; ids that are no longer in `_messages` are skipped
        self._queue: deque[str] = deque()
        self._messages: dict[str, _Queued] = {}
        self._answers: dict[str, _Answer] = {}
        self._broadcasts: weakref.WeakValueDictionary[tuple[int, ...], _Broadcast] = (
            weakref.WeakValueDictionary()
        )
        # lower bound of the time at which the next message expires, on the monotonic clock
        self._earliest = math.inf
        super().__init__(num_clients)
        _allow_descriptors(2 * num_clients + 8 * workers)
        self._pool = WorkerPool(settings, self._next_job, self._answer)
        _OPEN.add(self)

    # Flower's Grid

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; returns their new ids in order.

        Raises ValueError for a message that is a reply or has no time to live.
        """
        self._check_open()
        pushed = list(messages)  # referenced until the end, so that the ids below stay unique
        for message in pushed:
            if message.metadata.reply_to_message_id or message.metadata.ttl <= 0:
                raise ValueError(
                    f"only a request with a positive ttl can be pushed, not {message.metadata!r}"
                )
        known: dict[int, Content] = {}  # a round's messages often share one content
        ids = []
        for message in pushed:
            key = id(message.content)
            known[key] = known.get(key) or take_apart(message.content)
            ids.append(self._enqueue(message, known[key]))
        self._pump(0)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each once, in the order of the ids; never waits."""
        self._pump(0)
        found = [
            self._answers.pop(message_id)
            for message_id in message_ids
            if message_id in self._answers
        ]
        return [_reply(answer) for answer in found]

    # Beyond Flower's Grid

    def wait(self, timeout: float | None = None, message_ids: Iterable[str] | None = None) -> bool:
        """Wait for a reply to one of `message_ids` (None: to any message); see LocalGrid."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        return self._wait(deadline, None if message_ids is None else set(message_ids))

    def ready(self) -> list[str]:
        """Ids of the messages whose replies can be pulled now, oldest reply first."""
        self._pump(0)
        return list(self._answers)

    def time_of(self, message_id: str) -> JobTime:
        """The seconds that a worker process has measured; unknown if there is no reply."""
        answer = self._answers.get(message_id)
        if answer is None or isinstance(answer.outcome, Error):
            return JobTime()
        return JobTime(**answer.outcome.header["time"])

    def discard(self, message_ids: Iterable[str]) -> None:
        """Cancel messages: queued ones never run; the reply to a running one is dropped."""
        for message_id in message_ids:
            self._answers.pop(message_id, None)
            queued = self._messages.get(message_id)
            if queued and queued.running:
                # its ttl remains valid, so that a client that hangs does not block its worker
                queued.wanted = False
            elif queued:
                del self._messages[message_id]

    def close(self) -> None:
        """End all workers by process id and free all memory; may be called twice."""
        # a forked child must not end its parent's workers
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        _OPEN.discard(self)
        self._pool.close()
        for table in (self._queue, self._messages, self._answers, self._broadcasts):
            table.clear()

    def __enter__(self) -> PoolGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The queue and its messages

    def _enqueue(self, message: Message, content: Content) -> str:
        message_id = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        fields = metadata_to_json(message.metadata)
        metadata = Metadata(**fields)  # a copy: pushing the same Message again gives it another id
        partition = metadata.dst_node_id - FIRST_NODE
        if not 0 <= partition < self.num_clients:
            last = FIRST_NODE + self.num_clients - 1
            error = Error(
                ErrorCode.NODE_UNAVAILABLE,
                f"no node {metadata.dst_node_id}: {FIRST_NODE} to {last}",
            )
            self._answers[message_id] = _Answer(metadata, error, math.inf)
            return message_id
        broadcast = self._broadcast(content.arrays)
        header = {
            "kind": "job",
            "metadata": fields,
            "node_config": {"partition-id": partition, "num-partitions": self.num_clients},
            "records": content.records,
            "arrays": broadcast.specs if broadcast else [],
        }
        # created_at is wall time; the rest of the ttl is measured on the monotonic clock
        expires = time.monotonic() + metadata.created_at + metadata.ttl - time.time()
        self._messages[message_id] = _Queued(metadata, header, content.body, broadcast, expires)
        self._queue.append(message_id)
        self._earliest = min(self._earliest, expires)
        return message_id

    def _broadcast(self, arrays: Sequence[Array]) -> _Broadcast | None:
        """The shared copy of `arrays`, written now unless the same objects are in flight."""
        if not arrays:
            return None
        key = tuple(id(array) for array in arrays)
        found = self._broadcasts.get(key)
        if found and all(
            source() is array for source, array in zip(found.sources, arrays, strict=True)
        ):
            return found
        made = self._broadcasts[key] = _Broadcast(
            *share(arrays), [weakref.ref(array) for array in arrays]
        )
        return made

    def _next_job(self) -> tuple[str, Frame] | None:
        """The oldest queued message, for an idle worker."""
        if len(self._answers) >= self.workers and not self._starving:
            return None
        while self._queue:
            message_id = self._queue.popleft()
            queued = self._messages.get(message_id)
            if queued and queued.expires > time.monotonic():
                queued.running = True
                memory = queued.broadcast.memory if queued.broadcast else None
                return message_id, Frame(queued.header, queued.body, memory)
        return None

    def _answer(self, message_id: str, outcome: Frame | Error) -> None:
        queued = self._messages.pop(message_id)
        if queued.wanted:
            self._answers[message_id] = _Answer(queued.metadata, outcome, queued.expires)

    def _wait(self, deadline: float, wanted: set[str] | None) -> bool:
        self._pump(0)
        try:
            while not _overlap(self._answers, wanted):
                left = deadline - time.monotonic()
                if left <= 0 or not _overlap(self._messages, wanted):
                    return False
                self._starving = True
                self._pump(left)
        finally:
            self._starving = False
        return True

    def _pump(self, seconds: float) -> None:
        self._check_open()
        self._pool.pump(min(seconds, max(0.0, self._earliest - time.monotonic())))
        now = time.monotonic()
        if now >= self._earliest:
            self._expire(now)

    def _expire(self, now: float) -> None:
        """Enforce the ttl of queued and running messages and of unread replies."""
        for message_id, queued in list(self._messages.items()):
            if queued.expires > now:
                continue
            if queued.running:
                self._pool.stop(message_id)
                error = Error(
                    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
                    f"ran past its ttl of {queued.metadata.ttl:g} s",
                )
            else:
                error = Error(
                    ErrorCode.MESSAGE_UNAVAILABLE,
                    f"stayed in the queue for its ttl of {queued.metadata.ttl:g} s",
                )
            self._answer(message_id, error)
        unread = [answer for answer in self._answers.values() if isinstance(answer.outcome, Frame)]
        for answer in unread:
            if answer.expires <= now:
                text = f"reply not pulled within the ttl of {answer.request.ttl:g} s"
                answer.outcome = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, text)
                answer.expires = math.inf
        self._earliest = min(
            (entry.expires for entry in (*self._messages.values(), *unread)), default=math.inf
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this PoolGrid is closed")


def _reply(answer: _Answer) -> Message:
    """The Message of an answer; arrays are mapped here and freed with their last view."""
    if isinstance(answer.outcome, Error):
        reply = Message(answer.outcome, reply_to=make_message(answer.request, RecordDict()))
    else:
        header = answer.outcome.header
        error = Error(*header["error"]) if "error" in header else None
        reply = make_message(
            Metadata(**header["metadata"]), None if error else content_of(answer.outcome), error
        )
    reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return reply


def _overlap(table: Mapping[str, object], wanted: set[str] | None) -> bool:
    return bool(table) if wanted is None else not table.keys().isdisjoint(wanted)


def _allow_descriptors(count: int) -> None:
    """Raise the soft limit of open descriptors to `count`, and 256 for other files.

    A reply keeps a descriptor open until its last view is freed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = count + 256
    if soft != resource.RLIM_INFINITY and soft < need:
        allowed = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


_OPEN: weakref.WeakSet[PoolGrid] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for grid in list(_OPEN):
        grid.close()
