"""A client's connection to a SuperLink: Flower's fleet API, as a SuperNode uses it.

Messages arrive and leave as trees of objects (a message, its records, the chunks of its arrays),
each of which is a request of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedgpt.core.device import free_memory, memory, out_of_memory
from fedgpt.flower.deploy.answers import fleet_client
from fedgpt.flower.objects import (
    AT_ONCE,
    CHUNK,
    OTHER_OBJECTS,
    in_order,
    is_within,
    put_together,
    taken_apart,
)

# statuses of a server that is overloaded, restarts or fails once, or got a body too slowly
PASSING = (408, 429, 500, 502, 503, 504)
PULL_SECONDS = 600.0  # longest wait for the objects of a message that the server still sends
QUICK_SECONDS = 10.0  # for objects that were uploaded, after which several are sent at a time
# between two requests for such an object; Flower's first pause, 1 s, was most of a short job's trip
SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
NO_ROOM = (
    "out of memory: a message does not fit into what this client may use; lower model.n_layer or"
    " model.n_embd, or raise memory in the site's policy"
)
log = logging.getLogger(__name__)


class UploadEnded(Exception):
    """The SuperLink takes no more objects of a reply: the job was given up, or it took too long."""


@dataclass(frozen=True)
class Upload:
    """A reply that was announced, and those of its objects that the SuperLink does not have."""

    run_id: int
    session_id: str
    objects: dict[str, InflatableObject]  # id -> object that has not been sent


def passes(error: Exception) -> bool:
    """Whether an error is of the network or of a server that is away, so that waiting may help."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in PASSING
    return isinstance(error, httpx.TransportError)


