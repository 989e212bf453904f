"""The pool runtime: Flower's Grid over persistent worker processes on this machine.

Messages queue here, workers draw them in order (crew.py), arrays pass through anonymous shared
memory (shared.py). There is no thread and no polling: sockets are pumped inside push_messages,
pull_messages and wait, so a server that computes for long between them may call `pull_messages([])`
to keep the workers fed.
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
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.flower.pool.channel import Content, Frame, content_of, metadata_to_json, take_apart
from fedgpt.flower.pool.shared_memory import Memory, share
from fedgpt.flower.pool.worker_process import worker_environment
from fedgpt.flower.pool.workers import WorkerPool

FIRST_NODE = 1000  # node id of partition 0
_RUN, _TASK = 1, 1  # ids that Flower wants; they are global, so there is one grid per process


@dataclass(eq=False)
class _Broadcast:
    """Arrays written once for all messages that refer to the same Array objects; freed with the
    last of them.
    """

    memory: Memory
    specs: list[dict[str, Any]]
    sources: list[weakref.ref[Array]]  # an id may be given to a new object once the old one is gone


@dataclass(eq=False)
class _Queued:
    """A message that is queued or running."""

    metadata: Metadata
    header: dict[str, Any]
    body: bytes
    broadcast: _Broadcast | None
    expires: float  # monotonic seconds
    running: bool = False
    wanted: bool = True


@dataclass(eq=False)
class _Answer:
    """A reply nobody has pulled: a worker's frame, its arrays not mapped yet, or an error."""

    request: Metadata
    outcome: Frame | Error
    expires: float


