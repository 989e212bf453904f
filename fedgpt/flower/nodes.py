"""Which client each connected node is.

Every node is asked when it connects, and gets what the run sends once: the tokenizer with the
question, base weights piece by piece after the answer. One that gives no usable answer, is another
run's or another client's, or is not needed is left out: the log says why, and the run goes on with
the others. It is asked again later, as its owner may have mended the cause.

A client that was away is asked again before its next job: its files may be gone, and its program
may be another one.

    one text for all clients   `expected` clients, all of which are needed
    corpus=site                begins with `expected` clients; with `late`, others join later
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedgpt.core.errors import ConfigError, FedGPTError, amount
from fedgpt.core.files import read_json
from fedgpt.core.lines import one_line
from fedgpt.core.messages import ClientInfo
from fedgpt.flower.base_delivery import ACTION, BaseDelivery, read_kept
from fedgpt.flower.mailbox import Arrival, Mailbox
from fedgpt.flower.messages import (
    PROTOCOL,
    Introduction,
    away,
    read_info,
    reason_of,
    refused_for,
    versions,
)
from fedgpt.flower.push import push

MOST_INFO = 1 << 20  # bytes of the longest answer to a question
# environment variable with the path of a file: the approved site of each registered node
NODES_FILE = "FEDGPT_NODES_FILE"
# until a node that was left out is asked again, unless it says when
ASK_AGAIN_SECONDS = 60.0
GONE_SECONDS = 1.0  # the same for a node that went away during the question
Read = TypeVar("Read")
log = logging.getLogger(__name__)


class AskLater(FedGPTError):
    """A node takes no part now: the policy of its site refuses the run, or it has gone away."""

    def __init__(self, why: str, again: float):
        """`again`: seconds until the node may be asked again."""
        super().__init__(why)
        self.again = again


@dataclass(frozen=True)
class Admission:
    """Who may take part in a run."""

    expected: int  # number of clients that must be connected before the run begins
    # of what a client must have in common with the server: the text, or the tokenizer alone
    digest: str
    # content of the message that asks a node who it is; a run whose clients have their own text
    # brings the tokenizer with it
    question: RecordDict = field(default_factory=RecordDict)
    members: tuple[ClientInfo, ...] = ()  # the clients of a run that goes on
    late: bool = False  # whether other clients may join while the run goes on
    # whether a client that joins later needs an amount of text between those of the smallest and
    # the largest one of the start, for which noise and delta were computed
    planned: bool = False
    base: BaseDelivery | None = None  # base weights that clients get from the server

    @property
    def own_text(self) -> bool:
        """Whether each client has its own text."""
        return "tokenizer" in self.question


class Nodes:
    """The clients of a run by node."""

    def __init__(
        self,
        grid: Grid,
        mailbox: Mailbox,
        admission: Admission,
        known: Mapping[int, ClientInfo] | None,
    ):
        """`known`: all clients by node, if they are known without being asked."""
        self._grid, self._mailbox, self._admission = grid, mailbox, admission
        self._members = {info.id: info for info in admission.members}
        self._begun = False  # whether the run has taken its first clients
        self.come_and_go = known is None  # otherwise they are always connected
        self._clients = dict(known or {})  # node -> its client
        self._node = {info.id: node for node, info in self._clients.items()}
        self._asked: dict[str, int] = {}  # id of a question without an answer -> the node
        self.left_out: dict[int, FedGPTError] = {}  # node -> why
        self._again: dict[int, float] = {}  # node that was left out -> when it is asked again
        self._online = frozenset(self._clients)
        self._unsure: set[int] = set()  # nodes of clients that must be asked again
        self._getting: dict[int, Introduction] = {}  # node that gets base weights -> its answer
        self._returned = False  # whether a client has come back since `returned` was called

    @property
    def expected(self) -> int:
        """Number of clients that the run begins with."""
        return self._admission.expected

    @property
    def count(self) -> int:
        """Number of clients that have joined, of those that the run waits for."""
        return len(self._clients)

    @property
    def waits(self) -> str:
        """What the run needs before it begins or goes on, and who is there."""
        names = ", ".join(sorted(info.id for info in self._clients.values()))
        return f"{amount(self._needed, 'client')}: {names or 'none'} connected"

    @property
    def _needed(self) -> int:
        wanted = self._admission.expected
        return min(wanted, len(self._members) or wanted)

    def begin(self, fewer: bool = False) -> list[ClientInfo] | None:
        """The clients that the run begins or goes on with, sorted by id; None: not enough yet.

        With `fewer` a run that goes on needs one client only.
        """
        needed = 1 if fewer and self._members else self._needed
        if len(self._clients) < needed:
            return None
        if needed < self._needed:
            log.warning("the run goes on without the others: it waited for %s", self.waits)
        if not self._members:
            self._members = {info.id: info for info in self._clients.values()}
        self._begun = True
        return sorted(self._members.values(), key=lambda info: info.id)

    def newcomers(self) -> list[ClientInfo]:
        """The clients that have joined since the run began or this was called, sorted by id."""
        if not self._begun:
            return []
        new = [info for info in self._clients.values() if info.id not in self._members]
        self._members |= {info.id: info for info in new}
        return sorted(new, key=lambda info: info.id)

    @property
    def has_newcomers(self) -> bool:
        """Whether `newcomers` has any."""
        return self._begun and any(i.id not in self._members for i in self._clients.values())

    @property
    def refused(self) -> bool:
        """Whether all connected nodes have answered, and none can take part.

        Sites are waited for in any case: others may connect, and an owner may mend what is wrong.
        """
        connected = self._online - self.left_out.keys()
        enough = len(self.left_out) >= self._admission.expected
        return enough and not (connected or self._asked or self._admission.own_text)

    @property
    def silent(self) -> int:
        """Number of nodes that have not answered yet."""
        return len(set(self._asked.values()) - self._getting.keys())

    @property
    def getting(self) -> int:
        """Number of nodes that get base weights, and take part when they have them."""
        return len(self._getting)

    def returned(self) -> bool:
        """Whether a client has come back since this was called."""
        returned, self._returned = self._returned, False
        return returned

    @property
    def connected(self) -> dict[str, int]:
        """The node of each client that is connected."""
        return {client: node for client, node in self._node.items() if node in self._online}

    def of(self, client: str) -> int | None:
        """The node of a client if it is connected and has what the run needs."""
        node = self._node.get(client)
        return node if node in self._online - self._unsure else None

    def lost(self, client: str) -> None:
        """Note that the SuperLink has lost a client, which the list of nodes shows later."""
        self._online -= {self._node.get(client)}

    def ask_again(self, client: str) -> None:
        """Ask a client again before its next job: it lacks what the run sends once."""
        if (node := self._node.get(client)) is not None:
            self._unsure.add(node)

    def look(self) -> None:
        """Note which nodes are connected, and ask those that are new or have come back."""
        if not self.come_and_go:
            return
        self._note(frozenset(self._mailbox.nodes()))
        now = time.monotonic()
        unknown = self._online - self._clients.keys() | self._online & self._unsure
        new = [
            node
            for node in sorted(unknown - set(self._asked.values()))
            if self._again.get(node, 0.0) <= now
        ]
        for node in new:  # where the piece of a base was refused by the SuperLink
            self._getting.pop(node, None)
        if new:
            content = self._admission.question
            self._ask([Message(content, node, MessageType.QUERY) for node in new])

    def _ask(self, questions: list[Message]) -> None:
        for message_id, message in zip(push(self._grid, questions), questions, strict=True):
            if message_id:  # a SuperLink refuses a message to a node that has just left
                self._asked[message_id] = message.metadata.dst_node_id
                self._mailbox.watch(message_id, MOST_INFO)

    def takes(self, arrival: Arrival) -> bool:
        """Whether an arrival is the answer to a question; notes which client the node is."""
        node = self._asked.pop(arrival.message_id, None)
        if node is None:
            return False
        before = self._getting.pop(node, None)
        try:
            self._enter(node, self._introduced(node, arrival.reply, before))
        except FedGPTError as error:
            seconds = error.again if isinstance(error, AskLater) else ASK_AGAIN_SECONDS
            self._again[node] = time.monotonic() + seconds
            if str(self.left_out.get(node)) != str(error):
                site = approved_names().get(node)
                log.warning("%s is left out: %s", f"site {site}" if site else "a node", told(error))
            self.left_out[node] = error
        return True

    def _introduced(
        self, node: int, reply: Message | Exception, before: Introduction | None
    ) -> Introduction:
        """What a node has said of itself: now, or `before`, when it has got more of the base."""
        if before is None:
            return _read(node, reply, read_info)
        kept = _read(node, reply, read_kept)
        base = self._admission.base
        assert base is not None, "otherwise nothing was sent"
        if kept < base.next(before.base):  # it would be sent the same without end
            raise FedGPTError(f"client {before.info.id!r} does not keep the base weights")
        return replace(before, base=kept)

    def _note(self, online: frozenset[int]) -> None:
        for client, node in self._node.items():
            if (node in online) != (node in self._online):
                log.info("client %s is %s", client, "online" if node in online else "offline")
        self._unsure |= (online - self._online) & self._clients.keys()
        self._online = online
        for node in self.left_out.keys() - online:
            del self.left_out[node]
            self._again.pop(node, None)

    def _enter(self, node: int, answer: Introduction) -> None:
        """Let a node take part as the client that it says, when it has the base weights.

        Raises FedGPTError if it cannot take part.
        """
        before = self._node.get(answer.info.id)
        self._check(node, answer, before)
        base = self._admission.base
        if base is not None and answer.base < base.info.bytes:
            log.info("client %s gets base weights from byte %d on", answer.info.id, answer.base)
            self._getting[node] = answer
            self._ask([Message(base.piece(answer.base), node, f"query.{ACTION}")])
            return
        if before is not None:
            self._returned |= before not in self._online or before in self._unsure
            del self._clients[before]
        if (other := self._clients.get(node)) is not None:  # it was started as another client
            del self._node[other.id]
        self._unsure -= {before, node}
        self._clients[node], self._node[answer.info.id] = answer.info, node
        self.left_out.pop(node, None)
        for name, version in versions().items():
            if (theirs := answer.versions.get(name)) != version:
                about = (answer.info.id, name, theirs, version)
                log.warning(
                    "client %s has %s %s, the server %s; the bits of its updates may differ", *about
                )

    def _check(self, node: int, answer: Introduction, before: int | None) -> None:
        """Raise FedGPTError unless a node may take part; `before`: its client's node so far."""
        client = answer.info.id
        if answer.protocol != PROTOCOL:
            raise FedGPTError(
                f"client {client!r} speaks version {answer.protocol} of fedgpt's messages, this"
                f" server version {PROTOCOL}; install the same fedgpt at both"
            )
        if answer.digest != self._admission.digest:
            raise FedGPTError(
                f"client {client!r} uses another tokenizer than the server sent; install the same"
                " version of tokenizers at both"
                if self._admission.own_text
                else f"client {client!r} prepared other data than the server; corpus, tokenizer"
                " and their package versions must be the same"
            )
        self._check_key(node, client)
        if before is not None and before in self._online and before != node:
            raise FedGPTError(
                f"node {node} says that it is client {client!r}, as node {before} does; "
                + (
                    "use a site's kit for one client at a time, and give every site a name of its"
                    " own"
                    if self._admission.own_text
                    else "give every node its own --node-config partition-id"
                )
            )
        if before is None:
            self._check_new(node, answer.info)

    def _check_new(self, node: int, info: ClientInfo) -> None:
        """Raise FedGPTError unless a client that was not connected before may take part."""
        admission = self._admission
        if info.id in self._members:
            return
        full = self._members or len(self._clients) >= admission.expected
        if full and not admission.late:
            taken = len(self._members) or admission.expected
            raise FedGPTError(
                f"node {node} says that it is client {info.id!r}; the run has its {taken} clients"
            )
        sizes = [member.tokens for member in self._members.values()]
        if not (admission.planned and sizes):
            return
        if info.tokens < min(sizes):
            raise FedGPTError(
                f"client {info.id!r} has less text than any client at the start of the run, for"
                " which the noise was computed; it can take part in another run"
            )
        if info.tokens > max(sizes):
            raise FedGPTError(
                f"client {info.id!r} has more text than any client at the start of the run, for"
                " which delta was computed; it can take part in another run"
            )

    def _check_key(self, node: int, client: str) -> None:
        """Raise FedGPTError if a node with the key of one site says that it is another."""
        if not self._admission.own_text:
            return  # its clients are numbered
        site = approved_names().get(node)
        if site is not None and site != client:
            raise FedGPTError(
                f"node {node} has the key of site {site!r} and says that it is {client!r}; a site"
                " takes part with the name in its kit"
            )


