"""The server's Transport over any Flower Grid; it is faster over the grids of this package."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid

from fedgpt.core.errors import StoppedEarly, amount
from fedgpt.core.messages import ClientInfo, Job, Reply
from fedgpt.flower.local_grid import LocalGrid
from fedgpt.flower.mailbox import POLL_SECONDS, Arrival, mailbox_of
from fedgpt.flower.messages import (
    away,
    died,
    has_other_text,
    job_bytes,
    job_content,
    params_record,
    read_reply,
    unreadable,
)
from fedgpt.flower.nodes import Admission, Nodes, one_line

# bytes of the longest valid reply, as a multiple of the model's in fp32: no codec makes it larger
LARGEST = 2
# number of attempts at a job whose client process dies; each attempt gives the same bits
ATTEMPTS = 3
# seconds for which a job waits for a client that has gone away: longer than Flower needs to notice
# that (60) and a client to come back
PARKED_SECONDS = 180.0
ALONE_SECONDS = 24 * 3600.0  # without any client, after which the run stops
# environment variable with the path of a file: when the file appears, the server stops
STOP_FILE = "FEDGPT_STOP_FILE"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parked:
    """A job whose client has gone away; it is sent again when the client is back."""

    job: Job
    attempt: int
    until: float  # on the run's clock


class GridTransport:
    """Sends jobs and receives replies through a Grid's push and pull.

    `admission` says who may take part. `known` maps node ids to clients if the caller knows them
    (the pool); otherwise every node is queried once.
    """

    virtual = False

    def __init__(
        self,
        grid: Grid,
        admission: Admission,
        known: Mapping[int, ClientInfo] | None = None,
        check_text: Callable[[], None] = lambda: None,
        ttl: float | None = None,
        now: float = 0.0,
    ):
        """`check_text` raises FedGPTError if the server's own text has changed since the run began;
        `ttl` is the time to live of a job in seconds; `now` is the time on the run's clock.
        """
        # a launcher in another process stops the server by creating a file, because Flower runs a
        # ServerApp in a process or thread that gets no signal
        self._stop = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
        self.at_once = grid.workers if isinstance(grid, LocalGrid) else None
        self.grid, self.ttl = grid, ttl
        self._expected, self._check_text = admission.expected, check_text
        self._mailbox = mailbox_of(grid)
        self._nodes = Nodes(grid, self._mailbox, admission, known)
        self._began = time.monotonic() - now
        # message id -> its job, and the number of the attempt
        self._pending: dict[str, tuple[Job, int]] = {}
        self._parked: dict[tuple[str, int], _Parked] = {}
        self._abandoned: set[str] = set()  # ids of messages whose jobs were given up
        self._refused: list[Reply] = []  # failures of jobs whose messages were not accepted
        # params of the last version that was sent, and cached version -> record of the message
        self._broadcast: tuple[object, dict[int, ArrayRecord]] | None = None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """Clients sorted by id, once as many as expected have connected.

        Raises StoppedEarly if they do not in time, and FedGPTError or ConfigError as soon as there
        are enough nodes and none of them can take part.
        """
        deadline = self.now() + timeout
        while True:
            self._nodes.look()
            for arrival in self._mailbox.take():
                self._nodes.takes(arrival)
            if (clients := self._nodes.begin()) is not None:
                return clients
            left_out = list(self._nodes.left_out.values())
            if self._nodes.refused:
                raise left_out[0]
            if self.now() > deadline:
                silent = self._nodes.silent
                why = f"; {amount(silent, 'node')} did not say which client it is" if silent else ""
                why += "".join(f"; left out: {one_line(error)}" for error in left_out)
                raise StoppedEarly(
                    f"{self._nodes.count} of {self._expected} clients connected within"
                    f" {timeout:.0f} s{why}"
                )
            self._wait(POLL_SECONDS)

    def newcomers(self) -> list[ClientInfo]:
        """Clients that have joined while the run goes on."""
        return self._nodes.newcomers()

    def send(self, jobs: Sequence[Job]) -> None:
        """Push one message per job; the params of a version are sent once."""
        self._send(jobs, attempt=1)

    def _send(self, jobs: Sequence[Job], attempt: int, until: float | None = None) -> None:
        """Send jobs; one whose client is away is parked, at the latest `until` then."""
        there = [(job, node) for job in jobs if (node := self._nodes.of(job.client)) is not None]
        self._park((job for job in jobs if self._nodes.of(job.client) is None), attempt, until)
        messages = [
            Message(job_content(job, self._params(job)), node, MessageType.TRAIN, ttl=self.ttl)
            for job, node in there
        ]
        if not messages:
            return
        for (job, _), message_id in zip(there, self.grid.push_messages(messages), strict=True):
            if message_id:
                self._pending[message_id] = (job, attempt)
                self._mailbox.watch(message_id, LARGEST * job.params.nbytes)
            elif self._nodes.come_and_go:  # a SuperLink refuses a message to one that has just left
                self._nodes.lost(job.client)
                self._park([job], attempt, until)
            else:
                why = "the SuperLink refused the message"
                self._refused.append(Reply(job.client, job.number, error=why))

    def _params(self, job: Job) -> ArrayRecord:
        if self._broadcast is None or self._broadcast[0] is not job.params:
            self._broadcast = (job.params, {})
        records = self._broadcast[1]
        if job.plan.cached_version not in records:
            records[job.plan.cached_version] = params_record(job)
        return records[job.plan.cached_version]

    def receive(self, timeout: float | None) -> list[Reply]:
        """Replies that have arrived; waits up to `timeout` seconds for the first.

        Returns [] before that time when a client has come back or joined, which may get a job.
        """
        began = self.now()
        while True:
            returned = self._nodes.look()
            replies = self._resumed()
            for arrival in self._mailbox.take():
                if not self._nodes.takes(arrival):
                    replies += self._answered(arrival)
            waited = self.now() - began
            returned = returned or self._nodes.has_newcomers
            if replies or returned or (timeout is not None and waited >= timeout):
                return replies
            if waited > ALONE_SECONDS and not self._pending:
                raise StoppedEarly(f"no client was connected for {ALONE_SECONDS / 3600:.0f} hours")
            self._wait(None if timeout is None else timeout - waited)

    def available(self, client: str) -> bool:
        """Whether a client is connected."""
        return self._nodes.of(client) is not None

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Cancel jobs on a local grid; on other grids they continue, and their replies are rejected
        as `late`.
        """
        wanted = set(keys)
        for key in wanted & self._parked.keys():
            del self._parked[key]
        ids = {i for i, (job, _) in self._pending.items() if (job.client, job.number) in wanted}
        if self._mailbox.cancel(ids):
            for message_id in ids:
                del self._pending[message_id]
        else:
            self._abandoned |= ids

    @property
    def connected(self) -> dict[str, int]:
        """The node of each client that was connected when this was last looked at."""
        return self._nodes.connected

    def bytes_down(self, job: Job) -> int:
        """Bytes of the vector and the plan."""
        return job_bytes(job)

    def now(self) -> float:
        """Seconds on the run's clock, which is monotonic and does not advance while no server
        runs.
        """
        return time.monotonic() - self._began

    def close(self) -> None:
        """Stop receiving; the owner of the grid closes it."""
        self._mailbox.close()

    def _answered(self, arrival: Arrival) -> list[Reply]:
        """The reply to a job, unless it leads to another attempt."""
        job, attempt = self._pending.pop(arrival.message_id)
        wanted = arrival.message_id not in self._abandoned
        self._abandoned.discard(arrival.message_id)
        message = arrival.reply
        if isinstance(message, Exception):
            return [unreadable(job.client, job.number, message)]
        if has_other_text(message):
            # only what the server finds itself ends the run: a client may report anything
            self._check_text()
        if wanted and self._nodes.come_and_go and away(message):
            self._nodes.lost(job.client)
            self._park([job], attempt)
            return []
        if wanted and attempt < ATTEMPTS and died(message):
            log.warning(
                "client %s job %d is retried: %s", job.client, job.number, message.error.reason
            )
            self._send([job], attempt + 1)
            return []
        return [replace(read_reply(message, job.client, job.number), job_time=arrival.job_time)]

    def _park(self, jobs: Iterable[Job], attempt: int, until: float | None = None) -> None:
        """Keep jobs until their clients are back, at the latest `until`."""
        latest = self.now() + PARKED_SECONDS if until is None else until
        for job in jobs:
            if until is None:
                log.warning("client %s is offline; its job %d waits for it", job.client, job.number)
            self._parked[job.client, job.number] = _Parked(job, attempt, latest)

    def _resumed(self) -> list[Reply]:
        """Send parked jobs whose clients are back; failures of those that have waited too long."""
        replies, self._refused = self._refused, []
        for key, parked in list(self._parked.items()):
            if self.now() > parked.until:
                del self._parked[key]
                why = f"the client was offline for {PARKED_SECONDS:.0f} s"
                replies.append(Reply(*key, error=why, code="offline"))
            elif self._nodes.of(parked.job.client) is not None:
                del self._parked[key]
                self._send([parked.job], parked.attempt, parked.until)
        return replies

    def _wait(self, seconds: float | None) -> None:
        if self._stop is not None and self._stop.exists():
            raise KeyboardInterrupt
        self._mailbox.wait(seconds)
