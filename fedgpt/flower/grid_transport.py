"""The engine's Transport over any Flower Grid: pool, Ray simulation or SuperLink."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedgpt.core.errors import FedGPTError, StoppedEarly
from fedgpt.core.messages import ClientInfo, Job, Reply
from fedgpt.flower.messages import (
    died,
    job_bytes,
    job_content,
    params_record,
    read_info,
    read_reply,
    unreadable,
)

POLL_SECONDS = 0.05  # for grids that cannot wait; Flower's own send_and_receive sleeps 3 s
# at a job whose client process dies; the same job gives the same bits, wherever it is done
ATTEMPTS = 3
log = logging.getLogger(__name__)


class GridTransport:
    """Jobs out and replies in over a Grid's push and pull.

    `known` maps node ids to clients where the caller knows them (the pool); otherwise every node is
    asked once. `expected` clients must appear; `digest` is that of the server's prepared data,
    which each client's must equal.
    """

    virtual = False

    def __init__(
        self,
        grid: Grid,
        expected: int,
        digest: str,
        known: dict[int, ClientInfo] | None = None,
        ttl: float | None = None,
        now: float = 0.0,
        stop: Path | None = None,
    ):
        """`ttl` in seconds; `now` is where the run's clock stands; where the file `stop` appears,
        waits end.

        Flower runs a ServerApp in a process or a thread that gets no signal of ours.
        """
        self._stop = stop
        self.at_once: int | None = getattr(grid, "workers", None)
        self.grid, self.expected, self.digest, self.ttl = grid, expected, digest, ttl
        self._nodes: dict[str, int] = {}
        self._known = known
        self._began = time.monotonic() - now
        self._pending: dict[
            str, tuple[Job, int]
        ] = {}  # message id -> its job, and at which attempt
        self._abandoned: set[str] = set()  # message ids that may still be answered
        self._refused: list[Reply] = []
        self._sweep = 0.0  # seconds that the last look at all messages took
        # a version's params -> held -> as sent
        self._broadcast: tuple[object, dict[int, ArrayRecord]] | None = None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """Clients sorted by id; raises FedGPTError where one has other data than the server."""
        infos = self._known if self._known is not None else self._ask(timeout)
        self._nodes = {info.id: node for node, info in infos.items()}
        if len(self._nodes) != len(infos):
            raise FedGPTError(
                "two nodes answered with one client id; give every node its own partition-id"
            )
        return sorted(infos.values(), key=lambda info: info.id)

    def send(self, jobs: Sequence[Job]) -> None:
        """Push one message per job; the params of a version travel once."""
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
            if message_id is None:  # how a SuperLink grid says no
                self._refused.append(
                    Reply(job.client, job.number, error="the SuperLink refused the message")
                )
            else:
                self._pending[message_id] = (job, attempt)

    def receive(self, timeout: float | None) -> list[Reply]:
        """Replies that have come; waits up to `timeout` seconds for the first."""
        deadline = None if timeout is None else self.now() + timeout
        while True:
            replies = self._pull()
            left = None if deadline is None else deadline - self.now()
            if replies or (left is not None and left <= 0):
                return replies
            self._wait(left)

    def there(self, client: str) -> bool:
        """Always: a client that is gone answers with an error."""
        return True

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Nothing can be stopped at a SuperNode: its late reply is refused. The pool drops what is
        still queued.
        """
        wanted = set(keys)
        ids = [i for i, (job, _) in self._pending.items() if (job.client, job.number) in wanted]
        if discard := getattr(self.grid, "discard", None):
            discard(ids)
            for message_id in ids:
                del self._pending[message_id]
        else:
            self._abandoned.update(ids)

    def bytes_down(self, job: Job) -> int:
        """Bytes of the vector and the plan."""
        return job_bytes(job)

    def now(self) -> float:
        """The run's clock: monotonic, and it stands still while no server runs."""
        return time.monotonic() - self._began

    def close(self) -> None:
        """Nothing of its own to free: who made the grid closes it."""

    def _pull(self) -> list[Reply]:
        """What has come; one at a time where the grid can tell, as every reply is as large as the
        model.
        """
        replies, self._refused = self._refused, []
        ready = getattr(self.grid, "ready", None)
        ids = (
            list(self._pending) if ready is None else [i for i in ready() if i in self._pending][:1]
        )
        began = time.monotonic()
        for message_id in ids:
            replies += self._taken(message_id)
        self._sweep = time.monotonic() - began
        return replies

    def _message(self, message_id: str) -> Message | Exception | None:
        """The reply to one message, None where it is not there yet, or what Flower raised as it
        read it.

        Asked for alone, a message that cannot be read takes no other along.
        """
        try:
            return next(iter(self.grid.pull_messages([message_id])), None)
        except httpx.HTTPError:  # the SuperLink is gone: not the message's fault
            raise
        except Exception as error:
            return error

    def _taken(self, message_id: str) -> list[Reply]:
        """The reply to a job, if it is there."""
        took = getattr(self.grid, "seconds_of", lambda _: None)(message_id)  # only the pool knows
        message = self._message(message_id)
        if message is None:
            return []
        job, attempt = self._pending.pop(message_id)
        wanted = message_id not in self._abandoned
        self._abandoned.discard(message_id)
        if isinstance(message, Exception):
            return [unreadable(job.client, job.number, message)]
        if wanted and attempt < ATTEMPTS and died(message):
            log.warning(
                "client %s job %d is retried: %s", job.client, job.number, message.error.reason
            )
            self._send([job], attempt + 1)
            return []
        return [replace(read_reply(message, job.client, job.number), seconds=took)]

    def _wait(self, seconds: float | None) -> None:
        if self._stop is not None and self._stop.exists():
            raise KeyboardInterrupt
        wait = getattr(self.grid, "wait", None)
        if wait is not None:
            wait(seconds)
        else:
            pause = max(POLL_SECONDS, self._sweep)  # questions take half of the time at most
            time.sleep(pause if seconds is None else min(pause, seconds))

    def _ask(self, timeout: float) -> dict[int, ClientInfo]:
        """Query every node for its client; waits until `expected` nodes are there."""
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
                if digest != self.digest:
                    raise FedGPTError(
                        f"client {infos[node].id!r} prepared other data ({digest}) than the server ({self.digest}); "
                        "corpus, tokenizer and their package versions must be the same"
                    )
            if waiting and self.now() > deadline:
                raise StoppedEarly(
                    f"{len(waiting)} clients did not say who they are within {timeout:.0f} s"
                )
            self._wait(POLL_SECONDS)
        return infos


def _introduced(message: Message | Exception, node: int) -> tuple[ClientInfo, str]:
    """(client, digest of its data) that a node has answered; raises FedGPTError where it is no
    answer.
    """
    try:
        if isinstance(message, Exception):
            raise message
        if not message.has_error():
            return read_info(message)
        told = message.error.reason
    except Exception as error:  # whatever a malformed answer raises
        told = f"its answer cannot be read ({type(error).__name__})"
    raise FedGPTError(f"node {node} did not say who it is: {told}")