class PoolGrid(Grid):
    """A Grid whose nodes are virtual clients 1000 + i, run by `workers` processes of `threads`
    threads each.

    All processes start at construction and join when ready. Every message gets a fresh Context: its
    state is not carried from one message to the next (our clients keep their state in files), and
    two messages to one node may run at the same time. Array objects are written to shared memory
    when first pushed: share one record between messages, and make a new one per version, because a
    change in place is not seen.

    Workers get no new job while as many replies as there are workers lie unread, unless somebody
    waits for another one: a reader slower than its clients must not fill the memory with their
    replies.

    Failures come back as error replies: 2 the client raised, 3 expired in the queue, 4 expired
    while running (its worker is killed) or before the reply was pulled, 5 no such node, 8 the
    worker died. RuntimeError is raised only where no worker can start.
    """

    def __init__(  # what a launcher has to say
        self,
        client_app: str,
        num_clients: int,
        workers: int,
        threads: int,
        run_config: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        gpus: Sequence[str] = (),
    ):
        """Start the workers; `client_app` is `module:attribute`, `env` is added to their
        environment.

        Each worker sees one of the `gpus`, by its name in CUDA_VISIBLE_DEVICES: the one that fewest
        others have.
        """
        if num_clients < 1 or workers < 1 or threads < 1:
            raise ValueError(f"need at least 1 each of {num_clients=}, {workers=}, {threads=}")
        self._owner, self._closed = os.getpid(), False
        self._num_clients, self._most_unread, self.workers = num_clients, workers, workers
        self._starving = False  # somebody waits for a reply that is not among the unread ones
        # message ids; those no longer in `_messages` are passed over
        self._queue: deque[str] = deque()
        self._messages: dict[str, _Queued] = {}
        self._answers: dict[str, _Answer] = {}
        self._broadcasts: weakref.WeakValueDictionary[tuple[int, ...], _Broadcast] = (
            weakref.WeakValueDictionary()
        )
        self._earliest = math.inf  # nothing expires before this; a lower bound, monotonic seconds
        self.set_run(Run.create_empty(run_id=_RUN))
        TaskIdentity.task_id, TaskIdentity.node_id = _TASK, SUPERLINK_NODE_ID
        _allow_descriptors(2 * num_clients + 8 * workers)
        setup = {"app": client_app, "threads": threads, "run_config": dict(run_config)}
        self._crew = WorkerPool(
            workers, setup, worker_environment(threads, env), self._next_job, self._answer, gpus
        )
        _OPEN.add(self)

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
        return list(range(FIRST_NODE, FIRST_NODE + self._num_clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their new ids in order; raises ValueError for one that is no
        request.
        """
        self._check_open()
        pushed = list(messages)  # held until the end, so that identities below stay true
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
        """The replies that are there now, each once, in the order of the ids; never waits."""
        self._pump(0)
        found = [
            self._answers.pop(message_id)
            for message_id in message_ids
            if message_id in self._answers
        ]
        return [_reply(answer) for answer in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push, then pull until all replies are in or `timeout` seconds are over."""
        missing, replies = dict.fromkeys(self.push_messages(messages)), []
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while missing:
            for reply in self.pull_messages(missing):
                del missing[reply.metadata.reply_to_message_id]
                replies.append(reply)
            if not missing or not self._wait(deadline, set(missing)):
                break
        return replies

    # Beyond Flower's Grid

    def wait(self, timeout: float | None = None, message_ids: Iterable[str] | None = None) -> bool:
        """Whether a reply can be pulled (of `message_ids`, else of any message); returns as soon as
        one can.

        Waits at most `timeout` seconds (None: as long as a ttl allows); False at once where nothing
        is under way.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        return self._wait(deadline, None if message_ids is None else set(message_ids))

    def ready(self) -> list[str]:
        """Ids of the replies that can be pulled now, oldest first."""
        self._pump(0)
        return list(self._answers)

    def seconds_of(self, message_id: str) -> float | None:
        """How long a worker was at a message whose reply is ready, nan for its first; None where
        there is no reply.
        """
        answer = self._answers.get(message_id)
        return (
            answer.outcome.header["seconds"]
            if answer and isinstance(answer.outcome, Frame)
            else None
        )

    def discard(self, message_ids: Iterable[str]) -> None:
        """Forget messages: queued ones never run, a running one's reply is dropped when it
        comes.
        """
        for message_id in message_ids:
            self._answers.pop(message_id, None)
            queued = self._messages.get(message_id)
            if queued and queued.running:
                # its ttl still holds, so that a client that hangs gives its worker back
                queued.wanted = False
            elif queued:
                del self._messages[message_id]

    def close(self) -> None:
        """End all workers by process id and give everything back; may be called twice."""
        # a forked child must not end its parent's workers
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        _OPEN.discard(self)
        self._crew.close()
        for table in (self._queue, self._messages, self._answers, self._broadcasts):
            table.clear()

    def __enter__(self) -> PoolGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Messages on their way

    def _enqueue(self, message: Message, content: Content) -> str:
        message_id = message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        fields = metadata_to_json(message.metadata)
        metadata = Metadata(**fields)  # a copy: pushing the same Message again gives it another id
        partition = metadata.dst_node_id - FIRST_NODE
        if not 0 <= partition < self._num_clients:
            last = FIRST_NODE + self._num_clients - 1
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
            "node_config": {"partition-id": partition, "num-partitions": self._num_clients},
            "records": content.records,
            "arrays": broadcast.specs if broadcast else [],
        }
        # created_at is wall time, what is left of the ttl is measured on the monotonic clock.
        expires = time.monotonic() + metadata.created_at + metadata.ttl - time.time()
        self._messages[message_id] = _Queued(metadata, header, content.body, broadcast, expires)
        self._queue.append(message_id)
        self._earliest = min(self._earliest, expires)
        return message_id

    def _broadcast(self, arrays: Sequence[Array]) -> _Broadcast | None:
        """The shared copy of `arrays`, written now unless these very objects are in flight
        already.
        """
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
        if len(self._answers) >= self._most_unread and not self._starving:
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
        self._crew.pump(min(seconds, max(0.0, self._earliest - time.monotonic())))
        now = time.monotonic()
        if now >= self._earliest:
            self._expire(now)

    def _expire(self, now: float) -> None:
        """Enforce the ttl of queued and running messages and of replies that nobody pulled."""
        for message_id, queued in list(self._messages.items()):
            if queued.expires > now:
                continue
            if queued.running:
                self._crew.stop(message_id)
                error = Error(
                    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
                    f"ran past its ttl of {queued.metadata.ttl:g} s",
                )
            else:
                error = Error(
                    ErrorCode.MESSAGE_UNAVAILABLE,
                    f"queued for all its ttl of {queued.metadata.ttl:g} s",
                )
            self._answer(message_id, error)
        held = [answer for answer in self._answers.values() if isinstance(answer.outcome, Frame)]
        for answer in held:
            if answer.expires <= now:
                text = f"reply not pulled within the ttl of {answer.request.ttl:g} s"
                answer.outcome = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, text)
                answer.expires = math.inf
        self._earliest = min(
            (entry.expires for entry in (*self._messages.values(), *held)), default=math.inf
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
    """Raise the soft limit where needed: a reply holds a descriptor until its last view is gone."""
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
