"""The server's Transport over any Flower Grid; it is faster over the grids of this package."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
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
    lacks_part,
    params_record,
    read_reply,
    reason_of,
    refused_for,
    unreadable,
)
from fedgpt.flower.nodes import Admission, Nodes, told
from fedgpt.flower.push import push

# bytes of the longest valid reply, as a multiple of the model's in fp32: no codec makes it larger
LARGEST = 2
# number of attempts at a job whose client process dies; each attempt gives the same bits
ATTEMPTS = 3
# seconds for which a job waits in all for a client that goes away: longer than Flower needs to
# notice that (60) and a client to come back
PARKED_SECONDS = 180.0
# after which a run that goes on does so without the clients that have not come back
FEWER_SECONDS = 600.0
PATIENCE = 5.0  # seconds of waiting after which the log says for whom
ALONE_SECONDS = 24 * 3600.0  # without any client, after which the run stops
# environment variable with the path of a file: when the file appears, the server stops
STOP_FILE = "FEDGPT_STOP_FILE"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sent:
    """A job on its way."""

    job: Job
    attempt: int = 1
    # seconds for which it may still wait for its client: one that goes and comes back again and
    # again is not waited for without a bound
    patience: float = field(default_factory=lambda: PARKED_SECONDS)


@dataclass(frozen=True)
class _Parked:
    """A job whose client has gone away; it is sent again when the client is back."""

    sent: _Sent
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
        self._own_text = admission.own_text
        self._check_text = check_text
        self._mailbox = mailbox_of(grid)
        self._nodes = Nodes(grid, self._mailbox, admission, known)
        self._began = time.monotonic() - now
        self._pending: dict[str, _Sent] = {}  # by the id of the message
        self._parked: dict[tuple[str, int], _Parked] = {}
        self._abandoned: set[str] = set()  # ids of messages whose jobs were given up
        # client whose policy refuses jobs -> when it is asked again, on the run's clock
        self._resting: dict[str, float] = {}
        self._refused: list[Reply] = []  # failures of jobs whose messages were not accepted
        # params of the last version that was sent, and cached version -> record of the message
        self._broadcast: tuple[object, dict[int, ArrayRecord]] | None = None

    def clients(self, timeout: float) -> list[ClientInfo]:
        """Clients sorted by id, once as many as expected have connected.

        A run of sites that goes on does so with fewer after FEWER_SECONDS, as one of them may have
        left for good. Raises StoppedEarly if they do not connect in time, and FedGPTError or
        ConfigError as soon as there are enough nodes and none of them can take part.
        """
        began, said = self.now(), ""
        deadline = began + timeout
        while True:
            self._nodes.look()
            for arrival in self._mailbox.take():
                self._nodes.takes(arrival)
            waited = self.now() - began
            fewer = self._own_text and waited > FEWER_SECONDS
            if (clients := self._nodes.begin(fewer)) is not None:
                return clients
            if waited > PATIENCE and (waits := self._nodes.waits) != said:
                said = waits
                log.warning("waiting for %s", waits)
            left_out = list(self._nodes.left_out.values())
            if self._nodes.refused:
                raise left_out[0]
            if self.now() > deadline:
                silent = self._nodes.silent
                why = f"; {amount(silent, 'node')} did not say which client it is" if silent else ""
                if getting := self._nodes.getting:
                    why += f"; {amount(getting, 'client')} did not have the base weights yet"
                why += "".join(f"; left out: {told(error)}" for error in left_out)
                raise StoppedEarly(
                    f"{self._nodes.count} of {self._nodes.expected} clients connected within"
                    f" {timeout:.0f} s{why}"
                )
            self._wait(POLL_SECONDS)

    def newcomers(self) -> list[ClientInfo]:
        """Clients that have joined while the run goes on."""
        return self._nodes.newcomers()

    def send(self, jobs: Sequence[Job]) -> None:
        """Push one message per job; the params of a version are sent once."""
        self._send([_Sent(job) for job in jobs])

    def _send(self, sent: Sequence[_Sent]) -> None:
        """Send jobs; one whose client is away is parked."""
        there = []
        for one in sent:
            if (node := self._nodes.of(one.job.client)) is None:
                self._park(one)
            else:
                there.append((one, node))
        messages = [
            Message(
                job_content(one.job, self._params(one.job)), node, MessageType.TRAIN, ttl=self.ttl
            )
            for one, node in there
        ]
        if not messages:
            return
        for (one, _), message_id in zip(there, push(self.grid, messages), strict=True):
            job = one.job
            if message_id:
                self._pending[message_id] = one
                self._mailbox.watch(message_id, LARGEST * job.params.nbytes)
            elif self._nodes.come_and_go:  # a SuperLink refuses a message to one that has just left
                self._nodes.lost(job.client)
                self._park(one)
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
            self._nodes.look()
            returned = self._rested()
            replies = self._resumed()
            for arrival in self._mailbox.take():
                if not self._nodes.takes(arrival):
                    replies += self._answered(arrival)
            waited = self.now() - began
            returned |= self._nodes.returned() or self._nodes.has_newcomers
            if replies or returned or (timeout is not None and waited >= timeout):
                return replies
            if waited > ALONE_SECONDS and not self._pending:
                raise StoppedEarly(
                    f"no client that could get a job was connected for {ALONE_SECONDS / 3600:.0f}"
                    " hours"
                )
            self._wait(None if timeout is None else timeout - waited)

    def available(self, client: str) -> bool:
        """Whether a client is connected, and its policy has not refused a job a short time ago."""
        return self._nodes.of(client) is not None and client not in self._resting

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        """Cancel jobs on a local grid; on other grids they continue, and their replies are rejected
        as `late`.
        """
        wanted = set(keys)
        for key in wanted & self._parked.keys():
            del self._parked[key]
        ids = {i for i, one in self._pending.items() if _key(one.job) in wanted}
        if self._mailbox.cancel(ids):
            for message_id in ids:
                del self._pending[message_id]
        else:
            self._abandoned |= ids
            # who has the job is enough to recognise its late reply. A client may never answer; then
            # the SuperLink does when the message's time to live is over
            for message_id in ids:
                self._pending[message_id] = _without_vectors(self._pending[message_id])

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
        sent = self._pending.pop(arrival.message_id)
        job = sent.job
        wanted = arrival.message_id not in self._abandoned
        self._abandoned.discard(arrival.message_id)
        message = arrival.reply
        if isinstance(message, Exception):
            return [unreadable(job.client, job.number, message)]
        if has_other_text(message) and not self._own_text:
            # only what the server finds itself ends the run: a client may report anything
            self._check_text()
        if wanted and self._nodes.come_and_go and away(message):
            self._nodes.lost(job.client)
            self._park(sent)
            return []
        if wanted and sent.attempt < ATTEMPTS and lacks_part(message) and self._own_text:
            self._nodes.ask_again(job.client)
            self._park(replace(sent, attempt=sent.attempt + 1), f"reports {reason_of(message)}")
            return []
        if (seconds := refused_for(message)) is not None:
            log.warning("client %s refuses job %d: %s", job.client, job.number, reason_of(message))
            self._resting[job.client] = self.now() + seconds
        if wanted and sent.attempt < ATTEMPTS and died(message):
            log.warning(
                "client %s job %d is retried: %s", job.client, job.number, reason_of(message)
            )
            self._send([replace(sent, attempt=sent.attempt + 1)])
            return []
        return [replace(read_reply(message, job.client, job.number), job_time=arrival.job_time)]

    def _rested(self) -> bool:
        """Whether a client that has refused a job by its policy may be asked again.

        So may one that has been away: its owner may have changed the policy.
        """
        over = [
            client
            for client, until in self._resting.items()
            if self.now() > until or self._nodes.of(client) is None
        ]
        for client in over:
            del self._resting[client]
        return bool(over)

    def _park(self, sent: _Sent, why: str = "is offline") -> None:
        """Keep a job until its client is back, as long as its patience lasts."""
        job = sent.job
        log.warning("client %s %s; its job %d waits for it", job.client, why, job.number)
        self._parked[_key(sent.job)] = _Parked(sent, self.now() + sent.patience)

    def _resumed(self) -> list[Reply]:
        """Send parked jobs whose clients are back; failures of those that have waited too long.

        A client that is connected and cannot have its job yet, because it is asked who it is or
        gets base weights, is waited for: it may be busy with an earlier job.
        """
        replies, self._refused = self._refused, []
        connected = self._nodes.connected
        for key, parked in list(self._parked.items()):
            client = parked.sent.job.client
            if self._nodes.of(client) is not None:
                del self._parked[key]
                patience = max(0.0, parked.until - self.now())
                self._send([replace(parked.sent, patience=patience)])
            elif self.now() > parked.until and client not in connected:
                del self._parked[key]
                why = f"the client was offline for {PARKED_SECONDS:.0f} s"
                replies.append(Reply(*key, error=why, code="offline"))
        return replies

    def _wait(self, seconds: float | None) -> None:
        if self._stop is not None and self._stop.exists():
            raise KeyboardInterrupt
        self._mailbox.wait(seconds)


def _key(job: Job) -> tuple[str, int]:
    return job.client, job.number


def _without_vectors(sent: _Sent) -> _Sent:
    nothing = np.empty(0, np.float32)
    return replace(sent, job=replace(sent.job, params=nothing, model_deltas=()))
