"""Which client each connected node is.

Every node is asked once when it connects. One that gives no usable answer, is another run's or
another client's, or is not needed is left out: the log says why, and the run goes on with the
others. It is asked again later, as its owner may have mended the cause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import ClientInfo
from fedgpt.flower.mailbox import Arrival, Mailbox
from fedgpt.flower.messages import (
    MOST_REASON,
    PROTOCOL,
    Introduction,
    read_info,
    refused_for,
    versions,
)

MOST_INFO = 1 << 20  # bytes of the longest answer to a question
ASK_AGAIN_SECONDS = 60.0  # until a node that was left out is asked again
log = logging.getLogger(__name__)


class SiteRefused(FedGPTError):
    """The policy of a site refuses the run, perhaps for some hours only."""


class Nodes:
    """The clients of a run by node; `expected` of them may join."""

    def __init__(
        self,
        grid: Grid,
        mailbox: Mailbox,
        digest: str,
        expected: int,
        known: Mapping[int, ClientInfo] | None,
    ):
        """`digest`: of the text that each client must have; `known`: all clients, if they are
        known without being asked.
        """
        self._grid, self._mailbox, self._digest, self._expected = grid, mailbox, digest, expected
        self.come_and_go = known is None  # otherwise they are always connected
        self._clients = dict(known or {})  # node -> its client
        self._node = {info.id: node for node, info in self._clients.items()}
        self._asked: dict[str, int] = {}  # id of a question without an answer -> the node
        self.left_out: dict[int, FedGPTError] = {}  # node -> why
        self._again: dict[int, float] = {}  # node that was left out -> when it is asked again
        self._online = frozenset(self._clients)

    @property
    def clients(self) -> list[ClientInfo]:
        """The clients that have joined, sorted by id."""
        return sorted(self._clients.values(), key=lambda info: info.id)

    @property
    def refused(self) -> bool:
        """Whether all connected nodes have answered, and none can take part now or later."""
        connected = self._online - self.left_out.keys()
        later = any(isinstance(error, SiteRefused) for error in self.left_out.values())
        enough = len(self.left_out) >= self._expected
        return enough and not (connected or later or self._asked)

    @property
    def silent(self) -> int:
        """Number of nodes that have not answered yet."""
        return len(self._asked)

    def of(self, client: str) -> int | None:
        """The node of a client if it is connected."""
        node = self._node.get(client)
        return node if node in self._online else None

    def lost(self, client: str) -> None:
        """Note that the SuperLink has lost a client, which the list of nodes shows later."""
        self._online -= {self._node.get(client)}

    def look(self) -> bool:
        """Note which nodes are connected, and ask the new ones; whether a client has come back."""
        if not self.come_and_go:
            return False
        returned = self._note(frozenset(self._mailbox.nodes()))
        now = time.monotonic()
        waiting = set(self._asked.values())
        new = [
            node
            for node in sorted(self._online - self._clients.keys() - waiting)
            if self._again.get(node, 0.0) <= now
        ]
        if new:
            questions = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
            for message_id, node in zip(self._grid.push_messages(questions), new, strict=True):
                if message_id:  # a SuperLink refuses a message to a node that has just left
                    self._asked[message_id] = node
                    self._mailbox.watch(message_id, MOST_INFO)
        return returned

    def takes(self, arrival: Arrival) -> bool:
        """Whether an arrival is the answer to a question; notes which client the node is."""
        node = self._asked.pop(arrival.message_id, None)
        if node is None:
            return False
        try:
            self._enter(node, arrival.reply)
        except FedGPTError as error:
            self._again[node] = time.monotonic() + ASK_AGAIN_SECONDS
            if str(self.left_out.get(node)) != str(error):
                log.warning("a node is left out: %s", one_line(error))
            self.left_out[node] = error
        return True

    def _note(self, online: frozenset[int]) -> bool:
        for client, node in self._node.items():
            if (node in online) != (node in self._online):
                log.info("client %s is %s", client, "online" if node in online else "offline")
        returned = bool((online - self._online) & self._clients.keys())
        self._online = online
        for node in self.left_out.keys() - online:
            del self.left_out[node]
            self._again.pop(node, None)
        return returned

    def _enter(self, node: int, reply: Message | Exception) -> None:
        """Let a node take part as the client that it says; raises FedGPTError if it cannot."""
        answer = _answer(node, reply)
        client, before = answer.info.id, self._node.get(answer.info.id)
        if answer.protocol != PROTOCOL:
            raise FedGPTError(
                f"client {client!r} speaks version {answer.protocol} of fedgpt's messages, this"
                f" server version {PROTOCOL}; install the same fedgpt at both"
            )
        if answer.digest != self._digest:
            raise FedGPTError(
                f"client {client!r} prepared other data than the server; corpus, tokenizer and"
                " their package versions must be the same"
            )
        if before is not None and before in self._online and before != node:
            raise FedGPTError(
                f"node {node} says that it is client {client!r}, as node {before} does; give every"
                " node its own --node-config partition-id"
            )
        if before is None and len(self._clients) >= self._expected:
            raise FedGPTError(
                f"node {node} says that it is client {client!r}; the run has its"
                f" {self._expected} clients"
            )
        for name, version in versions().items():
            if (theirs := answer.versions.get(name)) != version:
                log.warning(
                    "client %s has %s %s, the server %s; the bits of its updates may differ",
                    client,
                    name,
                    theirs,
                    version,
                )
        if before is not None:
            del self._clients[before]
        self._clients[node], self._node[client] = answer.info, node
        self.left_out.pop(node, None)


def one_line(error: FedGPTError) -> str:
    """The error's message, or its problems, for a log."""
    return "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)


def _answer(node: int, reply: Message | Exception) -> Introduction:
    try:
        if isinstance(reply, Exception):
            raise reply
        if not reply.has_error():
            return read_info(reply)
        reason = reply.error.reason
        if refused_for(reply) is not None:
            raise SiteRefused(f"node {node}: {reason}"[:MOST_REASON])
    except SiteRefused:
        raise
    except ConfigError as error:
        raise ConfigError(f"node {node}: {problem}" for problem in error.problems) from error
    except Exception as error:  # a malformed answer may raise any exception
        reason = f"its answer cannot be read ({type(error).__name__})"
    raise FedGPTError(f"node {node} did not report its client: {reason}")