def approved_names() -> dict[int, str]:
    """Node -> the site whose key it has, where a link has written that down."""
    path = os.environ.get(NODES_FILE)
    if path is None:
        return {}
    return {int(node): str(name) for node, name in read_json(Path(path)).items()}


def told(error: FedGPTError) -> str:
    """The error's message, or its problems, for a log."""
    return one_line("; ".join(error.problems) if isinstance(error, ConfigError) else str(error))


def _read(node: int, reply: Message | Exception, read: Callable[[Message], Read]) -> Read:
    """What a node has answered; raises FedGPTError with the reason if it is no answer."""
    try:
        if isinstance(reply, Exception):
            raise reply
        if not reply.has_error():
            return read(reply)
        reason = reason_of(reply)
        if (seconds := refused_for(reply)) is not None:
            raise AskLater(f"node {node}: {reason}", seconds)
        if away(reply):
            raise AskLater(f"node {node} has gone away: {reason}", GONE_SECONDS)
    except AskLater:
        raise
    except ConfigError as error:
        raise ConfigError(f"node {node}: {problem}" for problem in error.problems) from error
    except Exception as error:  # a malformed answer may raise any exception
        reason = f"its answer cannot be read ({type(error).__name__})"
    raise FedGPTError(f"node {node} did not report its client: {reason}")