class FleetConnection:
    """The connection of the node with the private `key` to the SuperLink at `address`.

    Requests raise httpx.HTTPError if the SuperLink does not respond or refuses.
    """

    def __init__(
        self, address: str, key: ec.EllipticCurvePrivateKey, root_certificates: bytes | None
    ):
        """`address`: host and port; without `root_certificates` (PEM) there is no encryption."""
        self._key, self._root_certificates = key, root_certificates
        self._public_key = public_key_to_bytes(key.public_key())
        self._node = Node()
        self._executor = ThreadPoolExecutor(AT_ONCE, "objects")
        # the message that is being read: about it, and its objects
        self._handed: tuple[Metadata, ObjectTree] | None = None
        self._whole: Message | None = None  # it is read, and the SuperLink may not know that yet
        self._at_once = 1  # objects that are uploaded at the same time
        self._client = fleet_client(address, self._key, self._root_certificates)

    def move(self, address: str) -> None:
        """Send requests to another address of the same SuperLink from now on."""
        self._client.close()
        self._client = fleet_client(address, self._key, self._root_certificates)

    def activate(self) -> int:
        """Connect; returns the node's id, which belongs to its key."""
        wanted = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        self._node = Node(node_id=self._client.ActivateNode(wanted).node_id)
        return self._node.node_id

    def heartbeat(self) -> bool:
        """Say that the node is alive; False if the SuperLink has given it up."""
        beat = SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        return self._client.SendNodeHeartbeat(beat).success

    def receive(self) -> Message | None:
        """The next message with all its content; None if there is none.

        One that cannot be read has an error in place of its content, with the reason to reply.
        After an interruption the next call goes on with the same message, because a SuperLink hands
        out each message once.
        """
        if self._handed is None:
            found = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not found.messages_list:
                return None
            self._handed = found.messages_list[0].metadata, found.message_object_trees[0]
        metadata, tree = self._handed
        try:
            if self._whole is None:
                self._whole = self._read(metadata, tree)
            # the server may still send one that was not read to its end, and its run would fail if
            # the SuperLink forgot the objects; they go when the server has got the reply
            if not self._whole.has_error():
                self._confirm(metadata)
        except httpx.HTTPStatusError as error:
            # a 401 is for the client or its clock, and not for the message
            if not passes(error) and error.response.status_code != httpx.codes.UNAUTHORIZED:
                self._handed = self._whole = None
            raise
        message, self._handed, self._whole = self._whole, None, None
        return message

    def _read(self, metadata: Metadata, tree: ObjectTree) -> Message:
        """The message, or one with an error that says why it cannot be read."""
        most = _most_memory()
        if most and not is_within(tree, OTHER_OBJECTS + most // CHUNK):
            return _unread(metadata, NO_ROOM)
        try:
            return self._pulled(metadata, tree)
        except Exception as error:
            if passes(error) or isinstance(error, httpx.HTTPStatusError):
                raise
            # the server must not read the exception's message, which may quote what was read
            why = f"the message cannot be read ({type(error).__name__})"
            if out_of_memory(error):
                why = NO_ROOM
        # here the exception is gone, which kept what was read
        free_memory("cpu")
        return _unread(metadata, why)

    def _pulled(self, metadata: Metadata, tree: ObjectTree) -> Message:
        ended = threading.Event()
        deadline = time.monotonic() + PULL_SECONDS

        def pulled(object_id: str) -> bytes:
            """The content of an object, which the server may still be sending."""
            wanted = PullObjectRequest(node=self._node, run_id=metadata.run_id, object_id=object_id)
            pause = SHORTEST_PAUSE
            while not (found := self._client.PullObject(wanted)).object_available:
                if not found.object_found or time.monotonic() > deadline or ended.wait(pause):
                    raise ObjectPullError(object_id, "the server does not send it")
                pause = min(LONGEST_PAUSE, 2 * pause)
            return found.object_content

        try:
            return put_together(tree, lambda ids: in_order(self._executor, pulled, ids))
        finally:
            ended.set()

    def _confirm(self, metadata: Metadata) -> None:
        """Say that a message was read, after which the SuperLink has its objects no more."""
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
            )
        )

    def announce(self, reply: Message, seconds: float) -> Upload:
        """Tell the SuperLink of a reply that took `seconds`, and learn what to upload."""
        tree, objects = taken_apart(reply)
        about = remove_content_from_message(reply) if reply.has_content() else reply
        answer = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(about)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
        )
        asked = set(answer.objects_to_push)
        wanted = {object_id: one for object_id, one in objects.items() if object_id in asked}
        return Upload(reply.metadata.run_id, answer.session_id, wanted)

    def upload(self, upload: Upload) -> bool:
        """Send the next objects of an announced reply; whether there were any.

        On a slow link it is one at a time, because an upload has a time limit. Raises UploadEnded
        if the SuperLink does not want them any more. After any other error the objects that were
        not stored are sent again by the next call.
        """
        some, began = list(upload.objects)[: self._at_once], time.monotonic()
        self._at_once = 1

        def send(object_id: str) -> None:
            answer = self._client.PushObject(
                PushObjectRequest(
                    node=self._node,
                    run_id=upload.run_id,
                    session_id=upload.session_id,
                    object_id=object_id,
                    object_content=upload.objects[object_id].deflate(),
                )
            )
            if not answer.stored:
                raise UploadEnded
            del upload.objects[object_id]

        under_way = [self._executor.submit(send, object_id) for object_id in some]
        wait(under_way)  # also after an error: an object that is sent twice counts as not wanted
        for one in under_way:
            one.result()
        if time.monotonic() - began < QUICK_SECONDS:
            self._at_once = AT_ONCE
        return bool(some)

    def run_config(self, run_id: int) -> dict[str, Any]:
        """The options that a run was submitted with; its code is not asked for."""
        found = self._client.GetRun(GetRunRequest(node=self._node, run_id=run_id))
        return dict(run_from_proto(found.run).override_config)

    def deactivate(self) -> None:
        """Disconnect, so that the server knows at once."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def close(self) -> None:
        """Close the connection without a word to the SuperLink."""
        self._executor.shutdown(cancel_futures=True)
        self._client.close()


def _most_memory() -> int:
    """Bytes of main memory that this process may use, or 0 if the system does not say."""
    known = [memory()]
    if sys.platform.startswith("linux"):
        import resource

        known.append(resource.getrlimit(resource.RLIMIT_DATA)[0])  # the site's share, or -1
    return min((one for one in known if one > 0), default=0)


def _unread(metadata: Metadata, why: str) -> Message:
    log.warning("a message was not read: %s", why)
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why)
    return make_message(metadata_from_proto(metadata), error=error)
