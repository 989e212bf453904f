"""The server's Transport over any Flower Grid; it is faster over the grids of this package."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.core.messages import ClientInfo, Job, JobTime, Reply
from fedgpt.flower.local_grid import LocalGrid
from fedgpt.flower.messages import (
    died,
    has_other_text,
    job_bytes,
    job_content,
    params_record,
    read_info,
    read_reply,
    unreadable,
)

# seconds between two polls of a grid without `wait`; Flower's own send_and_receive sleeps 3 s
POLL_SECONDS = 0.05
# number of attempts at a job whose client process dies; each attempt gives the same bits
ATTEMPTS = 3
# environment variable with the path of a file: when the file appears, the server stops
STOP_FILE = "FEDGPT_STOP_FILE"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunText:
    """The prepared text of a run, which the server and every client must have."""

    digest: str  # of the text and of everything that it was prepared with
    # raises FedGPTError if the server's own text has changed since
    check: Callable[[], None] = lambda: None


class GridTransport:
    """Sends jobs and receives replies through a Grid's push and pull.

    It waits until `expected` clients have connected. `known` maps node ids to clients if the caller
    knows them (the pool); otherwise every node is queried once. `text` is the server's
    prepared text; each client must have the same.
    """

    virtual = False

    def __init__(
        self,
        grid: Grid,
        expected: int,
        text: RunText,
        known: dict[int, ClientInfo] | None = None,
        ttl: float | None = None,
        now: float = 0.0,
    ):
        """`ttl` is the time to live of a job in seconds; `now` is the time on the run's clock."""
        # a launcher in another process stops the server by creating a file, because Flower runs a
        # ServerApp in a process or thread that gets no signal
        self._stop = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
        self._local = grid if isinstance(grid, LocalGrid) else None
        self.at_once = None if self._local is None else self._local.workers
        self.grid, self.expected, self.text, self.ttl = grid, expected, text, ttl
        self._nodes: dict[str, int] = {}
        self._known = known
        self._began = time.monotonic() - now
        # message id -> its job, and the number of the attempt
        self._pending: dict[str, tuple[Job, int]] = {}
        self._abandoned: set[str] = set()  # ids of messages whose jobs were given up
        self._refused: list[Reply] = []  # failures of messages that the SuperLink did not accept
        self._sweep = 0.0  # seconds that the last poll of all messages took
        # params of the last version that was sent, and cached version -> record of the message
        self._broadcast: tuple[object, dict[int, ArrayRecord]] | None = None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """Clients sorted by id; raises FedGPTError if one has other data than the server."""
        infos = self._known if self._known is not None else self._ask(timeout)
        self._nodes = {info.id: node for node, info in infos.items()}
        if len(self._nodes) != len(infos):
            raise FedGPTError(
                "two nodes reported the same client id; give every node its own"
                " --node-config partition-id"
            )
        return sorted(infos.values(), key=lambda info: info.id)

    def send(self, jobs: Sequence[Job]) -> None:
        """Push one message per job; the params of a version are sent once."""
        self._send(jobs, attempt=1)

    def _send(self, jobs: Sequence[Job], attempt: int) -> None:
        messages = []
        for job in jobs:
            if self._broadcast is None or self._broadcast[0] is not job.params:
                self._broadcast = (job.params, {})
            records = self._broadcast[1]
            if job.plan.cached_version not in records:
                records[job.plan.cached_version] = params_record(job)
            content = job_content(job, records[job.plan.cached_version])
            messages.append(
                Message(content, self._nodes[job.client], MessageType.TRAIN, ttl=self.ttl)
            )
        for job, message_id in zip(jobs, self.grid.push_messages(messages), strict=True):
            if message_id is None:  # a SuperLink's grid returns None for a message that it rejects
                self._refused.append(
                    Reply(job.client, job.number, error="the SuperLink refused the message")
                )
            else:
                self._pending[message_id] = (job, attempt)

    def receive(self, timeout: float | None) -> list[Reply]:
        """Replies that have arrived; waits up to `timeout` seconds for the first."""
        deadline = None if timeout is None else self.now() + timeout
        while True:
            replies = self._pull()
            left = None if deadline is None else deadline - self.now()
            if replies or (left is not None and left <= 0):
                return replies
            self._wait(left)

    def available(self, client: str) -> bool:
        """Always true; a job for a disconnected client gets an error reply."""
        return True

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Cancel jobs on a local grid; on other grids they continue, and their replies are rejected
        as `late`.
        """
        wanted = set(keys)
        ids = [i for i, (job, _) in self._pending.items() if (job.client, job.number) in wanted]
        if self._local is not None:
            self._local.discard(ids)
            for message_id in ids:
                del self._pending[message_id]
        else:
            self._abandoned.update(ids)

    def bytes_down(self, job: Job) -> int:
        """Bytes of the vector and the plan."""
        return job_bytes(job)

    def now(self) -> float:
        """Seconds on the run's clock, which is monotonic and does not advance while no server
        runs.
        """
        return time.monotonic() - self._began

    def close(self) -> None:
        """Do nothing, because the owner of the grid closes it."""

    def _pull(self) -> list[Reply]:
        """Replies that have arrived; a local grid gives one at a time, as each is a large array."""
        replies, self._refused = self._refused, []
        if self._local is None:
            ids = list(self._pending)
        else:
            ids = [i for i in self._local.ready() if i in self._pending][:1]
        began = time.monotonic()
        for message_id in ids:
            replies += self._taken(message_id)
        self._sweep = time.monotonic() - began
        return replies

    def _message(self, message_id: str) -> Message | Exception | None:
        """The reply to one message, None if it has not arrived, or the exception of reading it.

        Messages are pulled one by one, so that one unreadable reply does not lose others.
        """
        try:
            return next(iter(self.grid.pull_messages([message_id])), None)
        except httpx.HTTPError:  # the SuperLink does not respond: not an error of the message
            raise
        except Exception as error:
            return error

    def _taken(self, message_id: str) -> list[Reply]:
        """The reply to a job, if it has arrived and does not lead to another attempt."""
        took = JobTime() if self._local is None else self._local.time_of(message_id)
        message = self._message(message_id)
        if message is None:
            return []
        job, attempt = self._pending.pop(message_id)
        wanted = message_id not in self._abandoned
        self._abandoned.discard(message_id)
        if isinstance(message, Exception):
            return [unreadable(job.client, job.number, message)]
        if has_other_text(message):
            # only what the server finds itself ends the run: a client may report anything
            self.text.check()
        if wanted and attempt < ATTEMPTS and died(message):
            log.warning(
                "client %s job %d is retried: %s", job.client, job.number, message.error.reason
            )
            self._send([job], attempt + 1)
            return []
        return [replace(read_reply(message, job.client, job.number), job_time=took)]

    def _wait(self, seconds: float | None) -> None:
        if self._stop is not None and self._stop.exists():
            raise KeyboardInterrupt
        if self._local is not None:
            self._local.wait(seconds)
        else:
            pause = max(POLL_SECONDS, self._sweep)  # polls take at most half of the time
            time.sleep(pause if seconds is None else min(pause, seconds))

    def _ask(self, timeout: float) -> dict[int, ClientInfo]:
        """Ask every node for its client; waits until `expected` nodes have connected."""
        deadline = self.now() + timeout
        while len(nodes := sorted(self.grid.get_node_ids())) < self.expected:
            if self.now() > deadline:
                raise StoppedEarly(
                    f"{len(nodes)} of {self.expected} clients connected within {timeout:.0f} s"
                )
            self._wait(POLL_SECONDS)
        nodes = nodes[: self.expected]
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        waiting = dict(zip(self.grid.push_messages(questions), nodes, strict=True))
        infos: dict[int, ClientInfo] = {}
        while waiting:
            for message_id, node in list(waiting.items()):
                if (message := self._message(message_id)) is None:
                    continue
                del waiting[message_id]
                infos[node], digest = _introduced(message, node)
                if digest != self.text.digest:
                    raise FedGPTError(
                        f"client {infos[node].id!r} prepared other data than the server; corpus,"
                        " tokenizer and their package versions must be the same"
                    )
            if waiting and self.now() > deadline:
                raise StoppedEarly(
                    f"{len(waiting)} clients did not report their id within {timeout:.0f} s"
                )
            self._wait(POLL_SECONDS)
        return infos


def _introduced(message: Message | Exception, node: int) -> tuple[ClientInfo, str]:
    """(client, digest of its data) in a node's answer; raises FedGPTError for an invalid answer."""
    try:
        if isinstance(message, Exception):
            raise message
        if not message.has_error():
            return read_info(message)
        reason = message.error.reason
    except ConfigError as error:
        raise ConfigError(f"node {node}: {problem}" for problem in error.problems) from error
    except Exception as error:  # a malformed answer may raise any exception
        reason = f"its answer cannot be read ({type(error).__name__})"
    raise FedGPTError(f"node {node} did not report its client: {reason}")
